"""What can go wrong while a GPT trains, injected into real processes, and what must have happened afterwards.

The run that the faults meet has all that a resumed run could get wrong: dropout, accumulated gradients, Muon beside AdamW,
evaluations, checkpoints written in the background. `same_run` compares every log line, all weights and the optimizer's
state, to the last bit, with those of the run that met no fault.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_checkpoint import Evil

import checkpoint as ckpt
from data import bins

RUN = (*TINY, '--gradient_accumulation_steps=2', '--dropout=0.1', '--optimizer=muon', '--max_iters=20', '--eval_interval=8',
       '--save_interval=4', '--lr_decay_iters=20')


@pytest.fixture(scope='session')
def arguments(char_data):
    return (*RUN, f'--dataset={char_data}')


@pytest.fixture(scope='session')
def whole(run, arguments, tmp_path_factory):
    """The run that met no fault. It has checkpoints of steps 16 and 20."""
    out_dir = tmp_path_factory.mktemp('whole') / 'out'
    run('train.py', f'--out_dir={out_dir}', *arguments)
    assert [manifest['step'] for manifest in ckpt.manifests(out_dir)] == [20, 16]
    return out_dir


@pytest.fixture
def out_dir(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / 'out')


@pytest.fixture
def fault(tmp_path):
    """fault(code) -> the environment of processes in which code runs first: Python imports sitecustomize when it starts."""

    def fault(code, **values):
        folder = tmp_path / 'fault'
        folder.mkdir(exist_ok=True)
        (folder / 'sitecustomize.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in values.items()) + code)
        return {'PYTHONPATH': str(folder)}

    return fault


def log_of(out_dir):
    """What the log says, but for the speeds."""
    lines = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ('tokens_per_second', 'seconds')} for line in lines]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return all(map(equal, a, b)) if isinstance(a, list) else a == b


def same_run(out_dir, whole):
    assert log_of(out_dir) == log_of(whole)
    a, b = ckpt.load(out_dir), ckpt.load(whole)
    assert (a.step, a.samples_seen, a.best_val_loss) == (b.step, b.samples_seen, b.best_val_loss)
    assert equal(a.model, b.model) and equal(a.optimizer, b.optimizer)
    assert not list(Path(out_dir).glob('*.tmp'))
    assert {path.name for path in Path(out_dir).glob('ckpt_*')} == {path.name for path in whole.glob('ckpt_*')}


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file() and path.name != '.lock'}


def last_words(result):
    """The one sentence in which a program refuses."""
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(('train.py: ', 'sample.py: ')) and 'Traceback' not in result.stderr, result.stderr
    return line


# A damaged checkpoint is passed over: the run goes on from the one before, and becomes the same run ----------------------------


def flip_a_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


DAMAGED = {  # step of the checkpoint, what is done to it, what is said
    8: (flip_a_bit, 'its sha256 is not'),
    10: (lambda path: path.write_bytes(path.read_bytes()[:-1000]), 'bytes instead of'),
    11: (lambda path: path.write_bytes(b''), 'it has 0 bytes'),
    12: (lambda path: path.unlink(), 'the file is missing'),
    14: (lambda path: path.with_suffix('.json').write_bytes(b'\xff\x00garbage'), '.json is damaged'),
    16: (lambda path: path.with_suffix('.json').write_text('{"step": 20, "sha'), '.json is damaged'),
    18: (lambda path: path.with_suffix('.json').write_text('[1]'), '.json is damaged'),
    20: (lambda path: torch.save(Evil('ran'), path), 'bytes instead of'),
}


def test_damaged_checkpoints_are_named_and_passed_over(run, arguments, whole, tmp_path):
    out_dir = tmp_path / 'out'
    run('train.py', f'--out_dir={out_dir}', *arguments, '--save_interval=1', '--keep_last=14')
    for step, (damage, _) in DAMAGED.items():
        damage(out_dir / f'ckpt_{step:08d}.pt')
    for step in (9, 13, 15, 17, 19):
        (out_dir / f'ckpt_{step:08d}.json').unlink()
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--save_interval=4')
    for step, (_, words) in DAMAGED.items():
        assert any(f'ckpt_{step:08d}' in line and words in line for line in result.stderr.splitlines()), result.stderr
    assert 'step 7:' in result.stdout and 'step 6:' not in result.stdout
    assert log_of(out_dir) == log_of(whole) and equal(ckpt.load(out_dir).model, ckpt.load(whole).model)
    assert not (tmp_path / 'ran').exists() and not Path('ran').exists()


def all_bad(out_dir):
    for path in out_dir.glob('*.pt'):
        flip_a_bit(path)


def no_manifests(out_dir):
    for path in out_dir.glob('*.json'):
        path.unlink()


def forge(out_dir, **change):
    """Change what the newest checkpoint holds, with a manifest that fits."""
    path = out_dir / 'ckpt_00000020.pt'
    torch.save(torch.load(path, weights_only=True) | change, path)
    commit(path)


def commit(path, **change):
    manifest = json.loads(path.with_suffix('.json').read_text())
    manifest |= {'bytes': path.stat().st_size, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()} | change
    path.with_suffix('.json').write_text(json.dumps(manifest))


def evil(out_dir):
    torch.save({'model': {'x': Evil(str(out_dir / 'ran'))}}, out_dir / 'ckpt_00000020.pt')
    commit(out_dir / 'ckpt_00000020.pt')


def wrong_shapes(out_dir):
    state = ckpt.load(out_dir).optimizer
    state['muon']['state'][0]['momentum_buffer'] = torch.zeros(3, 3)
    forge(out_dir, optimizer=state)


REFUSED = {  # what is done to the run's folder, what is asked for, what is said
    'all bad': (all_bad, (), 'every checkpoint in it is damaged'),
    'no manifest': (no_manifests, (), 'no manifest to check it by'),
    'pickle that would run code': (evil, (), 'refused: it would run io.open'),
    'another architecture asked for': (lambda out_dir: None, ('--n_layer=3',), 'n_layer = 3 but'),
    'another architecture inside': (lambda out_dir: forge(out_dir, model_config={'n_layer': 1}), (), 'do not fit the model'),
    'no optimizer state': (lambda out_dir: forge(out_dir, optimizer=None), (), 'has no optimizer state'),
    'optimizer state of another shape': (wrong_shapes, (), 'momentum_buffer has shape (3, 3)'),
    'optimizer state of another optimizer': (lambda out_dir: None, ('--optimizer=adamw',), 'optimizer state does not fit'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_resumed_is_refused_and_nothing_changes(run, out_dir, what):
    damage, options, words = REFUSED[what]
    damage(out_dir)
    before = content(out_dir)
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', *options, code=2)
    assert words in last_words(result)
    assert content(out_dir) == before


def test_files_that_are_not_the_runs_own_stay(run, out_dir):
    mine = ['ckpt_best.pt', 'ckpt_best.json', 'ckpt_00000024.pt', 'notes.tmp']  # the third is of a step that the run reaches
    for name in mine:
        shutil.copy(out_dir / f'ckpt_00000016{Path(name).suffix.replace("tmp", "pt")}', out_dir / name)
    before = content(out_dir)
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=32', '--keep_last=1')
    assert 'ckpt_00000024.pt has no manifest to check it by and is passed over' in result.stderr
    after = content(out_dir)
    for name in mine:
        assert before[name] in (after.get(name), after.get(name + '.unchecked')), name


def test_sampling_from_a_run_that_is_alive_never_fails(clone, run, arguments, tmp_path):
    options = ('--max_iters=1000000', '--save_interval=1', '--keep_last=1', '--eval_interval=1000000')
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, *options) as process:
        read_until(process, 'saved ')
        threading.Thread(target=process.stdout.read).start()
        try:
            for _ in range(3):
                run('sample.py', f'--out_dir={tmp_path}/out', '--start=d', '--num_samples=1', '--max_new_tokens=2')
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM


def test_closed_streams_and_an_early_sigusr1_end_nothing(clone, arguments, whole, tmp_path):
    command = '"$0" "$@" >&- 2>&- & sleep 0.5; kill -USR1 $!; wait $!'
    words = [sys.executable, clone / 'train.py', f'--out_dir={tmp_path}/out', *arguments]
    assert subprocess.run(['bash', '-c', command, *map(str, words)]).returncode == 0
    same_run(tmp_path / 'out', whole)


def test_a_manifest_cannot_lead_out_of_its_folder(run, whole, out_dir):
    outside = out_dir.parent / 'outside.pt'
    outside.write_bytes(b'precious')
    for path in out_dir.glob('ckpt_*.json'):
        path.write_text(json.dumps(json.loads(path.read_text()) | {'file': '../outside.pt'}))
    run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=32')
    assert outside.read_bytes() == b'precious'
    assert ckpt.load(out_dir).step == 32 and not (out_dir / 'ckpt_00000016.pt').exists()


# The data ------------------------------------------------------------------------------------------------------------------


def overwrite(path, at, ids):
    tokens = np.fromfile(path, dtype='<u2')
    tokens[at] = ids
    tokens.tofile(path)


def swap(path):
    tokens = np.fromfile(path, dtype='<u2')
    i = np.argmax(tokens[1:] != tokens[:-1])  # the first two neighbours that differ
    overwrite(path, slice(i, i + 2), tokens[[i + 1, i]])


DATA = {
    'changed since the checkpoint': (lambda data: swap(data / 'train.bin'), 'the bins have changed'),
    'odd size': (lambda data: (data / 'train.bin').write_bytes(b'123'), 'no multiple of 2'),
    'empty': (lambda data: (data / 'val.bin').write_bytes(b''), 'val.bin: its size, 0 bytes'),
    'missing': (lambda data: (data / 'train.bin').unlink(), 'train.bin: No such file'),
    'id beyond the vocabulary': (lambda data: overwrite(data / 'train.bin', 5000, 60000), 'token id 60000 at position 5000'),
    'cut off': (lambda data: os.truncate(data / 'train.bin', 2000), 'where meta.json says'),
    'garbage meta.json': (lambda data: (data / 'meta.json').write_text('{'), 'meta.json'),
}


@pytest.mark.parametrize('what', DATA)
def test_broken_data_are_named_before_a_step_is_done(run, refused, char_data, out_dir, tmp_path, what):
    data = shutil.copytree(char_data, tmp_path / 'data')
    config = torch.load(out_dir / 'ckpt_00000020.pt', weights_only=True)['config']
    forge(out_dir, config=config | {'dataset': str(data)})
    damage, words = DATA[what]
    damage(data)
    before = content(out_dir)
    refused('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=24', says=words)
    assert content(out_dir) == before
    if what.startswith('changed'):  # unless it is meant
        run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=21', f'--dataset={data}')


def test_an_id_beyond_its_file_format_is_never_written(tmp_path):
    code = f'from data.bins import BinWriter; w = BinWriter({str(tmp_path)!r}, "train", 65536); w.append([65535, 65536])'
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert 'token id 65536 at position 1' in result.stderr
    assert (tmp_path / 'train.bin.tmp').stat().st_size == 0


# SIGKILL: the run is resumed, and becomes the same run --------------------------------------------------------------------------

KILL_AT = '''
import os, signal

def kill_at(name, matches, after=False):
    real = getattr(os, name)
    def function(*arguments, **options):
        path = os.readlink(f'/proc/self/fd/{arguments[0]}') if name == 'fsync' else str(arguments[-1])
        result = real(*arguments, **options) if after else None
        if path.endswith(matches):
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else real(*arguments, **options)
    setattr(os, name, function)

kill_at(*POINT)
'''
KILL_IN_EVALUATION = '''
import numpy, os, signal
pad, calls = numpy.pad, []
def function(*arguments, **options):
    calls.append(1)
    if len(calls) == 14:  # 2 batches of 2 arrays of 2 splits make 8: this is the second evaluation, at step 8
        os.kill(os.getpid(), signal.SIGKILL)
    return pad(*arguments, **options)
numpy.pad = function
'''
KILLED = (  # where the process dies, and the step at which the next one goes on; each makes 4 steps between saves
    ('while the data is written', ('fsync', 'ckpt_00000008.pt.tmp'), 4),
    ('while the manifest is written', ('fsync', 'ckpt_00000008.json.tmp'), 4),
    ('before the data has its name', ('replace', 'ckpt_00000008.pt'), 4),
    ('between data and manifest', ('replace', 'ckpt_00000008.json'), 4),
    ('just after the manifest', ('replace', 'ckpt_00000008.json', True), 8),
    ('before an old checkpoint is deleted', ('replace', 'ckpt_00000004.json.tmp'), 12),
    ('while an old checkpoint is deleted', ('replace', 'ckpt_00000008.json.tmp', True), 16),
    ('after the data of an old checkpoint is deleted', ('unlink', 'ckpt_00000012.json.tmp'), 20),
)


def test_a_run_that_is_killed_again_and_again_goes_on_from_its_last_save(run, arguments, fault, whole, tmp_path):
    # saves are not in the background: the step at which the process dies is then known
    command = ('train.py', f'--out_dir={tmp_path}/out', '--async_save=False', '--max_iters=20')
    options = arguments
    for what, point, step in KILLED:
        run(*command, *options, env=fault(KILL_AT, POINT=point), code=-signal.SIGKILL)
        options = ('--init_from=resume',)
        assert ckpt.manifests(tmp_path / 'out')[0]['step'] == step, what
    result = run(*command, *options)
    assert 'half written: ckpt_00000012.json.tmp' in result.stdout
    same_run(tmp_path / 'out', whole)


def test_a_run_that_is_killed_in_an_evaluation_goes_on(run, arguments, fault, whole, tmp_path):
    run('train.py', f'--out_dir={tmp_path}/out', *arguments, '--async_save=False', env=fault(KILL_IN_EVALUATION),
        code=-signal.SIGKILL)
    result = run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/out')
    assert 'step 4:' in result.stdout and 'step 3:' not in result.stdout
    same_run(tmp_path / 'out', whole)


def test_killed_while_it_prepares_to_resume(run, fault, whole, out_dir):
    (out_dir / 'ckpt_00000020.json').unlink()
    (out_dir / 'ckpt_00000020.pt').unlink()
    for name in ('config.py', 'log.jsonl'):
        killed = fault(KILL_AT, POINT=('replace', name))
        run('train.py', '--init_from=resume', f'--out_dir={out_dir}', env=killed, code=-signal.SIGKILL)
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}')
    assert 'removed what a killed process left half written: log.jsonl.tmp' in result.stdout
    same_run(out_dir, whole)


def test_killed_while_an_earlier_run_is_set_aside(run, arguments, fault, out_dir):
    killed = fault(KILL_AT, POINT=('rename', 'log.jsonl'))
    run('train.py', f'--out_dir={out_dir}', *arguments, env=killed, code=-signal.SIGKILL)
    run('train.py', f'--out_dir={out_dir}', *arguments, '--max_iters=0')
    kept = {path.name for path in out_dir.glob('earlier-*/*')}
    assert kept == {'ckpt_00000016.pt', 'ckpt_00000016.json', 'ckpt_00000020.pt', 'ckpt_00000020.json', 'log.jsonl', 'config.py'}


@pytest.mark.parametrize('point', [('fsync', 'train.bin.tmp'), ('replace', 'train.bin'), ('replace', 'val.bin')])
def test_a_killed_prepare_leaves_no_data_set_and_is_repeated(run, refused, clone, fault, text, tmp_path, point):
    (tmp_path / 'text.txt').write_text(text)
    name = 'killed_' + tmp_path.name.replace('.', '_')
    prepare = ('data/text/prepare.py', f'--input={tmp_path}/text.txt', '--tokenizer=char', f'--dataset={name}')
    run(*prepare, env=fault(KILL_AT, POINT=point), code=-signal.SIGKILL)
    refused('train.py', f'--dataset={name}', *TINY, says=name)
    run(*prepare)
    assert sorted(path.name for path in (clone / 'data' / name).iterdir()) == ['.lock', 'meta.json', 'train.bin', 'val.bin']
    bins.open_dataset(clone / 'data' / name, 32)


PREPARE = '''
import os, signal, sys
from data import bins, tokenizer
text, kill_at = open(sys.argv[2], encoding='utf-8').read(), int(sys.argv[3])
bins.COMMIT_BYTES, bins.SHARD_BYTES = 20_000, 30_000
def pieces():
    for i in range(0, len(text), 1000):
        if i // 1000 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield bins.Piece('val' if i // 1000 % 10 == 9 else 'train', text[i:i + 1000], ends_document=i // 1000 % 7 == 0)
real = bins.encoded
bins.encoded = lambda pieces, tokenizer, pool: real(pieces, tokenizer, pool, size=3000)
bins.write_dataset(sys.argv[1], pieces(), tokenizer.train_bpe([text[:4000]], 300), sys.argv[4])
'''


def test_a_prepare_killed_again_and_again_goes_on_and_ends_with_the_same_bins(clone, text, tmp_path):
    (tmp_path / 'text.txt').write_text(text)

    def prepare(folder, kill_at=-1, source='a text'):
        command = [sys.executable, '-c', PREPARE, tmp_path / folder, tmp_path / 'text.txt', str(kill_at), source]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True)

    assert prepare('whole').returncode == 0
    for kill_at in (30, 31, 55, 90):
        assert prepare('killed', kill_at).returncode == -signal.SIGKILL
        assert not (tmp_path / 'killed' / 'val.bin').exists()
    result = prepare('killed')
    assert 'going on behind the' in result.stdout and result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / 'whole').iterdir())
    assert sorted(path.name for path in (tmp_path / 'killed').iterdir()) == names and 'train_00001.bin' in names
    for name in names:
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()

    prepare('torn', 60)  # what was committed is not there any more
    os.truncate(tmp_path / 'torn' / 'train.bin.tmp', 10)
    assert 'going on' not in prepare('torn').stdout
    assert (tmp_path / 'torn' / 'train.bin').read_bytes() == (tmp_path / 'whole' / 'train.bin').read_bytes()

    prepare('mixed', 60)  # another one in between leaves nothing of the first, not even if it ends before it has saved anything
    assert prepare('mixed', 5, source='another').returncode == -signal.SIGKILL
    assert 'going on' not in prepare('mixed').stdout
    assert (tmp_path / 'mixed' / 'train.bin').read_bytes() == (tmp_path / 'whole' / 'train.bin').read_bytes()

    prepare('changed', 60)
    (tmp_path / 'text.txt').write_text(text[:5000] + 'x' + text[5000:])
    result = prepare('changed')
    assert 'a text has changed since a prepare of it was interrupted' in result.stderr
    assert prepare('changed').returncode == 0


STREAM = '''
import os, signal, sys
from data import bins, tokenizer
kill_at, read = int(sys.argv[3]), 0
bins.COMMIT_BYTES = 50_000
(pieces, source), encoded = bins.hub_documents(sys.argv[2], None, val_every=7), bins.encoded
def counted(state):
    global read
    for read, piece in enumerate(pieces(state), 1):
        if read == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
bins.encoded = lambda pieces, tokenizer, pool: encoded(pieces, tokenizer, pool, size=3000)
bins.write_dataset(sys.argv[1], counted, tokenizer.ByteTokenizer(), source)
print(read, 'documents read')
'''


def test_a_killed_stream_of_documents_goes_on_without_reading_again_what_is_written(clone, text, tmp_path):
    import datasets

    documents = [text[i:i + 1000] for i in range(0, 120_000, 1000)]
    for shard in range(3):
        datasets.Dataset.from_dict({'text': documents[shard * 40:][:40]}).to_parquet(tmp_path / 'hub' / f'{shard}.parquet')

    def prepare(folder, kill_at=-1):
        command = [sys.executable, '-c', STREAM, tmp_path / folder, tmp_path / 'hub', str(kill_at)]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True, env=os.environ | {'HF_HOME': str(tmp_path)})

    assert '120 documents read' in prepare('whole').stdout
    assert prepare('killed', 70).returncode == -signal.SIGKILL
    result = prepare('killed')
    assert 'going on behind' in result.stdout and '70 documents read' in result.stdout, result.stdout + result.stderr
    for name in ('meta.json', 'train.bin', 'val.bin'):
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    data = bins.open_dataset(tmp_path / 'killed', 16)
    ids = data.train.read([0], data.train.n_tokens)[0]
    assert data.tokenizer.decode(ids) == ''.join(d for i, d in enumerate(documents) if i % 7)
    result = subprocess.run([sys.executable, '-c', STREAM, tmp_path / 'x', tmp_path / 'nowhere', '-1'], cwd=clone,
                            capture_output=True, text=True, env=os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    assert 'UserError' in result.stderr and 'nowhere: cannot be read' in result.stderr


def test_kills_at_random_moments(run):
    assert run('tools/crashtest.py', '--kills=3').stdout.endswith('OK\n')


# Signals -------------------------------------------------------------------------------------------------------------------


def start(clone, *arguments, env=None, command=()):
    return subprocess.Popen([sys.executable, *command, clone / 'train.py', *map(str, arguments)], cwd=clone, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | (env or {}))


def read_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f'{words!r} never came')


SLOW = 'import torch, time; relu = torch.nn.functional.gelu\ndef gelu(*a, **k): time.sleep(SECONDS); return relu(*a, **k)\n' \
       'torch.nn.functional.gelu = gelu\n'  # so that a signal comes in time


SLOW_EVALUATION = '''
import numpy, time
real, calls = numpy.pad, []
def pad(*arguments, **options):
    calls.append(1)
    time.sleep(0.5 * (len(calls) > 8))  # not the first one
    return real(*arguments, **options)
numpy.pad = pad
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_after_the_step(clone, run, arguments, fault, whole, tmp_path, number):
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, env=fault(SLOW, SECONDS=0.05)) as process:
        read_until(process, 'step 1:')
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 128 + number
    step = ckpt.load(tmp_path / 'out').step
    assert f'stopped by {number.name} after {step} steps' in rest and 'Traceback' not in rest and 2 <= step < 20
    run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume')
    same_run(tmp_path / 'out', whole)


def test_ctrl_c_again_stops_at_once(clone, arguments, fault, tmp_path):
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, env=fault(SLOW, SECONDS=0.5)) as process:
        read_until(process, 'step 0: train loss')
        process.send_signal(signal.SIGINT)
        read_until(process, 'Ctrl-C again stops at once')
        process.send_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGINT and not list((tmp_path / 'out').glob('ckpt_*'))


def test_a_signal_in_an_evaluation_stops_it_and_the_evaluation_is_made_up_for(clone, run, arguments, fault, whole, tmp_path):
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, env=fault(SLOW_EVALUATION)) as process:
        read_until(process, 'step 7:')
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert 'stopped by SIGTERM after 8 steps' in process.stdout.read()
    assert ckpt.manifests(tmp_path / 'out')[0]['val_loss'] is None
    result = run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume', '--keep_last=9')
    assert 'step 8: train loss' in result.stdout
    same = {manifest['step']: manifest['val_loss'] is not None for manifest in ckpt.manifests(tmp_path / 'out')}
    assert same == {4: False, 8: True, 12: False, 16: True, 20: True}
    assert log_of(tmp_path / 'out') == log_of(whole) and equal(ckpt.load(tmp_path / 'out').model, ckpt.load(whole).model)


def test_sigusr1_saves_and_goes_on(clone, arguments, fault, tmp_path):
    options = ('--save_interval=1000', '--eval_interval=1000', '--max_iters=12', '--keep_last=9')
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, *options, env=fault(SLOW, SECONDS=0.03)) as process:
        read_until(process, 'step 1:')
        process.send_signal(signal.SIGUSR1)
        rest = process.stdout.read()
    assert process.returncode == 0 and 'done' in rest
    last, asked = (manifest['step'] for manifest in ckpt.manifests(tmp_path / 'out'))
    assert last == 12 and 2 <= asked < 12


def workers(process):
    """The processes that torchrun has started, by rank."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f'/proc/{child}/environ').read_bytes().split(b'\0')
        ranks |= {int(word[5:]): int(child) for word in environment if word.startswith(b'RANK=')}
    return ranks


TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


SLOW_SAVE = '''
save = torch.save
def slow_save(*arguments, **options):
    time.sleep(2)
    save(*arguments, **options)
torch.save = slow_save
'''


def test_both_processes_stop_after_the_same_step_and_wait_for_the_save(clone, run, arguments, fault, whole, tmp_path):
    slow = fault(SLOW + SLOW_SAVE, SECONDS=0.05)
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, command=TORCHRUN, env=slow) as process:
        read_until(process, 'step 2:')
        for _ in range(2):  # a scheduler may tell every process, and torchrun then tells them again
            for pid in workers(process).values():
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.3)
        rest = process.stdout.read()
    assert process.returncode != 0 and 'stopped by SIGTERM' in rest
    assert 4 <= ckpt.load(tmp_path / 'out').step < 20
    result = run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume')
    assert 'processes 2 then, 1 now' in result.stdout
    assert [line['loss'] for line in log_of(tmp_path / 'out') if 'loss' in line] == pytest.approx(
        [line['loss'] for line in log_of(whole) if 'loss' in line], abs=1e-5)


def test_a_signal_to_one_of_two_processes_in_an_evaluation_stops_both(clone, arguments, fault, tmp_path):
    slow = fault(SLOW_EVALUATION.replace('0.5', "(os.environ['RANK'] == '0')").replace('import', 'import os,'))
    options = ('--eval_iters=4', '--gradient_accumulation_steps=2')
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, *options, command=TORCHRUN, env=slow) as process:
        read_until(process, 'step 7:')
        time.sleep(0.5)  # the process that gets the signal waits for the other
        os.kill(workers(process)[1], signal.SIGTERM)
        rest = process.stdout.read()
    assert 'stopped by SIGTERM after 8 steps' in rest and ckpt.load(tmp_path / 'out').step == 8
    assert (tmp_path / 'out' / 'status').read_text() == 'stopped\n'


