"""Constants and plain functions shared by several test files; fixtures are in conftest.py."""

import contextlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch

import checkpoint as ckpt
import explain
from lib import bins, tokenizer
from lib.device import has_bfloat16
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
TEXT = 'def main(config):\n    return config\n\n\ndef main(con'  # of the pages

# a model that trains in a second
TINY = (
    '--device=cpu',
    '--block_size=32',
    '--batch_size=4',
    '--gradient_accumulation_steps=1',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--warmup_iters=2',
    '--learning_rate=3e-3',
    '--eval_iters=2',
    '--eval_interval=10',
)

# everything that a resumed run could get wrong: dropout, accumulated gradients, Muon together with
# AdamW, evaluations, checkpoints written in the background
FAULT_RUN = (
    *TINY,
    '--gradient_accumulation_steps=2',
    '--dropout=0.1',
    '--optimizer=muon',
    '--max_iters=20',
    '--eval_interval=8',
    '--save_interval=4',
    '--lr_decay_iters=20',
)

# micro-batches to distribute, dropout, and a number of rows that 4 processes cannot share evenly;
# learning rates at which training does not amplify differences in summation order
PARALLEL_RUN = (
    *TINY,
    '--gradient_accumulation_steps=8',
    '--dropout=0.1',
    '--dtype=float32',
    '--n_embd=36',
    '--max_iters=8',
    '--lr_decay_iters=8',
    '--learning_rate=1e-3',
    '--muon_learning_rate=2e-3',
)

# In fp32 the losses of 20 steps differ by no more than this, however a step is split over
# micro-batches and processes (docs/checkpoints.md). Muon rounds to bf16 where the hardware has it.
ROUNDING = {'adamw': 2e-6, 'muon': 5e-4 if has_bfloat16('cpu') else 2e-6}

TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


# Models -------------------------------------------------------------------------------------------

POSITIONS = ('learned', 'sinusoidal', 'rope', 'none')

ARCHITECTURES = (
    [{'position': p} for p in POSITIONS]
    + [
        {'norm': 'rmsnorm'},
        {'qk_norm': True},
        {'n_kv_head': 2},
        {'n_kv_head': 1},
        {'bias': False},
        {'tie_weights': False},
        {'logit_softcap': 5.0},
        {'attention': 'math'},
        {'ngram': 4, 'ngram_rows': 97},
        {'eot_token': 3, 'ngram': 3, 'ngram_rows': 97, 'position': 'rope'},
        {'eot_token': 3, 'attention': 'math'},
        {'eot_token': 3, 'turns': 2, 'ngram': 3, 'ngram_rows': 97},
    ]
    + [{'activation': a} for a in ('gelu', 'relu', 'relu2', 'swiglu')]
    + [
        {
            'position': 'rope',
            'norm': 'rmsnorm',
            'activation': 'swiglu',
            'n_kv_head': 2,
            'qk_norm': True,
            'bias': False,
        },
        {
            'position': 'rope',
            'qk_norm': 'gain',
            'head_size': 6,
            'n_hidden': 40,
            'rope_theta': 500.0,
            'norm_eps': 1e-3,
            'n_kv_head': 2,
        },
    ]
)

POST = {'norm_position': 'post', 'position': 'sinusoidal'}


def tiny(**options):
    """A small model in eval mode."""
    torch.manual_seed(0)
    size = {'block_size': 16, 'vocab_size': 40, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    model = GPT(GPTConfig(**size | options))
    for p in model.parameters():
        if p.dim() > 1:  # larger than at initialization, so that every part affects the logits
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def awake(**options):
    """A small model whose biases and gains affect the logits too."""
    model = tiny(**options)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0.5, std=0.3)
    return model


@torch.no_grad()
def randomize(model, std):
    """Give a model, ours or of transformers, random weights, also biases and gains (around 1)."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(std=std)
        if 'norm' in name or 'ln_' in name:
            p.add_('weight' in name)
    return model.eval()


def peak_bytes(profiler):
    """The most memory that was allocated at once under torch.profiler with profile_memory."""
    events = profiler.profiler.kineto_results.events()
    allocated = [event for event in events if event.name() == '[memory]']
    allocated.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in allocated))


def tokens(*shape, vocab_size=40, seed=1):
    """Random token ids."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# Processes ----------------------------------------------------------------------------------------


def start_train(clone, *arguments, env=None, command=()):
    """Start train.py in the background, with stderr merged into stdout."""
    return subprocess.Popen(
        [sys.executable, *command, clone / 'train.py', *map(str, arguments)],
        cwd=clone,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | (env or {}),
    )


def worker_pids(process):
    """{rank: pid} of the processes that torchrun has started."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    ranks = {}
    for child in children:
        with contextlib.suppress(OSError):  # it has just ended
            environment = Path(f'/proc/{child}/environ').read_bytes().split(b'\0')
            ranks |= {int(word[5:]): int(child) for word in environment if word[:5] == b'RANK='}
    return ranks


def read_until(process, text):
    """Read the output of a process up to the line that contains text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'{text!r} was never printed')


def error_line(result):
    """The one-line error message of a program."""
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(('train.py: ', 'sample.py: ')), result.stderr
    assert 'Traceback' not in result.stderr, result.stderr
    return line


# Runs ---------------------------------------------------------------------------------------------


