"""On a real GPU: attention kernels, the model, torch.compile, CUDA graphs and host syncs.

    python -m pytest -m cuda                    # skipped where PyTorch sees no GPU
    CUDA_TESTS_ON=cpu python -m pytest -m cuda  # runs what can run there, to find mistakes in tests
"""

import contextlib
import copy
import importlib.util
import itertools
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from architectures import combined, describe, gpt_config, one_by_one
from helpers import tokens
from lib import loss as losses
from lib.device import autocast
from lib.generation import generate_tokens
from lib.linear import Int8Linear, quantize
from lib.step_log import StepLog
from model import GPT, math_attention, sdpa
from stub_trainer import Rows, make_trainer

# what is worth a warning on this machine is not what these tests are about
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('default')]

HALF = (torch.bfloat16, torch.float16)
# of the largest value: a few roundings to 8, 11 and 24 bits; sums in fp32 in another order
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def exact_products(gpu):
    """No TF32; nothing is compiled yet, and everything may be."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    torch.compiler.reset()
    torch.compiler.set_stance('default')
    yield
    torch.set_float32_matmul_precision(before)


def assert_close(actual, expected, tolerance, what=''):
    """Within tolerance times the largest expected value."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.isfinite().all(), what
    error, largest = (actual - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * max(largest, 1e-3), f'{what}: off by {error:.3g} of {largest:.3g}'


def make_model(**options):
    """A small model on the CPU in training mode, in which every parameter affects the loss."""
    torch.manual_seed(0)
    model = GPT(gpt_config({'dropout': 0.0} | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.5 * (p.dim() == 1), std=0.3)
    return model.train()


def loss_and_gradients(model, call, idx, targets, device, dtype=torch.float32):
    """(loss, {parameter: gradient}) of call, which is model or wraps it."""
    model.zero_grad()
    with autocast(device, dtype):
        loss = call(idx.to(device), targets.to(device), return_logits=False)[1]
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(actual, expected, tolerance):
    assert_close(actual[0], expected[0], tolerance, 'loss')
    for name, gradient in expected[1].items():
        assert_close(actual[1][name], gradient, tolerance, name)


def without_dropout(architectures):
    """Masks of dropout differ from device to device, and where they are compiled."""
    kept = [{key: value for key, value in a.items() if key != 'dropout'} for a in architectures]
    return [a for i, a in enumerate(kept) if a not in kept[:i]]


def compile_on(device, model, graphs=()):
    """Compile without a graph break. On a CPU Inductor would take a minute: trace only. graphs: a
    list that gets what was compiled."""
    name = 'inductor' if device.type == 'cuda' else 'aot_eager'
    compile_graph = torch._dynamo.lookup_backend(name)

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_graph(graph, inputs)

    return torch.compile(model, fullgraph=True, dynamic=False,
                         backend=name if graphs == () else backend)


# Attention ----------------------------------------------------------------------------------------


def attention_cases():
    """(backend, dtype, mask, key/value heads) that each kernel is there for."""
    for dtype, n_kv_head in itertools.product(HALF, (4, 2)):
        yield 'FLASH_ATTENTION', dtype, None, n_kv_head
        yield 'FA3', dtype, None, n_kv_head
    for dtype, mask in itertools.product(TOLERANCE, (None, 'documents')):
        yield 'EFFICIENT_ATTENTION', dtype, mask, 4
        yield 'MATH', dtype, mask, 2
        yield 'default', dtype, mask, 2  # what training gets


@pytest.mark.parametrize('T', [100, 256])
@pytest.mark.parametrize('backend, dtype, mask, n_kv_head', attention_cases())
def test_attention_matches_float64(gpu, backend, dtype, mask, n_kv_head, T):
    """Forward and backward, causal, against attention written out on the CPU."""
    torch.manual_seed(0)
    parts = [torch.randn(2, n, T, 64).to(dtype) for n in (4, n_kv_head, n_kv_head, 4)]
    if mask:
        document = torch.arange(T) // 37
        mask = (document[:, None] == document) & torch.ones(T, T, dtype=torch.bool).tril()
    expected = attention_step(math_attention, [x.double() for x in parts], mask)
    with kernel(gpu, backend):
        on_gpu = None if mask is None else mask.to(gpu)[None, None]
        actual = attention_step(sdpa, [x.to(gpu) for x in parts], on_gpu)
    for name, x, reference in zip(('output', 'dq', 'dk', 'dv'), actual, expected, strict=True):
        assert_close(x, reference, TOLERANCE[dtype], name)


def attention_step(attend, parts, mask):
    """The output of attention and its gradients for q, k and v."""
    *qkv, gradient = parts
    qkv = [x.requires_grad_() for x in qkv]
    output = attend(*qkv, mask)
    output.backward(gradient)
    return output, *(x.grad for x in qkv)


@contextlib.contextmanager
def kernel(device, backend):
    """Only this kernel of scaled_dot_product_attention."""
    if backend == 'FA3':
        with flash_attention_3(device), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    elif backend == 'default' or device.type == 'cpu':
        yield
    else:
        with sdpa_kernel(SDPBackend[backend]):
            yield


@contextlib.contextmanager
def flash_attention_3(device):
    if importlib.util.find_spec('flash_attn_interface') is None:
        pytest.skip('needs FlashAttention 3, the package flash_attn_interface')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('FlashAttention 3 needs a Hopper GPU')
    torch.nn.attention.activate_flash_attention_impl('FA3')
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def test_decoding_attention_matches_float64(gpu):
    """One query without a mask, and with the mask of a static cache."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, T, 64) for n, T in ((4, 1), (2, 50), (2, 50)))
    mask = (torch.arange(50) < 33).view(1, 1, 1, 50).expand(3, 1, 1, 50)
    for dtype, visible in itertools.product(TOLERANCE, (None, mask)):
        x = [part.to(dtype) for part in (q, k, v)]
        expected = math_attention(*(part.double() for part in x), visible)
        seen = None if visible is None else visible.to(gpu)
        actual = sdpa(*(part.to(gpu) for part in x), seen)
        assert_close(actual, expected, TOLERANCE[dtype])


DOCUMENTS = {'eot_token': 3, 'n_head': 2, 'n_embd': 64}
SOURCES = {'turns': 2, 'prefix_lm': True, 'n_kv_head': 1, 'qk_norm': True, 'position': 'rope'}


@pytest.mark.parametrize('T', [64, 192])  # below 128 tokens it has another kernel
@pytest.mark.parametrize('options', [DOCUMENTS, DOCUMENTS | SOURCES], ids=['documents', 'sources'])
def test_flex_attention_matches_mask(gpu, monkeypatch, options, T):
    """Block masks, compiled, in bf16, against masked attention in fp32 on the CPU."""
    if gpu.type == 'cpu':
        monkeypatch.setattr(GPT, 'uses_flex_attention',
                            lambda self, tokens: torch.compiler.is_compiling())
        monkeypatch.setattr('torch.nn.attention.flex_attention._validate_device',
                            lambda *qkv: None)  # Inductor lacks the backward pass
    model = make_model(block_size=T, **options)
    idx, targets = tokens(2, T), tokens(2, T, seed=2)
    idx[:, ::23] = 3  # ends of documents
    cpu = torch.device('cpu')
    expected = loss_and_gradients(model, lambda *args, **_: model(*args), idx, targets, cpu)
    on_gpu = copy.deepcopy(model).to(gpu)
    graphs = []
    compiled = compile_on(gpu, on_gpu, graphs)
    actual = loss_and_gradients(on_gpu, compiled, idx, targets, gpu, torch.bfloat16)
    # errors add up through the model
    assert_same_step(actual, expected, 5 * TOLERANCE[torch.bfloat16])
    assert 'flex_attention' in graphs[0].code


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', without_dropout(one_by_one() + combined()), ids=describe)
def test_model_matches_cpu_in_fp32(gpu, options):
    model = make_model(**options)
    on_gpu = copy.deepcopy(model).to(gpu)
    idx, targets = tokens(3, 16), tokens(3, 16, seed=2)
    targets[0, :5] = -1
    assert_close(on_gpu(idx.to(gpu), targets.to(gpu))[0], model(idx, targets)[0], 1e-4, 'logits')
    expected = loss_and_gradients(model, model, idx, targets, torch.device('cpu'))
    actual = loss_and_gradients(on_gpu, on_gpu, idx, targets, gpu)
    assert_same_step(actual, expected, 1e-4)


@pytest.mark.parametrize('options', without_dropout([{}, *combined()]), ids=describe)
def test_compiled_matches_eager(gpu, options):
    """Without a graph break."""
    model = make_model(**options).to(gpu)
    idx, targets = tokens(3, 16), tokens(3, 16, seed=2)
    expected = loss_and_gradients(model, model, idx, targets, gpu)
    actual = loss_and_gradients(model, compile_on(gpu, model), idx, targets, gpu)
    assert_same_step(actual, expected, 1e-4)


@pytest.mark.parametrize('dtype', HALF)
def test_compiled_half_precision_matches_fp32(gpu, dtype):
    """With a chunked loss, whose products are in 16 bits and their sums in fp32."""
    model = make_model(n_layer=2, tie_weights=False).to(gpu)
    model.max_logits = 20 * 40
    idx, targets = tokens(3, 16), tokens(3, 16, seed=2)
    expected = loss_and_gradients(model, model, idx, targets, gpu)
    actual = loss_and_gradients(model, compile_on(gpu, model), idx, targets, gpu, dtype)
    assert_same_step(actual, expected, 5 * TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('vocab_size', [384, 300])  # 300 needs padding on CUDA
@pytest.mark.parametrize('n_chunks', [1, 3])
def test_chunked_loss_matches_cross_entropy(gpu, n_chunks, vocab_size, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(70, 64), torch.randn(vocab_size, 64) / 4
    targets = torch.randint(vocab_size, (70,))
    targets[::6] = -1
    for cap, smoothing in ((0.0, 0.0), (5.0, 0.1)):
        def reference(x, weight, cap=cap, smoothing=smoothing):
            logits = losses.softcap(x @ weight.T, cap)
            return F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing)

        def chunked(x, weight, cap=cap, smoothing=smoothing):
            at_once = -(-70 * vocab_size // n_chunks)
            with autocast(gpu, dtype):
                return losses.chunked_cross_entropy(x, weight, targets.to(gpu), cap, smoothing,
                                                    at_once)

        results = []
        for loss_of, to in ((reference, {'dtype': torch.float64}), (chunked, {'device': gpu})):
            inputs = [part.detach().to(**to).requires_grad_() for part in (x, weight)]
            loss = loss_of(*inputs)
            loss.backward()
            results.append((loss, *(part.grad for part in inputs)))
        for name, actual, expected in zip(('loss', 'dx', 'dw'), results[1], results[0]):
            assert_close(actual, expected, TOLERANCE[dtype], name)


# Host syncs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_host_sync(device):
    """An operation for which the CPU waits for the GPU raises RuntimeError."""
    if device.type != 'cuda':
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize(
    'dtype, compiled, keys',
    [
        (torch.bfloat16, False, {}),
        (torch.bfloat16, True, {'optimizer': 'muon'}),
        (torch.float16, False, {'optimizer': 'muon', 'dropout': 0.1}),
        (torch.float32, False, {'deterministic_sum': True}),
    ],
    ids=['adamw', 'compiled muon', 'fp16', 'deterministic sum'],
)
def test_training_step_has_no_host_sync(gpu, capsys, dtype, compiled, keys):
    keys = {'gradient_accumulation_steps': 2, 'max_iters': 100} | keys
    trainer = make_trainer({}, gpu, dtype, compiled=compiled and gpu.type == 'cuda', **keys)
    assert 'torch.compile failed' not in capsys.readouterr().err
    with StepLog(trainer.config, None, trainer.raw_model, gpu, dtype, Rows(), 0) as log:
        trainer.log = log
        for _ in range(3):  # warmup: allocations, kernels
            trainer.train_step()
        with no_host_sync(gpu):
            for _ in range(20):
                trainer.train_step()
        log.flush()  # raises if a loss was not finite
    assert trainer.step == 23 and log.skips == 0


@pytest.mark.parametrize('compile', [False, True], ids=['eager', 'compiled'])
def test_sampling_has_no_host_sync_per_token(gpu, compile):
    """Past the context, where the window slides, with every filter."""
    if compile and gpu.type == 'cpu':
        pytest.skip('on a CPU every token is one')
    model = make_model(n_layer=2).to(gpu).eval()
    filters = {'top_k': 9, 'top_p': 0.9, 'min_p': 0.01, 'repetition_penalty': 1.2}
    steps = generate_tokens(model, [[1, 2, 3], [4]], 40, seed=1, slide=4, compile=compile,
                            **filters)
    drawn = [next(steps) for _ in range(20)]
    with no_host_sync(gpu):
        drawn += steps
    assert len(drawn) == 40 and all((token >= 0).all() for token in drawn)


# Decoding -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_graphs():
    """The list of CUDA graphs that are captured meanwhile."""
    graphs, capture = [], torch.cuda.CUDAGraph.capture_begin

    def noted(graph, *args, **options):
        graphs.append(graph)
        return capture(graph, *args, **options)

    with mock.patch.object(torch.cuda.CUDAGraph, 'capture_begin', noted):
        yield graphs


@pytest.mark.parametrize('options', [{}, {'position': 'rope', 'n_kv_head': 2, 'eot_token': 3},
                                     {'ngram': 3, 'norm': 'rmsnorm'}], ids=describe)
def test_cuda_graph_decoding_matches_eager(gpu, options):
    """Three prompts of other lengths, the last past the context, with the graphs of the first."""
    model = make_model(n_layer=2, **options).to(gpu).eval()
    with counted_graphs() as graphs:
        n_graphs = []
        for prompt, n_new in (([5, 6, 7], 6), ([9] * 8, 6), ([1, 2, 3, 4, 5], 30)):
            eager = model.generate([prompt], n_new, temperature=0, slide=4)
            assert model.generate([prompt], n_new, temperature=0, slide=4, compile=True) == eager
            n_graphs.append(len(graphs))
    assert n_graphs[0] == n_graphs[1] == n_graphs[2]
    # the first one is empty: PyTorch makes its memory pool with it
    assert n_graphs[0] > 1 or gpu.type == 'cpu', 'the decode step did not become a CUDA graph'


def test_cuda_graph_decoding_of_a_batch_matches_eager(gpu):
    """Unequal prompts with padding; then others, of the same number."""
    model = make_model(n_layer=2).to(gpu).eval()
    for prompts in ([[1, 2, 3], [4]], [[7], [8, 9, 10, 11]]):
        eager = model.generate(prompts, 25, temperature=0, slide=4)
        assert model.generate(prompts, 25, temperature=0, slide=4, compile=True) == eager


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_int8_matches_dequantized_weights(gpu, dtype):
    """Compiled, where the conversion is fused into the product."""
    model = make_model(n_layer=2, bias=True).to(gpu, dtype).eval()
    int8 = quantize(copy.deepcopy(model))
    with torch.no_grad():
        for mine, theirs in zip(int8.modules(), model.modules(), strict=True):
            if isinstance(mine, Int8Linear):
                step = theirs.weight.float().abs().amax(1, keepdim=True) / 127
                assert ((mine.weight - theirs.weight).abs() <= 0.51 * step).all()
                theirs.weight.copy_(mine.weight)
        idx = tokens(2, 8).to(gpu)
        expected = model(idx)[0]
        if gpu.type == 'cpu':  # its kernels round the inputs too, and do not compile
            assert_close(int8(idx)[0], expected, 0.2)
            return
        assert_close(compile_on(gpu, int8)(idx)[0], expected, 5 * TOLERANCE[dtype])
    if dtype == torch.float32:
        eager = model.generate([[1, 2, 3]], 12, temperature=0)
        assert int8.generate([[1, 2, 3]], 12, temperature=0, compile=True) == eager
