"""Ablations, snippets and attribution graphs against PyTorch's hooks and handmade cases."""

import collections
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import interpret
from helpers import ARCHITECTURES, POST, awake, char_tokenizer, tokens, write_nanogpt_dataset
from interpret import causal, graph, snippets
from lib import bins

GATED = {'activation': 'swiglu', 'norm': 'rmsnorm', 'bias': False, 'position': 'rope'}
PAIRS = {'eot_token': 3, 'turns': 1, 'prefix_lm': True, 'ngram': 2, 'ngram_rows': 97}
TELLING = [{'n_kv_head': 2, 'logit_softcap': 5.0}, POST, GATED, PAIRS]
OTHERS = [pytest.param(options, marks=pytest.mark.slow)
          for options in ARCHITECTURES if options not in TELLING]


def text(model, T):
    """(trace, target (T,)) of random tokens; every fourth ends a document, a source or a target."""
    idx = tokens(1, T)
    if model.config.eot_token is not None:
        idx[:, ::4] = model.config.eot_token
    return interpret.run(model, idx), tokens(T, seed=3)


@contextlib.contextmanager
def hooked(*hooks):
    """hooks: (module, function of its input that returns another one)."""
    with contextlib.ExitStack() as stack:
        for module, function in hooks:
            handle = module.register_forward_pre_hook(lambda _, args, f=function: f(args[0]))
            stack.callback(handle.remove)
        yield


