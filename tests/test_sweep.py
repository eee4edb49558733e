"""tools/sweep.py: values and ranges, halving, a table that tells differences from noise."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

import sweep
from configurator import TrainConfig
from helpers import ROOT, TINY, assert_same_run, log_lines, step_losses
from lib import jobs
from lib.errors import UserError
from lib.noise import compare, p_value
from lib.recipe import read_train_config
from lib.run import write_config
from lib.trials import Range, combinations, read_values, rungs

QUICKSTART = 'config/quickstart.py'


def write_tiny_config(path, dataset):
    lines = [flag.removeprefix('--').replace('device=cpu', "device='cpu'") for flag in TINY]
    path.write_text('\n'.join([*lines, f"dataset = '{dataset}'", 'max_iters = 20', '']))


def read_rows(table):
    return [[cell.strip() for cell in line.strip('| ').split('|')] for line in table.splitlines()]


def run_folders(out_dir):
    return sorted(path.name for path in out_dir.iterdir() if path.is_dir())


@pytest.mark.slow
def test_sweep_trains_each_value_and_ranks_them(run, refused, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    command = ('tools/sweep.py', tmp_path / 'tiny.py', f'--out_dir={tmp_path}/sweep')
    (tmp_path / 'sweep').mkdir()
    (tmp_path / 'precious').write_text('mine')
    (tmp_path / 'sweep' / 'table.md').symlink_to(tmp_path / 'precious')
    refused(*command, '--learning_rate=1e-5,1e-2', says='table.md is not of tools/sweep.py: move')
    assert run_folders(tmp_path / 'sweep') == []
    (tmp_path / 'sweep' / 'table.md').unlink()
    output = run(*command, '--learning_rate=1e-5,1e-2').stdout
    assert run_folders(tmp_path / 'sweep') == ['learning_rate=1e-2', 'learning_rate=1e-5']
    assert (tmp_path / 'precious').read_text() == 'mine'
    table = (tmp_path / 'sweep' / 'table.md').read_text()
    assert table.strip() in output
    rows = read_rows(table)
    assert [row[0] for row in rows[2:]] == ['0.01', '1e-05']  # best first


@pytest.mark.slow
def test_sweep_trains_each_combination_once_and_ranks_them(run, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    command = (
        'tools/sweep.py',
        tmp_path / 'tiny.py',
        f'--out_dir={tmp_path}/sweep',
        '--learning_rate=1e-5,1e-2',
        '--seed=1,2',
    )
    first = run(*command)
    assert run_folders(tmp_path / 'sweep') == [
        f'learning_rate={rate},seed={seed}' for rate in ('1e-2', '1e-5') for seed in (1, 2)
    ]
    table = (tmp_path / 'sweep' / 'table.md').read_text()
    assert table.strip() in first.stdout
    rows = read_rows(table)
    assert rows[0] == ['learning_rate', 'seeds', 'steps', 'val loss', 'difference', 'train loss',
                       'tokens/s']  # fmt: skip
    # one line for both seeds, best first
    assert [row[:3] for row in rows[2:]] == [['0.01', '2', '20'], ['1e-05', '2', '20']]
    losses = [
        [log_lines(tmp_path / 'sweep' / f'learning_rate={rate},seed={seed}', 'val_loss')[-1]
         ['val_loss'] for seed in (1, 2)] for rate in ('1e-2', '1e-5')
    ]  # fmt: skip
    mean, error = statistics.mean(losses[0]), statistics.stdev(losses[0]) / math.sqrt(2)
    assert rows[2][3:5] == [f'{mean:.4f} ± {error:.4f}', 'best']
    differences = [worse - better for better, worse in zip(*losses)]  # the seeds are the same
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(2)
    assert rows[3][4].startswith(f'{mean:+.4f} ± {error:.4f}')
    page = (tmp_path / 'sweep' / 'runs.html').read_text()
    assert 'plainGPT runs' in page and f'{tmp_path}/sweep/runs.html: ' in first.stdout

    # only the truncated run continues, and further values extend the table
    broken = tmp_path / 'sweep' / 'learning_rate=1e-2,seed=2'
    lines = (broken / 'log.jsonl').read_text().splitlines(keepends=True)
    (broken / 'log.jsonl').write_text(
        ''.join(line for line in lines if json.loads(line)['step'] < 15)
    )
    for path in broken.glob('ckpt_00000020.*'):
        path.unlink()
    (broken / 'status').write_text('running 1\n')  # as a killed run leaves it
    again = run(*command[:3], '--learning_rate=1e-5,1e-2,1e-3', '--seed=1,2')
    assert again.stdout.count('already done') == 3 and again.stdout.count('step 0: train loss') == 2
    assert len((tmp_path / 'sweep' / 'table.md').read_text().splitlines()) == 5


@pytest.mark.parametrize(
    'argv, says',
    [
        (
            ('config/quickstart.py', '--learning_rte=1,2'),
            'learning_rte: no such key; did you mean learning_rate?',
        ),
        (('config/quickstart.py', '--n_layer=2,two'), "n_layer = 'two': expected int"),
        (('config/quickstart.py', '--batch_size=4,0'), 'batch_size = 0: give at least 1'),
        (('--n_layer=2,4',), 'name a config file'),
        (('config/quickstart.py', '--n_layer', '4'), 'write --key=value'),
        (('config/quickstart.py', '--dataset=nowhere'), "dataset = 'nowhere'"),
    ],
)
def test_sweep_reports_mistakes_before_training(refused, clone, argv, says):
    refused('tools/sweep.py', *argv, says=says)
    assert not (clone / 'sweep-quickstart').exists()


@pytest.mark.slow
def test_sweep_with_many_keys_has_short_stable_folder_names(run, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    keys = ('gradient_accumulation_steps=1', 'muon_learning_rate=0.02', 'muon_momentum=0.95')
    keys += ('embedding_learning_rate=0.001', 'weight_decay=0.1', 'wandb_project=a-long-name')
    keys += ('wandb_run_name=another-long-name', 'label_smoothing=0.0', 'decay_fraction=0.2')
    keys += ('activation_checkpointing=False', 'always_save_checkpoint=True', 'max_iters=2')
    command = ['tools/sweep.py', '~/tiny.py', '--out_dir=~/sweep', *(f'--{key}' for key in keys)]
    home = {'HOME': str(tmp_path)}
    run(*command, '--seed=1,2', env=home)
    folders = run_folders(tmp_path / 'sweep')
    assert [name.rpartition(',')[0] for name in folders] == ['seed=1', 'seed=2']  # and a hash
    assert run(*command, '--seed=2,1', env=home).stdout.count('already done') == 2


@pytest.mark.slow
def test_sweep_with_failed_runs_finishes_the_others_and_exits_with_1(run, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    # in a folder name a slash becomes an underscore
    (tmp_path / 'a').mkdir()
    for name in ('a/b', 'a_b'):
        (tmp_path / name).symlink_to(char_data)
    (tmp_path / 'broken').mkdir()
    for split in ('train', 'val'):
        (tmp_path / 'broken' / f'{split}.bin').write_bytes(b'odd')
    datasets = ','.join(f'{tmp_path}/{name}' for name in ('broken', 'a/b', 'a_b'))
    command = ('tools/sweep.py', tmp_path / 'tiny.py', '--max_iters=2')
    result = run(*command, f'--out_dir={tmp_path}/sweep', f'--dataset={datasets}', code=1)
    assert '1 of 3 runs failed: ' in result.stdout and 'already done' not in result.stdout
    assert 'Traceback' not in result.stderr
    table = (tmp_path / 'sweep' / 'table.md').read_text()
    assert table.strip() in result.stdout
    assert len(table.splitlines()) == 4 and f'{tmp_path}/a/b ' in table

    command = (*command, f'--dataset={tmp_path}/broken', f'--out_dir={tmp_path}/none')
    result = run(*command, code=1)
    assert f'{tmp_path}/none: no run has finished' in result.stdout
    assert 'Traceback' not in result.stderr


def test_sweep_help_lists_its_keys_and_those_of_train(run):
    output = run('tools/sweep.py', '--help').stdout
    train = run('train.py', '--help').stdout
    for key in TrainConfig.__dataclass_fields__:
        (line,) = [line for line in train.splitlines() if line.startswith(f'  --{key}=')]
        assert line in output.splitlines()
    assert '[--switch ...]' not in output  # which a sweep does not take


@pytest.mark.slow
def test_sweep_of_another_config_does_not_take_runs_for_its_own(run, refused, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    command = ('tools/sweep.py', tmp_path / 'tiny.py', f'--out_dir={tmp_path}/sweep', '--seed=1,2')
    run(*command)
    text = (tmp_path / 'tiny.py').read_text()
    (tmp_path / 'tiny.py').write_text(text + 'learning_rate = 1e-2\n')
    refused(*command, says=('seed=1 holds a run with other values of learning_rate', '--out_dir'))
    (tmp_path / 'tiny.py').write_text(text + 'min_lr = 0.0\nhead_size = 8\n')
    refused(*command, says='seed=1 holds a run with other values of head_size, min_lr')
    (tmp_path / 'tiny.py').write_text(text)
    config = tmp_path / 'sweep' / 'seed=1' / 'config.py'
    saved = config.read_text()
    config.write_text(saved + 'min_lr = 0.0\nhead_size = 8\n')
    refused(*command, says='seed=1 holds a run with other values of head_size, min_lr')
    config.write_text('(')
    refused(*command, says=('seed=1', 'config.py cannot be read'))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['pairs', 'finetuned'])
def test_sweep_knows_the_keys_that_follow_from_data_or_weights(run, trained, clone, prepare_pairs,
                                                                 char_data, tmp_path, kind):
    """The same command continues."""
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    flags = ['--max_iters=4', '--learning_rate=1e-3,3e-3', f'--out_dir={tmp_path}/sweep']
    if kind == 'pairs':
        data = prepare_pairs([(f'a{i}', f'b{i}') for i in range(200)], '--block_size=32')
        flags += [f'--dataset={data}']
    else:
        (tmp_path / 'tiny.py').write_text(f"device = 'cpu'\nbatch_size = 4\neval_iters = 2\n"
                                          f"dataset = '{char_data}'\ninit_from = '{trained}'\n"
                                          f"gradient_accumulation_steps = 1\n")
    command = ('tools/sweep.py', tmp_path / 'tiny.py', *flags)
    run(*command)
    again = run(*command).stdout
    assert again.count('already done') == 2


def test_an_out_dir_that_cannot_hold_the_results_is_refused_first(char_data, tmp_path):
    argv = [QUICKSTART, f'--dataset={char_data}', '--seed=1,2']
    for name in ('table.md', 'runs.html'):
        folder = tmp_path / name.partition('.')[0]
        folder.mkdir()
        (folder / name).write_text('mine')
        with pytest.raises(UserError, match=f'{name} is not of tools/sweep.py'):
            sweep.check_runs(folder, sweep.read_command([*argv, f'--out_dir={folder}'])[1])
        assert (folder / name).read_text() == 'mine' and len(list(folder.iterdir())) == 1
    for flag in ('--eval_only=True', '--init_from=resume', '--max_iters=0'):
        with pytest.raises(UserError, match=f'{flag[2:].replace("=", " = ")}: the runs of a sweep'):
            sweep.read_command([*argv, flag])
    with pytest.raises(UserError, match='cannot write there'):
        jobs.make_folder(Path('/sys/kernel'))
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(UserError, match='choose another --out_dir'):
        sweep.check_runs(tmp_path / 'file', sweep.read_command([*argv])[1])


# Values and ranges --------------------------------------------------------------------------------


def test_random_draws_are_spread_over_their_range_and_end_at_its_ends():
    rate = read_values('learning_rate', 'log:1e-4:1e-2')
    drawn = sorted(rate.draw(f'0 {trial} learning_rate') for trial in range(2000))
    assert drawn[0] >= 1e-4 and drawn[-1] <= 1e-2
    # the quartiles of a log-uniform variable; 4 standard errors are 0.06 decades
    for share, exponent in ((0.25, -3.5), (0.5, -3), (0.75, -2.5)):
        assert math.log10(drawn[int(2000 * share)]) == pytest.approx(exponent, abs=0.1)
    drop = read_values('dropout', 'uniform:0:0.3')
    drawn = sorted(drop.draw(f'0 {trial} dropout') for trial in range(2000))
    assert drawn[0] >= 0 and drawn[1000] == pytest.approx(0.15, abs=0.015) and drawn[-1] <= 0.3
    for kind in ('uniform', 'log'):
        layers = read_values('n_layer', f'{kind}:1:4')
        assert {layers.draw(str(trial)) for trial in range(200)} == {1, 2, 3, 4}
    assert all(len(str(rate.draw(str(trial)))) <= 9 for trial in range(200))


def test_a_draw_depends_on_seed_trial_and_key_alone():
    rate = Range('log', 1e-4, 1e-2)
    more = {'n_layer': ['2', '4'], 'dropout': Range('uniform', 0.0, 0.5)}
    choices = combinations({'learning_rate': rate}, 3, seed=0)
    assert combinations({'learning_rate': rate}, 5, seed=0)[:3] == choices
    rates = [choice['learning_rate'] for choice in choices]
    crossed = combinations(more | {'learning_rate': rate}, 3, seed=0)
    assert [choice['learning_rate'] for choice in crossed] == [r for r in rates for _ in range(2)]
    assert len({choice['learning_rate'] for choice in combinations({'learning_rate': rate}, 3, 1)}
               - set(rates)) == 3  # fmt: skip
    # equal in every version of Python, or the same command would not continue
    assert rates == ['0.006068', '0.0004178', '0.001172']


def test_a_range_and_a_grid_make_folders_named_by_the_varied_keys():
    keys = [f'--{key}={value}' for key, value in vars(TrainConfig()).items()
            if key not in ('out_dir', 'depth', 'learning_rate', 'seed', 'n_layer')]  # fmt: skip
    config, runs = sweep.read_command(
        [QUICKSTART, '--n_layer=2,4', '--learning_rate=log:1e-4:1e-2', '--trials=3', *keys])
    assert config.out_dir == 'sweep-quickstart'
    assert len({run.folder for run in runs}) == 6
    for run in runs:
        n_layer, rate, digest = run.folder.name.split(',')
        assert n_layer == f'n_layer={run.config.n_layer}' and len(digest) == 8
        assert float(rate.removeprefix('learning_rate=')) == run.config.learning_rate


def test_draws_that_are_equal_are_one_run():
    _, runs = sweep.read_command([QUICKSTART, '--n_layer=uniform:2:3', '--trials=20', '--seed=1,1'])
    assert [run.folder.name for run in runs] == ['n_layer=3,seed=1', 'n_layer=2,seed=1']


@pytest.mark.parametrize(
    'argv, says',
    [
        (('--learning_rate=log:1e-4:1e-2',), '--trials=20'),
        (('--learning_rate=1e-4,1e-2', '--trials=3'), 'which key to draw'),
        (('--dropout=log:0:0.3', '--trials=3'), 'LOW more than 0'),
        (('--learning_rate=uniform:2:1', '--trials=3'), 'write uniform:LOW:HIGH'),
        (('--n_layer=uniform:1:2.5', '--trials=3'), 'n_layer = 2.5: expected int'),
        (('--activation=uniform:1:2', '--trials=3'), 'expected gelu'),
        (('--qk_norm=uniform:0:1', '--trials=3'), 'qk_norm is not a number'),
        (('--learning_rte=log:1:2', '--trials=3'), 'did you mean learning_rate?'),
        (('--learning_rate=log:1e-4:1e-2', '--trials=0'), 'trials = 0: give at least 1'),
        (('--seed=1,2', '--halving=1'), 'halving = 1: give at least 2'),
        (('--n_layer=1,2,3,4', '--halving=2', '--max_iters=3'), 'at least 4 steps'),
        (('--n_layer=1,2', '--halving=2', '--lr_decay_iters=99'), 'lr_decay_iters = 99'),
        (('--n_layer=1,2', '--halving=2', '--max_minutes=1'), 'max_minutes: the last step must'),
        (('--n_layer=uniform:1:4', '--trials=5001', '--seed=1,2'), '10,002 runs'),
    ],
)
def test_ranges_and_halving_refuse_what_they_cannot_do(argv, says):
    with pytest.raises(UserError, match=says.replace('?', '[?]')):
        sweep.read_command([QUICKSTART, *argv])


def test_a_model_that_cannot_be_built_is_refused_before_training(refused):
    refused('tools/sweep.py', QUICKSTART, '--n_embd=64,65',
            says='n_embd = 65 is not divisible by n_head = 4')  # fmt: skip


# Noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    't, freedom, p',
    [  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: critical values of Student's t
        (12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.228, 10, 0.05),
        (2.042, 30, 0.05), (6.314, 1, 0.1), (1.886, 2, 0.2), (9.925, 2, 0.01), (4.604, 4, 0.01),
        (3.169, 10, 0.01), (10.215, 3, 0.002), (1.984, 100, 0.05),
    ],
)  # fmt: skip
def test_p_values_are_those_of_a_printed_table(t, freedom, p):
    assert p_value(t, freedom) == p_value(-t, freedom) == pytest.approx(p, rel=1e-3)


def test_the_t_tests_agree_with_student_on_his_data():
    """Student 1908, extra sleep of ten patients with two drugs; t.test(extra ~ group, data = sleep)
    in R prints -1.8608, 17.776, 0.07939, and with paired = TRUE -4.0621, 9, 0.002833."""
    a = dict(enumerate((0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)))
    b = dict(enumerate((1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)))
    difference, error, p = compare(a, b)
    assert difference / error == pytest.approx(-4.0621, abs=1e-4)
    assert difference == pytest.approx(-1.58) and p == pytest.approx(0.002833, abs=1e-6)
    others = {seed + 10: value for seed, value in b.items()}
    difference, error, p = compare(a, others)
    assert difference / error == pytest.approx(-1.8608, abs=1e-4)
    assert difference == pytest.approx(-1.58) and p == pytest.approx(0.07939, abs=1e-5)
    assert compare(a, a) == (0, 0, 1) and math.isnan(compare(a, {0: 1.0})[2])


def write_run(folder, losses, **keys):
    """A finished run: config.py and log.jsonl; losses: {step: val loss}."""
    folder.mkdir(parents=True)
    write_config(folder, asdict(TrainConfig(max_iters=max(losses))) | keys)
    lines = [{'step': step, 'val_loss': loss, 'train_loss': 1.0, 'tokens_per_second': 5.0}
             for step, loss in losses.items()]  # fmt: skip
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def table_of(folder, varied=(), **full):
    results = [sweep.read_result(path, full.get(path.name)) for path in folder.iterdir()]
    return read_rows(sweep.format_table(results, varied))[2:]


def test_the_table_tells_differences_from_noise(tmp_path):
    noise = {1: 0.0, 2: 0.1, 3: 0.25}  # of the seed, larger than the differences
    for seed, x in noise.items():
        losses = {0.0: 2.0, 0.1: 2.02 + 0.004 * seed, 0.2: 2.01 + 0.02 * (seed == 2)}
        for dropout, loss in losses.items():
            write_run(tmp_path / f'{dropout},{seed}', {9: loss + x}, dropout=dropout, seed=seed)
    write_run(tmp_path / 'other', {9: 2.9}, dropout=0.3, seed=1)
    for seed in (4, 5):
        write_run(tmp_path / f'w{seed}', {9: 4 + seed / 100}, dropout=0.4, seed=seed)
    rows = table_of(tmp_path)
    assert [row[:2] for row in rows] == [['0.0', '3'], ['0.2', '3'], ['0.1', '3'], ['0.3', '1'],
                                         ['0.4', '2']]  # fmt: skip
    assert [row[4] for row in rows] == [
        'best', '+0.0167 ± 0.0067, p = 0.13, within noise', '+0.0280 ± 0.0023, p = 0.0067',
        '+0.7833, one seed', '+1.9283 ± 0.0728, p = 0.0014']  # fmt: skip


def test_two_seeds_are_too_few_for_a_verdict(tmp_path):
    for seed, difference in {1: 0.1, 2: 0.13}.items():
        for dropout in (0.0, 0.1):
            loss = 2 + seed + difference * (dropout > 0)
            write_run(tmp_path / f'{dropout},{seed}', {9: loss}, dropout=dropout, seed=seed)
    _, (*_, against, _, _) = table_of(tmp_path)
    # t = 0.115 / 0.015 with one degree of freedom: p = 1 - 2 atan(t) / pi
    assert against == '+0.1150 ± 0.0150, p = 0.083, too few seeds to tell'


def test_a_longer_decay_is_not_taken_for_a_run_that_halving_ended(tmp_path):
    for end, loss in {20: 3.0, 40: 2.0}.items():
        write_run(tmp_path / str(end), {20: loss}, lr_decay_iters=end, max_iters=20)
    assert [row[:5] for row in table_of(tmp_path)] == [
        ['40', '1', '20', '2.0000', 'best'], ['20', '1', '20', '3.0000', '+1.0000, one seed']
    ]  # fmt: skip


def test_a_varied_key_has_a_column_even_if_one_run_is_left(tmp_path):
    write_run(tmp_path / 'a', {9: 3.0}, learning_rate=0.01)
    assert table_of(tmp_path, ['learning_rate'])[0][:2] == ['0.01', '1']


def test_equal_values_are_one_run_however_they_are_spelled():
    _, runs = sweep.read_command([QUICKSTART, '--learning_rate=1e-2,0.01,.01', '--bias=True,true'])
    assert [run.folder.name for run in runs] == ['learning_rate=1e-2,bias=True']


def test_the_table_keeps_shares_of_the_steps_apart_and_hides_what_follows_from_depth(tmp_path):
    keys = {'lr_decay_iters': 90, 'depth': 1}
    write_run(tmp_path / 'a', {10: 3.0, 90: 2.0}, **keys)
    write_run(tmp_path / 'b', {10: 1.0}, dropout=0.1, **keys)
    write_run(tmp_path / 'c', {10: 3.1, 180: 2.1}, depth=2, n_layer=2, lr_decay_iters=180)
    assert [row[:6] for row in table_of(tmp_path, b=90)] == [
        ['0.0', '1', '1', '90', '2.0000', 'best'],
        ['0.0', '2', '1', '180', '2.1000', '+0.1000, one seed'],
        ['0.1', '1', '1', '10/90', '1.0000', '-']]  # fmt: skip


def test_runs_that_end_at_an_unknown_step_are_done_when_they_say_so(tmp_path):
    argv = [QUICKSTART, f'--out_dir={tmp_path}', '--target_tokens=4096000']
    _, (run,) = sweep.read_command(argv)
    write_run(run.folder, {100: 3.0, 500: 2.0})  # more than max_iters in the file
    assert not sweep.is_done(run)
    for status, done in (('running 1', False), ('stopped', False), ('done', True)):
        (run.folder / 'status').write_text(status + '\n')
        assert sweep.is_done(run) == done


@pytest.mark.slow
def test_batches_compared_at_equal_tokens_and_with_patience(run, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    command = ('tools/sweep.py', tmp_path / 'tiny.py', f'--out_dir={tmp_path}/sweep',
               '--target_tokens=1280', '--batch_size=2,4')  # fmt: skip
    run(*command)
    rows = read_rows((tmp_path / 'sweep' / 'table.md').read_text())
    assert rows[0][:3] == ['batch_size', 'seeds', 'steps']
    assert sorted(row[:3] for row in rows[2:]) == [['2', '1', '20'], ['4', '1', '10']]
    assert run(*command).stdout.count('already done') == 2
    command = ('tools/sweep.py', tmp_path / 'tiny.py', f'--out_dir={tmp_path}/patient',
               '--patience=1', '--eval_interval=2', '--learning_rate=1e-9')  # fmt: skip
    run(*command)
    (row,) = read_rows((tmp_path / 'patient' / 'table.md').read_text())[2:]
    losses = log_lines(tmp_path / 'patient' / 'patience=1,eval_interval=2,learning_rate=1e-9',
                       'val_loss')  # fmt: skip
    assert row[1] == str(losses[-1]['step'])
    assert row[2] == f'{min(line["val_loss"] for line in losses):.4f}'
    assert run(*command).stdout.count('already done') == 1


# Halving ------------------------------------------------------------------------------------------


def test_rungs_divide_the_steps_by_powers_of_eta():
    assert rungs(900, 3, 20) == [100, 300, 900] and rungs(900, 3, 27) == [33, 99, 297, 900]
    assert rungs(10, 2, 1) == [10] and rungs(401, 2, 5) == [100, 200, 401]


def test_halving_trains_the_best_third_on_by_the_mean_over_seeds(char_data, tmp_path):
    """The loss is a function of dropout; at the last rung another one wins."""
    argv = [QUICKSTART, '--depth=1,2', '--dropout=0.1,0.2,0.3,0.4,0.5,0.6,0.7', '--seed=1,2',
            '--halving=3', '--max_iters=900', '--eval_interval=90', f'--dataset={char_data}',
            f'--out_dir={tmp_path}']  # fmt: skip
    _, runs = sweep.read_command(argv)
    flags = runs[0].arguments[-2:]
    assert flags == ['--eval_interval=100', '--lr_decay_iters=900']
    trained = []

    class FakeJobs:
        stop = 0

        def train(self, waiting):
            trained.append(set())
            for folder, arguments, _ in waiting:
                config, _ = read_train_config(arguments)
                trained[-1].add((config.dropout, config.depth))
                if config.dropout == 0.1 and config.seed == 2:
                    continue  # failed: out, however good the other seed is
                loss = config.dropout + config.depth / 100
                loss += 10 * (config.seed == 2 and config.dropout == 0.2)
                folder.mkdir(exist_ok=True)
                write_config(folder, asdict(config))
                with open(folder / 'log.jsonl', 'a') as file:
                    line = {'step': config.max_iters, 'val_loss': loss, 'train_loss': 0.0}
                    file.write(json.dumps(line) + '\n')

    sweep.halve(FakeJobs(), runs, 3)
    assert [len(settings) for settings in trained] == [14, 4, 1]
    assert trained[1] == {(0.3, 1), (0.3, 2), (0.4, 1), (0.4, 2)} and trained[2] == {(0.3, 1)}
    trained.clear()
    sweep.halve(FakeJobs(), runs, 3)  # who has gone on is still compared at the earlier rung
    assert trained == [{(0.1, 1), (0.1, 2)}, set(), set()]
    sweep.check_runs(tmp_path, runs)
    with pytest.raises(UserError, match='holds a run with other values of eval_interval'):
        sweep.check_runs(tmp_path, sweep.read_command([*argv, '--halving=2'])[1])


@pytest.mark.slow
def test_a_winner_of_halving_equals_a_run_that_never_stopped(run, char_data, tmp_path):
    """With the dial: its schedules, Muon and dropout must not know of the stops."""
    keys = [*TINY, '--depth=1', f'--dataset={char_data}', '--dropout=0.1', '--max_iters=36',
            '--block_size=16', '--batch_size=2']  # fmt: skip
    (tmp_path / 'none.py').write_text('')
    command = ('tools/sweep.py', tmp_path / 'none.py', *keys, f'--out_dir={tmp_path}/sweep',
               '--learning_rate=log:1e-4:1e-2', '--trials=4', '--halving=2')  # fmt: skip
    run(*command, '--jobs=2')
    table = (tmp_path / 'sweep' / 'table.md').read_text()
    rows = read_rows(table)[2:]
    assert [row[2] for row in rows] == ['36', '18/36', '9/36', '9/36']
    again = run(*command).stdout
    assert again.count('already done') == 4 + 2 + 1 and table.strip() in again
    (winner,) = (tmp_path / 'sweep').glob(f'*learning_rate={rows[0][0]}*')
    whole = (f'--learning_rate={rows[0][0]}', f'--out_dir={tmp_path}/whole')
    run('train.py', *keys, *whole)
    assert_same_run(winner, tmp_path / 'whole')


# Jobs ---------------------------------------------------------------------------------------------


def test_runs_get_the_gpus_that_are_visible_or_a_share_of_the_cores(monkeypatch):
    def environments(n_jobs, device='auto', n_gpus=0, **variables):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n_gpus)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 9)
        for key in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS'):
            monkeypatch.delenv(key, raising=False)
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        return [(e.get('CUDA_VISIBLE_DEVICES'), e.get('OMP_NUM_THREADS'))
                for e in jobs.environments(n_jobs, {device})]  # fmt: skip

    assert environments(None) == [(None, None)]
    assert environments(2) == [(None, '4')] * 2
    assert environments(2, OMP_NUM_THREADS='3') == [(None, None)] * 2  # the user's
    assert environments(None, n_gpus=3) == [('0', None), ('1', None), ('2', None)]
    assert environments(2, n_gpus=3) == [('0', None), ('1', None)]
    assert environments(3, n_gpus=2) == [('0', None), ('1', None), ('0', None)]
    assert environments(None, n_gpus=2, CUDA_VISIBLE_DEVICES='5,7') == [('5', None), ('7', None)]
    assert environments(None, n_gpus=2, device='cpu') == [(None, None)]
    assert environments(None, n_gpus=2, device='cuda:1') == [(None, None)]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_runs_which_save_and_continue(clone, run, char_data, tmp_path, number):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    with open(tmp_path / 'tiny.py', 'a') as file:
        file.write('max_iters = 300\n')
    command = ('tools/sweep.py', tmp_path / 'tiny.py', '--seed=1,2,3', '--jobs=2',
               f'--out_dir={tmp_path}/sweep')  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=clone, stdout=subprocess.PIPE, text=True,
        start_new_session=True)  # fmt: skip
    running = [tmp_path / 'sweep' / f'seed={seed}' for seed in (1, 2)]
    for folder in running:
        while not (folder / 'log.jsonl').exists() or len(log_lines(folder, 'loss')) < 5:
            time.sleep(0.02)
            assert process.poll() is None
    os.killpg(process.pid, number)  # as a terminal does
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number and 'the same command continues' in output
    for folder in running:
        assert (folder / 'status').read_text() == 'stopped\n'
        assert len(list(folder.glob('ckpt_*.pt'))) > 0
        assert 'stopping after this step' in (folder / 'output.txt').read_text()
    assert not (tmp_path / 'sweep' / 'seed=3').exists()
    result = run(*command)
    assert result.stdout.count('val loss ') >= 3
    assert 'step 299' not in result.stdout  # which is in output.txt
    run('train.py', tmp_path / 'tiny.py', '--seed=1', f'--out_dir={tmp_path}/whole')
    assert step_losses(running[0]) == step_losses(tmp_path / 'whole')


# wandb --------------------------------------------------------------------------------------------


def test_the_command_of_the_wandb_sweep_is_one_that_train_accepts(clone, tmp_path, monkeypatch):
    """Expanded by wandb's own functions, as its agent does, for the ends of each parameter."""
    text = yaml.safe_load((ROOT / 'docs' / 'wandb_sweep.yaml').read_text())
    assert text['metric'] == {'name': 'val_loss', 'goal': 'minimize'}
    (tmp_path / 'python').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv('WANDB_RUN_ID', 'abc 1')
    for end in (0, -1):
        drawn = {}
        for key, range_ in text['parameters'].items():
            values = range_.get('values') or [range_['min'], range_['max']]
            drawn[key] = values[end]
        arguments = wandb_sweeps.create_sweep_command_args(
            {'args': {key: {'value': value} for key, value in drawn.items()}})
        fill = arguments | {'program': [text['program']], 'env': ['/usr/bin/env']}
        words = []
        for word in wandb_sweeps.create_sweep_command(list(text['command'])):
            words += fill[word[2:-1]] if word.startswith('${') else [word]
        output = subprocess.run(words, cwd=clone, capture_output=True, text=True, check=True)
        script, *argv = output.stdout.splitlines()
        config, _ = read_train_config(argv)
        assert script == 'train.py' and config.wandb_log and config.dataset == 'python_stdlib'
        assert {key: getattr(config, key) for key in drawn} == drawn
        assert config.out_dir == 'out-sweep/abc 1'
