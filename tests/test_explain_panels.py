"""The page of explain.py for new activations, prefix-LM models, extremes, and broken data."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import explain
from browser import NO_RUN, PANELS, assert_close, opened, table, wait_until_drawn, write_page
from helpers import ROOT, char_tokenizer, collect, tiny, tokens
from model import GPT, GPTConfig

# Extremes -----------------------------------------------------------------------------------------

def test_explain_page_works_without_dropped_arrays(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, 'MAX_PAGE_BYTES', 0)
    facts, arrays = collect(tiny(), char_tokenizer(48, 40), tokens(9).tolist())
    hostile = '</script><script>document.title = "x"</script><!--'
    facts |= NO_RUN | {'live': True, 'error': hostile}
    path = write_page(tmp_path / 'page.html', facts, arrays)
    with opened(chromium, path, '#tour=1') as tab:
        for _ in range(13):
            tab.locator('#tour .bar button').nth(1).click()
            wait_until_drawn(tab)
        assert tab.locator('#tour').is_hidden()
        assert tab.locator('#heads .thumbs button').count() == 8
        assert tab.locator('#live-error').text_content() == hostile
        assert 'Left out' in tab.locator('#accuracy').text_content()


def test_explain_page_single_token_single_layer(chromium, tmp_path):
    config = GPTConfig(block_size=2, vocab_size=40, n_layer=1, n_head=1, n_embd=8, position='none')
    facts, arrays = collect(GPT(config).eval(), char_tokenizer(48, 40), [5])
    path = write_page(tmp_path / 'page.html', facts | NO_RUN | {'live': True}, arrays)
    with opened(chromium, path) as tab:
        assert tab.locator('#where').text_content().startswith('Position 0 of 0: ')
        assert tab.locator('#live-text').input_value() == '5'
        assert tab.locator('#figure-why .picture svg').count() == 1


# Changed models, broken pages ---------------------------------------------------------------------

def plotted_activation(tab):
    """((x, y) of the curve in pixels, (x, y) of the dots in pixels) of the activation's plot."""
    plot = tab.locator('#figure-activation')
    curve = plot.locator('polyline').get_attribute('points')
    dots = plot.locator('circle').evaluate_all(
        'all => all.map(dot => [dot.cx.baseVal.value, dot.cy.baseVal.value])')
    return np.array([point.split(',') for point in curve.split()], dtype=float).T, np.array(dots).T


@pytest.mark.parametrize('activation', ['gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu'])
def test_explain_page_draws_activation(chromium, tmp_path, activation):
    facts, arrays = collect(tiny(activation=activation), char_tokenizer(48, 40), tokens(9).tolist())
    functions = {
        'gelu_tanh': lambda x: torch.nn.functional.gelu(x, approximate='tanh'),
        'relu2': lambda x: x.relu().square(),
        'swiglu': torch.nn.functional.silu,  # of the gate
    }
    function = functions.get(activation) or getattr(torch.nn.functional, activation)
    for x, y in arrays['curve']:
        torch.testing.assert_close(y, function(x))
        assert x.min() <= -3 and x.max() >= 3
    path = write_page(tmp_path / 'page.html', facts, arrays)
    with opened(chromium, path, '#t=4&layer=1') as tab:
        assert activation in tab.locator('#figure-activation h3').text_content()
        curve, dots = plotted_activation(tab)
        assert len(curve[0]) > 50 and np.ptp(curve[0]) > 150 and np.ptp(curve[1]) > 100
        np.testing.assert_allclose(np.interp(dots[0], *curve), dots[1], atol=1.5)
        gates = [float(row[1]) for row in table(tab, 'neurons')]
        assert_close(gates, arrays['neuron_pre'][1, 4])


NEW_ACTIVATION = """
        if self.activation == 'mish':
            return F.mish(x)
        raise NotImplementedError"""


WRITE_PAGE = """
import sys

import explain
from browser import write_page
from helpers import char_tokenizer, collect, tiny, tokens

facts, arrays = collect(tiny(activation='mish'), char_tokenizer(48, 40), tokens(9).tolist())
write_page(explain.Path(sys.argv[1]), facts, arrays)
"""


