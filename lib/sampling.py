"""What sample.py and its page share: samples as they grow, the turns that a chat remembers."""
import codecs

from lib.errors import require
from lib.generation import generate_tokens
from lib.tokenizer import encode_turns


class Sample:
    """One sample as it grows: tokens in, whole characters out, until a stop."""

    def __init__(self, tokenizer, stop, end=None):
        """end: a token that ends it and is not shown."""
        self.tokenizer, self.end = tokenizer, end
        self.stop_texts = [s for s in stop if isinstance(s, str)]
        self.stop_tokens = [s for s in stop if isinstance(s, int)]
        # buffers incomplete UTF-8
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.held = ''  # may be the beginning of a stop text
        self.ended = False
        self.n_tokens = 0

    def add(self, token):
        """The text that can be shown after this token."""
        if self.ended:
            return ''
        self.n_tokens += 1
        if token != self.end:
            self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = [i for i in map(self.held.find, self.stop_texts) if i >= 0]
        if found:
            self.ended = True
            text, self.held = self.held[:min(found)], ''
            self.decoder.reset()
            return text
        if token == self.end or token in self.stop_tokens:
            self.ended = True
            return self.finish()
        prefixes = (s[:n] for s in self.stop_texts
                    for n in range(1, min(len(s), len(self.held) + 1)))
        keep = max((len(p) for p in prefixes if self.held.endswith(p)), default=0)
        shown = len(self.held) - keep
        text, self.held = self.held[:shown], self.held[shown:]
        return text

    def finish(self):
        """The text that was held back."""
        text, self.held = self.held + self.decoder.decode(b'', final=True), ''
        return text


def batches(prompts, model, config):
    """Lists of the prompts (lists of ids) that are continued together."""
    room = model.config.block_size - max(map(len, prompts))
    if model.config.turns and room < config.max_new_tokens and len(set(map(len, prompts))) > 1:
        return [[prompt] for prompt in prompts]  # the longest one would cut the others' texts
    return [prompts]


def n_new_tokens(prompts, model, config):
    """max_new_tokens, or what fits: a document does not continue past the context."""
    room = model.config.block_size - max(map(len, prompts))
    return min(config.max_new_tokens, room) if model.config.turns else config.max_new_tokens


def generate_samples(model, tokenizer, prompts, config, with_logits=False):
    """([Sample, ...], generate_tokens) of num_samples continuations of each prompt, in one batch.
    config: of sample.py."""
    batch = [prompt for prompt in prompts for _ in range(config.num_samples)]
    end = tokenizer.eot if model.config.turns else None
    steps = generate_tokens(
        model, batch, n_new_tokens(prompts, model, config), config.temperature, config.top_k,
        top_p=config.top_p, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
        seed=config.seed, slide=config.slide or max(1, model.config.block_size // 8),
        vocab_size=tokenizer.vocab_size, compile=config.compile, with_logits=with_logits)
    return [Sample(tokenizer, config.stop, end) for _ in batch], steps


def check_options(model, tokenizer, config):
    """Check stop and slide against the model. Raises UserError."""
    block_size = model.config.block_size
    for stop in config.stop:
        require(isinstance(stop, str) or 0 <= stop < tokenizer.vocab_size,
                f'stop = {stop}: there is no such id in a vocabulary of {tokenizer.vocab_size}')
    require(config.slide <= block_size,
            f'slide = {config.slide}: give at most block_size = {block_size}')


def recent_turns(history, start, model, tokenizer, config):
    """(the turns that fit before start, token ids of both). At most as many turns as in training;
    the oldest go while less than max_new_tokens, or half of block_size, is left for the answer."""
    block_size = model.config.block_size
    longest = block_size - min(config.max_new_tokens, block_size // 2)
    history = history[max(0, len(history) - 2 * (model.config.turns - 1)):]
    while len(ids := encode_turns([*history, start], tokenizer)) > longest and history:
        history = history[2:]
    return history, ids
