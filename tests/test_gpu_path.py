"""What only a GPU or several processes use, tested by what it computes on a CPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

import sample
from architectures import gpt_config
from configurator import TrainConfig
from helpers import ROUNDING, TINY, step_losses, tiny, tokens
from lib import device, loss
from lib.distributed import map_shared
from lib.errors import UserError
from lib.generation import beam_search, race, sample_next_token
from lib.linear import Int8Linear, quantize
from lib.step_log import StepLog
from model import GPT
from optimizer import Optimizer, orthogonalize

DOCUMENTS = [
    {'eot_token': 3},
    {'eot_token': 3, 'turns': 2, 'position': 'rope', 'n_kv_head': 2},
    {'eot_token': 3, 'turns': 2, 'prefix_lm': True},
]


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', DOCUMENTS)
@torch.no_grad()
def test_flex_attention_sees_what_the_mask_shows(monkeypatch, options):
    """Its blocks have 128 tokens. There is no backward for it on a CPU."""
    torch.manual_seed(0)
    model = GPT(gpt_config(options | {'block_size': 300})).eval()
    idx = torch.randint(12, (2, 300))
    idx[0, 40:250] = torch.randint(4, 12, (210,))  # a document longer than a block
    expected = model(idx, idx)[0]
    torch.compiler.reset()
    collector = CompileCounterWithBackend('aot_eager')
    monkeypatch.setattr(GPT, 'uses_flex_attention', lambda model, tokens: True)
    actual = torch.compile(model, fullgraph=True, backend=collector)(idx, idx)[0]
    assert 'flex_attention' in str(collector.graphs[0].graph)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_flex_attention_is_for_compiled_models_on_cuda(monkeypatch):
    on_cuda, on_cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    model = tiny(eot_token=3, n_head=2, n_embd=32)
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device: True)
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device: torch.bfloat16)
    assert not model.uses_flex_attention(on_cuda)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert model.uses_flex_attention(on_cuda) and not model.uses_flex_attention(on_cpu)
    narrow = tiny(eot_token=3, n_head=4, n_embd=32)  # flex attention needs heads of 16
    assert not narrow.uses_flex_attention(on_cuda)
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device: torch.float16)
    assert not model.uses_flex_attention(on_cuda)


# Loss and logits ----------------------------------------------------------------------------------


def test_loss_chunks_follow_the_memory_of_the_gpu():
    logits = 12 * 1024 * 50304
    assert 1 <= -(-logits // loss.max_logits(80 * 2**30)) <= 4
    assert 10 * loss.max_logits(8 * 2**30) < 8 * 2**30 / 8  # bytes
    assert loss.max_logits(None) == 2**24


def test_vocabulary_that_needs_padding_takes_the_chunked_loss():
    cuda, cpu = torch.device('cuda'), torch.device('cpu')
    assert loss.needs_chunks(1, 50257, cuda, 2**30) and not loss.needs_chunks(1, 50304, cuda, 2**30)
    assert not loss.needs_chunks(1, 50257, cpu, 2**30)


def test_chunked_loss_of_a_quantized_model():
    """Its head is int8 too."""
    model = quantize(tiny(tie_weights=False).eval())
    idx = tokens(2, 16)
    with torch.no_grad():
        plain = model(idx, idx)[1]
        model.max_logits = 100
        chunked = model(idx, idx, return_logits=False)[1]
    torch.testing.assert_close(chunked, plain, atol=0.01, rtol=0)  # plain rounds x to int8 too


def test_int8_weights_of_a_gpu_are_what_its_products_use():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(8, 3), torch.randn(2, 8)
    with torch.device('meta'):
        int8 = Int8Linear(torch.nn.Linear(8, 3))
    int8.scale = linear.weight.detach().abs().amax(dim=1) / 127
    int8.int8 = (linear.weight / int8.scale[:, None]).round().to(torch.int8)
    int8.bias = linear.bias
    torch.testing.assert_close(int8.weight, linear.weight, atol=0.51 * int8.scale.max(), rtol=0)
    expected = torch.nn.functional.linear(x, int8.weight, linear.bias)
    torch.testing.assert_close(int8(x), expected)


@pytest.mark.parametrize('temperature', [0, 1.0])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_rows_without_finite_logits_draw_no_token(temperature, bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    drawn = sample_next_token(logits, temperature)
    assert drawn[1] == -1 and (drawn[[0, 2]] >= 0).all()


def test_nan_weights_end_every_way_to_generate_with_one_sentence():
    model = tiny().eval()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.fill_(float('nan'))
    for generate in (
        lambda: model.generate(tokens(2, 3), 5),
        lambda: model.generate([[1, 2], [3]], 5, temperature=0, repetition_penalty=1.2),
        lambda: beam_search(model, [[1, 2], [3]], 5, num_beams=2),
    ):
        with pytest.raises(UserError, match='the logits are not finite'):
            generate()


def test_gpu_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    drawn = race(probs.expand(20_000, 5), torch.Generator().manual_seed(0))
    counts, expected = drawn.bincount(minlength=5), 20_000 * probs
    chi2 = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert chi2 < 16.3 and counts[4] == 0  # p = 0.001 with 3 degrees of freedom


def test_int8_on_a_gpu_needs_compile(monkeypatch, trained):
    monkeypatch.setattr(sample, 'pick_device', lambda name: torch.device('cuda', 0))
    config = sample.Config(out_dir=str(trained), quantize='int8')
    with pytest.raises(UserError, match='quantize = int8: .* add --compile'):
        sample.main(config)


# Training -----------------------------------------------------------------------------------------


def test_log_does_not_wait_for_the_step_just_launched(monkeypatch, tmp_path):
    """On a GPU: the numbers of the step before are there already."""
    recorded, waited = [], []

    class Event:
        def record(self):
            recorded.append(self)

        def synchronize(self):
            waited.append(recorded.index(self))

    class OnCuda:
        device = torch.device('cuda')

        def to(self, device, non_blocking):
            assert non_blocking
            return torch.ones(3)

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr('lib.step_log.peak_flops', lambda *args: None)
    model = SimpleNamespace(flops_per_token=lambda: 1)
    config = TrainConfig(log_interval=1)
    data = SimpleNamespace(block_size=8, n_samples=1)
    with StepLog(config, None, model, torch.device('cuda'), torch.float32, data, 0) as log:
        for step in range(3):
            log.add(step, 0, 0.1, OnCuda(), None)
            log.flush_if_due(step + 1)
            assert waited == list(range(step))
        log.flush()  # before an evaluation or a save
        assert waited == [0, 1, 2]


def test_deterministic_by_default_on_a_cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(device, 'pick_device', torch.device)
    for name, choice, expected in (('cpu', 'auto', True), ('cuda', 'auto', False),
                                   ('cpu', False, False), ('cuda', True, True)):
        device.start_device(name, choice)
        assert torch.are_deterministic_algorithms_enabled() == expected
    torch.set_deterministic_debug_mode('default')


def test_each_process_orthogonalizes_its_share():
    """Of 8 fake processes, whose all-gather leaves other shares as they are."""
    dist.init_process_group('fake', store=FakeStore(), rank=1, world_size=8)
    try:
        params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(12)]
        optimizer = Optimizer([{'params': params, 'lr': 0.1, 'weight_decay': 0.0, 'kind': 'muon'}])
        for p in params:
            p.grad = torch.randn_like(p)
        shares = []
        optimizer.orthogonalize = lambda x: shares.append(len(x)) or orthogonalize(x)
        optimizer.step()
        assert shares == [2]  # of 12
        optimizer.shares_muon = False
        optimizer.step()
        assert shares == [2, 12]
        assert len(map_shared(lambda x: x, torch.zeros(3, 2))) == 3
    finally:
        dist.destroy_process_group()


ONE_CANNOT_COMPILE = """
import os, torch
def compile(function=None, **options):
    if os.environ.get('RANK') == '1':
        raise RuntimeError('no compiler')
    return function