def test_explain_page_shows_activation_added_as_in_contributing(chromium, clone, tmp_path):
    changed = shutil.copytree(clone, tmp_path / 'changed')
    for name, old, new in (
        ('configurator.py', "activation: Literal['gelu', ", "activation: Literal['mish', 'gelu', "),
        ('model.py', '\n        raise NotImplementedError', NEW_ACTIVATION),
    ):
        source = (changed / name).read_text()
        assert old in source
        (changed / name).write_text(source.replace(old, new, 1))
    path = tmp_path / 'page.html'
    env = os.environ | {'PYTHONPATH': f'{changed}{os.pathsep}{ROOT / "tests"}'}
    subprocess.run([sys.executable, '-c', WRITE_PAGE, path], cwd=tmp_path, env=env, check=True)
    with opened(chromium, path) as tab:
        assert tab.locator('#figure-activation h3').text_content() == 'mish, with these neurons'
        curve, dots = plotted_activation(tab)
        np.testing.assert_allclose(np.interp(dots[0], *curve), dots[1], atol=1.5)
        for _, pre, post in table(tab, 'activation'):
            mish = torch.nn.functional.mish(torch.tensor(float(pre)))
            assert_close([post], [mish.item()], atol=1e-2)
        for name in PANELS[:-1]:
            assert tab.locator(f'#{name}').locator('svg, canvas, table').count(), name


BROKEN = [
    ('arrays', 'near', ['embedding']),
    ('arrays', 'lens', ['flow', 'lens']),
    ('arrays', 'neuron_tokens', ['mlp']),
    ('arrays', 'loss', ['tokens']),
    ('arrays', 'parts', ['heads', 'head', 'why']),
    ('arrays', 'eigenvalues', ['circuits']),
    ('facts', 'circuit_ids', ['circuits']),
    ('facts', 'neuron_ids', ['mlp']),
    ('facts', 'embeddings', ['flow', 'embedding']),
    ('facts', 'run', ['run-facts', 'training']),
]


@pytest.mark.parametrize('kind, name, failing', BROKEN)
def test_explain_page_panel_that_fails_leaves_others_alone(chromium, tmp_path, kind, name,
                                                           failing):
    facts, arrays = collect(tiny(), char_tokenizer(48, 40), tokens(9).tolist())
    facts = NO_RUN | facts
    (facts if kind == 'facts' else arrays).pop(name)
    path = tmp_path / 'page.html'
    path.write_text(explain.build_page(facts, arrays), encoding='utf-8')
    with opened(chromium, path, '#measure=logit') as tab:
        tab.evaluate('scrollTo(0, document.body.scrollHeight)')
        for panel in ('tokens', 'run-facts', *PANELS):
            shown = tab.locator(f'#{panel}')
            message = shown.locator('.failure summary')
            assert message.count() == (panel in failing), panel
            if panel in failing:
                assert 'cannot be shown: ' in message.text_content()
                assert not shown.locator('figure, button, dd').count()  # nothing stale
            else:
                assert shown.locator('svg, canvas, table, .note, button, dd').count(), panel
        tab.evaluate("location.hash = 't=2&measure=logit'")  # the others follow
        tab.wait_for_function("document.querySelector('#figure-flow h3, #figure-next-token')")
        wait_until_drawn(tab)
        tab.locator('#tour-start').click()
        for _ in range(13):
            tab.locator('#tour .bar button').nth(1).click()
        assert tab.locator('#tour').is_hidden()


def test_explain_page_survives_damaged_bytes(chromium, tmp_path):
    facts, arrays = collect(tiny(), char_tokenizer(48, 40), tokens(9).tolist())
    html = explain.build_page(NO_RUN | facts, arrays)
    path = tmp_path / 'page.html'
    path.write_text(re.sub(r'("near":{[^}]*"start":)\d+', r'\g<1>0', html), encoding='utf-8')
    with opened(chromium, path) as tab:
        failures = tab.locator('.failure').evaluate_all(
            "all => all.map(x => x.closest('section').id)")
        assert failures == ['embedding']
        assert 'near cannot be read' in tab.locator('#embedding .failure').inner_text()
