"""Generate text with a trained GPT, your own or GPT-2.

    python sample.py --out_dir=out-quickstart --start="def main(" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
"""
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from configurator import (
    Beams,
    Bound,
    Count,
    FilePath,
    LengthPenalty,
    Share,
    Size,
    Text,
    Which,
    WholeNumber,
    configure,
)
from lib.errors import UserError, first_line, plural, require, user_errors

Penalty = Annotated[float, Bound(lambda x: 0.01 <= x <= 100, '0.01 to 100; 1 is off')]
Temperature = Annotated[float, Bound(lambda x: x >= 0, '0 (greedy) or more')]
MinP = Annotated[float, Bound(lambda x: 0 <= x <= 1, 'a share from 0 to 1')]


@dataclass
class Config:
    # model
    init_from: FilePath = 'resume'  # resume (out_dir), gpt2, gpt2-medium, ..., gpt2-xl or a path
    out_dir: FilePath = 'out'  # the folder of a run
    checkpoint: Which = 'auto'  # of the run: last, best (by val loss) or a step; auto: see README
    average_last: Count = 1  # average the weights of the last N checkpoints (Vaswani 2017: 5)
    # prompt
    start: Text | list[str] = '\n'  # the prompt, FILE:path for a file's text, or a list of prompts
    interactive: bool = False  # type prompts or chat; Ctrl-C ends a text, Ctrl-D the program
    num_samples: Size = 10  # per prompt
    max_new_tokens: Count = 500  # per sample
    stop: list[str | int] = field(default_factory=list)  # end before these texts, after these ids
    # filters, in this order
    repetition_penalty: Penalty = 1.0  # above 1: tokens in the text so far become less likely
    temperature: Temperature = 0.8  # below 1: more predictable; above 1: more random; 0: greedy
    top_k: Count | None = 200  # only the k most likely tokens; None: all
    top_p: Share | None = None  # the fewest most likely tokens that hold this probability
    min_p: MinP | None = None  # only tokens at least this many times as likely as the likeliest
    seed: WholeNumber = 1337  # the same seed and options give the same samples
    # beam search
    num_beams: Beams = 1  # above 1: print the num_samples best texts, with their scores
    length_penalty: LengthPenalty = 0.6  # score = log p / ((5 + tokens) / 6)^length_penalty
    # system
    slide: WholeNumber = 0  # tokens that a full context moves at a time; 1: nanoGPT; 0: an eighth
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights
    quantize: Literal['none', 'int8'] = 'none'  # int8 weights: fewer bytes to read per token
    compile: bool = False  # compile the decode step: takes minutes, pays off on a GPU


def check(config):
    """Validate the config. Raises UserError."""
    require(config.init_from and config.out_dir, 'init_from or out_dir is empty: name a folder')
    require(config.start != [], 'start is an empty list: give at least one prompt')
    require(config.num_beams == 1 or not config.compile,
            'compile = True: beam search does not compile; leave it out')
    require('' not in config.stop,
            f'stop = {config.stop}: an empty text matches at once; give others')


if __name__ == '__main__':  # so that --help and typos do not wait for the slow imports
    with user_errors():
        config, _ = configure(Config)
        check(config)

import codecs
import sys
import time

import checkpoint as ckpt
from lib.device import dtype_name, pick_device, pick_dtype
from lib.generation import beam_search, generate_tokens, require_drawn
from lib.linear import quantize
from lib.memory import require_sampling_fits
from lib.tokenizer import encode_prompt, encode_turns, read_prompt


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
        prefixes = (s[:n] for s in self.stop_texts for n in range(1, len(s)))
        keep = max((len(p) for p in prefixes if self.held.endswith(p)), default=0)
        shown = len(self.held) - keep
        text, self.held = self.held[:shown], self.held[shown:]
        return text

    def finish(self):
        """The text that was held back."""
        text, self.held = self.held + self.decoder.decode(b'', final=True), ''
        return text