# Ablations ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', TELLING + OTHERS, ids=str)
@torch.no_grad()
def test_ablate_equals_hooks_on_whole_model(options):
    model = awake(**options)
    trace, target = text(model, 9)
    target.clamp_(max=37)
    hs = model.config.head_dim

    def measure():
        out = model(trace.idx, trace.idx)[0][0, :, :38]
        return F.cross_entropy(out, target, reduction='none'), out[torch.arange(9), target]

    losses, logits = causal.ablate(model, trace, target, vocab_size=38)
    before = measure()
    for layer, block in enumerate(model.transformer.h):
        for part in range(5):
            for kind in range(2):
                where = slice(part * hs, part * hs + hs) if part < 4 else slice(None)

                def replaced(x, kind=kind, where=where):
                    x = x.clone()
                    x[..., where] = x[..., where].mean(dim=1, keepdim=True) * kind
                    return x

                module = (block.attn if part < 4 else block.mlp).c_proj
                with hooked((module, replaced)):
                    after = measure()
                for shown, old, new in zip((losses, logits), before, after):
                    torch.testing.assert_close(shown[kind, layer, part], new - old,
                                               atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_ablate_by_given_means_changes_nothing_if_they_are_what_it_computes():
    model = awake()
    trace, target = text(model, 1)
    means = (trace.mixed[:, 0, :, 0], trace.post[:, 0, 0])
    losses, logits = causal.ablate(model, trace, target, means)
    torch.testing.assert_close(losses[1], torch.zeros(2, 5, 1), atol=1e-5, rtol=0)
    assert (logits[0].abs() > 1e-3).all()
    other = tuple(2 * mean for mean in means)
    assert (causal.ablate(model, trace, target, other)[1][1].abs() > 1e-3).all()


def test_ablations_that_would_take_too_long_are_left_out(monkeypatch):
    model = awake()
    trace, target = text(model, 4)
    facts, arrays = causal.collect_ablations(model, trace, target, 40)
    assert facts == {'ablation_mean': 'text'}
    assert {name: tuple(x.shape) for name, x in arrays.items()} == {
        'ablation_loss': (2, 2, 5, 4), 'ablation_logit': (2, 2, 5, 4)}
    monkeypatch.setattr(causal, 'MAX_FLOPS', 1e3)
    assert causal.collect_ablations(model, trace, target, 40) == ({}, {})


# Snippets -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [{}, {'eot_token': 3}], ids=str)
@torch.no_grad()
def test_search_finds_the_strongest_places_of_each_window(options):
    model = awake(**options)
    windows = tokens(7, 12)
    if options:
        windows[:, 5] = 3
    best, (mixed, post) = snippets.search(model, windows)
    traces = [interpret.run(model, window[None]) for window in windows]
    activations = torch.stack([trace.post[:, 0] for trace in traces])  # (7, L, T, F)
    torch.testing.assert_close(post, activations.mean(dim=(0, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        mixed, torch.stack([trace.mixed[:, 0].mean(dim=2) for trace in traces]).mean(dim=0),
        atol=1e-5, rtol=1e-5)
    values, places = best['neurons']
    for layer, neuron in ((0, 3), (1, 100)):
        by_window = activations[:, layer, 1:, neuron].max(dim=1).values
        largest = by_window.sort(descending=True).values[:5]
        torch.testing.assert_close(values[layer, neuron], largest)
        for value, (window, t) in zip(values[layer, neuron], places[layer, neuron].tolist()):
            torch.testing.assert_close(value, activations[window, layer, t, neuron])

    values, places = best['heads']
    attention = torch.stack([trace.attention[:, 0] for trace in traces])  # (7, L, nh, T, T)
    for head in range(4):
        found = []
        for window in range(7):
            pairs = [0.0]
            for query in range(12):
                seen = traces[window].mask[0, query].nonzero()[:, 0].tolist()
                if len(seen) >= 6:  # half a window
                    pairs += attention[window, 1, head, query, seen[1:-1]].tolist()
            found.append(max(pairs))
        expected = torch.tensor(sorted(found, reverse=True)[:5])
        torch.testing.assert_close(values[1, head], expected)
        for value, (window, query, key) in zip(values[1, head], places[1, head].tolist()):
            torch.testing.assert_close(value, attention[window, 1, head, query, key])


def checkpoint_of(dataset):
    return SimpleNamespace(config={'dataset': str(dataset)})


def test_snippets_come_from_the_runs_own_validation_data(tmp_path):
    write_nanogpt_dataset(tmp_path, 500 * 'abcdefgh' + 100 * 'stuvwxyz')  # the end is val.bin
    tokenizer = bins.open_tokenizer(tmp_path)
    model = awake(vocab_size=16)
    facts, arrays, means = snippets.collect_snippets(checkpoint_of(tmp_path), model, tokenizer)
    n, T = arrays['snippet_ids'].shape
    assert facts == {'snippets': {'path': str(tmp_path / 'val.bin'), 'tokens': n * T}}
    assert T == 16 and n == 30 and arrays['snippet_ids'].min() == 8
    assert arrays['neuron_best'].shape == (2, 128, 5)
    assert arrays['head_places'].shape == (2, 4, 5, 3)
    assert means[0].shape == (2, 4, 8) and means[1].shape == (2, 128)
    other = checkpoint_of(tmp_path), model, char_tokenizer(48, 16)
    assert 'another tokenizer' in snippets.collect_snippets(*other)[0]['snippets']['missing']


def test_snippets_say_why_there_are_none(tmp_path):
    model, tokenizer = awake(), char_tokenizer(48, 40)
    for dataset, reason in ((tmp_path, 'val.bin'), ('', 'names no data set')):
        facts, arrays, means = snippets.collect_snippets(checkpoint_of(dataset), model, tokenizer)
        assert reason in facts['snippets']['missing'] and not arrays and means is None


# Attribution graphs -------------------------------------------------------------------------------

class FrozenByHooks:
    """A model in which hooks keep attention patterns, norm divisors and the slopes of neurons as
    they were for a text, and in which one edge can be switched off."""

    def __init__(self, model, trace, stack):
        self.model, self.trace, self.config = model, trace, model.config
        self.inputs, self.scales = {}, {}
        norms = [m for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.RMSNorm))
                 and m.normalized_shape == (model.config.n_embd,)]
        self.change = {}  # module -> function of its frozen output
        for module in norms:
            module.register_forward_pre_hook(lambda m, args: self.inputs.update({m: args[0]}))
        model(trace.idx, trace.idx)
        self.scales = {norm: interpret.norm_scale(norm, self.inputs[norm]) for norm in norms}
        for module in norms:
            stack.callback(module.register_forward_hook(
                lambda m, args, out: self.norm(m, args[0])).remove)
        for layer, block in enumerate(model.transformer.h):
            for module, function in ((block.attn, self.attn), (block.mlp, self.mlp)):
                stack.callback(module.register_forward_hook(
                    lambda m, args, out, f=function, i=layer: f(m, args[0], i)).remove)
        self.edge = None  # (place, head or neuron, query, position, vector) that one reader misses

    def norm(self, module, x):
        if isinstance(module, torch.nn.LayerNorm):
            x = x - x.mean(dim=-1, keepdim=True)
        x = x * self.scales[module][..., None] * module.weight
        return x if getattr(module, 'bias', None) is None else x + module.bias

    def missing(self, norm, x, place):
        """The input x (1, T, C) of a layer, if the edge is cut at its position."""
        *_, position, vector = self.edge
        if self.config.norm_position == 'post':
            return x.index_add(1, torch.tensor([position]), -vector[None, None])
        stream = self.inputs[norm].index_add(1, torch.tensor([position]), -vector[None, None])
        return self.norm(norm, stream)

    def attn(self, module, x, layer):
        def values(x):
            v = module.c_attn(x).unflatten(-1, (-1, module.head_size))[:, :, -module.n_kv_head:]
            return interpret.per_head(self.model, v.transpose(1, 2))

        mixed = self.trace.attention[layer] @ values(x)  # (1, nh, T, hs)
        if self.edge and self.edge[0] == 2 * layer:
            _, head, query, position, _ = self.edge
            block = self.model.transformer.h[layer]
            lost = values(x) - values(self.missing(block.ln_1, x, 2 * layer))
            share = self.trace.attention[layer, 0, head, query, position]
            mixed[0, head, query] -= share * lost[0, head, position]
        return module.c_proj(mixed.transpose(1, 2).flatten(2))

    def mlp(self, module, x, layer):
        gated = self.config.activation == 'swiglu'
        pre = self.trace.pre[layer]

        def neurons(x):
            out = module.c_fc(x)
            if gated:
                return F.silu(pre) * out.chunk(2, dim=-1)[1]
            return out * self.trace.post[layer] / pre

        post = neurons(x)
        if self.edge and self.edge[0] == 2 * layer + 1:
            _, neuron, _, position, _ = self.edge
            block = self.model.transformer.h[layer]
            cut = neurons(self.missing(block.ln_2, x, 2 * layer + 1))
            post[0, position, neuron] = cut[0, position, neuron]
        return module.c_proj(post)

    def logit(self, t, token):
        """Before any softcap, in double precision."""
        found = []
        ln_f, end = self.model.transformer.ln_f, 2 * self.config.n_layer

        def last(module, args, out):
            x = args[0]
            if self.edge and self.edge[0] == end:
                x = x.index_add(1, torch.tensor([self.edge[3]]), -self.edge[4][None, None])
            found.append(self.norm(ln_f, x) if self.config.norm_position == 'pre' else x)

        handle = ln_f.register_forward_hook(last)
        self.model(self.trace.idx, self.trace.idx)
        handle.remove()
        return (found[0][0, t] @ self.model.lm_head.weight[token]).item()


def written(model, trace, node, place):
    """What a node has written, as it arrives in the stream before a place: its part of it. (C,)"""
    kind, layer, index, position, source = node
    block = model.transformer.h[layer]
    if kind == 0:
        vector, start = list(trace.embeddings.values())[index][0, position], 0
    elif kind == 1:
        v = interpret.per_head(model, trace.v[layer, 0])[index, source]
        hs = model.config.head_dim
        vector = block.attn.c_proj.weight[:, index * hs:(index + 1) * hs] @ v
        vector = vector * trace.attention[layer, 0, index, position, source]
        start = 2 * layer
    else:
        vector = block.mlp.c_proj.weight[:, index] * trace.post[layer, 0, position, index]
        start = 2 * layer + 1
    scale = trace.later_scale[:, 0, position]
    norms = interpret.stream_norms(model)[start:place]
    return interpret.carry(norms, vector) * scale[start] / scale[place] if norms else vector


RELU2 = {'activation': 'relu2', 'norm': 'rmsnorm', 'bias': False, 'qk_norm': True, 'ngram': 2,
         'position': 'rope', 'ngram_rows': 97, 'n_kv_head': 2}


@pytest.mark.parametrize('options', [RELU2, {}, POST, GATED, PAIRS] + OTHERS, ids=str)
@torch.no_grad()
def test_each_edge_of_a_graph_is_what_switching_it_off_changes(options):
    model = awake(**options).double()
    trace, target = text(model, 7)
    frozen = graph.Frozen(model, trace)
    t, token = 6, target[6]
    found = graph.attribution_graph(frozen, t, token)
    nodes = frozen.describe(found.ids).tolist()
    end = 2 * model.config.n_layer
    tried = collections.Counter()  # by kinds of writer and reader
    with contextlib.ExitStack() as stack:
        by_hooks = FrozenByHooks(model, trace, stack)
        before = by_hooks.logit(t, token)
        U, b_U = interpret.unembedding(model)
        assert before == pytest.approx((trace.residual[-1, 0, t] @ U[token]
                                        * trace.final_scale[0, t] + b_U[token]).item(), rel=1e-6)
        for (writer, reader), logits in zip(found.edges.tolist(), found.edge_logits):
            kind, layer, index, query, source = nodes[reader] if reader >= 0 else (3, 0, 0, t, t)
            pair = (nodes[writer][0], kind)
            is_bias = nodes[writer][0] == 0 and nodes[writer][2] == len(trace.embeddings)
            if is_bias or tried[pair] == 4:
                continue
            tried[pair] += 1
            place = {1: 2 * layer, 2: 2 * layer + 1, 3: end}[kind]
            position = source if kind == 1 else query
            vector = written(model, trace, nodes[writer], place)
            by_hooks.edge = (place, index, query, position, vector)
            difference = before - by_hooks.logit(t, token)
            assert difference == pytest.approx(logits.item(), rel=1e-4, abs=1e-7)
    assert {(0, 1), (0, 2), (1, 2), (2, 2), (1, 3), (2, 3)} <= set(tried)


@pytest.mark.parametrize('options', [RELU2, GATED], ids=str)
@torch.no_grad()
def test_whole_graph_conserves_the_logit(options, monkeypatch):
    for name, value in (('EXPANDED', 0), ('SHARE', 2), ('EDGE_SHARE', 2), ('MAX_NODES', 10**6)):
        monkeypatch.setattr(graph, name, value)
    model = awake(**options).double()
    trace, target = text(model, 5)
    frozen = graph.Frozen(model, trace)
    found = graph.attribution_graph(frozen, 4, target[4])
    logit = (trace.residual[-1, 0, 4] @ interpret.unembedding(model)[0][target[4]]
             * trace.final_scale[0, 4])
    incoming = torch.zeros(len(found.ids) + 1).double()
    outgoing = torch.zeros(len(found.ids) + 1).double()
    incoming.index_add_(0, found.edges[:, 1] + 1, found.edge_logits)
    outgoing.index_add_(0, found.edges[:, 0] + 1, found.edge_logits)
    is_leaf = frozen.describe(found.ids)[:, 0] == 0
    torch.testing.assert_close(incoming[0], logit)
    torch.testing.assert_close(outgoing[1:], found.logits, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(incoming[1:][~is_leaf], found.logits[~is_leaf], atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found.logits[is_leaf].sum(), logit)
    assert found.influence[is_leaf].sum().item() == pytest.approx(1)


def test_collect_graphs_keeps_the_most_influential_nodes():
    model = awake(**RELU2)
    trace, target = text(model, 9)
    facts, arrays = graph.collect_graphs(model, trace, target)
    assert [each['t'] for each in facts['graphs']] == list(range(1, 9))  # the last eight
    first = facts['graphs'][-2]['nodes']
    influence = arrays['graph_influence'][first:].float()
    assert (influence.diff() <= 0).all()
    assert influence.sum() >= 0.8 * facts['graphs'][-1]['total'] or len(influence) == 500
    assert facts['graphs'][-1]['logit'] == pytest.approx(trace.logits[0, 8, target[8]].item(),
                                                         abs=1e-4)
    assert len(arrays['graph_nodes']) == facts['graphs'][-1]['nodes']
    edges = arrays['graph_edges'][facts['graphs'][-2]['edges']:]
    assert edges[:, 0].min() >= 1 and edges.max() <= len(influence)  # 0: the logit reads only