def log_lines(out_dir, key):
    """The complete lines of a run's log that have this key."""
    lines = (Path(out_dir) / 'log.jsonl').read_text().splitlines(keepends=True)
    return [
        line for line in (json.loads(line) for line in lines if line.endswith('\n')) if key in line
    ]


def read_log(out_dir):
    """A run's log without timings and memory."""
    lines = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
    timings = ('tokens_per_second', 'seconds', 'peak_memory')
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def step_losses(out_dir):
    """[(step, loss, gradient norm)] of a run; [] before it has a log."""
    if not (out_dir / 'log.jsonl').exists():
        return []
    lines = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [(line['step'], line['loss'], line['grad_norm']) for line in lines if 'loss' in line]


def deep_equal(a, b):
    """Whether two nested structures of tensors are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(deep_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(deep_equal, a, b))
    return a == b


def assert_same_run(out_dir, reference_run):
    """Every log line, all weights, the optimizer state and the file names are identical."""
    assert read_log(out_dir) == read_log(reference_run)
    a, b = ckpt.load(out_dir), ckpt.load(reference_run)
    assert (a.step, a.samples_seen, a.best_val_loss) == (b.step, b.samples_seen, b.best_val_loss)
    assert deep_equal(a.model, b.model) and deep_equal(a.optimizer, b.optimizer)
    assert not list(Path(out_dir).glob('*.tmp'))
    names = [{path.name for path in Path(d).glob('ckpt_*')} for d in (out_dir, reference_run)]
    assert names[0] == names[1]


def save_overflowing(run, out_dir):
    """Save a run's last checkpoint with finite weights whose products overflow in fp32."""
    checkpoint = ckpt.load(run)
    checkpoint.model['transformer.ln_f.weight'].fill_(3e38)
    checkpoint.model['lm_head.weight'].mul_(1e3)
    out_dir.mkdir()
    ckpt.save(out_dir, checkpoint)


def folder_contents(folder):
    """{file name: bytes}, without the lock."""
    paths = [path for path in Path(folder).iterdir() if path.is_file() and path.name != '.lock']
    return {path.name: path.read_bytes() for path in paths}


# Data ---------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


SHAPE = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 16, 'vocab_size': 300}


def nanogpt_state(config=None, **change):
    """The content of nanoGPT's ckpt.pt for a small random model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | {'activation': 'gelu'} | (config or {})))
    args = SHAPE | {'bias': True, 'dropout': 0.0}
    state = {'model': model.state_dict(), 'model_args': args, 'iter_num': 3, 'best_val_loss': 2.0,
             'config': {'dataset': 'x', 'batch_size': 4}}  # fmt: skip
    return state | change


def write_nanogpt_dataset(folder, text):
    """train.bin, val.bin and meta.pkl as nanoGPT's data/shakespeare_char/prepare.py writes them."""
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[: int(len(ids) * 0.9)].tofile(folder / 'train.bin')
    ids[int(len(ids) * 0.9) :].tofile(folder / 'val.bin')
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': stoi}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


WORDS = 'the a red città naïve 日本 <|endoftext|> "quoted" don\'t jump x7 ß'.split()


def random_pairs(n, seed=0):
    """n pairs of source and target, and a second target for every seventh source."""
    rng = random.Random(seed)

    def phrase(max_words):
        return ' '.join(rng.choices(WORDS, k=rng.randint(1, max_words)))

    pairs = [(phrase(6), phrase(9)) for _ in range(n)]
    return pairs + [(source, phrase(5)) for source, _ in pairs[::7]]


def read_documents(data, split):
    """[(row, [source, target, ...])] read from the raw file, in which two eots begin a document."""
    ids = np.fromfile(data / f'{split}.bin', dtype=np.uint16)
    meta = json.loads((data / 'meta.json').read_text())
    tokenizer = bins.open_tokenizer(data)
    documents = []
    for row, row_ids in enumerate(ids.reshape(-1, meta['pairs']['block_size']).tolist()):
        parts, document = [[]], []
        assert row_ids[0] == tokenizer.eot
        for token in [*row_ids[1:], tokenizer.eot]:
            if token != tokenizer.eot:
                parts[-1].append(token)
            elif parts[-1]:
                document.append(tokenizer.decode(parts[-1]))
                parts.append([])
            elif document:
                documents.append((row, document))
                document = []
    return documents


# explain.py ---------------------------------------------------------------------------------------


def char_tokenizer(first, n):
    """n characters with consecutive code points."""
    return tokenizer.CharTokenizer(''.join(map(chr, range(first, first + n))))


def collect(model, names, ids):
    facts, arrays = explain.collect_weights(model, names)
    text_facts, text_arrays = explain.collect_text(model, names, ids)
    return facts | text_facts, arrays | text_arrays


@contextlib.contextmanager
def served(clone, *arguments, script='explain.py'):
    """(process, URL) of explain.py --serve, or of another script; killed after 100 s."""
    command = [sys.executable, str(clone / script), *arguments, '--serve', '--port=0']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, cwd=clone, **pipes) as server:
        killer = threading.Timer(100, server.kill)
        killer.start()
        try:
            url = next(line for line in server.stdout if line.startswith('http:')).split()[0]
            yield server, url
        finally:
            killer.cancel()
            server.kill()
