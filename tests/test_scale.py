"""tools/scale.py: a ladder of runs from branched decays, and what it says about larger ones."""

import json
import re
import shutil
from pathlib import Path

import pytest

import checkpoint as ckpt
from configurator import TrainConfig, read_config_file
from helpers import read_log
from lib import bins
from lib.plot import import_pyplot
from lib.scaling import Law

LAW = Law(E=1.0, A=30.0, a=0.3, B=40.0, b=0.3)
LADDER = ('--depths=1,2,3,4', '--horizons=0.25,0.5,1', '--tokens_per_layer=250e3',
          '--block_size=32')


@pytest.fixture(scope='module')
def config_file(char_data, tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'small.py'
    path.write_text(f"dataset = '{char_data}'\ndevice = 'cpu'\n")
    return path


@pytest.fixture(scope='module')
def plan_runs(run, config_file, clone):
    """plan_runs(out_dir, loss, *flags): finished runs as the tool would leave them, with losses by
    loss(parameters, tokens)."""

    def plan_runs(out_dir, loss, *flags):
        code = (
            'import sys, json; sys.path.insert(0, "tools"); import scale\n'
            'from dataclasses import asdict\n'
            '_, rungs, *_ = scale.read_command(sys.argv[1:])\n'
            'print(json.dumps([[str(rung.folder), asdict(rung.config), *scale.measure(rung.config)]'
            ' for rung in rungs]))')
        script = clone / 'list_rungs.py'
        script.write_text(code)
        lines = run('list_rungs.py', config_file, f'--out_dir={out_dir}', *LADDER, *flags).stdout
        for name, keys, n, _ in json.loads(lines):
            folder = Path(name)
            folder.mkdir(parents=True)
            text = ''.join(f'{key} = {value!r}\n' for key, value in keys.items())
            (folder / 'config.py').write_text(text)
            tokens = keys['max_iters'] * keys['batch_size'] * keys['block_size']
            tokens *= keys['gradient_accumulation_steps']
            line = {'step': keys['max_iters'], 'train_loss': 1.0, 'val_loss': loss(n, tokens)}
            (folder / 'log.jsonl').write_text(json.dumps(line) + '\n')

    return plan_runs


@pytest.fixture(scope='module')
def report(run, plan_runs, config_file, tmp_path_factory):
    """(folder of a ladder that follows LAW, its report)."""
    out_dir = tmp_path_factory.mktemp('report') / 'ladder'
    plan_runs(out_dir, LAW.loss)
    plan_runs(out_dir.with_name('better'), lambda n, d: LAW.loss(n * 1.2**0.5, d * 1.2**0.5))
    output = run('tools/scale.py', config_file, f'--out_dir={out_dir}', *LADDER,
                 '--predict_depth=8', '--gpu=a100', '--price=3',
                 f'--compare={out_dir.with_name("better")},{out_dir}').stdout
    return out_dir, output


@pytest.mark.slow
def test_table_has_every_run_with_size_tokens_and_loss(report, char_data):
    _, output = report
    rows = [line.split() for line in output.splitlines() if re.match(r'depth\d-steps', line)]
    assert len(rows) == 12 and len({row[0] for row in rows}) == 12
    vocab_size = bins.open_tokenizer(char_data).vocab_size
    for name, params, tokens, per_param, _, flops, loss, law, error in rows:
        depth, steps = map(int, re.findall(r'\d+', name))
        blocks, head = 12 * depth * (64 * depth) ** 2, 64 * depth * vocab_size
        gains = 0.01 * blocks
        assert blocks + head <= 1e6 * float(params[:-1]) + 5e3 <= blocks + head + gains + 1e4
        n, d = blocks + head, 1e6 * float(tokens[:-1])
        assert float(per_param) == pytest.approx(d / n, rel=0.05, abs=0.06)
        assert float(flops) > 6 * n * d * 0.97
        assert float(loss) == pytest.approx(LAW.loss(n, d), rel=0.01)
        assert abs(float(law) - float(loss)) < 2e-4 and error in ('+0.00%', '-0.00%')


@pytest.mark.slow
def test_report_has_the_law_the_left_out_size_and_the_prediction(report):
    out_dir, output = report
    E, A, a, B, b = map(float, re.search(
        r'L = (\S+) \+ (\S+) / N\^(\S+) \+ (\S+) / D\^(\S+)', output).groups())
    assert (E, a, b) == pytest.approx((LAW.E, LAW.a, LAW.b), rel=0.01)
    (left_out,) = re.findall(r'largest size left out .* errors of (.*)', output)
    assert len(left_out.split(', ')) == 3
    assert all(abs(float(error[:-1])) < 0.05 for error in left_out.split(', '))
    loss, low, high = map(float, re.search(
        r'predicted val loss (\S+) \(90%: (\S+) to (\S+)\)', output).groups())
    assert loss == pytest.approx(LAW.loss(12 * 8 * 512**2, 2e6), rel=2e-3)
    assert low - 1e-4 <= loss <= high + 1e-4
    # of the predicted run, and of the best for its cost
    assert output.count('$3.00 (--price)') == 2
    assert re.search(r'compute-optimal for \S+ FLOPs: depth \d', output)
    assert 'N grows as FLOPs^0.50, D as FLOPs^0.50' in output
    if import_pyplot():
        assert (out_dir / 'scale.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_setting_is_worth_compute(report):
    out_dir, output = report
    better, itself = re.findall(r'x(\d\.\d\d) compute .*; (.*)', output)
    assert better == ('1.20', '12 runs, 12 against one of the ladder with equal depth and tokens')
    assert itself[0] == '1.00'
    assert f'{out_dir}: x1.00 compute (90%: 1.00 to 1.00), within the noise' in output


@pytest.mark.slow
def test_note_where_the_data_repeat(report):
    pattern = r'the longest run has (\S+) epochs of (\S+) tokens'
    n_epochs, epoch = re.search(pattern, report[1]).groups()
    assert float(n_epochs) == pytest.approx(1e6 / int(epoch.replace(',', '')), rel=0.05)


@pytest.mark.parametrize('flags, says', [
    (('--depths=1,2',), '2 sizes at 4 token counts are too few'),
    (('--depths=2,3,4',), 'the sizes are too close: the largest has '),
    (('--horizons=1', '--depths=1,2,4'), '3 finished runs are too few'),
])
def test_no_law_from_too_few_or_too_close_runs(plan_runs, run, config_file, tmp_path, flags, says):
    plan_runs(tmp_path / 'ladder', LAW.loss, *flags)
    output = run('tools/scale.py', config_file, f'--out_dir={tmp_path}/ladder', *LADDER, *flags,
                 '--flops=1e15').stdout
    assert f'note: {says}' in output and f'no law and no prediction: {says}' in output
    assert ' / N^' not in output and 'compute-optimal' not in output


@pytest.mark.parametrize('flags, says', [
    (('--n_layer=3x',), "n_layer = '3x': expected int"),
    (('--max_minutes=3',), 'max_minutes: the ladder sets it itself'),
    (('--depths=0,2',), 'depths: give numbers of 1 or more'),
    (('--horizons=0,1',), 'horizons: give numbers above 0'),
    (('--horizon=1',), 'horizon: no such key'),
    (('--batch_size=auto',), 'batch_size = auto: all runs of a depth need one batch'),
    (('--predict_depth', '3'), '--predict_depth: write --key=value'),
    (('--compare=nowhere',), 'compare: there is no folder nowhere'),
    (('--predict_depth=4', '--gpu=abacus'), "tools/plan.py: gpu = 'abacus'"),
])
def test_mistakes_are_reported_before_training(refused, config_file, tmp_path, flags, says):
    refused('tools/scale.py', config_file, f'--out_dir={tmp_path}/ladder', *LADDER, *flags,
            says=says)
    assert not (tmp_path / 'ladder').exists()


@pytest.mark.slow
def test_runs_of_another_config_are_refused(report, refused, config_file):
    out_dir, _ = report
    refused('tools/scale.py', config_file, f'--out_dir={out_dir}', *LADDER, '--seed=2',
            says='holds a run with other values of seed: choose another --out_dir')


@pytest.mark.slow
def test_runs_of_another_evaluation_are_not_compared(report, refused, config_file, tmp_path):
    out_dir, _ = report
    shutil.copytree(out_dir, tmp_path / 'other')
    for path in (tmp_path / 'other').glob('*/config.py'):
        path.write_text(re.sub(r'eval_iters = \d+', 'eval_iters = 2', path.read_text()))
    refused('tools/scale.py', config_file, f'--out_dir={out_dir}', *LADDER,
            f'--compare={tmp_path}/other', says='was evaluated on 32 windows of 32 tokens')


@pytest.mark.slow
def test_branched_runs_equal_unbroken_ones(run, config_file, tmp_path):
    """Bit by bit: the losses of all steps, the evaluation and the weights."""
    flags = ('--block_size=32', '--n_embd=32', '--n_head=2', '--ngram=2', '--warmup_iters=3',
             '--dropout=0.1', '--batch_size=4')
    command = ('tools/scale.py', config_file, f'--out_dir={tmp_path}/ladder', '--depths=1,2',
               '--tokens_per_layer=1280', '--horizons=0.3,0.65,1', *flags)
    output = run(*command).stdout
    folders = sorted(path.name for path in (tmp_path / 'ladder').iterdir())
    assert folders == sorted(['depth1-stable', 'depth1-steps3', 'depth1-steps6', 'depth1-steps10',
                              'depth2-stable', 'depth2-steps6', 'depth2-steps13',
                              'depth2-steps20'])
    assert 'stable' not in ''.join(re.findall('^depth.*', output, re.M))  # no run of the table
    for steps in (6, 13, 20):
        unbroken, branched = tmp_path / f'unbroken{steps}', tmp_path / f'ladder/depth2-steps{steps}'
        run('train.py', config_file, '--depth=2', *flags, '--gradient_accumulation_steps=1',
            f'--max_iters={steps}', '--eval_iters=256', f'--eval_interval={steps}',
            f'--out_dir={unbroken}')
        one, two = ([line for line in read_log(folder) if line['step'] or 'loss' in line]
                    for folder in (unbroken, branched))
        assert one == two and len(one) == steps + 1
        one, two = (ckpt.load(folder).model for folder in (unbroken, branched))
        assert all(one[name].equal(two[name]) for name in one)

    # a finished ladder is only read; a run that is lost is trained again, from scratch
    table = output[output.index('\nrun '):]
    shutil.rmtree(tmp_path / 'ladder' / 'depth1-steps6')
    again = run(*command).stdout
    assert again.count('already done') == 5 and again[again.index('\nrun '):] == table


@pytest.mark.slow
def test_a_ladder_continues_where_it_was_killed(run, config_file, tmp_path):
    command = ('tools/scale.py', config_file, f'--out_dir={tmp_path}/ladder', '--depths=1',
               '--tokens_per_layer=2560', '--horizons=0.5,1', '--block_size=32', '--n_embd=32',
               '--n_head=2', '--batch_size=4')
    table = run(*command).stdout.split('\nrun ')[1]
    ladder = tmp_path / 'ladder'
    # killed between the branch at step 10 and the first step of the copy
    shutil.rmtree(ladder / 'depth1-steps20')
    shutil.copytree(ladder / 'depth1-stable', ladder / 'depth1-steps20',
                    ignore=shutil.ignore_patterns('config.py', 'status'))
    again = run(*command).stdout
    assert again.count('already done') == 1 and again.split('\nrun ')[1] == table
    keys = read_config_file(str(ladder / 'depth1-steps20/config.py'), TrainConfig)
    assert keys['max_iters'] == 20 and keys['schedule'] == 'wsd'
