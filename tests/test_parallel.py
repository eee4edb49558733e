"""Shards and copies of a model on real processes of torchrun, over gloo: the same losses as one process alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

import checkpoint as ckpt
from device import has_bfloat16
from model import GPT, GPTConfig
from parallel import choose, draw, joins

# micro-batches to divide, dropout, and a number of rows that 4 processes do not share evenly; rates at which training does not
# amplify what sums in another order differ by
RUN = (*TINY, '--gradient_accumulation_steps=8', '--dropout=0.1', '--dtype=float32', '--n_embd=36', '--max_iters=8',
       '--lr_decay_iters=8', '--learning_rate=1e-3', '--muon_learning_rate=2e-3')


@pytest.fixture
def torchrun(clone):
    def torchrun(n, *arguments, code=0):
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', clone / 'train.py']
        result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=clone)
        assert (result.returncode == 0) == (code == 0), result.stdout + result.stderr
        return result.stdout + result.stderr

    return torchrun


def losses(out_dir):
    lines = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [(line['step'], line['loss'], line['grad_norm']) for line in lines if 'loss' in line]


def test_shards_of_muon_train_as_one_process_and_others_go_on_from_them(run, torchrun, char_data, tmp_path):
    common = (f'--dataset={char_data}', '--optimizer=muon', *RUN)
    run('train.py', f'--out_dir={tmp_path}/whole', *common)
    torchrun(2, f'--out_dir={tmp_path}/parts', *common, '--parallel=fsdp', '--max_iters=3')
    resume = (f'--out_dir={tmp_path}/parts', '--init_from=resume')
    run('train.py', *resume, '--max_iters=5')
    said = torchrun(4, *resume, '--max_iters=8', '--sample_every_eval')
    assert 'sample.py does' in said  # no process has all of the model
    whole, parts = losses(tmp_path / 'whole'), losses(tmp_path / 'parts')
    assert [step for step, *_ in parts] == list(range(8))
    # where Muon multiplies in bfloat16, a last bit of fp32 may become one of its 8 bits
    tolerance = 1e-4 if has_bfloat16('cpu') else 1e-5
    for (_, loss, norm), (_, expected, expected_norm) in zip(parts, whole):
        assert loss == pytest.approx(expected, abs=tolerance) and norm == pytest.approx(expected_norm, abs=10 * tolerance)
    one, many = ckpt.load(tmp_path / 'whole'), ckpt.load(tmp_path / 'parts')
    for name, weight in one.model.items():
        torch.testing.assert_close(many.model[name], weight, atol=10 * tolerance, rtol=0)
    assert many.val_loss == pytest.approx(one.val_loss, abs=tolerance)


def test_in_one_order_the_sums_are_equal_to_the_last_bit(run, torchrun, char_data, tmp_path):
    common = (f'--dataset={char_data}', '--deterministic_sum', *RUN)
    run('train.py', f'--out_dir={tmp_path}/1', *common)
    torchrun(4, f'--out_dir={tmp_path}/4', *common)
    assert losses(tmp_path / '1') == losses(tmp_path / '4') and len(losses(tmp_path / '1')) == 8
    one, four = ckpt.load(tmp_path / '1').model, ckpt.load(tmp_path / '4').model
    assert all(torch.equal(four[name], weight) for name, weight in one.items())


def test_shards_are_not_summed_in_one_order_which_is_said_once(torchrun, char_data, tmp_path):
    common = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *RUN)
    said = torchrun(2, *common, '--deterministic_sum', '--parallel=fsdp', code=2)
    assert said.count('train.py: deterministic_sum = True: only for copies') == 1 and not (tmp_path / 'out').exists()


def test_when_torchrun_starts_processes_again_the_run_goes_on(run, clone, char_data, tmp_path):
    common = (f'--dataset={char_data}', *RUN, '--max_iters=80', '--lr_decay_iters=80', '--save_interval=5', '--eval_interval=80')
    run('train.py', f'--out_dir={tmp_path}/whole', *common)
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3')
    log = tmp_path / 'out' / 'log.jsonl'
    environment = os.environ | {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}  # README says why
    with subprocess.Popen([sys.executable, *torchrun, clone / 'train.py', f'--out_dir={tmp_path}/out', *common], cwd=clone,
                          env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as agent:
        while not log.exists() or log.read_text().count('grad_norm') < 12:
            assert agent.poll() is None
            time.sleep(0.1)
        workers = Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        said = agent.communicate(timeout=200)[0]
    assert agent.returncode == 0, said
    assert 'started the processes again, the run goes on' in said and (tmp_path / 'out' / 'status').read_text() == 'done\n'
    parts = losses(tmp_path / 'out')
    assert [step for step, *_ in parts] == list(range(80))
    assert [loss for _, loss, _ in parts] == pytest.approx([loss for _, loss, _ in losses(tmp_path / 'whole')], abs=1e-5)


@pytest.mark.parametrize('n', range(1, 20))
def test_a_tree_is_halved_from_the_top(n):
    def tree(first, last):
        return first if last - first == 1 else (tree(first, (first + last) // 2), tree((first + last) // 2, last))

    nodes = []
    for leaf, count in enumerate(joins(n)):
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
def test_a_model_without_memory_draws_the_weights_of_any_other(options):
    config = GPTConfig(**{'block_size': 8, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 32} | options)
    with torch.device('meta'):
        model = GPT(config)
    assert all(p.is_meta for p in model.parameters())
    torch.manual_seed(1)
    draw(model, torch.device('cpu'))
    torch.manual_seed(1)
    expected = GPT(config)
    assert (model.lm_head.weight is model.transformer.wte.weight) == config.tie_weights
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)


def test_shards_are_chosen_where_copies_would_fill_half_of_the_memory():
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=1, n_embd=8))
    needed = 16 * model.get_num_params(False)  # weights, gradients and two moments in fp32
    for memory, expected in ((None, 'ddp'), (2 * needed, 'ddp'), (2 * needed - 1, 'fsdp')):
        assert choose('auto', model, memory) == expected
        assert choose('ddp', model, memory) == 'ddp' and choose('fsdp', model, memory) == 'fsdp'


def test_processes_that_see_different_folders_say_so(run, clone, char_data, tmp_path):
    for rank, steps in ((0, 3), (1, 5)):
        run('train.py', f'--out_dir={tmp_path}/out-{rank}', f'--dataset={char_data}', *RUN, f'--max_iters={steps}')
    command = f'{sys.executable} train.py --init_from=resume --out_dir={tmp_path}/out-$RANK'
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no-python']
    result = subprocess.run([*torchrun, 'bash', '-c', command], capture_output=True, text=True, timeout=200, cwd=clone)
    assert result.returncode and result.stderr.count('train.py: ') == 1 and 'is not the same folder for all' in result.stderr