def test_three_processes_are_resumed_to_the_last_bit(clone, arguments, tmp_path):
    whole, parts, command = tmp_path / 'whole', tmp_path / 'parts', (*TORCHRUN[:-1], '--nproc_per_node=3')
    options = ('--gradient_accumulation_steps=3', '--max_iters=8', '--n_embd=128', '--n_layer=4')
    with start(clone, f'--out_dir={whole}', *arguments, *options, command=command) as process:
        process.stdout.read()
    shutil.copytree(whole, parts)
    (parts / 'ckpt_00000008.pt').unlink()
    with start(clone, f'--out_dir={parts}', '--init_from=resume', command=command) as process:
        assert 'step 4:' in process.stdout.read()
    same_run(parts, whole)


def test_one_process_two_and_one_again(clone, run, arguments, whole, tmp_path):
    common = (f'--out_dir={tmp_path}/out', '--init_from=resume')
    run('train.py', f'--out_dir={tmp_path}/out', *arguments, '--max_iters=6')
    with start(clone, *common, '--max_iters=13', command=TORCHRUN) as process:
        assert 'processes 1 then, 2 now' in process.stdout.read()
    run('train.py', *common, '--max_iters=20')
    a, b = log_of(tmp_path / 'out'), log_of(whole)
    losses = [[(line['step'], line['samples_seen'], pytest.approx(line['loss'], abs=1e-5)) for line in log if 'loss' in line]
              for log in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    for name, weight in ckpt.load(whole).model.items():
        torch.testing.assert_close(ckpt.load(tmp_path / 'out').model[name], weight, atol=1e-4, rtol=0)


def test_a_reader_that_has_gone_does_not_stop_training(clone, arguments, tmp_path):
    with start(clone, f'--out_dir={tmp_path}/out', *arguments) as process:
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0 and ckpt.load(tmp_path / 'out').step == 20


def test_another_run_is_kept_out_and_a_terminal_that_is_closed_loses_nothing(clone, refused, arguments, tmp_path):
    master, slave = os.openpty()
    command = [sys.executable, clone / 'train.py', f'--out_dir={tmp_path}/out', *arguments, '--max_iters=1000000']
    process = subprocess.Popen(command, cwd=clone, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.set_blocking(master, False)
    while not (tmp_path / 'out' / 'log.jsonl').exists() or len(log_of(tmp_path / 'out')) < 4:
        with contextlib.suppress(BlockingIOError):
            os.read(master, 1000)
        time.sleep(0.1)
        assert process.poll() is None
    for resume in ((), ('--init_from=resume',)):
        refused('train.py', f'--out_dir={tmp_path}/out', *arguments, *resume, says='another process is writing there')
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert ckpt.load(tmp_path / 'out').step >= 3


# The disk ------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved(run, out_dir):
    size = (out_dir / 'ckpt_00000020.pt').stat().st_size
    for background in (True, False):
        result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=40', f'--async_save={background}',
                     code=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 5000, size - 5000)))
        said = last_words(result)
        assert 'ckpt_00000024.pt: cannot write the checkpoint: File too large' in said and 'go on from step 20' in said
        assert 'step 39' not in result.stdout and not list(out_dir.glob('*.tmp'))
        assert [manifest['step'] for manifest in ckpt.manifests(out_dir)] == [20, 16] and ckpt.load(out_dir).step == 20


