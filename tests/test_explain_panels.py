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
import interpret
from browser import NO_RUN, PANELS, assert_close, opened, table, wait_until_drawn, write_page
from checkpoint import load_model
from helpers import ROOT, TINY, char_tokenizer, collect, served, tiny, tokens
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow

# Extremes -----------------------------------------------------------------------------------------

def test_explain_page_works_without_dropped_arrays(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, 'MAX_PAGE_BYTES', 0)
    facts, arrays = collect(tiny(), char_tokenizer(48, 40), tokens(9).tolist())
    hostile = '</script><script>document.title = "x"</script><!--'
    facts |= {'run': NO_RUN['run'] | {'path': hostile}}
    path = write_page(tmp_path / 'page.html', facts, arrays)
    with opened(chromium, path, '#tour=1') as tab:
        for _ in range(16):
            tab.locator('#tour .bar button').nth(1).click()
            wait_until_drawn(tab)
        assert tab.locator('#tour').is_hidden()
        assert tab.locator('#heads .thumbs button').count() == 8
        assert tab.locator('#run-name').text_content() == hostile
        assert 'Left out' in tab.locator('#accuracy').text_content()


def test_explain_page_single_token_single_layer(chromium, tmp_path):
    config = GPTConfig(block_size=2, vocab_size=40, n_layer=1, n_head=1, n_embd=8, position='none')
    facts, arrays = collect(GPT(config).eval(), char_tokenizer(48, 40), [5])
    path = write_page(tmp_path / 'page.html', facts | NO_RUN, arrays)
    with opened(chromium, path) as tab:
        assert tab.locator('#where').text_content().startswith('Position 0 (0 to 0): ')
        assert tab.locator('#figure-why .picture svg').count() == 1


# Sources and targets ------------------------------------------------------------------------------

PAIR = 'jump twice<|endoftext|>JUMP JUMP'


@pytest.fixture(scope='module')
def translator(run, prepare_pairs, tmp_path_factory):
    """The folder of a run with bidirectional attention within a source."""
    pairs = [(a, a.upper()) for a in ('jump twice', 'walk', 'look twice', 'run', 'walk twice')]
    data = prepare_pairs(pairs * 40, '--tokenizer=byte', '--block_size=32', '--val_fraction=0.3')
    out_dir = tmp_path_factory.mktemp('translator') / 'out'
    run('train.py', f'--dataset={data}', f'--out_dir={out_dir}', *TINY, '--prefix_lm=True',
        '--max_iters=20')
    return out_dir


def test_explain_page_shows_bidirectional_attention(chromium, run, translator):
    run('explain.py', f'--out_dir={translator}', f'--start={PAIR}', '--checkpoints=all')
    model, tokenizer = load_model(translator)
    eot = [tokenizer.eot]
    ids = eot + tokenizer.encode('jump twice') + eot + tokenizer.encode('JUMP JUMP') + eot
    T, end = len(ids), 11  # 11 tokens of the source, with the <|endoftext|> before it
    trace = interpret.run(model, torch.tensor([ids]))
    with opened(chromium, translator / 'explain.html', '#t=2&layer=1&head=1&source=9') as tab:
        assert tab.locator('#tokens button').count() == T
        shown = torch.zeros(T, T)
        attention = table(tab, 'attention')
        for query, key, p in attention:
            shown[int(query.split()[0]), int(key.split()[0])] = float(p)
        assert len(attention) == T * (T + 1) // 2 + end * (end - 1) // 2
        torch.testing.assert_close(shown, trace.attention[1, 0, 1], atol=2e-3, rtol=2e-3)
        scores = table(tab, 'scores')
        assert [masked != '-Infinity' for *_, masked, _ in scores] == [s < end for s in range(T)]
        assert_close([row[4] for row in scores], trace.attention[1, 0, 1, 2])
        by_source = [float(value) for _, value in table(tab, 'by-source')]
        assert len(by_source) == end
        parts = dict(table(tab, 'why'))
        assert sum(by_source) == pytest.approx(float(parts['head L1·H1']), abs=1e-2)
        assert 'Softmax over 11 keys' in tab.locator('#figure-terms .readout').text_content()
        assert 'not a prediction' in tab.locator('#where').text_content()
        assert 'causal' in tab.locator('#heads .content > .note').text_content()
        tab.locator('#tour-start').click()
        for _ in range(5):
            tab.locator('#tour .bar button').nth(1).click()
        assert tab.locator('#tour-title').text_content() == 'Attention mask'
        assert f'attend to 11 of {T}' in tab.locator('#tour .look').text_content()


