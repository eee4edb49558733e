"""What the tests share: a clone of the working tree to run the programs in, as a person would, and a small real text."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
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


FORK = '''
import json, os, signal, sys
import numpy, tiktoken, torch, torch.distributed, tqdm  # no modules of the repository

def become(script, arguments, cwd, out, err):
    alarm = signal.alarm
    os.chdir(cwd)
    for number, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    with open(script, encoding='utf-8') as file:
        code = compile(file.read(), script, 'exec')
    names = sys.modules['__main__'].__dict__
    for name in [name for name in names if not name.startswith('__')]:
        del names[name]
    names['__file__'] = script
    alarm(200)  # seconds: ends what hangs
    exec(code, names)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        become(*json.loads(line))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


@pytest.fixture(scope='session')
def forked():
    """forked(script, arguments, cwd) -> the finished process, as subprocess.run would give it, but forked from one that has
    imported torch, which otherwise takes seconds.
    """
    with subprocess.Popen([sys.executable, '-c', FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def forked(script, arguments, cwd):
            with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
                print(json.dumps([script, arguments, str(cwd), out.name, err.name]), file=server.stdin, flush=True)
                code = int(server.stdout.readline())
                return subprocess.CompletedProcess([script, *arguments], code, out.read(), err.read())

        yield forked
        server.stdin.close()


@pytest.fixture(scope='session')
def run(clone, forked):
    """run('train.py', '--key=value', ...) -> the finished process; code: the exit code it must have."""

    def run(script, *arguments, code=0, cwd=clone, env=None, **options):
        command = [str(clone / script), *map(str, arguments)]
        if env or options:
            result = subprocess.run([sys.executable, *command], cwd=cwd, text=True, timeout=200, capture_output=True,
                                    env=os.environ | (env or {}), **options)
        else:
            result = forked(command[0], command[1:], cwd)
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


@pytest.fixture(scope='session')
def text():
    """Real text: the source of the programs themselves."""
    text = ''.join((ROOT / name).read_text(encoding='utf-8') for name in ('model.py', 'train.py', 'README.md'))
    return text.replace('<|endoftext|>', '')


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
