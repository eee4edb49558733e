"""Resuming: bitwise equality, damaged checkpoints, changed data and changed environments."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from helpers import (
    TINY,
    Evil,
    assert_same_run,
    deep_equal,
    error_line,
    folder_contents,
    log_lines,
    read_log,
)


def test_resume_matches_uninterrupted_run(run, char_data, tmp_path):
    common = (
        *TINY,
        f'--dataset={char_data}',
        '--max_iters=14',
        '--eval_interval=7',
        '--dropout=0.2',
        '--batch_size=2',
        '--gradient_accumulation_steps=3',
        '--dtype=float16',
    )
    run('train.py', f'--out_dir={tmp_path}/whole', *common)
    run('train.py', f'--out_dir={tmp_path}/parts', *common, '--max_iters=7', '--lr_decay_iters=14')
    # everything else comes from the checkpoint
    result = run('train.py', f'--out_dir={tmp_path}/parts', '--init_from=resume', '--max_iters=14')
    assert 'step 7:' in result.stdout and 'step 6:' not in result.stdout
    for key in ('loss', 'val_loss'):
        whole, parts = (
            [line[key] for line in log_lines(tmp_path / name, key)] for name in ('whole', 'parts')
        )
        assert whole == parts and len(whole) == (14 if key == 'loss' else 3)
    whole, parts = ckpt.load(tmp_path / 'whole'), ckpt.load(tmp_path / 'parts')
    assert all(torch.equal(whole.model[name], parts.model[name]) for name in whole.model)
    assert parts.scaler == whole.scaler and parts.scaler['_growth_tracker'] == 14


def test_resume_validates_merged_config(run, refused, char_data, tmp_path):
    common = (f'--out_dir={tmp_path}/out', '--init_from=resume')
    run(
        'train.py',
        f'--out_dir={tmp_path}/out',
        f'--dataset={char_data}',
        *TINY,
        '--max_iters=2',
        '--learning_rate=1e-2',
    )
    run('train.py', *common, '--max_iters=4', '--min_lr=2e-3')
    refused('train.py', *common, '--max_iters=6', '--learning_rate=1e-3', says='min_lr = 0.002')


def test_resume_reports_finished_run(run, tmp_path, char_data):
    result = run(
        'train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', '--max_iters=0', *TINY
    )
    assert ckpt.load(tmp_path / 'out').step == 0
    result = run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/out')
    assert 'max_iters = 0 is reached' in result.stdout


def flip_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


DAMAGED = {  # step of the checkpoint: (how it is damaged, message)
    8: (flip_bit, 'its sha256 does not match'),
    10: (lambda path: path.write_bytes(path.read_bytes()[:-1000]), 'bytes instead of'),
    11: (lambda path: path.write_bytes(b''), 'it has 0 bytes'),
    12: (lambda path: path.unlink(), 'the file is missing'),
    14: (
        lambda path: path.with_suffix('.json').write_bytes(b'\xff\x00garbage'),
        '.json is damaged',
    ),
    16: (
        lambda path: path.with_suffix('.json').write_text('{"step": 20, "sha'),
        '.json is damaged',
    ),
    18: (lambda path: path.with_suffix('.json').write_text('[1]'), '.json is damaged'),
    20: (lambda path: torch.save(Evil('ran'), path), 'bytes instead of'),
}


def test_resume_skips_and_reports_damaged_checkpoints(run, train_args, reference_run, tmp_path):
    out_dir = tmp_path / 'out'
    run('train.py', f'--out_dir={out_dir}', *train_args, '--save_interval=1', '--keep_last=14')
    for step, (damage, _) in DAMAGED.items():
        damage(out_dir / f'ckpt_{step:08d}.pt')
    for step in (9, 13, 15, 17, 19):
        (out_dir / f'ckpt_{step:08d}.json').unlink()
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--save_interval=4')
    for step, (_, message) in DAMAGED.items():
        assert any(
            f'ckpt_{step:08d}' in line and message in line for line in result.stderr.splitlines()
        ), result.stderr
    assert 'step 7:' in result.stdout and 'step 6:' not in result.stdout
    assert read_log(out_dir) == read_log(reference_run)
    assert deep_equal(ckpt.load(out_dir).model, ckpt.load(reference_run).model)
    assert not (tmp_path / 'ran').exists() and not Path('ran').exists()


def damage_all(out_dir):
    for path in out_dir.glob('*.pt'):
        flip_bit(path)


def remove_manifests(out_dir):
    for path in out_dir.glob('*.json'):
        path.unlink()


def modify_checkpoint(out_dir, **change):
    """Change fields of the newest checkpoint and make its manifest match."""
    path = out_dir / 'ckpt_00000020.pt'
    torch.save(torch.load(path, weights_only=True) | change, path)
    update_manifest(path)


def update_manifest(path):
    manifest = json.loads(path.with_suffix('.json').read_text())
    manifest |= {
        'bytes': path.stat().st_size,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix('.json').write_text(json.dumps(manifest))


def save_evil_pickle(out_dir):
    torch.save({'model': {'x': Evil(str(out_dir / 'ran'))}}, out_dir / 'ckpt_00000020.pt')
    update_manifest(out_dir / 'ckpt_00000020.pt')


def save_wrong_shapes(out_dir):
    state = ckpt.load(out_dir).optimizer
    buffer = next(s for s in state['state'].values() if 'momentum_buffer' in s)
    buffer['momentum_buffer'] = torch.zeros(3, 3)
    modify_checkpoint(out_dir, optimizer=state)


REFUSED = {  # case: (how the run's folder is changed, options, message)
    'all checkpoints damaged': (damage_all, (), 'every checkpoint in it is damaged'),
    'no manifest': (remove_manifests, (), 'no manifest to verify it'),
    'pickle that runs code': (save_evil_pickle, (), 'refused: it would run io.open'),
    'other architecture requested': (lambda out_dir: None, ('--n_layer=3',), 'n_layer = 3 but'),
    'other architecture saved': (
        lambda out_dir: modify_checkpoint(out_dir, model_config={'n_layer': 1}),
        (),
        'do not fit the model',
    ),
    'no optimizer state': (
        lambda out_dir: modify_checkpoint(out_dir, optimizer=None),
        (),
        'has no optimizer state',
    ),
    'optimizer state of other shape': (save_wrong_shapes, (), 'momentum_buffer has shape (3, 3)'),
    'state of other optimizer': (
        lambda out_dir: None,
        ('--optimizer=adamw',),
        'optimizer state does not fit',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_resume_refuses_unusable_run_and_changes_nothing(run, out_dir, case):
    damage, options, message = REFUSED[case]
    damage(out_dir)
    before = folder_contents(out_dir)
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', *options, code=2)
    assert message in error_line(result)
    assert folder_contents(out_dir) == before


def test_resume_keeps_foreign_files(run, out_dir):
    # the third one belongs to a step that the run will reach
    foreign = ['ckpt_best.pt', 'ckpt_best.json', 'ckpt_00000024.pt', 'notes.tmp']
    for name in foreign:
        shutil.copy(
            out_dir / f'ckpt_00000016{Path(name).suffix.replace("tmp", "pt")}', out_dir / name
        )
    before = folder_contents(out_dir)
    result = run(
        'train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=32', '--keep_last=1'
    )
    assert 'ckpt_00000024.pt has no manifest to verify it and is skipped' in result.stderr
    after = folder_contents(out_dir)
    for name in foreign:
        assert before[name] in (after.get(name), after.get(name + '.unchecked')), name


def test_resume_ignores_manifest_path_outside_out_dir(run, reference_run, out_dir):
    outside = out_dir.parent / 'outside.pt'
    outside.write_bytes(b'precious')
    for path in out_dir.glob('ckpt_*.json'):
        path.write_text(json.dumps(json.loads(path.read_text()) | {'file': '../outside.pt'}))
    run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=32')
    assert outside.read_bytes() == b'precious'
    assert ckpt.load(out_dir).step == 32 and not (out_dir / 'ckpt_00000016.pt').exists()


def overwrite_ids(path, at, ids):
    tokens = np.fromfile(path, dtype='<u2')
    tokens[at] = ids
    tokens.tofile(path)


def swap_ids(path):
    tokens = np.fromfile(path, dtype='<u2')
    i = np.argmax(tokens[1:] != tokens[:-1])  # the first two neighbors that differ
    overwrite_ids(path, slice(i, i + 2), tokens[[i + 1, i]])


BROKEN_DATA = {
    'changed since the checkpoint': (
        lambda data: swap_ids(data / 'train.bin'),
        'has changed since',
    ),
    'odd size': (lambda data: (data / 'train.bin').write_bytes(b'123'), 'not a multiple of 2'),
    'empty': (lambda data: (data / 'val.bin').write_bytes(b''), 'val.bin: its size, 0 bytes'),
    'missing': (lambda data: (data / 'train.bin').unlink(), 'there is no train.bin in'),
    'id beyond the vocabulary': (
        lambda data: overwrite_ids(data / 'train.bin', 5000, 60000),
        'token id 60000 at position 5000',
    ),
    'cut off': (lambda data: os.truncate(data / 'train.bin', 2000), 'where meta.json says'),
    'garbage meta.json': (lambda data: (data / 'meta.json').write_text('{'), 'meta.json'),
}


@pytest.mark.parametrize('case', BROKEN_DATA)
def test_resume_reports_broken_or_changed_data(run, refused, char_data, out_dir, tmp_path, case):
    data = shutil.copytree(char_data, tmp_path / 'data')
    config = torch.load(out_dir / 'ckpt_00000020.pt', weights_only=True)['config']
    modify_checkpoint(out_dir, config=config | {'dataset': str(data)})
    damage, message = BROKEN_DATA[case]
    damage(data)
    before = folder_contents(out_dir)
    refused(
        'train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=24', says=message
    )
    assert folder_contents(out_dir) == before


def test_resume_keeps_best_checkpoint(run, train_args, tmp_path):
    options = ('--always_save_checkpoint=False', '--save_interval=1000')
    run('train.py', f'--out_dir={tmp_path}/out', *train_args, *options, '--max_iters=10')
    run(
        'train.py',
        f'--out_dir={tmp_path}/out',
        '--init_from=resume',
        '--max_iters=24',
        '--learning_rate=1',
        '--min_lr=1',
        '--muon_learning_rate=1',
        '--keep_last=9',
    )
    losses = {
        line['step']: line['val_loss'] for line in read_log(tmp_path / 'out') if 'val_loss' in line
    }
    assert losses[16] > losses[8]
    assert [m['step'] for m in ckpt.manifests(tmp_path / 'out')] == [24, 10, 8]


BACKWARD_CLOCK = """
import time
now = 2e9
def clock():
    global now
    now -= 3600
    return now
