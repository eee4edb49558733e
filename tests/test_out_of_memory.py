"""Out of memory: the micro-batch is halved, and the step keeps its samples."""

import pytest

import checkpoint as ckpt
from helpers import assert_same_run

OUT_OF_MEMORY = """
import torch
real = torch.nn.functional.cross_entropy
def cross_entropy(logits, targets, **options):
    if len(targets) > LIMIT:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    return real(logits, targets, **options)
torch.nn.functional.cross_entropy = cross_entropy
"""


def test_out_of_memory_halves_micro_batch_and_preserves_step(
    run, train_args, patched_env, tmp_path
):
    result = run(
        'train.py',
        f'--out_dir={tmp_path}/small',
        *train_args,
        env=patched_env(OUT_OF_MEMORY, LIMIT=2 * 32),
    )
    message = 'out of memory with batch_size = 4: going on with 2, and 2 times as many'
    assert message in result.stdout
    cut = ('--batch_size=2', '--gradient_accumulation_steps=4', '--eval_iters=4')
    run('train.py', f'--out_dir={tmp_path}/asked', *train_args, *cut)
    assert_same_run(tmp_path / 'small', tmp_path / 'asked')
    assert 'batch_size = 2\n' in (tmp_path / 'small' / 'config.py').read_text()


def test_out_of_memory_is_reported_for_single_sequence(refused, train_args, patched_env, tmp_path):
    for command in ((), ('--gradient_accumulation_steps=3', '--batch_size=3')):
        result = patched_env(OUT_OF_MEMORY, LIMIT=0)
        refused(
            'train.py',
            f'--out_dir={tmp_path}/out',
            *train_args,
            *command,
            env=result,
            says=('out of memory with a single sequence', '--block_size'),
        )


@pytest.mark.slow
def test_out_of_memory_on_one_rank_halves_micro_batch_on_all(
    ranks, train_args, patched_env, tmp_path
):
    only_one = 'import os' + OUT_OF_MEMORY.replace(
        '> LIMIT', "> LIMIT and os.environ['RANK'] == '1'"
    )
    env = patched_env(only_one, LIMIT=2 * 32)
    assert 'going on with 2' in ranks(2, f'--out_dir={tmp_path}/out', *train_args, env=env)
    assert ckpt.load(tmp_path / 'out').step == 20
