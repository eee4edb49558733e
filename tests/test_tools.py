"""The tools as a person uses them: the sweep with its table, the benchmark, and the one dial of train.py."""

import json
import math
import sys

import pytest
from conftest import ROOT, TINY

import train
from configurator import UserError

sys.path.insert(0, str(ROOT / 'tools'))


def test_a_sweep_trains_every_combination_once_and_tables_them_best_first(run, char_data, tmp_path):
    (tmp_path / 'tiny.py').write_text('\n'.join(flag.removeprefix('--').replace('device=cpu', "device='cpu'") for flag in TINY)
                                      + f"\ndataset = '{char_data}'\nmax_iters = 20\n")
    command = ('tools/sweep.py', tmp_path / 'tiny.py', f'--out_dir={tmp_path}/sweep', '--learning_rate=1e-5,1e-2', '--seed=1,2')
    first = run(*command)
    folders = sorted(path.name for path in (tmp_path / 'sweep').iterdir() if path.is_dir())
    assert folders == [f'learning_rate={rate},seed={seed}' for rate in ('1e-2', '1e-5') for seed in (1, 2)]
    table = (tmp_path / 'sweep' / 'table.md').read_text()
    assert table.strip() in first.stdout
    rows = [[cell.strip() for cell in line.strip('| ').split('|')] for line in table.splitlines()]
    assert rows[0] == ['learning_rate', 'runs', 'steps', 'val loss', 'train loss', 'tokens/s']
    assert [row[:3] for row in rows[2:]] == [['0.01', '2', '20'], ['1e-05', '2', '20']]  # seeds are one line, the best is first
    losses = []
    for seed in (1, 2):
        lines = (tmp_path / 'sweep' / f'learning_rate=1e-2,seed={seed}' / 'log.jsonl').read_text().splitlines()
        losses.append(next(line['val_loss'] for line in map(json.loads, reversed(lines)) if 'val_loss' in line))
    spread = abs(losses[0] - losses[1]) / math.sqrt(2)
    assert rows[2][3] == f'{sum(losses) / 2:.4f} ± {spread:.4f}'

    # one run has lost its end: it alone goes on, and a command with other values adds to the table
    broken = tmp_path / 'sweep' / 'learning_rate=1e-2,seed=2'
    lines = (broken / 'log.jsonl').read_text().splitlines(keepends=True)
    (broken / 'log.jsonl').write_text(''.join(line for line in lines if json.loads(line)['step'] < 15))
    for path in broken.glob('ckpt_00000020.*'):
        path.unlink()
    again = run(*command[:3], '--learning_rate=1e-5,1e-2,1e-3', '--seed=1,2')
    assert again.stdout.count('done before') == 3 and again.stdout.count('step 0: train loss') == 2
    assert len((tmp_path / 'sweep' / 'table.md').read_text().splitlines()) == 5


@pytest.mark.parametrize('words, says', [
    (('config/quickstart.py', '--learning_rte=1,2'), 'learning_rte: no such key; did you mean learning_rate?'),
    (('config/quickstart.py', '--n_layer=2,two'), "n_layer = 'two': give a whole number"),
    (('config/quickstart.py', '--batch_size=4,0'), 'batch_size = 0: give at least 1'),
    (('--n_layer=2,4',), 'name a config file'),
    (('config/quickstart.py', '--n_layer', '4'), 'write --key=value'),
])
def test_a_mistake_in_a_sweep_is_told_before_anything_is_trained(refused, clone, words, says):
    refused('tools/sweep.py', *words, says=says)
    assert not (clone / 'sweep-quickstart').exists()


def dialled(*words):
    return train.read_command(list(words))[0]


def test_the_dial_sets_what_was_not_given_behind_it():
    config = dialled('config/quickstart.py', '--depth=6', '--learning_rate=0.1', '--batch_size=8')
    assert (config.n_layer, config.n_embd, config.n_head, config.optimizer) == (6, 384, 6, 'muon')
    assert config.learning_rate == 0.1 and config.batch_size == 8 and config.dataset == 'python_stdlib'
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size * config.max_iters
    assert tokens == pytest.approx(20 * 12 * 6 * 384**2, rel=0.01)  # Hoffmann et al. 2022
    assert dialled('--depth=12').n_embd == 768  # GPT-2's proportions
    assert dialled('--n_layer=3', '--depth=2').n_layer == 2 and dialled('--depth=2', '--n_layer=3').n_layer == 3
    assert dialled('--depth=2').max_iters < dialled('--depth=3').max_iters
    assert dialled('--max_iters=7').max_iters == 7 and dialled('--max_iters=7').n_layer == train.Config().n_layer
    for words, says in ((('--depth=0',), 'depth = 0'), (('--depth=2', '--n_embd=0'), 'n_embd = 0: give at least 1'),
                        (('--depth=2', '--block_size=-1'), 'block_size = -1'),
                        (('--depth=2', '--init_from=gpt2'), 'from scratch')):
        with pytest.raises(UserError, match=says):
            dialled(*words)


def test_the_benchmark_says_what_it_cannot_do(refused):
    refused('tools/bench.py', '--parts=speed', says="parts = 'speed': give some of training, sampling, prepare, start, saving")
    refused('tools/bench.py', '--repeats=0', says='repeats = 0: give at least 1')
    refused('tools/bench.py', '--input=missing.txt', says="input = 'missing.txt': there is no such file")


def test_the_benchmark_prints_json(run, text, tmp_path):
    (tmp_path / 'text.txt').write_text(text * 5)
    result = json.loads(run('tools/bench.py', '--parts=prepare', f'--input={tmp_path}/text.txt', '--repeats=1', '--json').stdout)
    speed, share, memory = (row['value'] for row in result['rows'])
    assert result['device'] and speed > 0 and share > 0 and 0.01 < memory < 2