def test_explain_page_samples_after_a_source_as_sample_py(chromium, run, translator):
    run('explain.py', f'--out_dir={translator}', f'--start={PAIR}')
    with opened(chromium, translator / 'explain.html', '#t=14&seed=7') as tab:
        assert 'at the end of the first source only' in tab.locator('#next .card').text_content()
    with opened(chromium, translator / 'explain.html', '#t=11&seed=7&k=256') as tab:
        assert 'with this source' in tab.locator('#next .card').text_content()
        draws = tab.locator('#draws .token').evaluate_all(
            'tokens => tokens.map(token => JSON.parse(token.title))')
    result = run('sample.py', f'--out_dir={translator}', '--start=jump twice', '--num_samples=10',
                 '--max_new_tokens=1', '--seed=7', '--dtype=float32', '--temperature=0.8',
                 '--top_k=256')
    samples = result.stdout.split('\n' + '-' * 15 + '\n')[:-1]
    samples = [sample.removeprefix('jump twice\n') for sample in samples]
    is_text = [draw.isascii() and draw.isprintable() for draw in draws]
    assert sum(is_text) >= 3
    assert [d for d, shown in zip(draws, is_text) if shown] == [
        s for s, shown in zip(samples, is_text) if shown]


def test_served_page_of_pairs_follows_what_is_typed(chromium, clone, translator):
    with served(clone, f'--out_dir={translator}', f'--start={PAIR}') as (_, url), \
            opened(chromium, url) as tab:
        assert tab.locator('#live-text').input_value() == PAIR
        for text, n_tokens in (('walk', 6), (PAIR, 22)):
            tab.locator('#live-text').fill(text)
            wait_until_drawn(tab)
            assert tab.locator('#notice').is_hidden()
            assert tab.locator('#tokens button').count() == n_tokens


def test_explain_page_of_a_source_predicts_its_target(chromium, run, prepare_pairs, tmp_path):
    pairs = [(a, a.upper()) for a in ('jump twice', 'walk', 'look twice', 'run', 'walk twice')]
    data = prepare_pairs(pairs * 40, '--tokenizer=byte', '--block_size=32', '--val_fraction=0.3')
    out_dir = tmp_path / 'out'
    run('train.py', f'--dataset={data}', f'--out_dir={out_dir}', *TINY, '--norm_position=post',
        '--prefix_lm=True', '--max_iters=20')
    run('explain.py', f'--out_dir={out_dir}', '--start=walk', '--checkpoints=all')
    model, tokenizer = load_model(out_dir)
    ids = [tokenizer.eot, *tokenizer.encode('walk'), tokenizer.eot]
    expected = model(torch.tensor([ids]))[0][0, -1].softmax(dim=-1)
    with opened(chromium, out_dir / 'explain.html') as tab:
        assert tab.locator('#tokens button').count() == len(ids)
        p = {int(token): float(p) for _, token, _, p, _ in table(tab, 'next-token')}
        assert_close([p[i] for i in range(tokenizer.vocab_size)],
                     expected[:tokenizer.vocab_size], atol=1e-5)
        assert 'with this source' in tab.locator('#next .card').text_content()
        assert 'layernorm (post)' in tab.locator('#run-facts').text_content()


def test_explain_refuses_pairs_that_do_not_fit(refused, translator):
    refused('explain.py', f'--out_dir={translator}', f'--start={"jump " * 9}',
            says=('start has 46 tokens', 'only 32 fit'))
    refused('explain.py', f'--out_dir={translator}', '--start=jump<|endoftext|>',
            says='start is empty')


def test_explain_page_masks_other_documents(chromium, tmp_path):
    model = tiny(eot_token=3)
    ids = [5, 9, 7, 3, 8, 6]
    facts, arrays = collect(model, char_tokenizer(48, 40), ids)
    path = write_page(tmp_path / 'page.html', facts, arrays)
    with opened(chromium, path, '#t=5&layer=1&head=2') as tab:
        p = [float(row[4]) for row in table(tab, 'scores')]
        trace = interpret.run(model, torch.tensor([ids]))
        assert_close(p, trace.attention[1, 0, 2, 5])
        assert p[:3] == [0, 0, 0]


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
import interpret
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
        for name in PANELS[:-2]:
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
    ('facts', 'embeddings', ['flow', 'embedding', 'graph']),
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
        for _ in range(16):
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
