"""Write text with a trained GPT, your own or GPT-2.

    python sample.py --out_dir=out-quickstart --start="def main(" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
"""
from dataclasses import dataclass, field, replace
from typing import Literal

from configurator import UserError, configure, first_line, require, user_errors


@dataclass
class Config:
    # model
    init_from: str = 'resume'  # resume (from out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to weights
    out_dir: str = 'out'  # the folder of a run
    average_last: int = 1  # the mean weights of so many of its last checkpoints (2017: 5)
    # prompt
    start: str | list[str] = '\n'  # the text to continue, FILE:path for that of a file, or a list of them
    interactive: bool = False  # type prompts, or messages of a chat, each answered once; Ctrl-C ends a text, Ctrl-D the program
    num_samples: int = 10  # for each prompt
    max_new_tokens: int = 500  # in each sample
    stop: list[str | int] = field(default_factory=list)  # a sample ends before one of these texts, or behind a token id
    # choice of the next token, in this order
    repetition_penalty: float = 1.0  # above 1: tokens that were there before become less likely
    temperature: float = 0.8  # below 1 bolder on what is likely, above 1 more random, 0 always the likeliest
    top_k: int | None = 200  # only the k likeliest; None: all
    top_p: float | None = None  # only the likeliest that together hold this share of the probability
    min_p: float | None = None  # only those at least this many times as likely as the likeliest
    seed: int = 1337  # the same seed and options draw the same samples
    # instead of drawing
    num_beams: int = 1  # above 1: beam search for likely texts, of which num_samples are shown at most, with their scores
    length_penalty: float = 0.6  # by which longer texts score better: log p / ((5 + tokens) / 6)^length_penalty
    # system
    slide: int = 0  # tokens by which a full window moves on: 1 as nanoGPT, exact and slow; 0: an eighth of block_size
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights; auto: bfloat16 where it is native
    quantize: Literal['none', 'int8'] = 'none'  # int8: weights in 8 bits, fewer bytes to read for each token
    compile: bool = False  # compile the step of one token: takes up to minutes, pays on a GPU for many tokens


def check(config):
    """What can be seen to be wrong before anything is loaded. Raises UserError."""
    require(config.num_samples >= 1, f'num_samples = {config.num_samples}: give at least 1')
    require(config.max_new_tokens >= 1, f'max_new_tokens = {config.max_new_tokens}: give at least 1')
    require(config.temperature >= 0, f'temperature = {config.temperature}: give 0 (greedy) or more')
    require(config.top_k is None or config.top_k >= 1, f'top_k = {config.top_k}: give at least 1, or None')
    require(config.top_p is None or 0 < config.top_p <= 1, f'top_p = {config.top_p}: give a share above 0, at most 1, or None')
    require(config.min_p is None or 0 <= config.min_p <= 1, f'min_p = {config.min_p}: give a share from 0 to 1, or None')
    penalty = config.repetition_penalty
    require(0.01 <= penalty <= 100, f'repetition_penalty = {penalty}: give 0.01 to 100; 1 is off')
    require(config.average_last >= 1, f'average_last = {config.average_last}: give at least 1')
    require(config.num_beams >= 1, f'num_beams = {config.num_beams}: give at least 1')
    require(config.seed >= 0, f'seed = {config.seed}: give 0 or more')
    require(config.init_from and config.out_dir, 'init_from or out_dir is empty: name a folder')
    require(config.slide >= 0, f'slide = {config.slide}: give 0 or more')
    require('' not in config.stop, f'stop = {config.stop}: an empty text is always there already; give others')


if __name__ == '__main__':  # before the slow imports: --help and a mistyped key are answered at once
    with user_errors():
        config, _ = configure(Config)
        check(config)

import codecs
import sys
import time

import checkpoint as ckpt
from data.tokenizer import encode_prompt, encode_turns, read_prompt
from device import pick_device, pick_dtype