time.time = time.perf_counter = clock
"""


def test_resume_ignores_clock_going_backwards(run, patched_env, reference_run, out_dir):
    for step, age in ((16, 0), (20, 10**6)):  # the newest checkpoint has the oldest mtime
        for suffix in ('pt', 'json'):
            os.utime(out_dir / f'ckpt_000000{step}.{suffix}', (1e9 - age, 1e9 - age))
    result = run(
        'train.py',
        '--init_from=resume',
        f'--out_dir={out_dir}',
        '--max_iters=24',
        env=patched_env(BACKWARD_CLOCK),
    )
    assert 'step 20:' in result.stdout and 'step 19:' not in result.stdout
    assert [line['step'] for line in read_log(out_dir) if 'loss' in line] == list(range(24))
    assert ckpt.load(out_dir).step == 24


@pytest.mark.slow
def test_resume_reports_changed_environment(run, out_dir):
    result = run(
        'train.py',
        '--init_from=resume',
        f'--out_dir={out_dir}',
        '--max_iters=21',
        env={'OMP_NUM_THREADS': '2'},
    )
    assert 'not be bitwise the same (threads 1 then, 2 now)' in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resume_is_bitwise_exact_with_two_threads(run, train_args, tmp_path, compile):
    whole, parts, threads = tmp_path / 'whole', tmp_path / 'parts', {'OMP_NUM_THREADS': '2'}
    result = run(
        'train.py',
        f'--out_dir={whole}',
        *train_args,
        f'--compile={compile}',
        '--n_layer=1',
        '--max_iters=8',
        env=threads,
    )
    assert ('compiling' in result.stdout) == compile
    assert 'torch.compile failed' not in result.stdout
    shutil.copytree(whole, parts)
    (parts / 'ckpt_00000008.pt').unlink()
    run('train.py', f'--out_dir={parts}', '--init_from=resume', env=threads)
    assert_same_run(parts, whole)


def test_resume_says_what_a_config_file_changes(run, out_dir, tmp_path):
    (tmp_path / 'mine.py').write_text("learning_rate = 1e-5\nn_layer = 2\nout_dir = 'x'\n")
    output = run('train.py', tmp_path / 'mine.py', '--init_from=resume', f'--out_dir={out_dir}',
                 '--eval_only').stdout
    before = ckpt.load(out_dir).config['learning_rate']
    assert f'note: {tmp_path}/mine.py changes learning_rate from {before} to 1e-05\n' in output
    assert output.count('changes') == 1
    assert f'the keys of the run, {tmp_path}/mine.py with out_dir = ' in output


def test_resume_on_other_data_forgets_best_val_loss(run, out_dir, clone, text):
    rare = [c for c in text.swapcase() if c in text]  # so the loss is higher
    (clone / 'other.txt').write_text(''.join(rare))
    tokenizer = ('data/text/prepare.py', f'--input={clone}/other.txt', f'--init_from={out_dir}')
    run(*tokenizer, '--dataset=other')
    best = ckpt.load(out_dir).best_val_loss
    resume = ('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=21')
    run(*resume, '--dataset=other', '--eval_interval=1000')
    found = ckpt.load(out_dir)
    assert found.step == 21 and found.best_val_loss == found.val_loss > best
