"""Memory: the estimates, against autograd and the profiler, and activation checkpointing."""


import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from configurator import TrainConfig
from helpers import peak_bytes
from lib import memory
from lib.device import math_attention_is_faster
from lib.resume import MODEL_KEYS
from model import GPT, GPTConfig
from optimizer import make_optimizer


def forward_and_measure(model, idx, half=False):
    """(loss, bytes that autograd saves in a forward pass), without weights, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast('cpu', enabled=half),
    ):
        loss = model(idx, idx)[1]
    return loss, sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in weights
    )


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'bias': False, 'n_layer': 5},
        {'n_kv_head': 1},
        {'activation': 'swiglu'},
        {'activation': 'relu'},
        {'position': 'rope'},
        {'tie_weights': False},
        {'block_size': 512},
        {'position': 'rope', 'qk_norm': True, 'n_kv_head': 2},
        {'position': 'rope', 'qk_norm': 'gain', 'head_size': 40, 'n_hidden': 300},
        {'ngram': 4, 'ngram_rows': 50},
    ],
    ids=str,
)
def test_activation_bytes_matches_autograd(options, half):
    model = GPT(
        GPTConfig(
            **{'n_layer': 3, 'n_head': 4, 'n_embd': 128, 'vocab_size': 200, 'block_size': 128}
            | options
        )
    )
    cpu, dtype = torch.device('cpu'), torch.bfloat16
    if half and math_attention_is_faster(cpu, dtype, model.config.block_size):
        model.train_with_math_attention()
    _, kept = forward_and_measure(model, torch.randint(200, (4, model.config.block_size)), half)
    logits = 4 * model.config.block_size * 200 * 4  # of the log-softmax
    estimate = memory.activation_bytes(memory.Sizes(model.config, cpu), 4, half)
    assert estimate == pytest.approx(kept - logits, rel=0.06)


def test_activation_checkpointing_saves_memory_and_preserves_gradients():
    options = {
        'n_layer': 4,
        'n_head': 4,
        'n_embd': 64,
        'vocab_size': 50,
        'block_size': 64,
        'dropout': 0.1,
    }
    results = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**options, activation_checkpointing=wanted))
        idx = torch.randint(50, (4, 64))
        loss, kept = forward_and_measure(model, idx)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()], kept))
    (loss, gradients, all_kept), (same_loss, same_gradients, less) = results
    assert torch.equal(loss, same_loss) and all(map(torch.equal, gradients, same_gradients))
    assert less < all_kept / 5


@pytest.mark.parametrize('accumulation', [4, 8])
def test_memory_estimate_of_ddp_and_fsdp_matches_hand_calculation(accumulation):
    keys = {'n_layer': 3, 'n_head': 2, 'n_embd': 64, 'block_size': 32}
    model = GPT(GPTConfig(vocab_size=100, bias=False, **keys))
    config = TrainConfig(gradient_accumulation_steps=accumulation, batch_size=2, **keys)
    total, block = model.get_num_params(False), 12 * 64**2
    copies, shards = (
        memory.step_bytes(memory.Sizes(model.config, torch.device('meta')), config, True, how, 4)
        for how in ('ddp', 'fsdp')
    )
    assert copies['weights'] == 4 * total
    assert copies['optimizer'] == 8 * total
    assert shards['optimizer'] == 2 * total
    # buckets in addition to the local sum
    assert copies['gradients'] == (8 if accumulation > 4 else 4) * total
    rest = total - 3 * block
    # unsharded: everything outside the blocks, and two blocks in 16 bits
    assert shards['weights'] == total + 4 * rest + 2 * 2 * block
    if accumulation > 4:  # sharded, and for a time whole: the same, and one block
        assert shards['gradients'] == total + 4 * rest + 4 * block
        assert shards['activations'] == copies['activations'] - 2 * 3 * block


SHAPES = [
    (2048, {'n_layer': 4, 'n_embd': 256, 'block_size': 128, 'batch_size': 16}),
    (
        30000,
        {
            'n_layer': 2,
            'n_embd': 256,
            'block_size': 256,
            'batch_size': 4,
            'norm': 'rmsnorm',
            'activation': 'relu2',
        },
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize('accumulation', [1, 2])
@pytest.mark.parametrize('vocab_size, options', SHAPES)
def test_memory_estimate_matches_torch_profiler(vocab_size, options, accumulation):
    config = TrainConfig(n_head=4, gradient_accumulation_steps=accumulation, **options)
    keys = {key: getattr(config, key) for key in MODEL_KEYS}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        model = GPT(GPTConfig(**keys, vocab_size=vocab_size))
        optimizer = make_optimizer(model, config)
        for _ in range(2):
            for _ in range(accumulation):
                idx = torch.randint(vocab_size, (config.batch_size, config.block_size))
                model(idx, idx, return_logits=False)[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    peak = peak_bytes(events)
    sizes = memory.Sizes(model.config, idx.device)
    estimate = sum(memory.step_bytes(sizes, config, half=False).values())
    assert estimate == pytest.approx(peak, rel=0.15)
