"""The panels of ablations, snippets and attribution graphs in Chromium, against PyTorch."""

import re
from types import SimpleNamespace

import pytest
import torch

import interpret
from browser import assert_close, opened, table, wait_until_drawn, write_page
from helpers import awake, char_tokenizer, collect, tokens
from interpret import causal, graph, snippets
from lib.page import to_half

LETTERS = [chr(48 + i) for i in range(40)]


@pytest.fixture(scope='module')
def reference(chromium, tmp_path_factory):
    """A model, its trace, the best snippets of random windows, and its page in a tab."""
    model = awake(activation='relu2', norm='rmsnorm', bias=False, n_kv_head=2, ngram=2,
                  ngram_rows=97)
    ids = tokens(9).tolist()
    facts, arrays = collect(model, char_tokenizer(48, 40), ids)
    windows = tokens(8, 16, seed=5)
    best, _ = snippets.search(model, windows)
    facts |= {'snippets': {'path': 'data/x/val.bin', 'tokens': 128}}
    arrays |= {'snippet_ids': windows}
    for name, (values, places) in best.items():
        arrays |= {f'{name[:-1]}_best': to_half(values), f'{name[:-1]}_places': places}
    path = write_page(tmp_path_factory.mktemp('page') / 'page.html', facts, arrays)
    with opened(chromium, path, '#t=5&layer=1&head=2') as tab:
        trace = interpret.run(model, torch.tensor([ids]))
        yield SimpleNamespace(tab=tab, model=model, ids=ids, trace=trace, windows=windows,
                              best=best, arrays=arrays, facts=facts,
                              target=torch.tensor([*ids[1:], trace.logits[0, -1].argmax()]))


def test_ablation_panel_matches_model_and_says_which_part_counts_most(reference):
    tab = reference.tab
    losses, logits = causal.ablate(reference.model, reference.trace, reference.target)
    rows = table(tab, 'ablation')
    assert [row[0] for row in rows[:6]] == ['L0·H0', 'L0·H1', 'L0·H2', 'L0·H3', 'the MLP of L0',
                                            'L1·H0']
    by_part = (x.flatten(1, 2).unbind(1) for x in (losses, logits))  # each (2, T)
    for row, loss, logit in zip(rows, *by_part):
        expected = [[loss[k, 5], logit[k, 5], loss[k, :-1].mean()] for k in range(2)]
        assert_close(row[1:], torch.tensor(expected).flatten(), atol=1e-2)
    worth = losses[0, :, :, 5].flatten()
    strongest = worth.abs().argmax()
    readout = tab.locator('#figure-ablation .readout')
    verb = 'raises' if worth[strongest] > 0 else 'lowers'
    part, token = rows[strongest][0], LETTERS[reference.ids[6]]
    amount = f'{worth[strongest].abs():.3f} nats'
    expected = f'Switching off {part} {verb} the loss of “{token}” by {amount}'
    assert readout.text_content().startswith(expected)
    tab.locator('#figure-ablation canvas').focus()
    tab.keyboard.press('ArrowRight')
    tab.keyboard.press('ArrowRight')
    assert readout.text_content().startswith('Switching off L0·H1 ')
    tab.get_by_role('group', name='Kind of ablation').get_by_text('set to its mean').click()
    wait_until_drawn(tab)
    assert 'Means are over this text' in readout.text_content() and 'ablation=mean' in tab.url


