"""tools/sweep.py: one run per combination of values, and a table of the results."""

import json
import math

import pytest

from configurator import TrainConfig
from helpers import TINY


def write_tiny_config(path, dataset):
    lines = [flag.removeprefix('--').replace('device=cpu', "device='cpu'") for flag in TINY]
    path.write_text('\n'.join([*lines, f"dataset = '{dataset}'", 'max_iters = 20', '']))


def run_folders(out_dir):
    return sorted(path.name for path in out_dir.iterdir() if path.is_dir())


@pytest.mark.slow
def test_sweep_trains_each_value_and_ranks_them(run, char_data, tmp_path):
    write_tiny_config(tmp_path / 'tiny.py', char_data)
    command = ('tools/sweep.py', tmp_path / 'tiny.py', f'--out_dir={tmp_path}/sweep')
    (tmp_path / 'sweep').mkdir()
    (tmp_path / 'precious').write_text('mine')
    (tmp_path / 'sweep' / 'table.md').symlink_to(tmp_path / 'precious')
    output = run(*command, '--learning_rate=1e-5,1e-2').stdout
    assert run_folders(tmp_path / 'sweep') == ['learning_rate=1e-2', 'learning_rate=1e-5']
    assert (tmp_path / 'precious').read_text() == 'mine'
    table = (tmp_path / 'sweep' / 'table.md').read_text()
    assert table.strip() in output
    rows = [[cell.strip() for cell in line.strip('| ').split('|')] for line in table.splitlines()]
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
    rows = [[cell.strip() for cell in line.strip('| ').split('|')] for line in table.splitlines()]
    assert rows[0] == ['learning_rate', 'runs', 'steps', 'val loss', 'train loss', 'tokens/s']
    # one line for both seeds, best first
    assert [row[:3] for row in rows[2:]] == [['0.01', '2', '20'], ['1e-05', '2', '20']]
    losses = []
    for seed in (1, 2):
        lines = (
            (tmp_path / 'sweep' / f'learning_rate=1e-2,seed={seed}' / 'log.jsonl')
            .read_text()
            .splitlines()
        )
        losses.append(
            next(
                line['val_loss'] for line in map(json.loads, reversed(lines)) if 'val_loss' in line
            )
        )
    spread = abs(losses[0] - losses[1]) / math.sqrt(2)
    assert rows[2][3] == f'{sum(losses) / 2:.4f} ± {spread:.4f}'

    # only the truncated run continues, and further values extend the table
    broken = tmp_path / 'sweep' / 'learning_rate=1e-2,seed=2'
    lines = (broken / 'log.jsonl').read_text().splitlines(keepends=True)
    (broken / 'log.jsonl').write_text(
        ''.join(line for line in lines if json.loads(line)['step'] < 15)
    )
    for path in broken.glob('ckpt_00000020.*'):
        path.unlink()
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
    assert len(folders) == 2 and all(len(name.encode()) <= 255 for name in folders)
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


def test_sweep_help_lists_the_keys_of_train(run):
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
    with open(tmp_path / 'tiny.py', 'a') as file:
        file.write('learning_rate = 1e-2\n')
    refused(*command, says=('seed=1 holds a run with other values of learning_rate', '--out_dir'))
