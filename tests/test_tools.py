"""The tools: bench, plan and compare_rnn, and train.py's --depth."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
import torch

import bench
import compare_rnn
from configurator import TrainConfig
from lib.errors import UserError
from lib.recipe import read_train_config


def read_config(*argv):
    return read_train_config(list(argv))[0]


def test_depth_dial_sets_unspecified_keys():
    config = read_config(
        'config/quickstart.py', '--depth=6', '--learning_rate=0.1', '--batch_size=8'
    )
    assert (config.n_layer, config.n_embd, config.n_head, config.optimizer) == (6, 384, 6, 'muon')
    assert config.learning_rate == 0.1
    assert config.batch_size == 8
    assert config.dataset == 'python_stdlib'
    tokens = (
        config.batch_size
        * config.gradient_accumulation_steps
        * config.block_size
        * config.max_iters
    )
    assert tokens == pytest.approx(20 * 12 * 6 * 384**2, rel=0.01)  # Hoffmann et al. 2022
    assert read_config('--depth=12').n_embd == 768  # GPT-2's proportions
    heads = {7: 7, 8: 4, 9: 9, 12: 6}  # of 64, from depth 8 on of 128 where they divide n_embd
    assert {depth: read_config(f'--depth={depth}').n_head for depth in heads} == heads
    assert read_config('--depth=8', '--n_head=8').n_head == 8
    assert read_config('--n_layer=3', '--depth=2').n_layer == 2
    assert read_config('--depth=2', '--n_layer=3').n_layer == 3
    assert read_config('--depth=2').max_iters < read_config('--depth=3').max_iters
    assert read_config('--max_iters=7').max_iters == 7
    assert read_config('--max_iters=7').n_layer == TrainConfig().n_layer
    for argv, says in (
        (('--depth=0',), 'depth = 0'),
        (('--depth=2', '--n_embd=0'), 'n_embd = 0: give at least 1'),
        (('--depth=2', '--block_size=-1'), 'block_size = -1'),
        (('--depth=2', '--init_from=gpt2'), 'from scratch'),
    ):
        with pytest.raises(UserError, match=says):
            read_config(*argv)


def test_bench_reports_invalid_arguments(refused):
    refused(
        'tools/bench.py',
        '--parts=speed',
        says="parts = 'speed': give some of training, sampling, prepare, data, start",
    )
    refused('tools/bench.py', '--repeats=0', says='repeats = 0: give at least 1')
    refused(
        'tools/bench.py', '--input=missing.txt', says="input = 'missing.txt': there is no such file"
    )


@pytest.mark.slow
def test_bench_prints_json(run, text, tmp_path):
    (tmp_path / 'text.txt').write_text(text * 5)
    result = json.loads(
        run(
            'tools/bench.py',
            '--parts=prepare',
            f'--input={tmp_path}/text.txt',
            '--repeats=1',
            '--json',
        ).stdout
    )
    speed, share, memory = (row['value'] for row in result['rows'])
    assert result['device'] and speed > 0 and share > 0 and 0.01 < memory < 2


def test_bench_profile_is_not_written_through_a_link(tmp_path):
    for name in ('trace.json', 'trace.json.gz'):
        (tmp_path / 'precious').write_text('mine')
        path = tmp_path / name
        path.symlink_to('precious')
        bench.write_profile(lambda: torch.ones(2) + 1, torch.device('cpu'), str(path))
        assert (tmp_path / 'precious').read_text() == 'mine' and not path.is_symlink()
        raw = path.read_bytes()
        trace = json.loads(gzip.decompress(raw) if name.endswith('.gz') else raw)
        assert trace['traceEvents']


SLOW_FIRST_START = """
import os, sys, time
if 'import torch' in sys.orig_argv and not os.path.exists(MARK):
    open(MARK, 'w').close()
    time.sleep(20)  # files that are not in the page cache yet