def encode_prompts(starts, model, tokenizer, config):
    """Token ids of the prompts, cut to block_size. Raises UserError."""
    block_size, turns = model.config.block_size, model.config.turns
    prompts = []
    for start in starts:
        ids = encode_turns([start], tokenizer) if turns else encode_prompt(start, tokenizer)
        require(not turns or len(ids) < block_size,
                f'start has {len(ids)} tokens: a source and its target share block_size = '
                f'{block_size}')
        if len(ids) > block_size:
            print(f'the prompt has {len(ids)} tokens: only the last {block_size} are used',
                  file=sys.stderr)
        prompts.append(ids[-block_size:])
    longest = max(map(len, prompts))
    n_sequences = len(prompts) * config.num_samples if config.num_beams == 1 else len(prompts)
    require_sampling_fits(model, n_sequences, longest, config.max_new_tokens, config.num_beams)
    room = block_size - longest
    require(config.num_beams == 1 or turns or config.max_new_tokens <= room,
            f'max_new_tokens = {config.max_new_tokens}: beam search has room for {room} after the '
            f'prompt (block_size = {block_size})')
    return prompts


def write(model, tokenizer, shown, prompts, config):
    """Print num_samples continuations of each prompt, generated in one batch; the first one is
    streamed. shown: what to print before each. Returns the first text."""
    block_size, turns = model.config.block_size, model.config.turns
    if turns:  # a document does not continue past the context
        room = block_size - max(map(len, prompts))
        if room < config.max_new_tokens and len(set(map(len, prompts))) > 1:
            # the longest prompt would cut the others' texts: one prompt at a time
            return [write(model, tokenizer, [start], [ids], config)
                    for start, ids in zip(shown, prompts)][0]
        config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
    if config.num_beams > 1:
        return write_beams(model, tokenizer, shown, prompts, config)
    batch = [prompt for prompt in prompts for _ in range(config.num_samples)]
    shown = [start for start in shown for _ in range(config.num_samples)]
    texts = [Sample(tokenizer, config.stop, tokenizer.eot if turns else None) for _ in batch]
    written = [''] * len(batch)
    print(shown[0], end='', flush=True)
    start_time = time.perf_counter()
    steps = generate_tokens(
        model, batch, config.max_new_tokens, config.temperature, config.top_k, top_p=config.top_p,
        min_p=config.min_p, repetition_penalty=config.repetition_penalty, seed=config.seed,
        slide=config.slide or max(1, block_size // 8), vocab_size=tokenizer.vocab_size,
        compile=config.compile)
    try:
        for next_token in steps:
            next_token = next_token.tolist()
            require_drawn(next_token)
            for i, token in enumerate(next_token):
                new = texts[i].add(token)
                written[i] += new
                if i == 0 and new:
                    print(new, end='', flush=True)
            if all(text.ended for text in texts):
                break
    except KeyboardInterrupt:  # show the texts so far
        print('stopped', file=sys.stderr)
    seconds = time.perf_counter() - start_time
    for i, text in enumerate(texts):
        rest = text.finish()
        written[i] += rest
        print(rest if i == 0 else shown[i] + written[i])
        print('-' * 15)
    sys.stdout.flush()
    n_tokens = sum(text.n_tokens for text in texts)
    print(f'{plural(n_tokens, "token")} in {seconds:.2f} s ({n_tokens / seconds:.1f} tokens/s)',
          file=sys.stderr)
    return written[0]


def write_beams(model, tokenizer, shown, prompts, config):
    """Print the best continuations of each prompt with their scores; returns the first one."""
    stops = {s for s in config.stop if isinstance(s, int)} | ({tokenizer.eot} - {None})
    found = beam_search(model, prompts, config.max_new_tokens, config.num_beams,
                        config.length_penalty, stop_tokens=stops, vocab_size=tokenizer.vocab_size)
    written = []
    for start, results in zip(shown, found):
        for tokens, score in results[:config.num_samples]:
            text = Sample(tokenizer, config.stop, tokenizer.eot)
            written.append(''.join(text.add(token) for token in tokens) + text.finish())
            print(start + written[-1])
            print(f'{"-" * 15} score {score:.4f}')
    return written[0]


def chat(model, tokenizer, config):
    """Continue or answer each line that is typed, until Ctrl-D."""
    config.num_samples, history = 1, []  # source, target, source, target, ...
    while True:
        try:
            start = read_line()
        except EOFError:
            return
        except KeyboardInterrupt:  # drop the line
            print()
            continue
        except UnicodeDecodeError:
            print('this is not UTF-8 text', file=sys.stderr)
            continue
        try:
            prompts = encode_prompts([start], model, tokenizer, config)
            if model.config.turns:
                history, ids = recent_turns(history, start, model, tokenizer, config)
                text = write(model, tokenizer, [''], [ids], config)
                history += [start, text] if text.strip() else []
            else:
                write(model, tokenizer, [start], prompts, config)
        except KeyboardInterrupt:  # beam search shows nothing until it is done
            print('stopped', file=sys.stderr)
        except UserError as error:  # an unknown character, an empty line
            print(error, file=sys.stderr)
        config.seed += 1  # another text if the same prompt is typed again


def read_line():
    """A line from the keyboard or a pipe. Raises EOFError, UnicodeDecodeError."""
    if sys.stdin.isatty():
        return input('> ')
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode('utf-8').rstrip('\r\n')


def recent_turns(history, start, model, tokenizer, config):
    """(the turns that fit before start, token ids of both). At most as many turns as in training;
    the oldest go while less than max_new_tokens, or half of block_size, is left for the answer."""
    block_size = model.config.block_size
    longest = block_size - min(config.max_new_tokens, block_size // 2)
    history = history[max(0, len(history) - 2 * (model.config.turns - 1)):]
    while len(ids := encode_turns([*history, start], tokenizer)) > longest and history:
        history = history[2:]
    return history, ids


def compiles(model, n):
    """Whether the decode step compiles for n sequences; prints why not."""
    print('compiling the decode step: this can take a few minutes', file=sys.stderr)
    try:
        model.generate([[0]] * n, 4, compile=True)  # the second step records a CUDA graph
        return True
    except UserError:  # the weights are to blame: their logits are not finite
        raise
    except Exception as error:  # no compiler on the machine, ...
        model.decoders.clear()
        print(f'torch.compile failed, going on without it: '
              f'{type(error).__name__}: {first_line(error)[:150]}', file=sys.stderr)
        return False


def main(config):
    device, start = pick_device(config.device), config.start
    starts = [read_prompt(text) for text in (start if isinstance(start, list) else [start])]
    checkpoint = ckpt.load_for(config)
    require(config.quantize != 'int8' or device.type == 'cpu' or config.compile,
            f'quantize = int8: uncompiled it is slower than bf16 on {device}: add --compile')
    dtype = pick_dtype(config.dtype, device, checkpoint.model_config['n_embd'])
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).to(device, dtype).eval()
    if config.quantize == 'int8':
        quantize(model)
    block_size = model.config.block_size
    for stop in config.stop:
        require(isinstance(stop, str) or 0 <= stop < tokenizer.vocab_size,
                f'stop = {stop}: there is no such id in a vocabulary of {tokenizer.vocab_size}')
    require(config.slide <= block_size,
            f'slide = {config.slide}: give at most block_size = {block_size}')
    prompts = [] if config.interactive else encode_prompts(starts, model, tokenizer, config)
    val_loss = '' if checkpoint.val_loss is None else f', val loss {checkpoint.val_loss:.4f}'
    print(f'{checkpoint.path}: step {checkpoint.step}{val_loss}; {device}, {dtype_name(dtype)}',
          file=sys.stderr)
    if config.compile:
        config.compile = compiles(model, len(prompts) * config.num_samples or 1)
    if config.interactive:
        chat(model, tokenizer, config)
    else:
        shown = [start + '\n' * (model.config.turns > 0) for start in starts]  # then the target
        write(model, tokenizer, shown, prompts, config)


if __name__ == '__main__':
    with user_errors():
        main(config)
