"""Changing the model in the page (web/changes.js, web/patch.js) against PyTorch hooks."""
import contextlib
import re
from urllib.parse import urlencode

import pytest
import torch
from torch.nn import functional as F

import interpret
from browser import assert_close, opened, table, wait_until_drawn, write_page
from helpers import awake, collect, tokens
from interpret import causal
from test_live import CHARACTERS, write_live_page

GROUPED = {'position': 'rope', 'norm': 'rmsnorm', 'activation': 'relu2', 'qk_norm': True,
           'n_kv_head': 2, 'ngram': 3, 'ngram_rows': 97}
IDS = tokens(9).tolist()
TEXT = CHARACTERS.decode(IDS)


def idx(ids):
    return torch.tensor([ids])


# Changes as PyTorch hooks -------------------------------------------------------------------------

def scaled(module, dimensions, factor):
    """Scale some of the last dimensions of what a module reads."""
    def hook(module, args):
        x = args[0].clone()
        x[..., dimensions] *= factor
        return (x,)
    return [module.register_forward_pre_hook(hook)]


def scaled_output(module, factor):
    return [module.register_forward_hook(lambda module, args, output: factor * output)]


def scaled_positions(model, factor):
    if model.config.position == 'learned':
        return scaled_output(model.transformer.wpe, factor)
    rotary = type(model).rotary
    model.rotary = lambda position: rotary(model, factor * position)
    return []


def patterns(model, edit, mask=None):
    """Let edit(layer, attention (nh, T, T)) change the attention patterns in place."""
    for layer, block in enumerate(model.transformer.h):
        def attend(q, k, v, causal=None, dropout=0.0, layer=layer):
            T = q.size(2)
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
            seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
            scores = q @ k.mT / q.size(-1) ** 0.5
            attention = scores.masked_fill(~seen, float('-inf')).softmax(dim=-1)
            edit(layer, attention[0])
            return attention @ v
        block.attn.attend = block.attn.attend_in_training = attend
    return []


def look(layer, head, query, key, share):
    def edit(this_layer, attention):
        if this_layer == layer:
            row = attention[head, query]
            rest = 1 - row[key]
            row *= (1 - share) / rest
            row[key] = share
    return lambda model: patterns(model, edit)


def without_mask(model):
    return patterns(model, lambda layer, attention: None, torch.tensor(True))


def frozen_as(ids):
    """The patterns of other ids, of the unchanged model."""
    def freeze(model):
        kept = []
        patterns(model, lambda layer, attention: kept.append(attention.clone()))
        model(idx(ids))

        def edit(layer, attention):
            n = min(attention.size(1), kept[layer].size(1))
            attention[:, :n] = 0
            attention[:, :n, :n] = kept[layer][:, :n, :n]
        return patterns(model, edit)
    return freeze


OTHER = tokens(7, seed=3).tolist()
CASES = {  # changes, frozen text, the same in PyTorch
    'head': ('L1.H2=0.5', '', lambda model: scaled(
        model.transformer.h[1].attn.c_proj, slice(16, 24), 0.5)),
    'heads': ('attn0=0', '', lambda model: scaled(model.transformer.h[0].attn.c_proj, ..., 0)),
    'mlp': ('mlp1=2', '', lambda model: scaled(model.transformer.h[1].mlp.c_proj, ..., 2)),
    'neuron': ('L0.n7=0', '', lambda model: scaled(model.transformer.h[0].mlp.c_proj, 7, 0)),
    'positions': ('positions=0', '', lambda model: scaled_positions(model, 0)),
    'mask': ('mask=0', '', without_mask),
    'look': ('L1.H3@8.2=1', '', look(1, 3, 8, 2, 1)),
    'share': ('L0.H1@5.3=0.25', '', look(0, 1, 5, 3, 0.25)),
    'frozen': ('mlp0=0', CHARACTERS.decode(OTHER), lambda model: [
        *frozen_as(OTHER)(model), *scaled(model.transformer.h[0].mlp.c_proj, ..., 0)]),
}


