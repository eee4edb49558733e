"""interpret.changes: parts of a model changed from Python, against PyTorch hooks."""
import pytest
import torch
from torch.nn import functional as F

import interpret
from helpers import awake, tokens
from interpret.causal import ablate
from interpret.changes import changed
from interpret.graph import Frozen
from lib.errors import UserError
from test_changes import CASES, GROUPED, INVALID, idx, logits_of, scaled_output
from test_live import CHARACTERS

IDS = tokens(9).tolist()


def frozen_trace(model, text):
    return interpret.run(model, idx(CHARACTERS.encode(text))) if text else None


@torch.no_grad()
@pytest.mark.parametrize('options', [
    GROUPED, {'activation': 'swiglu', 'norm_position': 'post', 'position': 'sinusoidal'}], ids=str)
def test_changes_are_those_of_pytorch_hooks(options):
    model = awake(**options)
    cases = dict(CASES)
    if options != GROUPED:
        del cases['positions']
    else:
        cases['ngrams'] = ('ngrams=0.5', '', lambda model: scaled_output(
            model.transformer.ngram, 0.5))
    before = logits_of(model, IDS)
    for name, (text, frozen, change) in cases.items():
        expected = logits_of(model, IDS, change)
        with changed(model, text, frozen_trace(model, frozen)):
            trace = interpret.run(model, idx(IDS))
            torch.testing.assert_close(trace.logits[0], expected, msg=name)
            torch.testing.assert_close(model(idx(IDS), idx(IDS))[0][0], expected, msg=name)
        assert (expected - before).abs().max() > 0.01, name
        # what the parts write still adds up to the logits
        target = expected.argmax(dim=-1)
        names, parts = interpret.attribute(model, trace, target[:, None])
        logits = expected.gather(1, target[:, None])
        torch.testing.assert_close(parts.sum(dim=0), logits, atol=1e-4, rtol=1e-4)
        by_source = interpret.effect_by_source(model, trace, target).sum(dim=-1).flatten(0, 1)
        heads = [i for i, (kind, *_) in enumerate(names) if kind == 'head']
        torch.testing.assert_close(by_source, parts[heads, :, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(model, IDS), before, atol=0, rtol=0)  # as it was


@torch.no_grad()
def test_ablations_and_graph_of_a_changed_model():
    model = awake(**GROUPED, bias=False)
    text = 'L0.H1=0.5,L1.H2=0,mlp0=0.5'
    with changed(model, text):
        trace = interpret.run(model, idx(IDS))
        target = trace.logits[0].argmax(dim=-1)
        losses, _ = ablate(model, trace, target)
    with changed(model, f'{text},L0.H3=0'):
        logits = model(idx(IDS), idx(IDS))[0][0]
    before, after = (F.cross_entropy(x, target, reduction='none')
                     for x in (trace.logits[0], logits))
    torch.testing.assert_close(losses[0, 0, 3], after - before, atol=1e-4, rtol=1e-4)
    assert losses[0, 1, 2].abs().max() < 1e-5  # that head is off
    # the edges into each node add up to it, so nothing is left for the last column
    frozen = Frozen(model, trace)
    direction = interpret.unembedding(model)[0][target[8]] * trace.final_scale[0, 8]
    for place, gradient in enumerate(frozen.gradients(8, direction)[:-1]):
        ids = torch.arange(*frozen.starts[place + 1:place + 3])
        node_logits, read, position = frozen.nodes_at(place, gradient, ids)
        rest = frozen.edges(node_logits, read, position, place)[1][:, -1]
        assert rest.abs().max() < 1e-4 < node_logits.abs().max()


def test_frozen_attention_brings_its_mask():
    model = awake(eot_token=3)
    frozen = interpret.run(model, idx([5, 6, 3, 7]))  # 3 begins another document
    with changed(model, '', frozen):
        trace = interpret.run(model, idx([5, 6, 7, 8, 9]))
    assert (trace.mask[0, :4, :4] == frozen.mask[0]).all() and trace.mask[0, 4].all()
    torch.testing.assert_close(trace.attention[..., :4, :4], frozen.attention)


@pytest.mark.parametrize('text', INVALID)
def test_a_change_that_the_model_does_not_have_is_refused(text):
    model = awake()
    with pytest.raises(UserError, match='changes: '), changed(model, f'mlp1=0,{text}'):
        pass
    assert 'embed' not in model.__dict__


def test_changes_need_the_whole_text():
    model = awake()
    with changed(model, 'mask=0'):
        with pytest.raises(ValueError, match='use_cache=False'):
            model.generate(idx(IDS), 3, temperature=0)
        ids = model.generate(idx(IDS), 3, temperature=0, use_cache=False)[0].tolist()
    for n in (9, 10, 11):
        assert ids[n] == logits_of(model, ids[:n], CASES['mask'][2])[-1].argmax()