def test_a_log_that_cannot_be_written_is_named(run, out_dir):
    size = (out_dir / 'log.jsonl').stat().st_size + 400
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=40', code=2,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert 'log.jsonl: cannot write: File too large' in last_words(result)


def test_a_full_disk_behind_the_output_does_not_stop_training(clone, arguments, whole, tmp_path):
    with open('/dev/full', 'w') as full:
        command = [sys.executable, clone / 'train.py', f'--out_dir={tmp_path}/out', *arguments]
        assert subprocess.run(command, stdout=full, stderr=subprocess.PIPE).returncode == 0
    same_run(tmp_path / 'out', whole)


def test_too_little_room_is_said_before_the_first_step(refused, arguments, fault, tmp_path):
    nearly_full = fault('import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5)')
    says = ('out_dir', '0.1 MB are free', 'keep_last')
    refused('train.py', f'--out_dir={tmp_path}/out', *arguments, env=nearly_full, says=says)
    assert content(tmp_path / 'out') == {}


def test_a_folder_that_cannot_be_written_is_named(refused, arguments):
    refused('train.py', '--out_dir=/sys/plaingpt', *arguments, says=("out_dir = '/sys/plaingpt'", 'choose another'))


# Numbers -------------------------------------------------------------------------------------------------------------------

