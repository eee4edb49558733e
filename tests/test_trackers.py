"""wandb and TensorBoard get what the log gets, a resumed run continues, no error stops training."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import TINY, log_lines, read_log
from lib.run import read_samples
from test_nonfinite import NONFINITE

RUN = (*TINY, '--gradient_accumulation_steps=2', '--max_iters=12', '--eval_interval=4',
       '--eval_iters=1', '--n_layer=1', '--sample_every_eval')
NAMES = ('loss', 'val_loss', 'lr', 'grad_norm', 'noise_scale', 'update_ratio_adamw', 'epoch')

FAKE_WANDB = """
import json, os

def record(what, **values):
    with open(os.environ['CALLS'], 'a') as file:
        file.write(json.dumps([what, {k: str(v) for k, v in values.items()}]) + '\\n')
    if os.environ.get('FAIL') == what:
        error = SystemExit if 'EXIT' in os.environ else ConnectionError
        raise error('no network\\nsecond line')

class errors:
    class CommError(Exception): pass

class Run:
    def log(self, line, step):
        record('log', step=step, keys=sorted(line))
    def finish(self, exit_code):
        record('finish', exit_code=exit_code)

def Table(columns, data):
    record('table', columns=columns, n=len(data))

def login(**options):
    return True

def teardown():
    record('teardown')

def init(mode, **options):
    if os.environ.get('FAIL') == 'network' and mode != 'offline':
        raise errors.CommError('no answer\\nsecond line')
    known = {k: v for k, v in os.environ.items() if k.startswith('WANDB_')}
    record('init', **known | options)
    return Run()
"""


@pytest.fixture
def fake_wandb(tmp_path):
    """fake_wandb() returns what the programs have called in the fake module that env offers."""
    (tmp_path / 'wandb.py').write_text(FAKE_WANDB)
    calls = tmp_path / 'calls'

    def fake_wandb():
        lines = calls.read_text().splitlines()
        calls.unlink()
        return [json.loads(line) for line in lines]

    fake_wandb.env = {'PYTHONPATH': str(tmp_path), 'CALLS': str(calls)}
    return fake_wandb


# wandb --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_wandb_continues_the_run_of_a_resumed_run(run, char_data, fake_wandb, tmp_path):
    out_dir = tmp_path / 'out'
    command = ('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={out_dir}', '--wandb_log')
    run(*command, env=fake_wandb.env)
    calls = fake_wandb()
    first, last = calls[0][1], calls[-1]
    assert last == ['finish', {'exit_code': '0'}]
    steps = [int(call['step']) for what, call in calls if what == 'log']
    assert steps == sorted(steps) and steps[-1] == 12
    tables = [call['n'] for what, call in calls if what == 'table']
    assert tables == ['1', '2', '3', '4']
    assert first['WANDB_PROJECT'] == 'plaingpt' and first['project'] == 'None'
    assert first['WANDB_DIR'] == str(out_dir)

    resume = ('train.py', '--init_from=resume', f'--out_dir={out_dir}')
    env = {'WANDB_DIR': str(tmp_path / 'w'), 'WANDB_PROJECT': 'mine'}
    run(*resume, '--max_iters=14', '--wandb_project=ours', env=fake_wandb.env | env)
    calls = fake_wandb()
    resumed = calls[0][1]
    assert resumed['WANDB_RUN_ID'] == first['WANDB_RUN_ID'] and resumed['resume'] == 'allow'
    assert (resumed['WANDB_DIR'], resumed['WANDB_PROJECT'], resumed['project']) == (
        str(tmp_path / 'w'), 'mine', 'ours')
    assert min(int(call['step']) for what, call in calls if what == 'log') == 12

    run(*command, env=fake_wandb.env | {'WANDB_RUN_ID': 'from-an-agent'})  # another run
    assert fake_wandb()[0][1]['WANDB_RUN_ID'] == 'from-an-agent'
    assert (out_dir / 'wandb_id').read_text() == 'from-an-agent'


def test_wandb_is_told_how_a_run_ended(run, char_data, fake_wandb, tmp_path):
    command = ('train.py', *RUN, f'--dataset={char_data}', '--wandb_log')
    stop = 'import os, signal, atexit\n'  # a signal at the first evaluation
    (tmp_path / 'sitecustomize.py').write_text(
        stop + 'import lib.run\nreal = lib.run.Run.add_sample\n'
        'def add_sample(*arguments):\n'
        '    real(*arguments)\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
        'lib.run.Run.add_sample = add_sample\n')
    env = fake_wandb.env | {'PYTHONPATH': f'{tmp_path}:{Path(__file__).parents[1]}'}
    run(*command, f'--out_dir={tmp_path}/stopped', env=env, code=143)
    assert fake_wandb()[-1] == ['finish', {'exit_code': '143'}]
    (tmp_path / 'sitecustomize.py').unlink()
    run(*command, f'--out_dir={tmp_path}/failed', '--learning_rate=1e15', '--grad_clip=0',
        env=fake_wandb.env, code=2)
    assert fake_wandb()[-1] == ['finish', {'exit_code': '1'}]


@pytest.mark.slow
@pytest.mark.parametrize('what, exits', [('init', {}), ('init', {'EXIT': '1'}), ('log', {}),
                                         ('table', {}), ('finish', {})])
def test_training_goes_on_without_wandb(run, char_data, fake_wandb, tmp_path, what, exits):
    result = run('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                 '--wandb_log', env=fake_wandb.env | exits | {'FAIL': what})
    error = 'SystemExit' if exits else 'ConnectionError'
    message = f'wandb failed, going on without it: {error}: no network second line\n'
    assert result.stdout.count(message) == 1
    assert [call for call, _ in fake_wandb()].count(what) == 1
    assert len(log_lines(tmp_path / 'out', 'loss')) == 12
    assert len(read_samples(tmp_path / 'out')) == 4


def test_wandb_logs_offline_without_a_network(run, char_data, fake_wandb, tmp_path):
    result = run('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                 '--wandb_log', env=fake_wandb.env | {'FAIL': 'network'})
    assert 'wandb: no answer: logging offline; upload later with wandb sync\n' in result.stdout
    calls = [what for what, _ in fake_wandb()]
    assert calls[:2] == ['teardown', 'init'] and calls.count('log') == 12 + 4 + 4
    assert calls[-1] == 'finish'


def wandb_records(path):
    """The records in a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = path.read_bytes(), 7, b'', []
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block
            at += 2**15 - at % 2**15
        _, size, kind = struct.unpack('<IHB', data[at:at + 7])
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the last part of a record
            records.append(Record.FromString(whole))
            whole = b''
    return records