"""


@pytest.mark.slow
def test_bench_start_is_not_disturbed_by_a_slow_first_start(run, patched_env, tmp_path):
    env = patched_env(SLOW_FIRST_START, MARK=str(tmp_path / 'mark'))
    options = ('--parts=start', '--repeats=1', '--device=cpu', '--json')
    output = run('tools/bench.py', *options, env=env).stdout
    seconds = {row['name']: row['value'] for row in json.loads(output)['rows']}
    first_step = seconds['train.py config/quickstart.py to its first step']  # imports torch too
    assert 0 < seconds['import torch'] < first_step


def plan(run, *arguments):
    """{text before the numbers of a line: the line}"""
    lines = run('tools/plan.py', *arguments).stdout.splitlines()
    return {
        re.match(r'  [^\d$]*', line)[0].strip(): line for line in lines if line.startswith('  ')
    }


def test_plan_gpt2_matches_nanogpt_and_palm(run):
    lines = plan(
        run, 'config/train_gpt2.py', '--vocab_size=50304', '--bias', '--gpu=a100', '--gpus=8'
    )
    assert ' 123.69M ' in lines['parameters']
    assert '0.79M of learned positions' in lines['parameters']
    flops = 6 * 123_689_472 + 12 * 12 * 12 * 64 * 1024
    assert f' {flops:.4g} ' in lines['FLOPs per token']
    assert ' 491,520 ' in lines['tokens per step']
    assert f'{flops * 491520 / 8 / 312e12 * 1e3:,.3g} ms' in lines['compute']
    assert f'{2 * 7 / 8 * 4 * 124_475_904 / 1e9:.2f} GB' in lines['communication, DDP']

    def numbers(name):
        return [float(number) for number in re.findall(r'[\d.]+', lines[name])]

    assert numbers('weights')[0] == round(4 * 124_475_904 / 1e9, 2)
    assert numbers('optimizer') == [1.0, 0.12]  # 8 bytes per parameter; sharded over 8 GPUs
    parts = ('weights', 'gradients', 'optimizer', 'activations', 'backward', 'logits')
    assert numbers('total') == pytest.approx(
        [sum(column) for column in zip(*map(numbers, parts))], abs=0.03
    )


def test_plan_muon_and_fsdp_match_hand_calculation(run):
    shape = (
        '--n_layer=2',
        '--n_head=4',
        '--n_embd=256',
        '--vocab_size=1000',
        '--position=rope',
        '--bias=False',
    )
    command = (
        'config/train_gpt2.py',
        *shape,
        '--optimizer=muon',
        '--gpus=2',
        '--gradient_accumulation_steps=4',
    )
    lines = plan(run, *command, '--block_size=512', '--batch_size=8')
    matrices = {(768, 256): 2, (256, 256): 2, (1024, 256): 2, (256, 1024): 2}
    # xx', aa and bx, five times
    products = sum(
        n * 5 * (2 * 2 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m, n in matrices.items()
    )
    assert f'{products / 989e12 * 1e3:,.3g} ms' in lines["Muon's matmuls"]
    in_muon = sum(n * a * b for (a, b), n in matrices.items())
    rest = 1000 * 256 + 5 * 256  # tied embedding and head; gains
    total = in_muon + rest
    assert f'{4 * (7 * total - 2 * in_muon) / 3.35e12 * 1e3:,.3g} ms' in lines['update, DDP']
    # weights and gradients of two micro-batches, Muon's updates
    sent = (2 * (4 * in_muon + 4 * rest + 4 * total) + 4 * in_muon) / 2
    assert f'{sent / 450e9 * 1e3:,.3g} ms' in lines['communication, FSDP']


def test_plan_handles_large_models_and_reports_mistakes(run, refused):
    large = plan(
        run,
        '--config',
        'config/train_gpt2.py',
        '--n_layer=96',
        '--n_embd=12288',
        '--n_head=96',
        '--gpus=40',
    )
    assert '174,' in large['parameters']
    assert 'does not fit' in next(line for line in large.values() if 'fit' in line)
    refused('tools/plan.py', '--gpu=h1000', says='gpu')
    refused('tools/plan.py', '--gpus=7', says='--gpus=1, or --gradient_accumulation_steps=35 or 42')
    refused('tools/plan.py', '--n_head=7', says='n_head')


@pytest.mark.slow
def test_compare_rnn_trains_lstm_and_gpt_on_same_tokens(run, char_data, tmp_path):
    out = tmp_path / 'compare'
    out.mkdir()
    (tmp_path / 'precious').write_text('mine')
    (out / 'compare.json').symlink_to(tmp_path / 'precious')
    small = (
        '--n_embd=32',
        '--block_size=32',
        '--batch_size=4',
        '--max_iters=40',
        '--eval_iters=2',
        '--lengths=[16, 64]',
    )
    rates = '--gpt_learning_rate=[1e9, 1e-5, 1e-2]'  # 1e9 diverges
    command = ('tools/compare_rnn.py', f'--dataset={char_data}', '--out_dir=~/compare', rates)
    output = run(*command, *small, env={'HOME': str(tmp_path)}).stdout
    assert (tmp_path / 'precious').read_text() == 'mine'
    results = json.loads((out / 'compare.json').read_text())['results']
    gpt, lstm = results['GPT'], results['LSTM']
    assert lstm['parameters'] == pytest.approx(gpt['parameters'], rel=0.05)
    assert f'{gpt["parameters"]:,}' in output
    # the best one is reported
    assert gpt['learning_rate'] == 1e-2 and set(gpt['losses_of_rates']) == {'1e-05', '0.01'}
    for result in (gpt, lstm):
        points = result['points']
        assert [point['tokens'] for point in points] == [step * 4 * 32 for step in range(0, 41, 2)]
        assert points[-1]['val_loss'] < points[0]['val_loss'] - 0.3
        assert points[-1]['seconds'] > points[1]['seconds'] > 0
        assert len(result['gradient']) == 32
        assert result['gradient'][0] == 1
        assert len(result['step_seconds']) == 2
    # both are untrained
    assert gpt['points'][0]['val_loss'] == pytest.approx(lstm['points'][0]['val_loss'], abs=0.3)


def test_compare_rnn_gradient_by_distance_matches_autograd():
    """Against the same model with the embeddings as differentiable inputs."""
    torch.manual_seed(0)
    model = compare_rnn.LSTM(20, 1, 8, 0.0)
    idx = torch.randint(20, (3, 6))
    split = SimpleNamespace(
        evaluation_windows=lambda n: range(3),
        windows=lambda index: (idx.numpy(), idx.roll(-1, 1).numpy()),
    )
    actual = compare_rnn.gradient_by_distance(
        model, split, SimpleNamespace(batch_size=2), torch.device('cpu')
    )
    x = model.wte(idx).detach().requires_grad_()
    logits = model.lstm(x)[0][:, -1] @ model.wte.weight.T
    torch.nn.functional.cross_entropy(logits, idx[:, 0]).backward()
    norms = x.grad.norm(dim=2).flip(1)
    assert actual == pytest.approx((norms / norms[:, :1]).mean(dim=0).tolist(), rel=1e-4)
