"""Generate text with a trained GPT, your own or GPT-2.

    python sample.py --out_dir=out-quickstart --start="def main(" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
    python sample.py --out_dir=out-quickstart --serve  # a page to write and chat, and an API
"""
from dataclasses import dataclass, field, replace
from os.path import realpath
from typing import Annotated, Literal

from configurator import (
    Beams,
    Bound,
    Count,
    FilePath,
    LengthPenalty,
    Port,
    Share,
    Size,
    Text,
    Which,
    WholeNumber,
    configure,
)
from lib.errors import UserError, first_line, plural, require, user_errors
from lib.files import printable, weights_of

Penalty = Annotated[float, Bound(lambda x: 0.01 <= x <= 100, '0.01 to 100; 1 is off')]
Temperature = Annotated[float, Bound(lambda x: x >= 0, '0 (greedy) or more')]
MinP = Annotated[float, Bound(lambda x: 0 <= x <= 1, 'a share from 0 to 1')]


@dataclass
class Config:
    # model
    init_from: FilePath = 'resume'  # resume (out_dir), gpt2, gpt2-medium, ..., gpt2-xl or a path
    out_dir: FilePath = 'out'  # the folder of a run
    checkpoint: Which = 'auto'  # last, best (by val loss) or a step; auto: docs/sampling.md
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
    # page
    serve: bool = False  # write and chat on a page on this machine; OpenAI's API under /v1
    port: Port = 8339  # for --serve, on 127.0.0.1; 0: any free port
    compare: FilePath | None = None  # for --serve: answer with this checkpoint too, side by side
    # system
    slide: WholeNumber = 0  # tokens that a full context moves at a time; 1: nanoGPT; 0: an eighth
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights
    quantize: Literal['auto', 'none', 'int8'] = 'auto'  # int8 weights; auto: on a CPU, if it pays
    compile: bool = False  # compile the decode step: takes minutes, pays off on a GPU


def check(config):
    """Validate the config. Raises UserError."""
    require(config.init_from and config.out_dir, 'init_from or out_dir is empty: name a folder')
    require(config.start != [], 'start is an empty list: give at least one prompt')
    require(config.num_beams == 1 or not config.compile,
            'compile = True: beam search does not compile; leave it out')
    require('' not in config.stop,
            f'stop = {config.stop}: an empty text matches at once; give others')
    texts = [stop for stop in config.stop if isinstance(stop, str)]
    require(config.num_beams == 1 or not texts,
            f'stop = {texts}: beam search ends at token ids only: give their ids')
    require(config.serve or not config.compare, 'compare is for the page: add --serve')
    require(not config.compare or realpath(config.compare) != realpath(weights_of(config)),
            f'compare = {config.compare} is the model itself: name another one, or a file of it')
    for key, off in (('interactive', False), ('num_beams', 1), ('compile', False)):
        require(not config.serve or getattr(config, key) == off,
                f'{key} = {getattr(config, key)}: --serve cannot do that; leave it out')


if __name__ == '__main__':  # so that --help and typos do not wait for the slow imports
    with user_errors():
        config, given = configure(Config)
        check(config)
        require(not config.interactive or 'start' not in given,
                'start: with --interactive you type the prompts: leave it out')

import sys
import time

import checkpoint as ckpt
from lib.device import dtype_name, pick_device, pick_dtype
from lib.generation import beam_search, require_drawn
from lib.linear import pack, quantize
from lib.memory import require_sampling_fits
from lib.playground import serve_playground
from lib.quantization import quantize_if_it_pays
from lib.sampling import (
    Sample,
    batches,
    check_options,
    generate_samples,
    n_new_tokens,
    recent_turns,
)
from lib.serve import Server
from lib.tokenizer import encode_prompt, encode_turns, read_prompt


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
    parts = batches(prompts, model, config)
    if len(parts) > 1:
        return [write(model, tokenizer, [start], part, config)
                for start, part in zip(shown, parts)][0]
    if config.num_beams > 1:
        return write_beams(model, tokenizer, shown, prompts, config)
    shown = [start for start in shown for _ in range(config.num_samples)]
    texts, steps = generate_samples(model, tokenizer, prompts, config)
    written = [''] * len(texts)
    print(shown[0], end='', flush=True)
    start_time = time.perf_counter()
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
    found = beam_search(model, prompts, n_new_tokens(prompts, model, config), config.num_beams,
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


def load(config, device):
    """(model, tokenizer, a line about them), ready to sample. Raises UserError."""
    checkpoint = ckpt.load_for(config)
    dtype = pick_dtype(config.dtype, device, checkpoint.model_config['n_embd'])
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).to(device, dtype).eval()
    about = dtype_name(dtype)
    check_options(model, tokenizer, config)
    if config.quantize == 'int8':
        quantize(model)
        about = 'int8'
    elif config.compile or device.type != 'cpu':
        pass  # packed weights are for uncompiled models on a CPU
    elif config.quantize == config.dtype == 'auto':
        n_samples = 1 if config.serve or config.interactive else config.num_samples
        model, gain = quantize_if_it_pays(model, tokenizer.eot or 0, n_samples)
        about = f'int8 ({gain} as {about})' if gain else about
    else:
        pack(model)
    return model, tokenizer, f'{checkpoint.describe()}; {device}, {about}'


def main(config):
    server = Server(config.port) if config.serve else None  # before the work, not after it
    device, start = pick_device(config.device), config.start
    starts = [read_prompt(text) for text in (start if isinstance(start, list) else [start])]
    require(config.quantize != 'int8' or device.type == 'cpu' or config.compile,
            f'quantize = int8: uncompiled it is slower than bf16 on {device}: add --compile')
    model, tokenizer, about = load(config, device)
    if config.serve:
        models = {printable(weights_of(config)): (model, tokenizer, about)}
        if config.compare:
            other = replace(config, init_from=config.compare, checkpoint='auto', average_last=1)
            models[printable(config.compare)] = load(other, device)
        for *_, about in models.values():
            print(about, file=sys.stderr)
        serve_playground(server, models, starts[0], config)
        return
    prompts = [] if config.interactive else encode_prompts(starts, model, tokenizer, config)
    print(about, file=sys.stderr)
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