def history(records):
    """{(step, key): value} of what was logged."""
    found = {}
    for record in records:
        if record.HasField('history'):
            items = {(item.key or '.'.join(item.nested_key)): item.value_json
                     for item in record.history.item}
            found |= {(int(items['_step']), key): json.loads(value)
                      for key, value in items.items()}
    return found


@pytest.mark.slow
def test_offline_wandb_run_has_log_samples_tags_and_difference_to_git(clone, char_data, tmp_path):
    """The real wandb, in a git repository, without a network or an account."""
    repo, out_dir = tmp_path / 'repo', tmp_path / 'out'
    shutil.copytree(clone, repo)
    git = ('git', '-c', 'user.name=x', '-c', 'user.email=x@example.org')
    for words in (('init', '-q'), ('add', '-A'), ('commit', '-qm', 'one')):
        subprocess.run([*git, *words], cwd=repo, check=True)
    revision = subprocess.run([*git, 'rev-parse', 'HEAD'], cwd=repo, capture_output=True,
                              text=True, check=True).stdout.strip()
    with open(repo / 'model.py', 'a') as file:
        file.write('# an experiment\n')
    env = os.environ | {
        'HOME': str(tmp_path), 'WANDB_API_KEY': '', 'WANDB_PROJECT': 'mine', 'WANDB_NAME': 'trial',
        'WANDB_TAGS': 'a,b', 'WANDB_NOTES': 'why', 'WANDB_RUN_GROUP': 'group'}

    def train(*arguments):
        command = [sys.executable, repo / 'train.py', *arguments, f'--out_dir={out_dir}']
        result = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
        assert result.returncode == 0 and 'logging offline' in result.stdout, result

    train(*RUN, f'--dataset={char_data}', '--wandb_log')
    lines = read_log(out_dir)
    train('--init_from=resume', '--max_iters=16')
    files = sorted(out_dir.glob('wandb/offline-run-*/*.wandb'))
    first, resumed = map(wandb_records, files)
    (settings,) = [record.run for record in first if record.HasField('run')][:1]
    assert (settings.project, settings.display_name, settings.run_group) == (
        'mine', 'trial', 'group')
    assert list(settings.tags) == ['a', 'b'] and settings.notes == 'why'
    ids = {record.run.run_id for record in first + resumed if record.HasField('run')}
    assert ids == {(out_dir / 'wandb_id').read_text()}

    logged = history(first)
    for line in lines:
        for key, value in line.items():
            expected = math.inf if value is None else value
            assert float(logged[line['step'], key]) == pytest.approx(expected, rel=1e-6), key
    assert {step for step, _ in history(resumed)} == {12, 13, 14, 15, 16}
    assert [record.exit.exit_code for record in first if record.HasField('exit')] == [0]

    media = sorted(files[0].parent.glob('files/media/table/samples_12_*.table.json'))
    table = json.loads(media[0].read_text())
    samples = [[sample['step'], sample['text']] for sample in read_samples(out_dir)]
    assert table['columns'] == ['step', 'text'] and table['data'] == samples[:4]
    assert logged[12, 'samples._type'] == 'table-file'
    assert any(revision.encode() in record.SerializeToString() for record in first)
    assert '+# an experiment' in (files[0].parent / 'files' / 'diff.patch').read_text()