# micro-batches 1 and 2 are on trial, before step 0; then there are two in each step
BAD_NUMBERS = '''
import os, torch
real, calls = torch.nn.functional.cross_entropy, []
def cross_entropy(*arguments, **options):
    loss = real(*arguments, **options)
    if torch.is_grad_enabled():
        calls.append(1)
        if len(calls) in AT and os.environ.get('RANK', RANK) == RANK:
            if WHAT == 'loss':
                return loss * float('nan')
            loss.register_hook(lambda gradient: gradient * float('inf'))
    return loss
torch.nn.functional.cross_entropy = cross_entropy
'''


@pytest.mark.parametrize('what, says', [('loss', 'the loss is nan in samples 44 to 47'),
                                        ('gradient', 'the gradient norm is nan in samples 40 to 47')])
def test_a_step_that_is_not_finite_is_not_taken(run, arguments, fault, whole, tmp_path, what, says):
    bad = fault(BAD_NUMBERS, AT=[14], WHAT=what, RANK='0')
    result = run('train.py', f'--out_dir={tmp_path}/out', *arguments, env=bad, code=2)
    assert f'step 5: {says}' in last_words(result) and '--nonfinite=skip' in result.stderr
    run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume')
    same_run(tmp_path / 'out', whole)


def test_a_step_that_is_not_finite_is_left_out_if_asked_for(run, arguments, fault, tmp_path):
    bad = fault(BAD_NUMBERS, AT=[13], WHAT='loss', RANK='0')
    options = ('--nonfinite=skip', '--save_interval=1', '--keep_last=99')
    result = run('train.py', f'--out_dir={tmp_path}/out', *arguments, *options, env=bad)
    assert 'step 5: the loss is nan in samples 40 to 43: left out' in result.stdout
    before, after = (ckpt.load(tmp_path / 'out' / f'ckpt_0000000{step}.pt') for step in (5, 7))
    taken = [state.optimizer['adamw']['state'][0]['step'] for state in (before, after)]
    assert taken == [5, 6] and after.samples_seen == before.samples_seen + 16
    assert not (tmp_path / 'out' / 'ckpt_00000006.pt').exists()  # nothing is saved behind a step that was left out
    lines = [line for line in log_of(tmp_path / 'out') if 'loss' in line]
    assert [line['step'] for line in lines if line.get('skipped')] == [5] and lines[5]['loss'] is None
    assert len(lines) == 20 and all(line['loss'] < 10 for line in lines if line['step'] != 5)


