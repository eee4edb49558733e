"""Live text: what is typed into the page, computed in the page, against PyTorch."""
import math
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
import torch
from torch.nn import functional as F

import explain
import interpret
import test_explain_browser as explain_browser
from browser import opened, table, wait_until_drawn, write_page
from helpers import awake, char_tokenizer, collect, tiny, tokens
from lib.page_weights import pack_weights
from lib.tokenizer import CharTokenizer, encode_turns

CHARACTERS = char_tokenizer(48, 40)
PAIRS = CharTokenizer(CHARACTERS.characters, end_of_text=True)
ROTARY = {'position': 'rope', 'norm': 'rmsnorm', 'activation': 'relu2', 'qk_norm': True,
          'bias': False, 'ngram': 3, 'ngram_rows': 97}
CAPPED = {'activation': 'swiglu', 'logit_softcap': 5.0, 'position': 'sinusoidal',
          'tie_weights': False}
DOCUMENTS = {'eot_token': 3, 'ngram': 3, 'ngram_rows': 97, 'n_kv_head': 1}
SOURCES = {'vocab_size': 41, 'eot_token': 40, 'turns': 2, 'prefix_lm': True, 'position': 'rope',
           'norm_position': 'post'}


def write_live_page(path, model, ids, tokenizer=CHARACTERS):
    """The page of a text, with the model in it in fp32."""
    facts, arrays = collect(model, tokenizer, ids)
    engine, weights, _ = pack_weights(model, tokenizer, 'float32')
    facts['engine'] = engine | {'difference': 0.0}
    return write_page(path, facts, arrays, weights)


def type_text(tab, text):
    tab.locator('#live-text').fill(text)
    wait_until_drawn(tab)


def shown_text(tab):
    return tab.locator('#tokens button').evaluate_all('all => all.map(x => x.textContent)')


# Numbers ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def reference(chromium, tmp_path_factory):
    """As in test_explain_browser, but the page was written for another text, longer than this."""
    model = awake(n_layer=3, n_kv_head=2, activation='gelu')
    ids = tokens(9).tolist()
    path = write_live_page(tmp_path_factory.mktemp('live') / 'page.html', model, [5] * 12)
    with opened(chromium, path, '#layer=2&head=3&lens=1') as tab:
        type_text(tab, CHARACTERS.decode(ids[:8]))  # its numbers are used again
        type_text(tab, CHARACTERS.decode(ids))
        tab.locator('#tokens button').nth(5).click()
        wait_until_drawn(tab)
        tab.evaluate("location.hash += '&source=3'")
        wait_until_drawn(tab)
        circuit_ids = list(dict.fromkeys(ids))
        yield SimpleNamespace(
            tab=tab, model=model, facts={'circuit_ids': circuit_ids}, ids=ids, t=5, l=2, k=3,
            trace=interpret.run(model, torch.tensor([ids])),
            id_of={chr(48 + i): i for i in range(40)},
        )


@pytest.mark.parametrize('name', ['stream', 'attention', 'logit_effect', 'neuron_and_lens',
                                  'circuit'])
def test_tables_of_typed_text_match_model(reference, name):
    getattr(explain_browser, f'test_explain_page_{name}_tables_match_model')(reference)


def test_losses_and_ranks_of_typed_text_match_model(reference):
    logits = reference.trace.logits[0, :-1]
    targets = torch.tensor(reference.ids[1:])
    losses = F.cross_entropy(logits, targets, reduction='none').tolist()
    ranks = 1 + (logits > logits.gather(1, targets[:, None])).sum(dim=1)
    titles = reference.tab.locator('#tokens button').evaluate_all('all => all.map(x => x.title)')
    assert titles[1:] == [f'loss {loss:.2f} nats, rank {rank} of 40'
                          for loss, rank in zip(losses, ranks, strict=True)]


def tables(tab):
    """{name of a figure: the rows of its table}"""
    figures = tab.locator('main figure:not(#figure-patching)')  # that one needs a second text
    return figures.evaluate_all("""figures => Object.fromEntries(
        figures.map(figure => {
            figure.querySelector('[aria-expanded=false]')?.click();
            const rows = [...figure.querySelectorAll('.data-table tbody tr')];
            return [figure.id, rows.map(row => [...row.cells].map(cell => cell.textContent))];
        }))""")


def assert_same(shown, expected):
    """Cells of tables: the same text, or numbers that differ by rounding only."""
    assert shown.keys() == expected.keys()
    for name, rows in expected.items():
        assert rows and len(shown[name]) == len(rows), name
        # the page's own text has queries and keys in half precision, here multiplied
        atol = 2e-2 if name in ('figure-scores', 'figure-terms') else 3e-3
        for row, expected_row in zip(shown[name], rows):
            for cell, expected_cell in zip(row, expected_row, strict=True):
                if cell != expected_cell:
                    x, y = float(cell), float(expected_cell)
                    assert math.isclose(x, y, rel_tol=3e-3, abs_tol=atol), (name, row, expected_row)


