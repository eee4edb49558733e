"""DDP and FSDP under torchrun with gloo: the same losses as a single process."""

import json
import random
import shutil

import pytest
import torch

import checkpoint as ckpt
from helpers import (
    PARALLEL_RUN,
    ROUNDING,
    TINY,
    assert_same_run,
    log_lines,
    read_log,
    step_losses,
)
from lib import device, distributed
from model import GPT, GPTConfig


def test_ddp_matches_single_process(ranks, run, char_data, tmp_path):
    common = (
        f'--dataset={char_data}',
        *TINY,
        '--gradient_accumulation_steps=4',
        '--max_iters=6',
        '--dtype=float32',
        '--dropout=0.1',
    )
    run('train.py', f'--out_dir={tmp_path}/one', *common)
    ranks(2, f'--out_dir={tmp_path}/two', *common)
    for key in ('loss', 'val_loss', 'grad_norm'):
        one, two = (
            [line[key] for line in log_lines(tmp_path / name, key)] for name in ('one', 'two')
        )
        assert one == pytest.approx(two, rel=0, abs=ROUNDING['adamw']) and len(one) in (2, 6)


@pytest.mark.slow
@pytest.mark.parametrize('n_processes', [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_losses_do_not_depend_on_split_of_step(
    run, ranks, char_data, tmp_path, optimizer, n_processes
):
    """8 sequences as 1 micro-batch, as 4, and over processes with DDP and FSDP; default rates."""
    options = (f'--dataset={char_data}', *PARALLEL_RUN, '--dropout=0', f'--optimizer={optimizer}')
    options += ('--learning_rate=3e-3', '--muon_learning_rate=0.02', '--max_iters=20')
    run('train.py', f'--out_dir={tmp_path}/whole', *options, *split(8, 1))
    run('train.py', f'--out_dir={tmp_path}/parts', *options, *split(2, 4))
    for parallel in ('ddp', 'fsdp'):
        out_dir = f'--out_dir={tmp_path}/{parallel}'
        ranks(n_processes, out_dir, f'--parallel={parallel}', *options, *split(1, 8))
    whole = [loss for _, loss, _ in step_losses(tmp_path / 'whole')]
    assert len(whole) == 20
    for name in ('parts', 'ddp', 'fsdp'):
        losses = [loss for _, loss, _ in step_losses(tmp_path / name)]
        assert losses == pytest.approx(whole, rel=0, abs=ROUNDING[optimizer])


def split(batch_size, n):
    return f'--batch_size={batch_size}', f'--gradient_accumulation_steps={n}'


@pytest.mark.parametrize('n_processes', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ddp_resume_is_bitwise_exact(ranks, train_args, tmp_path, n_processes):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = ('--max_iters=8', '--n_embd=128', '--n_layer=4')
    options += (f'--gradient_accumulation_steps={n_processes}',)
    ranks(n_processes, f'--out_dir={whole}', *train_args, *options)
    shutil.copytree(whole, parts)
    (parts / 'ckpt_00000008.pt').unlink()
    assert 'step 4:' in ranks(n_processes, f'--out_dir={parts}', '--init_from=resume')
    assert_same_run(parts, whole)


def test_ddp_resume_with_different_world_size_matches(
    ranks, run, train_args, reference_run, tmp_path
):
    common = (f'--out_dir={tmp_path}/out', '--init_from=resume')
    run('train.py', f'--out_dir={tmp_path}/out', *train_args, '--max_iters=6')
    assert 'processes 1 then, 2 now' in ranks(2, *common, '--max_iters=13')
    run('train.py', *common, '--max_iters=20')
    a, b = read_log(tmp_path / 'out'), read_log(reference_run)
    tolerance = ROUNDING['muon']
    losses = [
        [
            (line['step'], line['samples_seen'], pytest.approx(line['loss'], rel=0, abs=tolerance))
            for line in log
            if 'loss' in line
        ]
        for log in (a, b)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    for name, weight in ckpt.load(reference_run).model.items():
        torch.testing.assert_close(
            ckpt.load(tmp_path / 'out').model[name], weight, atol=1e-4, rtol=0
        )


def losses_and_norms(out_dir):
    lines = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [line[key] for line in lines for key in ('loss', 'grad_norm') if key in line]


def test_gradient_accumulation_weights_targets_equally(run, ranks, prepare_pairs, tmp_path):
    """The number of targets varies widely between micro-batches and between processes."""
    rng = random.Random(1)
    pairs = [('q' * rng.randint(1, 30), 'a' * rng.choice((1, 2, 60))) for _ in range(60)]
    data = prepare_pairs(pairs, '--tokenizer=byte', '--block_size=100', '--packing=False')
    common = (
        f'--dataset={data}',
        *TINY,
        '--block_size=100',
        '--max_iters=5',
        '--lr_decay_iters=5',
        '--dtype=float32',
    )
    run('train.py', *common, f'--out_dir={tmp_path}/8', '--batch_size=8')
    run(
        'train.py',
        *common,
        f'--out_dir={tmp_path}/2',
        '--batch_size=2',
        '--gradient_accumulation_steps=4',
    )
    arguments = [
        *common,
        f'--out_dir={tmp_path}/two',
        '--batch_size=1',
        '--gradient_accumulation_steps=8',
    ]
    ranks(2, *arguments)
    whole = losses_and_norms(tmp_path / '8')
    assert len(whole) == 10
    assert losses_and_norms(tmp_path / '2') == pytest.approx(whole, abs=2e-5)
    assert losses_and_norms(tmp_path / 'two') == pytest.approx(whole, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('n_processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fsdp_muon_matches_single_process_across_world_sizes(
    run, ranks, char_data, tmp_path, n_processes
):
    common = (f'--dataset={char_data}', '--optimizer=muon', *PARALLEL_RUN)
    run('train.py', f'--out_dir={tmp_path}/whole', *common)
    ranks(2, f'--out_dir={tmp_path}/parts', *common, '--parallel=fsdp', '--max_iters=3')
    resume = (f'--out_dir={tmp_path}/parts', '--init_from=resume')
    run('train.py', *resume, '--max_iters=5')
    output = ranks(n_processes, *resume, '--max_iters=8', '--sample_every_eval')
    assert 'sample.py does' in output  # no process has the whole model
    whole, parts = step_losses(tmp_path / 'whole'), step_losses(tmp_path / 'parts')
    assert [step for step, *_ in parts] == list(range(8))
    # in bfloat16, Muon may amplify a difference in fp32's last bit to one in bfloat16's last bit
    tolerance = 1e-4 if device.has_bfloat16('cpu') else 1e-5
    for (_, loss, norm), (_, expected, expected_norm) in zip(parts, whole):
        assert loss == pytest.approx(expected, abs=tolerance)
        assert norm == pytest.approx(expected_norm, abs=10 * tolerance)
    one, many = ckpt.load(tmp_path / 'whole'), ckpt.load(tmp_path / 'parts')
    for name, weight in one.model.items():
        torch.testing.assert_close(many.model[name], weight, atol=10 * tolerance, rtol=0)
    assert many.val_loss == pytest.approx(one.val_loss, abs=tolerance)


@pytest.mark.parametrize('n_processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_deterministic_sum_is_bitwise_exact_across_world_sizes(
    run, ranks, char_data, tmp_path, n_processes
):
    common = (f'--dataset={char_data}', '--deterministic_sum', *PARALLEL_RUN)
    run('train.py', f'--out_dir={tmp_path}/1', *common)
    ranks(n_processes, f'--out_dir={tmp_path}/many', *common)
    losses = [step_losses(tmp_path / name) for name in ('1', 'many')]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    one, many = ckpt.load(tmp_path / '1').model, ckpt.load(tmp_path / 'many').model
    assert all(torch.equal(many[name], weight) for name, weight in one.items())


def test_fsdp_rejects_deterministic_sum_once(ranks, char_data, tmp_path):
    common = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *PARALLEL_RUN)
    output = ranks(2, *common, '--deterministic_sum', '--parallel=fsdp', code=2)
    assert output.count('train.py: deterministic_sum = True: needs --parallel=ddp') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('n', range(1, 20))
def test_joins_build_balanced_summation_tree(n):
    def tree(first, last):
        middle = (first + last) // 2
        return first if last - first == 1 else (tree(first, middle), tree(middle, last))

    nodes = []
    for leaf, count in enumerate(distributed.joins(n)):
        nodes.append(leaf)
        for _ in range(count):
            right = nodes.pop()
            nodes[-1] = (nodes[-1], right)
    assert nodes == [tree(0, n)]


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'tie_weights': False, 'bias': False, 'position': 'rope', 'norm': 'rmsnorm'},
        {'ngram': 3, 'ngram_rows': 50, 'zero_init': True, 'activation': 'swiglu', 'n_kv_head': 1},
    ],
)
def test_meta_model_draws_same_initial_weights(options):
    config = GPTConfig(
        **{'block_size': 8, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 32} | options
    )
    with torch.device('meta'):
        model = GPT(config)
    assert all(p.is_meta for p in model.parameters())
    torch.manual_seed(1)
    distributed.init_weights(model, torch.device('cpu'))
    torch.manual_seed(1)
    expected = GPT(config)
    assert (model.lm_head.weight is model.transformer.wte.weight) == config.tie_weights
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)


def test_parallel_auto_selects_fsdp_above_half_of_memory():
    size = 1000  # bytes
    for memory, expected in ((None, 'ddp'), (2000, 'ddp'), (1999, 'fsdp')):
        assert distributed.choose_parallel('auto', size, memory) == expected
        for parallel in ('ddp', 'fsdp'):
            assert distributed.choose_parallel(parallel, size, memory) == parallel
