"""Shards and copies of a model on real processes of torchrun, over gloo: the same losses as one process alone."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import TINY

import checkpoint as ckpt
from parallel import joins

# micro-batches to divide, dropout, and a number of rows that 4 processes do not share evenly
RUN = (*TINY, '--gradient_accumulation_steps=8', '--dropout=0.1', '--dtype=float32', '--n_embd=36', '--max_iters=8',
       '--lr_decay_iters=8')


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
    for (_, loss, norm), (_, expected, expected_norm) in zip(parts, whole):
        assert loss == pytest.approx(expected, abs=1e-5) and norm == pytest.approx(expected_norm, abs=1e-4)
    one, many = ckpt.load(tmp_path / 'whole'), ckpt.load(tmp_path / 'parts')
    for name, weight in one.model.items():
        torch.testing.assert_close(many.model[name], weight, atol=1e-4, rtol=0)
    assert many.val_loss == pytest.approx(one.val_loss, abs=1e-5)


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