@pytest.mark.parametrize('options', [
    ROTARY,
    *(pytest.param(x, marks=pytest.mark.slow) for x in ({}, CAPPED, DOCUMENTS, SOURCES)),
], ids=str)
def test_typed_text_shows_what_its_own_page_shows(chromium, tmp_path, options):
    model = awake(**options)
    pairs = model.config.turns > 0
    tokenizer = PAIRS if pairs else CHARACTERS
    text = 'AB0C<|endoftext|>CAB4' if pairs else 'F83AG3B38OAF8'  # 3 is an end of text above
    ids = encode_turns(text.split('<|endoftext|>'), PAIRS) if pairs else CHARACTERS.encode(text)
    other = encode_turns(['QRS'], PAIRS) if pairs else [7, 9, 7]
    written = write_live_page(tmp_path / 'written.html', model, list(ids), tokenizer)
    typed = write_live_page(tmp_path / 'typed.html', model, other, tokenizer)
    selection = {'layer': 1, 'head': 2, 'lens': 1, 't': 4}
    with opened(chromium, written, '#' + urlencode(selection)) as tab:
        expected = tables(tab)
        places = tab.locator('#where').text_content()
    with opened(chromium, typed, '#' + urlencode(selection | {'text': text})) as tab:
        assert tab.locator('#live-text').input_value() == text
        assert tab.locator('#where').text_content() == places  # the address keeps the selection
        tab.locator('#ablation').scroll_into_view_if_needed()
        tab.wait_for_selector('#figure-ablation canvas')
        shown = tables(tab)
        only_when_written = expected.keys() - shown.keys()
        assert only_when_written == {
            f'figure-{name}' for name in (
                'graph', 'graph-nodes', 'gradients', 'head-gradients', 'step-loss', 'step-before',
                'step-after')}
        assert_same(shown, {name: rows for name, rows in expected.items()
                            if name not in only_when_written})


@pytest.mark.slow
def test_what_is_left_out_of_a_page_is_computed_in_it(chromium, tmp_path, monkeypatch):
    model = awake(**ROTARY)
    whole = write_live_page(tmp_path / 'whole.html', model, [5, 6, 7, 6])
    monkeypatch.setattr(explain, 'MAX_DATA_WITH_WEIGHTS', 0)
    small = write_live_page(tmp_path / 'small.html', model, [5, 6, 7, 6])
    with opened(chromium, whole, '#layer=1&head=2') as tab:
        expected = tables(tab)
    with opened(chromium, small, '#layer=1&head=2') as tab:
        assert 'Computed in this page' in tab.locator('#accuracy').text_content()
        assert_same(tables(tab), expected)
        type_text(tab, '77')
        type_text(tab, '5676')
        assert_same(tables(tab), expected)


def test_panels_keep_tables_and_selection_while_typing(chromium, tmp_path):
    model = awake()
    path = write_live_page(tmp_path / 'page.html', model, [5, 6, 7])
    with opened(chromium, path, '#layer=1&head=2') as tab:
        before = table(tab, 'logit-lens')
        box = tab.locator('#live-text')
        box.focus()
        tab.keyboard.press('End')
        tab.keyboard.type('8@')
        wait_until_drawn(tab)
        assert shown_text(tab) == ['5', '6', '7', '8', '@']
        assert tab.locator('#where').text_content().startswith('Position 4 (0 to 4)')
        after = table(tab, 'logit-lens')  # still open
        assert len(after) == 3 * 5 and len(before) == 3 * 3
        assert tab.locator('#head select').nth(1).input_value() == '2'
        assert 'text=5678%40' in tab.url and 't=' not in tab.url.replace('text=', '')
        assert box.evaluate('box => box === document.activeElement')
        tab.locator('#tokens button').nth(3).click()
        assert 'next token @ ·' in tab.locator('#where').text_content()
        type_text(tab, '567')  # the page's own text, as PyTorch computed it
        assert table(tab, 'logit-lens') == before
        assert 'text=' not in tab.url