def test_snippet_panels_show_the_strongest_places(reference):
    tab, windows = reference.tab, reference.windows
    values, places = reference.best['neurons']
    rows = table(tab, 'neuron-snippets')
    shown = reference.arrays['neurons'][1, 5].tolist()
    assert [int(row[0]) for row in rows[::5]] == shown
    for row, value, (window, t) in zip(rows, values[1, shown[0]], places[1, shown[0]].tolist()):
        assert_close([row[1]], [value], atol=1e-2)
        text = windows[window, max(0, t - 10):t + 5]
        assert row[2] == ''.join(LETTERS[i] for i in text)
    marks = tab.locator('#figure-neuron-snippets mark')
    assert marks.all_text_contents() == [
        LETTERS[windows[window, t]] for window, t in places[1, shown[0]].tolist()]
    tab.locator('#neuron').select_option(str(shown[1]))
    wait_until_drawn(tab)
    assert f'neuron {shown[1]}' in tab.locator('#figure-neuron-snippets h3').text_content()

    values, places = reference.best['heads']
    assert_close([row[0] for row in table(tab, 'head-snippets')], values[1, 2])
    window, query, key = places[1, 2, 0].tolist()
    first = tab.locator('#figure-head-snippets li').first
    assert first.locator('mark.query').text_content() == LETTERS[windows[window, query]]
    assert first.locator('mark.key').text_content() == LETTERS[windows[window, key]]


def node_name(node, trace, ids):
    """As web/graph.js writes it."""
    kind, layer, index, position, source = node
    at, source = (f'“{LETTERS[ids[i]]}” ({i})' for i in (position, source))
    if kind == 0:
        return f'{[*trace.embeddings, "biases"][index]} at {at}'
    if kind == 1:
        return f'L{layer}·H{index} at {at}, from {source}'
    return f'L{layer} neuron {index} at {at}'


def test_graph_panel_lists_edges_as_computed_and_opens_readable(reference):
    tab, ids, trace = reference.tab, reference.ids, reference.trace
    frozen = graph.Frozen(reference.model, trace)
    found = graph.attribution_graph(frozen, 5, reference.target[5])
    names = [node_name(node, trace, ids) for node in frozen.describe(found.ids).tolist()]
    names.append(f'logit of “{LETTERS[ids[6]]}”')  # row -1
    expected = {(names[writer], names[reader]): value.item() for (writer, reader), value
                in zip(found.edges.tolist(), found.edge_logits)}
    rows = table(tab, 'graph')
    assert len(rows) > 10
    assert_close([row[2] for row in rows], [expected[row[0], row[1]] for row in rows], atol=1e-2)
    buttons = tab.locator('#figure-graph svg [role=button]')
    n = buttons.count()
    assert 10 < n <= 30
    nodes = table(tab, 'graph-nodes')
    assert len(nodes) == n
    for name, logits, influence in nodes:
        i = names.index(name)
        assert_close([logits, influence], [found.logits[i], found.influence[i]])

    buttons.first.focus()
    tab.keyboard.press('ArrowRight')
    tab.keyboard.press('Enter')
    wait_until_drawn(tab)
    readout = tab.locator('#figure-graph .readout')
    assert re.search(r' logits over all paths.* It leads to ', readout.text_content())
    assert re.search(r'node=\d+', tab.url)
    label = buttons.nth(4).get_attribute('aria-label')
    buttons.nth(4).click()
    wait_until_drawn(tab)
    assert tab.evaluate('document.activeElement.ariaLabel') == label  # where the mouse is
    slider = tab.get_by_role('slider', name='Share of the influence')
    slider.focus()
    tab.keyboard.press('End')
    wait_until_drawn(tab)
    assert buttons.count() > n and '80%' in slider.get_attribute('aria-valuetext')


@pytest.mark.slow
def test_panels_say_what_is_missing(reference, chromium, tmp_path):
    names = ('ablation_loss', 'ablation_logit', 'snippet_ids', 'graph_nodes')
    arrays = {name: x for name, x in reference.arrays.items() if name not in names}
    missing = {'graphs': [], 'snippets': {'missing': 'there is no data/x/val.bin'}}
    path = write_page(tmp_path / 'page.html', reference.facts | missing, arrays)
    with opened(chromium, path) as tab:
        assert not tab.locator('.failure').count()
        assert 'Left out' in tab.locator('#ablation .note').text_content()
        assert 'when explain.py writes the page' in tab.locator('#graph .note').text_content()
        for panel in ('mlp', 'head'):
            note = tab.locator(f'#{panel} .content > .note').last
            assert note.text_content() == 'No snippets: there is no data/x/val.bin.'
