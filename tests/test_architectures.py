"""Every architecture: gradients on the meta device, and no graph break when it is compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from architectures import combined, describe, gpt_config, one_by_one
from lib.generation import KVCache
from model import GPT


@pytest.mark.parametrize('architecture', one_by_one() + combined(), ids=describe)
def test_backward_reaches_every_parameter(architecture):
    """On the meta device, which computes shapes alone."""
    with torch.device('meta'):
        model = GPT(gpt_config(architecture))
        idx = torch.zeros(2, 16, dtype=torch.long)
    model(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, name


def compile_whole(model):
    """(the model compiled into a single graph, collector of graphs); no code is generated."""
    torch.compiler.reset()
    collector = CompileCounterWithBackend('aot_eager')
    return torch.compile(model, fullgraph=True, dynamic=False, backend=collector), collector


def assert_one_graph(collector):
    (graph,) = collector.graphs
    # fullgraph captures .item() instead of raising; without fullgraph it is a graph break
    assert 'item' not in {node.target for node in graph.graph.nodes}


@pytest.mark.parametrize('architecture', [{}, *combined()], ids=describe)
def test_training_step_is_one_graph(architecture):
    model = GPT(gpt_config(architecture))
    compiled, collector = compile_whole(model)
    idx = torch.zeros(2, 16, dtype=torch.long)
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        loss = compiled(idx, idx, return_logits=False)[1]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_one_graph(collector)


@pytest.mark.parametrize('architecture', [{}, *combined()], ids=describe)
@torch.no_grad()
def test_decoding_step_is_one_graph(architecture):
    """The same one at every step, for prompts of unequal length."""
    model = GPT(gpt_config(architecture)).eval()
    compiled, collector = compile_whole(model)
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 1]), static=True)
    model(torch.zeros(2, 4, dtype=torch.long), cache=cache)
    for _ in range(3):
        compiled(torch.zeros(2, 1, dtype=torch.long), cache=cache)
    assert_one_graph(collector)


def test_chunked_loss_is_one_graph():
    model = GPT(gpt_config({'logit_softcap': 5.0, 'label_smoothing': 0.1}))
    model.max_logits = 500
    compiled, collector = compile_whole(model)
    idx = torch.zeros(2, 16, dtype=torch.long)
    compiled(idx, idx, return_logits=False)[1].backward()
    assert_one_graph(collector)


def test_texts_of_any_length_share_one_graph(monkeypatch):
    """Compiling takes minutes: sample.py does it once, before the first text. The last one slides
    over the context."""
    model, compile_ = GPT(gpt_config({})), torch.compile
    collector = CompileCounterWithBackend('aot_eager')
    torch.compiler.reset()

    compiled = []

    def compile_with(model, dynamic, mode):
        compiled.append(model)
        return compile_(model, dynamic=dynamic, backend=collector)

    monkeypatch.setattr(torch, 'compile', compile_with)
    for prompt, n in (([0], 2), ([1, 2, 3], 5), ([4], 20)):
        expected = model.generate([prompt], n, temperature=0)
        assert model.generate([prompt], n, temperature=0, compile=True) == expected
    assert_one_graph(collector)
    # a second cache would need a second CUDA graph
    assert compiled == [model] and len(model.decoders) == 1