@contextlib.contextmanager
def changed(model, change):
    attends = [block.attn.attend for block in model.transformer.h]
    handles = change(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.__dict__.pop('rotary', None)
        for block, attend in zip(model.transformer.h, attends):
            block.attn.attend = block.attn.attend_in_training = attend


@torch.no_grad()
def logits_of(model, ids, change=lambda model: []):
    with changed(model, change):
        return model(idx(ids), idx(ids))[0][0]


def visit(tab, **state):
    """Go to a state by the URL."""
    tab.evaluate('hash => { location.hash = hash; }', '#' + urlencode(state))
    tab.wait_for_timeout(20)  # the event comes first
    wait_until_drawn(tab)


def logits_shown(tab):
    """(logits, probabilities before the changes) by token id, of the table of next tokens."""
    rows = table(tab, 'next-token')
    ids = torch.tensor([int(row[1]) for row in rows])
    shown = torch.tensor([[float(row[2]), float(row[-1])] for row in rows])
    return shown[ids.argsort()].T


# Panels -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [GROUPED, pytest.param({}, marks=pytest.mark.slow)], ids=str)
def test_changes_are_those_of_pytorch_hooks(chromium, tmp_path, options):
    model = awake(**options)
    page = write_live_page(tmp_path / 'page.html', model, IDS)
    cases = dict(CASES)
    if 'ngram' in options:
        cases['ngrams'] = ('ngrams=0.5', '', lambda model: scaled_output(
            model.transformer.ngram, 0.5))
    before = logits_of(model, IDS)
    with opened(chromium, page) as tab:
        for name, (changes, frozen, change) in cases.items():
            t = 5 if name == 'share' else 8
            visit(tab, t=t, changes=changes, frozen=frozen)
            expected = logits_of(model, IDS, change)
            logits, p_before = logits_shown(tab)
            torch.testing.assert_close(logits, expected[t], atol=2e-4, rtol=0, msg=name)
            assert_close(p_before, before[t].softmax(dim=-1))
            assert (expected - before).abs().max() > 0.01, name
            losses = [F.cross_entropy(x[:-1], torch.tensor(IDS[1:])) for x in (before, expected)]
            stated = tab.locator('#changes .head p').text_content()
            assert stated.endswith(f'{losses[0]:.2f} → {losses[1]:.2f} nats'), name
            *parts, total = table(tab, 'why')
            target = expected[t].argmax() if t == 8 else IDS[t + 1]
            assert_close([total[1]], expected[t, target][None])
            assert_close([sum(float(part[1]) for part in parts)], expected[t, target][None])
            note = tab.locator('#figure-why .readout').text_content()
            stated = re.search(r'Before the changes it was ([−\d.]+\d)', note)[1]
            assert_close([stated.replace('−', '-')], before[t, target][None])


def test_ablations_of_a_changed_model_equal_those_of_pytorch(chromium, tmp_path):
    model = awake(**GROUPED)
    page = write_live_page(tmp_path / 'page.html', model, IDS)
    with opened(chromium, page, '#ablation=mean&effect=mean&t=4') as tab:
        visit(tab, changes='L1.H2=0,mlp0=0', ablation='mean', effect='mean', t=4)
        tab.locator('#ablation').scroll_into_view_if_needed()
        tab.wait_for_selector('#figure-ablation canvas')
        rows = table(tab, 'ablation')
        readout = tab.locator('#figure-ablation .readout').text_content()
    with torch.no_grad():  # the same function, by other weights
        model.transformer.h[1].attn.c_proj.weight[:, 16:24] = 0
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    trace = interpret.run(model, idx(IDS))
    target = torch.tensor([*IDS[1:], trace.logits[0, -1].argmax()])
    losses, logits = causal.ablate(model, trace, target)
    for row, loss, logit in zip(rows, losses.flatten(1, 2).unbind(1),
                                logits.flatten(1, 2).unbind(1), strict=True):
        expected = [[loss[kind, 4], logit[kind, 4], loss[kind, :-1].mean()] for kind in range(2)]
        assert_close(row[1:], torch.tensor(expected).flatten())
    assert 'Means are over this text' in readout


@pytest.mark.slow
def test_attention_panel_shows_what_was_set(chromium, tmp_path):
    model = awake(**GROUPED)
    page = write_live_page(tmp_path / 'page.html', model, IDS)
    with opened(chromium, page, '#layer=1&head=3&t=8&source=2') as tab:
        before = table(tab, 'scores')
        tab.get_by_role('button', name='Attend only to').click()
        wait_until_drawn(tab)
        after = table(tab, 'scores')
        for column in (1, 2, 3):  # what was computed when the page was written is in fp16
            assert_close([row[column] for row in after], [float(row[column]) for row in before],
                         atol=2e-2)
        assert [float(row[4]) for row in after] == [0, 0, 1, 0, 0, 0, 0, 0, 0]
        last = [row for row in table(tab, 'attention') if row[0].startswith('8 ')]
        assert [float(row[2]) for row in last] == [0, 0, 1, 0, 0, 0, 0, 0, 0]
        effects = [float(row[1]) for row in table(tab, 'by-source')]
        assert effects[2] != 0 and not any(effects[:2] + effects[3:])
        parts = {row[0]: float(row[1]) for row in table(tab, 'why')}
        assert abs(parts['head L1·H3'] - effects[2]) < 2e-3


def test_changes_by_keyboard_alone(chromium, tmp_path):
    page = write_live_page(tmp_path / 'page.html', awake(), IDS)

    def press(name, key='Enter'):
        tab.get_by_role('button', name=name).first.focus()
        tab.keyboard.press(key)
        tab.wait_for_timeout(20)
        wait_until_drawn(tab)

    def listed():
        items = tab.locator('#changes li')
        return [tuple(x.split('×')[0] for x in item.locator('span, output').all_text_contents())
                for item in items.all()]

    with opened(chromium, page, '#layer=1&head=2') as tab:
        original = table(tab, 'next-token')
        assert tab.locator('#changes').is_hidden()
        press('Switch off L1·H2')
        press('Switch off MLP 1')
        press('Switch off positions')
        press('Freeze attention', 'Space')
        assert [item[0] for item in listed()] == [
            'L1·H2', 'MLP 1', 'positions',
            f'attention weights as in “{TEXT}”, whatever mask and scores say']
        assert 'changes=L1.H2%3D0%2Cmlp1%3D0%2Cpositions%3D0' in tab.url
        tab.locator('#changes input').first.focus()
        tab.keyboard.press('ArrowRight')
        wait_until_drawn(tab)
        assert tab.locator('#changes input').first.evaluate('x => x === document.activeElement')
        assert 'L1.H2%3D0.05' in tab.url
        tab.keyboard.press('Tab')
        tab.keyboard.press('Enter')
        wait_until_drawn(tab)
        assert [item[0] for item in listed()][:2] == ['MLP 1', 'positions']
        press('Switch off MLP 1')  # on again
        press('Off: neuron')
        assert [item[0] for item in listed()][:1] == ['positions']
        assert listed()[-1][0].startswith('neuron ') and listed()[-1][1] == 'off'
        assert table(tab, 'next-token') != original
        press('Reset')
        assert tab.locator('#changes').is_hidden() and table(tab, 'next-token') == original
        assert 'changes' not in tab.url.split('#')[1] and 'frozen' not in tab.url
        visit(tab, changes='L0.H0@2.4=1')
        assert listed()[0][0].endswith(' (4), which it does not see')


INVALID = ['L9.H0=0', 'L0.H4=0', 'mlp0=3', 'mlp0=-1', 'L0.n128=0', 'ngrams=0', 'mask=1', 'x=0',
           'mlp0=0=0', 'L0.H0@16.0=1', 'L0.H0@3.1=1.5', 'constructor=0', 'mlp0=', 'mlp00x=0']


def test_invalid_changes_in_the_url_are_ignored(chromium, tmp_path):
    page = write_live_page(tmp_path / 'page.html', awake(), IDS)
    state = '#' + urlencode({'changes': ','.join(['mlp1=0', *INVALID])})
    with opened(chromium, page, state) as tab:
        assert tab.locator('#changes li').count() == 1
        assert tab.url.endswith('#changes=mlp1%3D0')
        changed_table = table(tab, 'next-token')
        tab.locator('#live-text').fill(TEXT + 'A')  # the changes stay with another text
        wait_until_drawn(tab)
        assert tab.locator('#changes li').count() == 1
        visit(tab, changes='%%%')
        assert tab.locator('#changes').is_hidden()
    with opened(chromium, page, '#changes=mlp1=0') as tab:
        assert table(tab, 'next-token') == changed_table


# Activation patching ------------------------------------------------------------------------------

@torch.no_grad()
def patched_answers(model, clean, corrupted, pair):
    """(L + 1, T): logit difference at the end with one residual vector of the clean run."""
    streams = []
    blocks = model.transformer.h

    def difference(ids):
        logits = model(idx(ids), idx(ids))[0][0, -1]
        return (logits[pair[0]] - logits[pair[1]]).item()

    def record(module, args):
        streams.append(args[0].clone())

    handles = [block.register_forward_pre_hook(record) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(
        lambda module, args, output: streams.append(output.clone())))
    ends = [difference(clean)]
    for handle in handles:
        handle.remove()
    ends.append(difference(corrupted))
    answers = torch.empty(len(streams), len(clean))
    for depth, stream in enumerate(streams):
        for t in range(len(clean)):
            def put(x, stream=stream, t=t):
                x = x.clone()
                x[:, t] = stream[:, t]
                return x
            if depth < len(blocks):
                handle = blocks[depth].register_forward_pre_hook(
                    lambda module, args: (put(args[0]), *args[1:]))
            else:
                handle = blocks[-1].register_forward_hook(lambda module, args, output: put(output))
            answers[depth, t] = difference(corrupted)
            handle.remove()
    return answers, ends


def answers_of(model, clean, corrupted):
    """The most likely token after each text; if both are one, those whose probability changes most,
    among the ten most likely after each."""
    p, q = (logits_of(model, ids)[-1].softmax(dim=-1) for ids in (clean, corrupted))
    if p.argmax() != q.argmax():
        return p.argmax().item(), q.argmax().item()
    ids = torch.cat((p.topk(10).indices, q.topk(10).indices))
    change = (p - q)[ids]
    return ids[change.argmax()].item(), ids[change.argmin()].item()


@pytest.mark.parametrize('options', [
    GROUPED, *(pytest.param(x, marks=pytest.mark.slow) for x in (
        {}, {'norm_position': 'post', 'position': 'sinusoidal'}))], ids=str)
def test_patching_map_equals_that_of_pytorch(chromium, tmp_path, options):
    model = awake(**options)
    page = write_live_page(tmp_path / 'page.html', model, IDS)
    second = [*IDS[:3], 11, *IDS[4:]]
    texts = [IDS, second]
    size = (model.config.n_layer + 1) * len(IDS)
    with opened(chromium, page) as tab:
        tab.locator('#patch-text').fill(CHARACTERS.decode(second))
        for into, (clean, corrupted) in (('second', (0, 1)), ('this', (1, 0))):
            tab.locator(f'#patching button[data-value={into}]').click()
            tab.wait_for_selector(f'#figure-patching[data-cells="{size}"][data-into={into}]')
            pair = answers_of(model, texts[clean], texts[corrupted])
            answers, ends = patched_answers(model, texts[clean], texts[corrupted], pair)
            rows = table(tab, 'patching')
            assert len(rows) == size
            assert_close([row[4] for row in rows], answers.flatten())
            restored = (answers - ends[1]) / (ends[0] - ends[1])
            assert_close([row[5] for row in rows], restored.flatten(), atol=5e-3)
        tab.locator('#patch-text').fill('AB')
        tab.wait_for_selector('text=both texts need the same number')
        tab.locator('#patch-text').fill('AB"')
        tab.wait_for_selector('text=does not know the character')


@pytest.mark.slow
@pytest.mark.parametrize('width', [360, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_changed_page_is_accessible(chromium, tmp_path, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = write_live_page(tmp_path / 'page.html', awake(**GROUPED), IDS)
    state = urlencode({'changes': 'L0.H1=0,mlp1=0.5,L0.n3=0,positions=0,ngrams=0,mask=0,'
                                  'L1.H2@8.3=0.5',
                       'frozen': TEXT, 'patch': TEXT[:-1] + 'B', 'layer': 1, 'head': 2})
    with opened(chromium, page, f'#{state}', width, color_scheme=scheme) as tab:
        tab.wait_for_selector('#figure-patching[data-cells="27"]')
        rules = {'label-content-name-mismatch': {'enabled': True}}
        found = Axe().run(tab, options={'rules': rules}).response['violations']
        assert [(x['id'], x['nodes'][0]['html']) for x in found] == []
        assert tab.evaluate('document.documentElement.scrollWidth') <= width


@pytest.mark.slow
def test_page_without_the_model_has_no_changes(chromium, tmp_path):
    facts, arrays = collect(awake(), CHARACTERS, IDS)
    page = write_page(tmp_path / 'page.html', facts, arrays)
    with opened(chromium, page, '#changes=mlp1=0') as tab:
        assert tab.locator('#changes').is_hidden() and not tab.locator('#patching').count()
        assert not tab.get_by_role('button', name='Switch off').count()
