"""Losses and gradients that are not finite: the step is never taken, on any rank."""

import math

import pytest

import checkpoint as ckpt
from helpers import TINY, assert_same_run, error_line, read_log


def test_nonfinite_loss_stops_run_and_keeps_checkpoints(refused, char_data, tmp_path):
    refused(
        'train.py',
        f'--dataset={char_data}',
        f'--out_dir={tmp_path}/out',
        *TINY,
        '--max_iters=40',
        '--eval_interval=2',
        '--learning_rate=1e15',
        '--grad_clip=0',
        '--dtype=float32',
        says=('the loss is', 'learning_rate'),
    )
    assert all(math.isfinite(manifest['val_loss']) for manifest in ckpt.manifests(tmp_path / 'out'))
    assert (tmp_path / 'out' / 'status').read_text() == 'failed\n'


# micro-batches 1 and 2 are the dry run before step 0; after that, each step has two
NONFINITE = """
import os, torch
real, calls = torch.nn.functional.cross_entropy, []
def cross_entropy(*args, **kwargs):
    loss = real(*args, **kwargs)
    if torch.is_grad_enabled():
        calls.append(1)
        if len(calls) in AT and os.environ.get('RANK', RANK) == RANK:
            if WHAT == 'loss':
                return loss * float('nan')
            loss.register_hook(lambda gradient: gradient * float('inf'))
    return loss
torch.nn.functional.cross_entropy = cross_entropy
"""


@pytest.mark.parametrize(
    'what, says',
    [
        ('loss', 'the loss is nan in samples 44 to 47'),
        ('gradient', 'the gradient norm is nan in samples 40 to 47'),
    ],
)
def test_nonfinite_step_is_not_taken(
    run, train_args, patched_env, reference_run, tmp_path, what, says
):
    bad = patched_env(NONFINITE, AT=[14], WHAT=what, RANK='0')
    result = run('train.py', f'--out_dir={tmp_path}/out', *train_args, env=bad, code=2)
    assert f'step 5: {says}' in error_line(result) and '--nonfinite=skip' in result.stderr
    run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume')
    assert_same_run(tmp_path / 'out', reference_run)


def test_nonfinite_step_is_skipped_on_request(run, train_args, patched_env, tmp_path):
    bad = patched_env(NONFINITE, AT=[13], WHAT='loss', RANK='0')
    options = ('--nonfinite=skip', '--save_interval=1', '--keep_last=99')
    result = run('train.py', f'--out_dir={tmp_path}/out', *train_args, *options, env=bad)
    assert 'step 5: the loss is nan in samples 40 to 43: skipped' in result.stdout
    before, after = (ckpt.load(tmp_path / 'out' / f'ckpt_0000000{step}.pt') for step in (5, 7))
    steps_taken = [state.optimizer['state'][0]['step'] for state in (before, after)]
    assert steps_taken == [5, 6] and after.samples_seen == before.samples_seen + 16
    # nothing is saved after a skipped step
    assert not (tmp_path / 'out' / 'ckpt_00000006.pt').exists()
    lines = [line for line in read_log(tmp_path / 'out') if 'loss' in line]
    assert [line['step'] for line in lines if line.get('skipped')] == [5]
    assert lines[5]['loss'] is None
    assert len(lines) == 20 and all(line['loss'] < 10 for line in lines if line['step'] != 5)


def test_nonfinite_step_is_detected_before_next_save(run, train_args, patched_env, tmp_path):
    bad = patched_env(NONFINITE, AT=[13], WHAT='gradient', RANK='0')
    options = ('--log_interval=1000', '--save_interval=4', '--eval_interval=1000')
    result = run('train.py', f'--out_dir={tmp_path}/out', *train_args, *options, env=bad, code=2)
    assert 'step 5: the gradient norm is' in error_line(result)
    assert [manifest['step'] for manifest in ckpt.manifests(tmp_path / 'out')] == [4]


def test_nonfinite_steps_beyond_max_skips_stop_run(run, train_args, patched_env, tmp_path):
    # in steps 1, 2, 4, 5, 6 and 7
    bad = patched_env(NONFINITE, AT=[5, 7, 11, 13, 15, 17], WHAT='loss', RANK='0')
    result = run(
        'train.py',
        f'--out_dir={tmp_path}/out',
        *train_args,
        '--nonfinite=skip',
        '--max_skips=3',
        env=bad,
        code=2,
    )
    assert result.stdout.count('skipped') == 5 and 'step 7: the loss is nan' in error_line(result)


def test_nonfinite_float16_gradients_stop_run_after_max_skips(
    run, train_args, patched_env, tmp_path
):
    bad = patched_env(NONFINITE, AT=list(range(3, 100)), WHAT='gradient', RANK='0')
    result = run(
        'train.py',
        f'--out_dir={tmp_path}/out',
        *train_args,
        '--dtype=float16',
        '--max_skips=4',
        env=bad,
        code=2,
    )
    assert result.stdout.count('skipped') == 4
    assert 'step 4: the gradient norm is' in error_line(result)


def test_nonfinite_loss_on_one_rank_stops_all(ranks, train_args, patched_env, tmp_path):
    # two in the dry run under DDP, then one per step and rank: this is step 3
    bad = patched_env(NONFINITE, AT=[6], WHAT='loss', RANK='1')
    output = ranks(2, f'--out_dir={tmp_path}/out', *train_args, env=bad, code=2)
    assert output.count('train.py: step 3: the loss is nan in samples 28 to 31') == 1, output
    assert not ckpt.manifests(tmp_path / 'out')
