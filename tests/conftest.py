"""What the tests share: a clone of the working tree to run the programs in, as a person would, and a small real text."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ['OMP_NUM_THREADS'] = '1'  # two tests run at a time, each on one core
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def clone(tmp_path_factory):
    """The repository without what was prepared or trained in it."""
    folder = tmp_path_factory.mktemp('clone') / 'plaingpt'
    left_out = shutil.ignore_patterns('*.bin', 'meta.json', 'input.txt', 'out*', 'wandb', '.*', '__pycache__', 'tests')
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


@pytest.fixture(scope='session')
def run(clone):
    """run('train.py', '--key=value', ...) -> the finished process; code: the exit code it must have."""

    def run(script, *arguments, code=0, cwd=clone, env=None, **options):
        result = subprocess.run(
            [sys.executable, str(clone / script), *map(str, arguments)],
            cwd=cwd,
            text=True,
            timeout=200,
            capture_output=True,
            env=os.environ | (env or {}),
            **options,
        )
        assert result.returncode == code, f'{script} {arguments}: exit {result.returncode}\n{result.stdout}\n{result.stderr}'
        return result

    return run


@pytest.fixture(scope='session')
def refused(run):
    """refused('train.py', '--key=value', ..., says=('words',)): one sentence on stderr with the words, exit 2, no traceback."""

    def refused(script, *arguments, says, **options):
        result = run(script, *arguments, code=2, **options)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith(Path(script).name + ': '), lines
        for words in (says,) if isinstance(says, str) else says:
            assert words in lines[0], f'{words!r} is not in: {lines[0]}'

    return refused


@contextmanager
def together(call):
    """What is called inside runs two at a time."""
    with ThreadPoolExecutor(2) as pool:
        results = []
        yield lambda *arguments, **options: results.append(pool.submit(call, *arguments, **options))
        for result in results:
            result.result()


@pytest.fixture(scope='session')
def text():
    """Real text: the source of the programs themselves."""
    return ''.join((ROOT / name).read_text(encoding='utf-8') for name in ('model.py', 'train.py', 'README.md'))


@pytest.fixture(scope='session')
def char_data(tmp_path_factory, text):
    """A data set of that text in characters."""
    from data import bins, tokenizer

    folder = tmp_path_factory.mktemp('data') / 'char'
    bins.write_dataset(folder, bins.split_at_end([(text, False)], len(text.encode())), tokenizer.train_char([text]), 'test')
    return folder


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


@pytest.fixture(scope='session')
def trained(run, char_data, tmp_path_factory):
    """The folder of a tiny run of 20 steps."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    run('train.py', f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=20', *TINY)
    return out_dir