def test_a_step_that_is_not_finite_is_noticed_before_the_next_save_however_rarely_the_run_logs(run, arguments, fault, tmp_path):
    bad = fault(BAD_NUMBERS, AT=[13], WHAT='gradient', RANK='0')
    options = ('--log_interval=1000', '--save_interval=4', '--eval_interval=1000')
    result = run('train.py', f'--out_dir={tmp_path}/out', *arguments, *options, env=bad, code=2)
    assert 'step 5: the gradient norm is' in last_words(result)
    assert [manifest['step'] for manifest in ckpt.manifests(tmp_path / 'out')] == [4]


def test_too_many_bad_steps_in_a_row_end_the_run(run, arguments, fault, tmp_path):
    bad = fault(BAD_NUMBERS, AT=[5, 7, 11, 13, 15, 17], WHAT='loss', RANK='0')  # steps 1, 2; 4, 5, 6, 7
    result = run('train.py', f'--out_dir={tmp_path}/out', *arguments, '--nonfinite=skip', '--max_skips=3', env=bad, code=2)
    assert result.stdout.count('left out') == 5 and 'step 7: the loss is nan' in last_words(result)


def test_float16_that_always_overflows_ends_the_run(run, arguments, fault, tmp_path):
    bad = fault(BAD_NUMBERS, AT=list(range(3, 100)), WHAT='gradient', RANK='0')
    result = run('train.py', f'--out_dir={tmp_path}/out', *arguments, '--dtype=float16', '--max_skips=4', env=bad, code=2)
    assert result.stdout.count('left out') == 4 and 'step 4: the gradient norm is' in last_words(result)