class Text:
    """One sample as it grows: tokens in, whole characters out, until a stop."""

    def __init__(self, tokenizer, stop, end=None):
        """end: a token that ends it and is not shown."""
        self.tokenizer, self.end = tokenizer, end
        self.stop_texts = [s for s in stop if isinstance(s, str)]
        self.stop_tokens = [s for s in stop if isinstance(s, int)]
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # keeps half a character until the rest is here
        self.held = ''  # could be the beginning of a stop text
        self.ended = False
        self.n_tokens = 0

    def add(self, token):
        """The text that can be shown now that this token has come."""
        if self.ended:
            return ''
        self.n_tokens += 1
        if token == self.end:
            self.ended = True
            return self.finish()
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = [i for i in map(self.held.find, self.stop_texts) if i >= 0]
        if found:
            self.ended = True
            text, self.held = self.held[:min(found)], ''
            self.decoder.reset()
            return text
        if token in self.stop_tokens:
            self.ended = True
            return self.finish()
        keep = max((n for s in self.stop_texts for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return text

    def finish(self):
        """What was held back."""
        text, self.held = self.held + self.decoder.decode(b'', final=True), ''
        return text


def show_beams(model, tokenizer, shown, prompts, config):
    """Search instead of drawing; the best num_samples texts for each prompt, with their scores. Returns the first text."""
    stops = {s for s in config.stop if isinstance(s, int)} | ({tokenizer.eot} - {None})
    found = model.beam_search(prompts, config.max_new_tokens, config.num_beams, config.length_penalty, stop_tokens=stops,
                              vocab_size=tokenizer.vocab_size)
    written = []
    for start, results in zip(shown, found):
        for tokens, score in results[:config.num_samples]:
            text = Text(tokenizer, config.stop, tokenizer.eot)
            written.append(''.join(text.add(token) for token in tokens) + text.finish())
            print(start + written[-1])
            print(f'{"-" * 15} score {score:.4f}')
    return written[0]


def main(config):
    device = pick_device(config.device)
    starts = [read_prompt(start) for start in (config.start if isinstance(config.start, list) else [config.start])]
    require(starts, 'start is an empty list: give at least one prompt')
    where = config.out_dir if config.init_from == 'resume' else config.init_from
    checkpoint = ckpt.load(where, prefer_best=True, mmap=True, average_last=config.average_last)
    dtype = pick_dtype(config.dtype, device, checkpoint.model_config['n_embd'])
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).to(device, dtype).eval()
    if config.quantize == 'int8':
        model.quantize()
    block_size = model.config.block_size
    for stop in config.stop:
        require(isinstance(stop, str) or 0 <= stop < tokenizer.vocab_size, f'stop = {stop}: there is no such token id; the '
                                                                           f'vocabulary has {tokenizer.vocab_size}')
    prompts = [] if config.interactive else encoded(starts, model, tokenizer, config)
    shown = [start + '\n' * (model.config.turns > 0) for start in starts]  # a target begins on a line of its own
    require(config.slide <= block_size, f'slide = {config.slide}: give at most block_size = {block_size}')
    val_loss = '' if checkpoint.val_loss is None else f', val loss {checkpoint.val_loss:.4f}'
    print(f'{checkpoint.path}: step {checkpoint.step}{val_loss}; {device}, {str(dtype)[6:]}', file=sys.stderr)

    sys.stdout.reconfigure(encoding='utf-8', errors='replace')
    if config.compile:
        print('compiling the step of one token: this takes up to some minutes', file=sys.stderr)
        try:
            model.generate([[0]] * (len(prompts) * config.num_samples or 1), 2, compile=True)
        except Exception as error:  # no compiler on the machine, ...
            reason = f'{type(error).__name__}: {first_line(error)[:150]}'
            print(f'torch.compile failed, going on without it: {reason}', file=sys.stderr)
            config.compile = False
    if config.interactive:
        answer(model, tokenizer, config)
    else:
        write(model, tokenizer, shown, prompts, config)


def answer(model, tokenizer, config):
    """Continue what is typed, or answer it, line by line, until Ctrl-D."""
    config.num_samples, chat = 1, []  # source, target, source, target, ...
    while True:
        try:
            start = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            return
        except KeyboardInterrupt:  # what was typed goes
            print()
            continue
        except UnicodeDecodeError:
            print('this is not UTF-8 text', file=sys.stderr)
            continue
        try:
            prompts = encoded([start], model, tokenizer, config)
            if model.config.turns:
                chat, prompts[0] = remembered(chat, start, model, tokenizer, config)
                text = write(model, tokenizer, [''], prompts, config)
                chat += [start, text] if text.strip() else []
            else:
                write(model, tokenizer, [start], prompts, config)
        except KeyboardInterrupt:  # a beam search shows nothing until it is done
            print('stopped', file=sys.stderr)
        except UserError as error:  # a character that the tokenizer does not know, nothing at all
            print(error, file=sys.stderr)
        config.seed += 1  # the same prompt again: another text


def remembered(chat, start, model, tokenizer, config):
    """(what of a chat stays before start, the ids of both): as many turns as the model was trained on, the oldest of which go
    while they leave less room than for max_new_tokens, or half of block_size.
    """
    block_size = model.config.block_size
    longest = block_size - min(config.max_new_tokens, block_size // 2)
    chat = chat[max(0, len(chat) - 2 * (model.config.turns - 1)):]
    while len(ids := encode_turns([*chat, start], tokenizer)) > longest and chat:
        chat = chat[2:]
    return chat, ids


def encoded(starts, model, tokenizer, config):
    """The prompts' token ids, cut to what the model can read. Raises UserError."""
    block_size = model.config.block_size
    turns = model.config.turns
    prompts = [encode_turns([start], tokenizer) if turns else encode_prompt(start, tokenizer) for start in starts]
    for prompt in prompts:
        if turns:
            require(len(prompt) < block_size, f'start has {len(prompt)} tokens: a source and its target have block_size = '
                                              f'{block_size} together')
        elif len(prompt) > block_size:
            print(f'the prompt has {len(prompt)} tokens: only the last {block_size} are taken', file=sys.stderr)
    prompts = [prompt[-block_size:] for prompt in prompts]
    room = block_size - max(map(len, prompts))
    require(config.num_beams == 1 or turns or config.max_new_tokens <= room,
            f'max_new_tokens = {config.max_new_tokens}: beam search has room for {room} behind the prompt (block_size = '
            f'{block_size})')
    return prompts


def write(model, tokenizer, shown, prompts, config):
    """Continue each prompt num_samples times, in one batch: the first is shown as it is written, the others when it is done.
    shown: what stands before each of these texts. Returns the first text.
    """
    if model.config.turns:  # a document does not go on behind the window
        room = model.config.block_size - max(map(len, prompts))
        if room < config.max_new_tokens and len(set(map(len, prompts))) > 1:  # the longest would cut what the others write
            return [write(model, tokenizer, [start], [ids], config) for start, ids in zip(shown, prompts)][0]
        config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
    if config.num_beams > 1:
        return show_beams(model, tokenizer, shown, prompts, config)
    rows = [prompt for prompt in prompts for _ in range(config.num_samples)]
    shown = [start for start in shown for _ in range(config.num_samples)]
    texts = [Text(tokenizer, config.stop, tokenizer.eot if model.config.turns else None) for _ in rows]
    written = [''] * len(rows)
    print(shown[0], end='', flush=True)
    begin = time.perf_counter()
    stream = model.stream(rows, config.max_new_tokens, config.temperature, config.top_k, top_p=config.top_p, min_p=config.min_p,
                          repetition_penalty=config.repetition_penalty, seed=config.seed,
                          slide=config.slide or max(1, model.config.block_size // 8), vocab_size=tokenizer.vocab_size,
                          compile=config.compile)
    try:
        for tokens in stream:
            for i, token in enumerate(tokens.tolist()):
                text = texts[i].add(token)
                written[i] += text
                if i == 0 and text:
                    print(text, end='', flush=True)
            if all(text.ended for text in texts):
                break
    except KeyboardInterrupt:  # show what there is
        print('stopped', file=sys.stderr)
    seconds = time.perf_counter() - begin
    for i, text in enumerate(texts):
        rest = text.finish()
        written[i] += rest
        print(rest if i == 0 else shown[i] + written[i])
        print('-' * 15)
    sys.stdout.flush()
    n_tokens = sum(text.n_tokens for text in texts)
    print(f'{n_tokens} tokens in {seconds:.2f} s ({n_tokens / seconds:.1f} tokens/s)', file=sys.stderr)
    return written[0]


if __name__ == '__main__':
    with user_errors():
        main(config)
