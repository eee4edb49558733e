"""Ablations, snippets and attribution graphs against PyTorch's hooks and handmade cases."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import interpret
from helpers import ARCHITECTURES, POST, awake, char_tokenizer, tokens, write_nanogpt_dataset
from interpret import causal, snippets
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