def test_a_bad_loss_in_one_of_two_processes_stops_both(clone, arguments, fault, tmp_path):
    bad = fault(BAD_NUMBERS, AT=[6], WHAT='loss', RANK='1')  # two on trial under DDP, then one in a step: the step is 3
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, command=TORCHRUN, env=bad) as process:
        said = process.stdout.read()
    assert said.count('train.py: step 3: the loss is nan in samples 28 to 31') == 1, said
    assert not ckpt.manifests(tmp_path / 'out')


OUT_OF_MEMORY = '''
import torch
real = torch.nn.functional.cross_entropy
def cross_entropy(logits, targets, **options):
    if len(targets) > LIMIT:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    return real(logits, targets, **options)
torch.nn.functional.cross_entropy = cross_entropy
'''


def test_out_of_memory_cuts_the_micro_batch_and_keeps_the_step(run, arguments, fault, tmp_path):
    result = run('train.py', f'--out_dir={tmp_path}/small', *arguments, env=fault(OUT_OF_MEMORY, LIMIT=2 * 32))
    assert 'out of memory with batch_size = 4: going on with 2, and 2 times as many' in result.stdout
    cut = ('--batch_size=2', '--gradient_accumulation_steps=4', '--eval_iters=4')
    run('train.py', f'--out_dir={tmp_path}/asked', *arguments, *cut)
    same_run(tmp_path / 'small', tmp_path / 'asked')
    assert 'batch_size = 2\n' in (tmp_path / 'small' / 'config.py').read_text()


def test_out_of_memory_with_one_sequence_is_said(refused, arguments, fault, tmp_path):
    for command in ((), ('--gradient_accumulation_steps=3', '--batch_size=3')):
        result = fault(OUT_OF_MEMORY, LIMIT=0)
        refused('train.py', f'--out_dir={tmp_path}/out', *arguments, *command, env=result,
                says=('out of memory with a single sequence', '--block_size'))


def test_out_of_memory_in_one_of_two_processes_cuts_both(clone, arguments, fault, tmp_path):
    only_one = 'import os' + OUT_OF_MEMORY.replace('> LIMIT', "> LIMIT and os.environ['RANK'] == '1'")
    with start(clone, f'--out_dir={tmp_path}/out', *arguments, command=TORCHRUN, env=fault(only_one, LIMIT=2 * 32)) as process:
        said = process.stdout.read()
    assert 'going on with 2' in said and process.returncode == 0 and ckpt.load(tmp_path / 'out').step == 20


