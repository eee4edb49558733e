"""Config files and command lines, as a nanoGPT user writes them."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from configurator import FilePath, Text, TrainConfig, configure
from helpers import ROOT
from lib.errors import UserError
from lib.recipe import check


@dataclass
class Config:
    """A config with every kind of field."""

    # numbers
    batch_size: int = 12  # sequences
    learning_rate: float = 6e-4
    n_kv_head: int | None = None
    # switches
    eval_only: bool = False
    compile: bool | Literal['auto'] = 'auto'
    # text
    out_dir: FilePath = 'out'
    position: Literal['learned', 'rope'] = 'learned'
    start: Text | list[str] = '\n'
    stop: list[str | int] = field(default_factory=list)


def read(*argv):
    return configure(Config, list(argv))[0]


@pytest.mark.parametrize(
    'argument, key, value',
    [
        ('--batch_size=32', 'batch_size', 32),
        ('--batch_size=4*8', 'batch_size', 32),
        ('--batch_size=1e3', 'batch_size', 1000),
        ('--learning_rate=1', 'learning_rate', 1.0),
        ('--learning_rate=-1e-3', 'learning_rate', -0.001),
        ('--n_kv_head=None', 'n_kv_head', None),
        ('--n_kv_head=2', 'n_kv_head', 2),
        ('--eval_only', 'eval_only', True),
        ('--eval_only=true', 'eval_only', True),
        ('--eval_only=1', 'eval_only', True),
        ('--eval_only=False', 'eval_only', False),
        ('--eval_only=0', 'eval_only', False),
        ('--compile=False', 'compile', False),
        ('--compile', 'compile', True),
        ('--compile=auto', 'compile', 'auto'),
        ('--out_dir=a=b', 'out_dir', 'a=b'),
        ('--out_dir=5', 'out_dir', '5'),
        ('--out_dir=None', 'out_dir', 'None'),
        ('--out_dir=', 'out_dir', ''),
        ('--position=rope', 'position', 'rope'),
        ('--start=12', 'start', '12'),
        ('--start=def f(x=1):', 'start', 'def f(x=1):'),
        ('--start=["a", "b"]', 'start', ['a', 'b']),
        ('--start=[1, 2]', 'start', '[1, 2]'),
        ('--stop=["\\n", 50256]', 'stop', ['\n', 50256]),
        ('--stop=END', 'stop', ['END']),
    ],
)
def test_configurator_converts_values_to_field_type(argument, key, value):
    actual = getattr(read(argument), key)
    assert actual == value and type(actual) is type(value)


def test_configurator_accepts_value_after_space():
    assert configure(Config, ['--batch_size', '8', '--eval_only', '--out_dir', 'x'])[0] == Config(
        batch_size=8, eval_only=True, out_dir='x'
    )


def test_configurator_applies_files_and_flags_in_order(tmp_path):
    (tmp_path / 'a.py').write_text(
        '"""Words."""\nimport time\n# more\nbatch_size = 5 * 8  # forty\n'
        'out_dir = "ft-" + str(time.time())\n'
        'learning_rate = batch_size / 10\nn_kv_head: int = -batch_size // 2\nstop = ["a", 1]\n'
    )
    config, given = configure(
        Config, ['--batch_size=1', str(tmp_path / 'a.py'), '--learning_rate=9']
    )
    assert (config.batch_size, config.learning_rate, config.n_kv_head, config.stop) == (
        40,
        9.0,
        -20,
        ['a', 1],
    )
    assert config.out_dir.startswith('ft-1')
    assert set(given) == {'batch_size', 'out_dir', 'learning_rate', 'n_kv_head', 'stop'}


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--batch_sise=3'], 'batch_sise.*did you mean batch_size'),
        (['--batch_size=x'], "batch_size = 'x': expected int"),
        (['--batch_size=1.5'], 'batch_size = 1.5'),
        (['--batch_size=True'], 'batch_size'),
        (['--batch_size=None'], 'batch_size'),
        (['--eval_only=2'], 'eval_only'),
        (['--eval_only=maybe'], 'eval_only'),
        (['--position=rotary'], 'learned or rope'),
        (['--position=rop'], 'did you mean rope'),
        (['batch_size=3'], 'batch_size=3: there is no such file; did you mean --batch_size=3'),
        (['quickstart.py'], 'quickstart.py: there is no such file; did you mean config/quick'),
        (['-b=3'], '--key=value'),
        (['--batch_size'], 'value is missing'),
        (['--learning_rate=1/0'], 'learning_rate'),
        (['--n_kv_head=10**10**10'], 'n_kv_head'),
        (['nothing.py'], 'nothing.py'),
        (['--learning_rate=' + '(' * 5000], 'learning_rate'),
        (['--learning_rate=nan'], 'learning_rate'),
        (['--learning_rate=1e999'], 'learning_rate = inf'),
        (['--learning_rate=(10**19)**64'], 'learning_rate'),
        (['--batch_size=2**63'], 'batch_size'),
        (['--batch_size=1e300'], 'batch_size'),
    ],
)
def test_configurator_reports_invalid_arguments(argv, message):
    with pytest.raises(UserError, match=message):
        read(*argv)


@pytest.mark.parametrize(
    'line, message',
    [
        ('batch_sise = 3', 'line 2: batch_sise.*did you mean batch_size'),
        ('batch_size = "x"', "line 2: batch_size = 'x'"),
        ('batch_size = other', 'line 2: other'),
        ('batch_size = open("x", "w")', 'line 2: open'),
        ('batch_size =', 'line 2'),
        ('for x in y: pass', 'line 2: only lines of key = value'),
        ('batch_size, out_dir = 1, "x"', 'line 2'),
        ('batch_size = __import__("os").system("touch evil")', 'line 2'),
        ('batch_size = 9**9**9', 'too large'),
        ('out_dir = "x" * 10', 'two numbers'),
        ('out_dir = time.sleep(9)', 'line 2'),
        ('batch_size = "a\0"', 'not a config file'),
    ],
)
def test_configurator_parses_files_without_executing_them(tmp_path, line, message):
    path = tmp_path / 'bad.py'
    path.write_text(f'out_dir = "x"\n{line}\n')
    with pytest.raises(UserError, match=message):
        read(str(path))


NANOGPT = {  # lines of nanoGPT's own config files
    'train_gpt2': (
        "wandb_run_name='gpt2-124M'\nbatch_size = 12\n"
        'gradient_accumulation_steps = 5 * 8\nweight_decay = 1e-1\n'
    ),
    'finetune_shakespeare': (
        "import time\nwandb_run_name = 'ft-' + str(time.time())\n"
        "init_from = 'gpt2' # small\ndecay_lr = 0\n"
    ),
    'eval_gpt2': (
        'batch_size = 8\neval_iters = 500\neval_only = True\n'
        "wandb_log = False\ninit_from = 'gpt2'\n"
    ),
}


@pytest.mark.parametrize('name', NANOGPT)
def test_configurator_reads_nanogpt_configs(name, tmp_path):
    (tmp_path / 'x.py').write_text(NANOGPT[name])
    config, given = configure(TrainConfig, [str(tmp_path / 'x.py')])
    assert len(given) == NANOGPT[name].count(' = ') + NANOGPT[name].count("name='")
    assert config.gradient_accumulation_steps == 40


def test_configurator_accepts_every_file_in_config():
    files = sorted((ROOT / 'config').glob('*.py'))
    assert len(files) >= 7
    for path in files:
        check(configure(TrainConfig, [str(path)])[0])


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'data/text/prepare.py'])
def test_help_lists_every_key_without_importing_torch(clone, script):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, '--help']
try:
    runpy.run_path({script!r}, run_name='__main__')
except SystemExit as e:
    print('code', e.code, 'torch' in sys.modules, 'numpy' in sys.modules)
"""
    shown = subprocess.run(
        [sys.executable, '-c', code], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    assert 'code 0 False False' in shown
    source = (clone / script).read_text()
    keys = source.partition('class Config:')[2]
    if script == 'train.py':
        keys = (clone / 'configurator.py').read_text().partition('class TrainConfig(')[2]
    for line in keys.split('\n\n')[0].splitlines()[1:]:
        if not line.strip().startswith(('#', '"""', 'bias:')):
            key, _, comment = line.partition('  # ')
            shown_line = next(
                x for x in shown.splitlines() if x.startswith(f'  --{key.split(":")[0].strip()}=')
            )
            assert comment and shown_line.endswith(comment), line