# TensorBoard --------------------------------------------------------------------------------------

def scalars(out_dir):
    """{(step, tag): value} as TensorBoard shows them, and the text of each sample."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(Path(out_dir) / 'tensorboard'), {'scalars': 0, 'tensors': 0})
    events.Reload()
    found = {}
    for tag in events.Tags()['scalars']:
        for event in events.Scalars(tag):
            assert (event.step, tag) not in found, 'twice'
            found[event.step, tag] = event.value
    texts = {event.step: make_ndarray(event.tensor_proto)[0].decode()
             for event in events.Tensors('sample/text_summary')}
    return found, texts


@pytest.mark.slow
def test_tensorboard_shows_the_log_of_a_resumed_run(run, char_data, tmp_path):
    out_dir = tmp_path / 'out'
    run('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={out_dir}', '--tensorboard_log')
    (out_dir / 'ckpt_00000012.pt').unlink()  # as if the run had been killed after step 8
    run('train.py', '--init_from=resume', f'--out_dir={out_dir}')
    found, texts = scalars(out_dir)
    lines = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    expected = {(line['step'], key): math.inf if value is None else value
                for line in lines for key, value in line.items() if key != 'step'}
    assert found == pytest.approx(expected, rel=1e-6)
    assert {tag for _, tag in found} >= set(NAMES)
    samples = read_samples(out_dir)
    assert texts.keys() == {sample['step'] for sample in samples} == {0, 4, 8, 12}
    for sample in samples:
        assert texts[sample['step']].replace('\n    ', '\n').strip() == sample['text'].strip()
    run('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={out_dir}')
    assert (out_dir / 'earlier-1' / 'tensorboard').is_dir()  # another run


def test_values_that_are_not_finite_reach_trackers(run, char_data, patched_env, tmp_path):
    bad = patched_env(NONFINITE, AT=[13], WHAT='loss', RANK='0')
    run('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={tmp_path}/out', '--nonfinite=skip',
        '--tensorboard_log', env=bad)
    found, _ = scalars(tmp_path / 'out')
    assert math.isnan(found[5, 'loss']) and found[5, 'skipped'] == 1
    assert log_lines(tmp_path / 'out', 'skipped')[0]['loss'] is None


FULL_DISK = """
import errno
from tensorboard.summary.writer.record_writer import RecordWriter
def write(self, data):
    raise OSError(errno.ENOSPC, 'No space left on device')
RecordWriter.write = write
"""
MISSING = """
import sys
sys.modules['tensorboard'] = None
"""


@pytest.mark.slow
@pytest.mark.parametrize('what, says', [
    (FULL_DISK, 'OSError: [Errno 28] No space left on device'),
    (MISSING, 'ModuleNotFoundError: import of tensorboard halted; None in sys.modules'),
], ids=['full disk', 'not installed'])
def test_training_goes_on_without_tensorboard(run, char_data, patched_env, tmp_path, what, says):
    result = run('train.py', *RUN, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                 '--tensorboard_log', env=patched_env(what))
    assert f'TensorBoard failed, going on without it: {says}\n' in result.stdout
    assert result.stdout.count('TensorBoard') == 1
    assert len(log_lines(tmp_path / 'out', 'loss')) == 12