def test_only_a_better_checkpoint_is_kept_by_a_resumed_run_too(run, arguments, tmp_path):
    options = ('--always_save_checkpoint=False', '--save_interval=1000')
    run('train.py', f'--out_dir={tmp_path}/out', *arguments, *options, '--max_iters=10')
    run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume', '--max_iters=24', '--learning_rate=1', '--min_lr=1',
        '--muon_learning_rate=1', '--keep_last=9')
    losses = {line['step']: line['val_loss'] for line in log_of(tmp_path / 'out') if 'val_loss' in line}
    assert losses[16] > losses[8] and [m['step'] for m in ckpt.manifests(tmp_path / 'out')] == [24, 10, 8]


# Other runs, other clocks, other machines -----------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards_changes_nothing(run, fault, whole, out_dir):
    for step, age in ((16, 0), (20, 10**6)):  # the newest checkpoint seems to be the oldest file
        for suffix in ('pt', 'json'):
            os.utime(out_dir / f'ckpt_000000{step}.{suffix}', (1e9 - age, 1e9 - age))
    backwards = 'import time; now = [2e9]\ndef clock(): now[0] -= 3600; return now[0]\ntime.time = time.perf_counter = clock\n'
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=24', env=fault(backwards))
    assert 'step 20:' in result.stdout and 'step 19:' not in result.stdout
    assert [line['step'] for line in log_of(out_dir) if 'loss' in line] == list(range(24))
    assert ckpt.load(out_dir).step == 24


def test_what_keeps_a_resumed_run_from_being_the_same_to_the_last_bit_is_said(run, out_dir):
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=21', env={'OMP_NUM_THREADS': '2'})
    assert 'not be the same to the last bit (threads 1 then, 2 now)' in result.stdout


def test_two_threads_and_a_compiled_model_are_resumed_to_the_last_bit_too(run, arguments, tmp_path):
    whole, parts, threads = tmp_path / 'whole', tmp_path / 'parts', {'OMP_NUM_THREADS': '2'}
    result = run('train.py', f'--out_dir={whole}', *arguments, '--compile=True', '--n_layer=1', '--max_iters=8', env=threads)
    assert 'compiling' in result.stdout and 'torch.compile failed' not in result.stdout
    shutil.copytree(whole, parts)
    (parts / 'ckpt_00000008.pt').unlink()
    run('train.py', f'--out_dir={parts}', '--init_from=resume', env=threads)
    same_run(parts, whole)


def test_secrets_stay_out_of_the_files_of_a_run(run, arguments, tmp_path):
    secrets = {'WANDB_API_KEY': 'a1b2c3d4e5' * 4, 'HF_TOKEN': 'hf_verysecretverysecret', 'WANDB_MODE': 'offline',
               'WANDB_SILENT': 'true', 'HOME': str(tmp_path)}
    result = run('train.py', f'--out_dir={tmp_path}/out', *arguments, '--wandb_log', '--max_iters=4', env=secrets)
    files = [path for path in (tmp_path / 'out').rglob('*') if path.is_file()]
    assert any('wandb' in path.parts for path in files)
    for written in (result.stdout.encode(), result.stderr.encode(), *(path.read_bytes() for path in files)):
        for name in ('WANDB_API_KEY', 'HF_TOKEN'):
            assert secrets[name].encode() not in written


# Downloads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'what, says', [('cut off', 'broke off after'), ('another content', 'sha256'), ('not https', 'only https')])
def test_a_download_gets_its_name_when_it_is_whole(run, tmp_path, what, says):
    content = b'{"model_type": "gpt2"}' * 1000

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('X-Linked-Etag', f'"{hashlib.sha256(b"x" if what == "another content" else content).hexdigest()}"')
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content[:-100] if what == 'cut off' else content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host = 'example.com' if what == 'not https' else f'127.0.0.1:{server.server_port}'
        hub = {'HF_ENDPOINT': f'http://{host}', 'XDG_CACHE_HOME': str(tmp_path)}
        assert says in last_words(run('sample.py', '--init_from=gpt2', env=hub, code=2))
        server.shutdown()
        thread.join()
    assert not list(tmp_path.rglob('config.json'))


COUNT_LOOKS = '''
import atexit, torch
looks = 0
def counted(real):
    def look(self, *arguments, **options):
        global looks
        looks += 1
        return real(self, *arguments, **options)
    return look
for name in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'):
    setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
atexit.register(lambda: print('LOOKS', looks))
'''


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_steps_between_two_lines_of_the_log_wait_for_nothing_on_the_device(run, arguments, fault, tmp_path, optimizer):
    """Each of these calls would make the processor wait until a GPU has done all that it was told."""
    looks = []
    for steps in (5, 15):
        options = (f'--max_iters={steps}', '--log_interval=1000', '--eval_interval=1000', '--save_interval=1000',
                   f'--optimizer={optimizer}')
        result = run('train.py', f'--out_dir={tmp_path}/{steps}', *arguments, *options, env=fault(COUNT_LOOKS))
        looks.append(int(result.stdout.split('LOOKS')[1]))
    assert looks[0] == looks[1] > 0