def test_text_box_says_what_is_wrong(chromium, tmp_path):
    path = write_live_page(tmp_path / 'page.html', tiny(), [5, 6, 7])
    with opened(chromium, path) as tab:
        notice = tab.locator('#notice')
        for text, message in (('', 'Type at least one character.'), ('5é', 'character "é"')):
            type_text(tab, text)
            assert message in notice.text_content()
            assert shown_text(tab) == ['5', '6', '7']
        type_text(tab, '56789' * 4)
        assert notice.text_content() == (
            'The text is too long: its first 4 tokens are left out. 16 fit.')
        assert len(shown_text(tab)) == 16
        type_text(tab, '8')
        assert notice.is_hidden() and shown_text(tab) == ['8']


# Generation ---------------------------------------------------------------------------------------

def generated(tab):
    """Press Generate and wait for the end: the window is full."""
    tab.get_by_role('button', name='Generate').click()
    tab.get_by_role('button', name='Generate').wait_for()
    wait_until_drawn(tab)


@pytest.mark.parametrize('sampling', [
    {'temperature': 1.5, 'k': 30, 'p': 0.9},
    pytest.param({'temperature': 0, 'k': 40, 'p': 1}, marks=pytest.mark.slow),
], ids=str)
def test_generated_text_equals_that_of_sample_py(chromium, tmp_path, sampling):
    model = awake(**ROTARY)
    ids = [20, 21, 20]
    expected = model.generate(torch.tensor([ids]), 13, sampling['temperature'], sampling['k'],
                              top_p=sampling['p'], seed=7)[0].tolist()
    path = write_live_page(tmp_path / 'page.html', model, [5])
    state = sampling | {'seed': 7, 'text': CHARACTERS.decode(ids)}
    with opened(chromium, path, '#' + urlencode(state)) as tab:
        generated(tab)
        assert tab.locator('#live-text').input_value() == CHARACTERS.decode(expected)
        assert shown_text(tab) == list(CHARACTERS.decode(expected))


@pytest.mark.slow
def test_target_is_generated_up_to_its_end(chromium, tmp_path):
    model = awake(**SOURCES | {'block_size': 64})
    source = encode_turns(['QRS'], PAIRS)
    expected = model.generate([source], 59, 1.0, 41, seed=1337, stop_tokens=[40])[0]
    path = write_live_page(tmp_path / 'page.html', model, encode_turns(['AB'], PAIRS), PAIRS)
    with opened(chromium, path, '#temperature=1&k=41&text=QRS') as tab:
        generated(tab)
        target = PAIRS.decode([id for id in expected[len(source):] if id != 40])
        assert tab.locator('#live-text').input_value() == 'QRS<|endoftext|>' + target


@pytest.mark.slow
def test_generation_stops_when_asked(chromium, tmp_path):
    path = write_live_page(tmp_path / 'page.html', awake(block_size=256), [5])
    with opened(chromium, path, '#text=AB') as tab:
        tab.locator('#generate').focus()
        tab.keyboard.press('Enter')
        while len(shown_text(tab)) < 5:
            tab.wait_for_timeout(20)
        tab.keyboard.press('Enter')
        wait_until_drawn(tab)
        text = tab.locator('#live-text').input_value()
        assert 4 < len(text) < 256
        tab.wait_for_timeout(200)
        assert tab.locator('#live-text').input_value() == text


# The page -----------------------------------------------------------------------------------------

def test_live_page_says_how_fast_it_is_and_is_accessible(chromium, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    path = write_live_page(tmp_path / 'page.html', awake(), [5, 6, 7])
    with opened(chromium, path, width=360) as tab:
        assert tab.locator('#clock').text_content().startswith('Opened in ')
        type_text(tab, '5678')
        tab.wait_for_selector('html[data-reaction]')
        reaction = tab.evaluate('document.documentElement.dataset.reaction')
        assert f'last reaction to typing in {reaction} ms' in tab.locator('#clock').text_content()
        assert tab.evaluate('document.documentElement.scrollWidth') == 360
        type_text(tab, '5é')
        serious = [x['id'] for x in Axe().run(tab).response['violations']
                   if x['impact'] in ('serious', 'critical')]
        assert not serious


@pytest.mark.parametrize('cause', [
    "window.Worker = class { constructor() { throw new Error('blocked'); } };",
    'const Whole = Blob; window.Blob = class extends Whole { constructor(parts, options) {'
    "super(options?.type === 'text/javascript' ? ['throw new Error(0)'] : parts, options); } };",
], ids=['no worker', 'worker fails'])
def test_page_says_that_the_model_cannot_run(chromium, tmp_path, cause):
    path = write_live_page(tmp_path / 'page.html', awake(), [5, 6, 7])
    tab = chromium.new_page()
    tab.add_init_script(cause)
    tab.goto(f'file://{path}')
    notice = tab.locator('#notice')
    notice.wait_for()
    assert notice.text_content().startswith('The model cannot run in this page: ')
    assert table(tab, 'next-token')  # of the page's own text
    tab.close()