torch.compile = compile
"""


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_where_one_process_cannot_compile_none_does(ranks, char_data, patched_env, tmp_path,
                                                    parallel):
    output = ranks(2, *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out', '--max_iters=2',
                   '--gradient_accumulation_steps=2', '--compile=True', f'--parallel={parallel}',
                   env=patched_env(ONE_CANNOT_COMPILE))
    assert output.count('torch.compile failed, going on without it: RuntimeError') == 1
    assert 'done: best val loss' in output


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_compiled_processes_train_like_plain_ones(run, ranks, char_data, tmp_path, parallel):
    """Recomputed blocks, several buckets of gradients, Muon, masks of documents."""
    common = (*TINY, f'--dataset={char_data}', '--n_embd=192', '--n_layer=3', '--dtype=float32',
              '--max_iters=3', '--gradient_accumulation_steps=4', '--activation_checkpointing',
              '--optimizer=muon')  # fmt: skip
    run('train.py', f'--out_dir={tmp_path}/plain', *common, '--compile=False')
    ranks(2, f'--out_dir={tmp_path}/compiled', *common, '--compile=True', f'--parallel={parallel}')
    plain, compiled = (
        [line[1] for line in step_losses(tmp_path / name)] for name in ('plain', 'compiled')
    )
    assert len(plain) == 3
    assert compiled == pytest.approx(plain, rel=0, abs=ROUNDING['muon'])


def test_beam_search_does_not_compile_for_nothing(refused, trained):
    says = 'compile = True: beam search does not compile'
    refused('sample.py', f'--out_dir={trained}', '--num_beams=2', '--compile', says=says)
