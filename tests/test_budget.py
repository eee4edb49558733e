"""Budgets in tokens, FLOPs and minutes, and patience."""

import shutil

import pytest

import checkpoint as ckpt
from configurator import TrainConfig
from helpers import TINY, assert_same_run, log_lines
from lib.budget import schedule_step, set_max_iters
from lib.recipe import read_train_config
from optimizer import lr_multiplier

T, PER_STEP = 32, 32 * 4 * 2  # tokens of a sequence, and of a step
KEYS = (*TINY, '--gradient_accumulation_steps=2', '--eval_interval=4', '--keep_last=9')


@pytest.fixture
def command(char_data):
    return ('train.py', *KEYS, f'--dataset={char_data}')


def flops_per_token(vocab_size):
    """6 per weight in a matrix product, 12 per layer, channel and position of attention (Chowdhery
    et al. 2022, PaLM, appendix B), of TINY: 2 layers of 32."""
    return 6 * (2 * 12 * 32**2 + 32 * vocab_size) + 12 * 2 * 32 * T


@pytest.mark.parametrize(
    'key', ['target_tokens', pytest.param('target_flops', marks=pytest.mark.slow)]
)
def test_interrupted_budget_equals_the_unbroken_one_bitwise(run, command, key, tmp_path):
    """As if the run had been killed after step 4."""
    budget = 12.3 * PER_STEP
    if key == 'target_flops':
        run(*command, f'--out_dir={tmp_path}/short', '--max_iters=1')
        budget *= flops_per_token(ckpt.load(tmp_path / 'short').model_config['vocab_size'])
    run(*command, f'--out_dir={tmp_path}/whole', '--dropout=0.1', f'--{key}={int(budget)}')
    lrs = log_lines(tmp_path / 'whole', 'lr')
    assert len(lrs) == 12 and lrs[-1]['lr'] < 0.15 * 3e-3  # the schedule ends with the budget
    shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
    for path in tmp_path.glob('parts/ckpt_*'):
        if path.stem != 'ckpt_00000004':
            path.unlink()
    run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/parts')
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


@pytest.mark.slow
def test_another_budget_replaces_the_one_of_the_run(run, command, tmp_path):
    out = f'--out_dir={tmp_path}/out'
    run(*command, out, f'--target_tokens={4 * PER_STEP}')
    run('train.py', out, '--init_from=resume', f'--target_tokens={6 * PER_STEP}')
    assert ckpt.load(tmp_path / 'out').step == 6
    run('train.py', out, '--init_from=resume', '--max_iters=7')
    assert ckpt.load(tmp_path / 'out').step == 7
    # steps of half the size: the samples so far count
    run('train.py', out, '--init_from=resume', f'--target_tokens={8 * PER_STEP}', '--batch_size=2')
    checkpoint = ckpt.load(tmp_path / 'out')
    assert (checkpoint.step, checkpoint.samples_seen * T) == (9, 8 * PER_STEP)


@pytest.mark.parametrize('key', ['target_tokens', 'target_flops'])
@pytest.mark.parametrize('steps', [12.3, 12.5, 12.7, 13.5])
def test_budget_has_the_same_steps_from_wherever_it_is_resumed(key, steps):
    per_token = 12345.6789 if key == 'target_flops' else 1
    config = TrainConfig(batch_size=4, gradient_accumulation_steps=2)
    setattr(config, key, steps * PER_STEP * per_token)
    found = set()
    for step in range(12):
        set_max_iters(config, 12345.6789, T, step, 8 * step)
        found.add(config.max_iters)
    assert found == {int(steps + 0.5)}


def test_dial_takes_batch_from_the_budget():
    def tokens_per_step(*flags):
        config, _ = read_train_config(['--depth=4', '--block_size=128', *flags])
        assert config.max_iters > 0
        return config.batch_size * config.gradient_accumulation_steps * 128

    n_params = 12 * 4 * 256**2
    assert tokens_per_step() == 2**14  # 2.6 * (20 * n_params)**0.5 = 20,622
    assert tokens_per_step('--target_tokens=1e6') == 2**11  # 2,600
    assert tokens_per_step(f'--target_flops={6e6 * n_params}') == 2**11


def test_schedule_follows_time():
    config = TrainConfig(max_minutes=2, max_iters=100, warmup_iters=0, schedule='linear', min_lr=0)
    for seconds, multiplier in ((0, 1), (30, 0.75), (90, 0.25), (120, 0), (500, 0)):
        # whatever the step
        assert lr_multiplier(schedule_step(config, 7, seconds), config) == multiplier


@pytest.mark.slow
def test_time_that_was_used_is_kept(run, command, tmp_path):
    out = f'--out_dir={tmp_path}/out'
    run(*command, out, '--max_minutes=0.01', '--schedule=linear', '--min_lr=0')
    first = ckpt.load(tmp_path / 'out')
    assert first.seconds >= 0.6
    rates = [line['lr'] for line in log_lines(tmp_path / 'out', 'lr')]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < rates[2]  # after warmup
    output = run('train.py', out, '--init_from=resume').stdout
    assert 'max_minutes = 0.01 is reached' in output
    assert ckpt.load(tmp_path / 'out').step == first.step
    run('train.py', out, '--init_from=resume', '--max_minutes=0.015')
    second = ckpt.load(tmp_path / 'out')
    assert second.seconds >= 0.9 and second.step > first.step


def test_patience_ends_a_run_that_no_longer_improves(run, command, tmp_path):
    """At such a rate fp32 weights stay what they are."""
    out, flags = f'--out_dir={tmp_path}/out', ('--learning_rate=1e-30', '--weight_decay=0')
    output = run(*command, out, *flags, '--max_iters=40', '--patience=3').stdout
    assert 'no lower val loss since step 0 (patience = 3)' in output
    assert (tmp_path / 'out' / 'status').read_text() == 'done\n'
    assert ckpt.load(tmp_path / 'out').step == 12
    for patience, step in ((3, 12), (4, 16)):
        run('train.py', out, '--init_from=resume', f'--patience={patience}')
        checkpoint = ckpt.load(tmp_path / 'out')
        assert (checkpoint.step, checkpoint.best_step) == (step, 0)


def test_patience_lets_an_improving_run_finish(run, command, tmp_path):
    run(*command, f'--out_dir={tmp_path}/out', '--max_iters=12', '--patience=1')
    checkpoint = ckpt.load(tmp_path / 'out')
    assert (checkpoint.step, checkpoint.best_step) == (12, 12)


@pytest.mark.parametrize(
    'flags, says',
    [
        (('--target_tokens=1e6', '--max_iters=5'), '--target_tokens and --max_iters: give one'),
        (('--target_flops=1e6', '--max_minutes=5'), '--target_flops and --max_minutes: give one'),
        (('--target_tokens=100',), ('target_tokens = 100: a step takes 256', 'give more')),
        (('--target_flops=1e4',), ('target_flops = 10,000', 'give more')),
        (('--target_tokens=1.5',), 'target_tokens = 1.5'),
        (('--max_minutes=0',), 'max_minutes = 0'),
        (('--patience=0',), 'patience = 0'),
    ],
)
def test_impossible_budgets_are_refused(refused, command, tmp_path, flags, says):
    refused(*command, f'--out_dir={tmp_path}/out', *flags, says=says)
    assert not (tmp_path / 'out').exists()
