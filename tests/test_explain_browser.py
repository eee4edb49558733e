"""The page of explain.py in a real browser: numbers against PyTorch, controls, accessibility."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import interpret
from browser import PANELS, assert_close, columns, opened, table, wait_until_drawn, write_page
from checkpoint import load_model
from helpers import TEXT, TINY, awake, char_tokenizer, collect, served, tiny, tokens
from lib.generation import filter_logits, sample_next_token


@pytest.fixture(scope='module')
def page(run, trained):
    """Path of the page of a tiny run with two checkpoints."""
    run('explain.py', f'--out_dir={trained}', f'--start={TEXT}', '--checkpoints=all',
        f'--compare={trained / "ckpt_00000010.pt"}')
    return trained / 'explain.html'


# Numbers against PyTorch --------------------------------------------------------------------------

@pytest.fixture(scope='module')
def reference(chromium, tmp_path_factory):
    """A model with grouped queries and random gains and biases, its trace, and its page in a tab.

    Selected: position t, layer l, head k, source token 3, depth 1 of the logit lens.
    """
    model = awake(n_layer=3, n_kv_head=2, activation='gelu')
    t, l, k = 5, 2, 3  # noqa: E741
    ids = tokens(9).tolist()
    facts, arrays = collect(model, char_tokenizer(48, 40), ids)
    path = write_page(tmp_path_factory.mktemp('page') / 'page.html', facts, arrays)
    state = f'#t={t}&layer={l}&head={k}&lens=1&source=3'
    with opened(chromium, path, state) as tab:
        yield SimpleNamespace(
            tab=tab, model=model, facts=facts, ids=ids, t=t, l=l, k=k,
            trace=interpret.run(model, torch.tensor([ids])),
            id_of={chr(48 + i): i for i in range(40)},
        )


def unembedding_against_mean(model):
    U = interpret.unembedding(model)[0].detach()
    return U - U.mean(dim=0)


def test_explain_page_stream_tables_match_model(reference):
    tab, model, trace, t = reference.tab, reference.model, reference.trace, reference.t
    rows = table(tab, 'flow')
    outputs = [part[0, t] for part in trace.embeddings.values()]
    for layer in range(3):
        outputs += [trace.attn_out[layer, 0, t], trace.mlp_out[layer, 0, t]]
    assert_close([row[1] for row in rows if row[1]], [x.norm().item() for x in outputs])
    stream = [trace.residual[0]]
    for layer in range(3):
        stream += [trace.middle[layer], trace.residual[layer + 1]]
    assert_close([row[2] for row in rows if row[2]], [x[0, t].norm().item() for x in stream])

    _, token, position, total = columns(tab, 'embedding')
    assert_close(token, model.transformer.wte.weight[reference.ids[t]])
    assert_close(position, model.transformer.wpe.weight[t])
    assert_close(total, trace.residual[0, 0, t])


def test_explain_page_attention_tables_match_model(reference):
    tab, model, trace = reference.tab, reference.model, reference.trace
    t, l, k = reference.t, reference.l, reference.k  # noqa: E741
    scores, losses = interpret.head_scores(model)
    for layer, head, *shown in table(tab, 'heads'):
        expected = [score[int(layer), int(head)].item() for score in scores.values()]
        assert_close(shown[:4], expected)
    for query, key, p in table(tab, 'attention'):
        query_position, key_position = int(query.split()[0]), int(key.split()[0])
        assert_close([p], [trace.attention[l, 0, k, query_position, key_position]])

    q = trace.q[l, 0, k]
    keys = interpret.per_head(model, trace.k[l, 0])[k]
    for s, (_, dot, scaled, masked, p) in enumerate(table(tab, 'scores')):
        expected = (q[t] @ keys[s]).item()
        assert_close([dot, scaled], [expected, expected / 8**0.5], atol=2e-2)
        assert_close([p], [trace.attention[l, 0, k, t, s]])
        assert (masked == '-Infinity') == (s > t)
    _, shown_q, shown_k, shown_product = columns(tab, 'terms')
    assert_close(shown_q, q[t])
    assert_close(shown_k, keys[3])
    assert_close(shown_product, q[t] * keys[3], atol=2e-2)

    shown_losses = [float(row[1]) for row in table(tab, 'repeats')]
    assert_close(shown_losses, losses)
    readout = tab.locator('#figure-repeats .readout').text_content()
    first, second = re.search(r'loss (\S+) in the first half, (\S+) in', readout).groups()
    assert float(first) == pytest.approx(np.mean(shown_losses[:7]), abs=0.006)
    assert float(second) == pytest.approx(np.mean(shown_losses[8:]), abs=0.006)


def test_explain_page_logit_effect_tables_match_model(reference):
    tab, model, trace, id_of = reference.tab, reference.model, reference.trace, reference.id_of
    t, l, k = reference.t, reference.l, reference.k  # noqa: E741
    W_O = model.transformer.h[l].attn.c_proj.weight[:, k * 8:(k + 1) * 8].detach()
    U = unembedding_against_mean(model)
    effect = U @ W_O @ trace.mixed[l, 0, k, t] * trace.final_scale[0, t]
    promoted = table(tab, 'promoted')
    for token, value in promoted:
        assert_close([value], [effect[id_of[token]]], atol=2e-2)
    order = effect.argsort(descending=True).tolist()
    assert [id_of[token] for token, _ in promoted] == order[:5] + order[:-6:-1]

    by_source = [float(value) for _, value in table(tab, 'by-source')]
    parts = dict(table(tab, 'why'))
    assert len(by_source) == t + 1
    assert sum(by_source) == pytest.approx(float(parts[f'head L{l}·H{k}']), abs=2e-2)
    logit = trace.logits[0, t, reference.ids[t + 1]].item()
    assert float(parts['sum']) == pytest.approx(logit, abs=1e-4)
    assert 'biases' in parts and 'MLP 2' in parts


def test_explain_page_neuron_and_lens_tables_match_model(reference):
    tab, model, trace, id_of = reference.tab, reference.model, reference.trace, reference.id_of
    t, l = reference.t, reference.l  # noqa: E741
    effects = unembedding_against_mean(model) @ model.transformer.h[l].mlp.c_proj.weight.detach()
    for neuron, pre, post, raised, lowered in table(tab, 'neurons'):
        neuron = int(neuron)
        assert_close([pre, post], [trace.pre[l, 0, t, neuron], trace.post[l, 0, t, neuron]])
        order = effects[:, neuron].argsort(descending=True).tolist()
        assert [id_of[token] for token in raised.split()] == order[:5]
        assert [id_of[token] for token in lowered.split()] == order[:-6:-1]

    lens = list(interpret.logit_lens(model, trace))
    depths = {'embedding': 0, 'layer 0': 1, 'layer 1': 2, 'final': 3}
    for after, position, _, prediction, p in table(tab, 'logit-lens'):
        probs = lens[depths[after]][int(position)]
        assert id_of[prediction] == probs.argmax()
        assert_close([p], [probs.max()])
    for token, p in table(tab, 'lens-top'):
        assert_close([p], [lens[1][t, id_of[token]]])

    probs = trace.logits[0, t].softmax(dim=-1)
    entropy = -(probs * probs.log2()).sum().item()
    assert tab.locator('#entropy').text_content() == f'{entropy:.3f} bits'


def test_explain_page_circuit_tables_match_model(reference):
    tab, model, id_of = reference.tab, reference.model, reference.id_of
    l, k = reference.l, reference.k  # noqa: E741
    composition = interpret.composition_scores(model)['k']
    edges = table(tab, 'composition')
    assert len(edges) == 3 * 16
    for writer, reader, excess in edges:
        writer_layer, writer_head = map(int, re.findall(r'\d+', writer))
        reader_layer, reader_head = map(int, re.findall(r'\d+', reader))
        score = composition[4 * reader_layer + reader_head, 4 * writer_layer + writer_head]
        assert_close([excess], [score - 32**-0.5])
    eigenvalues = interpret.ov_eigenvalues(model)[l, k]
    real, imaginary = columns(tab, 'eigenvalues')
    assert_close(real, eigenvalues.real, atol=0.05)
    assert_close(imaginary, eigenvalues.imag, atol=0.05)
    circuit_ids = torch.tensor(reference.facts['circuit_ids'])
    scale = reference.trace.final_scale.mean().item()
    qk, ov = interpret.token_circuits(model, circuit_ids, scale)
    for name, circuit in (('qk', qk), ('ov', ov)):
        assert_close([row[2] for row in table(tab, name)], circuit[l, k].flatten(), atol=0.05)

    token = reference.ids[reference.t]
    full, direct = interpret.bigrams(model, torch.arange(40))
    for name, probs in (('whole', full), ('direct', direct)):
        for next_token, p in table(tab, f'bigram-{name}'):
            assert_close([p], [probs[token, id_of[next_token]]])
        assert_close([row[2] for row in table(tab, f'bigrams-{name}')], probs.flatten(), atol=5e-3)


def test_explain_page_saves_matrix_as_shapes(reference):
    tab, T = reference.tab, len(reference.ids)
    canvas = tab.locator('#figure-attention canvas')
    svg = ElementTree.fromstring(canvas.evaluate('canvas => canvas.toSvg()'))
    shapes = [element.tag.rpartition('}')[2] for element in svg.iter()]
    assert 'image' not in shapes
    cells = [rect for rect in svg.findall('.//{*}rect') if rect.get('fill') != 'none']
    assert len(cells) == 1 + T * (T + 1) // 2  # the background, and each visible pair
    assert len({cell.get('x') for cell in cells[1:]}) == T
    assert len({cell.get('y') for cell in cells[1:]}) == T
    x, y, width = (float(cells[-1].get(name)) for name in ('x', 'y', 'width'))
    at = [int(x + width / 2), int(y + width / 2)]
    pixel = canvas.evaluate('(c, at) => [...c.getContext("2d").getImageData(...at, 1, 1).data]', at)
    assert cells[-1].get('fill') == 'rgb({} {} {})'.format(*pixel)
    words = [element.text for element in svg.findall('.//{*}text')]
    assert {'key →', '← query'} < set(words) and len(words) == 2 * T + 2


def test_explain_page_shows_post_norm(chromium, tmp_path):
    options = {'norm_position': 'post', 'eot_token': 3, 'turns': 1, 'prefix_lm': True}
    model = awake(**options)
    ids = [3, 5, 9, 7, 3]  # a source; the next token is the first of its target
    facts, arrays = collect(model, char_tokenizer(48, 40), ids)
    path = write_page(tmp_path / 'page.html', facts, arrays)
    logits = model(torch.tensor([ids]))[0][0, -1]
    trace = interpret.run(model, torch.tensor([ids]))
    with opened(chromium, path) as tab:
        assert 'end of the text' in tab.locator('#where').text_content()
        p = {int(token): float(p) for _, token, _, p, _ in table(tab, 'next-token')}
        assert_close([p[i] for i in range(40)], logits.softmax(dim=-1), atol=1e-4)
        parts = dict(table(tab, 'why'))
        assert float(parts['sum']) == pytest.approx(logits.max().item(), abs=1e-3)
        stream = [row[2] for row in table(tab, 'flow') if row[2]]
        expected = [trace.residual[0], trace.middle[0], trace.residual[1], trace.middle[1],
                    trace.residual[2]]
        assert_close(stream, [x[0, -1].norm().item() for x in expected])
        assert 'a norm (bar) rescales' in tab.locator('#figure-flow .readout').text_content()
        scale = trace.later_scale[:-1:2].mean(dim=(1, 2))
        _, ov = interpret.token_circuits(model, torch.tensor(facts['circuit_ids']), scale)
        head = [int(n) for n in re.findall(r'\d+', tab.locator('#circuits .controls h3').last
                                           .text_content())[:2]]
        assert_close([row[2] for row in table(tab, 'ov')], ov[head[0], head[1]].flatten(), 0.05)


SAMPLING = [(31, 0.8, 20, 1), (3, 1, 200, 0.6), (10, 0.3, 5, 0.9), (7, 0, 9, 1)]


@pytest.mark.parametrize('t, temperature, k, p', SAMPLING)
def test_explain_page_samples_match_sample_py(chromium, page, trained, run, t, temperature, k, p):
    model, chars = load_model(trained)
    ids = chars.encode(TEXT)[-32:][:t + 1]  # the prefix that ends at t
    logits = model(torch.tensor([ids]))[0][0, -1]
    base = logits.softmax(dim=-1)
    if temperature:
        expected = filter_logits(logits[None], temperature, k, p).softmax(dim=-1)[0]
    else:
        expected = torch.nn.functional.one_hot(logits.argmax(), len(logits))
    k = min(k, chars.vocab_size)
    state = f'#t={t}&temperature={temperature}&k={k}&p={p}&seed=7'
    with opened(chromium, page, state) as tab:
        rows = table(tab, 'next-token')
        assert len(rows) == chars.vocab_size
        for _, token, logit, base_p, p_after in rows:
            token = int(token)
            assert float(logit) == pytest.approx(logits[token].item(), abs=1e-4)
            assert float(base_p) == pytest.approx(base[token].item(), abs=1e-5)
            assert float(p_after) == pytest.approx(expected[token].item(), abs=1e-5)
        kept = tab.locator('#kept').text_content()
        assert int(kept.split()[0]) == (expected > 0).sum()
        draws = tab.locator('#draws .token').evaluate_all(
            'tokens => tokens.map(token => JSON.parse(token.title))')
    prompt = chars.decode(ids)
    result = run('sample.py', f'--out_dir={trained}', f'--start={prompt}', '--num_samples=10',
                 '--max_new_tokens=1', '--seed=7', '--dtype=float32',
                 f'--temperature={temperature}', f'--top_k={k}', f'--top_p={p}')
    samples = result.stdout.split('\n' + '-' * 15 + '\n')[:-1]
    assert draws == [sample.removeprefix(prompt) for sample in samples]


@pytest.fixture(scope='module')
def large_vocabulary(tmp_path_factory):
    """(path of a page, logits (T, V), tokenizer) of a model whose logits are stored in part."""
    model = tiny(vocab_size=6000, block_size=64)
    names = char_tokenizer(0x3400, 6000)
    facts, arrays = collect(model, names, tokens(60, vocab_size=6000).tolist())
    path = write_page(tmp_path_factory.mktemp('large') / 'page.html', facts, arrays)
    idx = torch.tensor([facts['ids']])
    return path, model(idx, idx)[0][0].detach(), names


# t = 59 is the last position, where all logits are stored
@pytest.mark.parametrize('t, k, p', [(20, 300, 0.5), (20, 6000, 0.97), (59, 6000, 0.97)])
def test_explain_page_filters_large_vocabulary(chromium, large_vocabulary, t, k, p):
    path, logits, names = large_vocabulary
    expected = filter_logits(logits[t:t + 1], 1.5, k, p).softmax(dim=-1)[0]
    base = logits[t].softmax(dim=-1)
    with opened(chromium, path, f'#t={t}&temperature=1.5&k={k}&p={p}') as tab:
        for _, token, _, _, p_after in table(tab, 'next-token')[:500]:
            assert float(p_after) == pytest.approx(expected[int(token)].item(), rel=2e-3, abs=1e-7)
        draws = tab.locator('#draws .token').evaluate_all('all => all.map(x => x.textContent)')
        mass = float(tab.locator('#mass').text_content().removesuffix('%')) / 100
        entropy = float(tab.locator('#entropy-left').text_content().split()[0])
        kept = int(tab.locator('#kept').text_content().split()[0].replace(',', ''))
    if k == 300:  # all of them stored exactly, so the samples are exact too
        generator = torch.Generator().manual_seed(1337)
        batch = logits[t].expand(10, -1)
        sampled = sample_next_token(batch, 1.5, k, p, generator=generator)
        assert draws == [names.decode([token]) for token in sampled.tolist()]
    assert mass == pytest.approx(base[expected > 0].sum().item(), abs=0.01)
    expected_entropy = -(expected * expected.clamp(min=1e-30).log2()).sum().item()
    assert entropy == pytest.approx(expected_entropy, rel=0.01)
    assert kept == pytest.approx((expected > 0).sum().item(), rel=0.01)


# Controls -----------------------------------------------------------------------------------------

def test_explain_page_panels_follow_selected_token(chromium, page):
    kinds = ('svg', 'canvas', 'table', '.thumbs', '.note', 'ol')
    contents = ', '.join(f'.picture {x}' for x in kinds)
    with opened(chromium, page) as tab:
        for name in PANELS:
            figures = tab.locator(f'#{name} figure')
            assert figures.count() >= 1, name
            for i in range(figures.count()):
                assert figures.nth(i).locator(contents).count() >= 1, (name, i)
        assert tab.locator('#heads .thumbs button').count() == 4
        assert 'model(idx)' in tab.locator('#accuracy').text_content()
        where = tab.locator('#where')
        token = tab.locator('#tokens button').nth(4)
        assert where.text_content().startswith('Position 31 ')
        following = ('next', 'flow', 'mlp', 'lens', 'why', 'bigrams')
        before = {name: tab.locator(f'#{name}').inner_html() for name in following}
        token.click()
        wait_until_drawn(tab)
        assert where.text_content().startswith('Position 4 (0 to 31): ')
        assert token.get_attribute('aria-pressed') == 'true'
        for name, html in before.items():
            assert tab.locator(f'#{name}').inner_html() != html, name
        tab.keyboard.press('ArrowRight')
        tab.keyboard.press('ArrowRight')
        wait_until_drawn(tab)
        assert where.text_content().startswith('Position 6 ') and 't=6' in tab.url
        tab.locator('#heads .thumbs button').nth(3).click()
        wait_until_drawn(tab)
        selects = tab.locator('#head select')
        assert [selects.nth(i).input_value() for i in range(2)] == ['1', '1']


def test_explain_page_controls_update_panels_and_url(chromium, page):
    with opened(chromium, page) as tab:
        kept = tab.locator('#kept')
        why = tab.locator('#figure-why')
        tab.get_by_role('slider', name='Temperature').fill('0')
        wait_until_drawn(tab)
        assert kept.text_content().startswith('1 of') and 'temperature=0' in tab.url
        tab.locator('#again').click()
        assert tab.locator('#seed').input_value() == '1338'

        readout = why.locator('.readout').text_content()
        total = float(re.search(r'sum to (\S+);', readout)[1].replace('−', '-'))
        contributions = [float(value) for _, value in table(tab, 'why')[:-1]]
        assert sum(contributions) == pytest.approx(total, abs=1e-3)
        tab.locator('#versus').select_option(index=2)
        wait_until_drawn(tab)
        assert 'rather than' in why.locator('h3').text_content()

        tab.get_by_role('group', name='Head score').get_by_text('induction').click()
        tab.get_by_role('group', name='Order of the heads').get_by_text('by score').click()
        wait_until_drawn(tab)
        scores = tab.locator('#heads .name span:last-child').all_text_contents()
        assert scores == sorted(scores, key=float, reverse=True)
        state = '#' + tab.url.split('#')[1]
    with opened(chromium, page, state) as tab:  # the URL restores the state
        assert tab.locator('#kept').text_content().startswith('1 of')
        assert 'rather than' in tab.locator('#figure-why h3').text_content()


def test_explain_page_ignores_invalid_url_state(chromium, page):
    state = '#t=999&layer=-1&k=x&measure=nonsense&temperature=&theme=7'
    with opened(chromium, page, state) as tab:
        assert tab.locator('#where').text_content().startswith('Position 31 ')


def test_explain_page_keyboard_reaches_parts_of_drawings(chromium, page):
    with opened(chromium, page) as tab:
        tab.locator('#figure-why svg [tabindex="0"]').focus()  # the one tab stop
        while not tab.locator('#tip').text_content().startswith('head L1·H1'):
            tab.keyboard.press('ArrowDown')
        tab.keyboard.press('Enter')
        wait_until_drawn(tab)
        selects = tab.locator('#head select')
        assert [selects.nth(i).input_value() for i in range(2)] == ['1', '1']
        figure = tab.locator('#figure-composition')
        figure.locator('svg [tabindex="0"]').focus()
        for _ in range(4):  # past the heads, to the strongest line
            tab.keyboard.press('ArrowRight')
        writer, reader, excess = table(tab, 'composition')[0]
        text = tab.locator('#tip').text_content()
        line = f'{reader} reads {writer}: {float(excess):.4f}'
        assert text.startswith(line if float(excess) > 0 else 'head L1·H1')  # no excess, no line
        tab.locator('#figure-eigenvalues circle[tabindex="0"]').focus()
        assert re.search(r'\d [+−] \d.*i$', tab.locator('#tip').text_content())


def test_explain_page_opens_plainly(chromium, page):
    with opened(chromium, page, width=360) as tab:
        assert tab.locator('.lens').evaluate('box => box.scrollLeft') == 0
        rows = tab.locator('#heads .thumbs')
        assert [rows.nth(i).locator('button').count() for i in range(rows.count())] == [2, 2]
        assert 'Loss of each token' in tab.locator('.legend').text_content()
        assert tab.locator('#no-pairs').count() == 1 and not tab.locator('#figure-pairs').count()
        for name in ('loss-curve', 'history-losses', 'repeats'):
            assert tab.locator(f'#figure-{name} text[text-anchor=end]').count() >= 5, name
        bars = tab.locator('#figure-bigram-whole rect[rx]')
        widths = bars.evaluate_all('all => all.map(bar => bar.width.baseVal.value)')
        assert max(widths) > 100  # as wide as there is room
        tab.set_viewport_size({'width': 200, 'height': 900})
        tab.locator('#figure-flow .hint').wait_for()
        wait_until_drawn(tab)
        strip = tab.locator('#tokens')
        tops = strip.evaluate('''strip => [...strip.children].map(token =>
            token.getBoundingClientRect().top - strip.getBoundingClientRect().top)''')
        assert tops[0] < -24 and not any(-23 < top < 0 for top in tops)  # no line is cut


@pytest.mark.slow
@pytest.mark.parametrize('width', [1280, 360])
def test_explain_page_tour_covers_nothing(chromium, page, width):
    with opened(chromium, page, '#tour=1', width=width, reduced_motion='reduce') as tab:
        for step in range(1, 19):  # the first stop shows the strip itself
            tab.locator('#tour .bar button').nth(1).click()
            tab.wait_for_timeout(200)
            wait_until_drawn(tab)
            tab.wait_for_timeout(300)  # it scrolls once all is drawn
            (left, top, right, bottom), (box_left, box_top), room = tab.evaluate('''() => {
                const shown = document.querySelector('.visited').getBoundingClientRect();
                const box = document.getElementById('tour').getBoundingClientRect();
                return [[shown.left, shown.top, shown.right, shown.bottom], [box.left, box.top],
                        innerHeight];
            }''')
            strip = tab.locator('#strip').evaluate('x => x.getBoundingClientRect().bottom')
            is_strip = tab.locator('#strip.visited').count()
            assert left >= 0 and (is_strip or max(0, strip) <= top + 1), step
            beside = right <= box_left
            has_room = bottom - top < box_top - 20
            below = box_top > 0 and (bottom <= box_top or not has_room)
            assert beside or below, step


def test_explain_page_keyboard_reads_matrix(chromium, page):
    with opened(chromium, page) as tab:
        readout = tab.locator('#figure-attention .readout')
        tab.locator('#figure-attention canvas').focus()
        for key in ('ArrowRight', 'ArrowDown', 'ArrowDown'):
            tab.keyboard.press(key)
        text = readout.text_content()
        assert re.search(r'\(2\) attends to .*\(0\).*attention 0\.\d+', text), text
        tab.keyboard.press('Enter')
        wait_until_drawn(tab)
        assert tab.locator('#where').text_content().startswith('Position 2 ')
        tab.keyboard.press('ArrowDown')  # the cursor stays where it was
        assert '(3) attends to' in readout.text_content()
        tab.locator('#lens .lens').focus()
        tab.keyboard.press('ArrowDown')
        wait_until_drawn(tab)
        assert 'After layer 0' in tab.locator('#figure-lens-top h3').text_content()


@pytest.mark.slow
def test_explain_page_saves_figures(chromium, page, tmp_path):
    files = [('why', 'SVG', b'<svg'), ('flow', 'PNG', b'\x89PNG'), ('attention', 'PNG', b'\x89PNG'),
             ('next-token', 'CSV', b'token,id,logit'), ('attention', 'SVG', b'<svg')]
    with opened(chromium, page, accept_downloads=True) as tab:
        for name, kind, magic in files:
            button = tab.locator(f'#figure-{name}').get_by_role('button', name=f'save {kind}')
            with tab.expect_download() as download:
                button.click()
            path = tmp_path / download.value.suggested_filename
            download.value.save_as(path)
            assert path.name == f'{name}.{kind.lower()}'
            assert path.read_bytes().startswith(magic) and path.stat().st_size > 300
    lines = (tmp_path / 'next-token.csv').read_text(encoding='utf-8').splitlines()
    rows = list(csv.reader(lines))[1:]
    assert sum(float(row[3]) for row in rows) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_served_page_of_large_model_takes_new_texts(chromium, clone, run, char_data, tmp_path):
    run('train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}', *TINY, '--max_iters=1',
        '--ngram=2', '--ngram_rows=900_000')  # 29 million parameters: too many for a page
    with served(clone, f'--out_dir={tmp_path}', '--start=def') as (_, url), \
            opened(chromium, url, accept_downloads=True) as tab:
        tab.locator('#live-text').fill('return ' * 6)
        wait_until_drawn(tab)
        notice = tab.locator('#notice')
        assert 'first 10 tokens are left out. 32 fit' in notice.text_content()
        assert notice.is_visible()
        assert 'press Run' in tab.locator('#graph').text_content()
        tab.locator('#live-text').fill('return')
        wait_until_drawn(tab)
        assert notice.is_hidden() and tab.locator('#tokens button').count() == 6
        tab.get_by_role('button', name=re.compile('Switch off all heads of layer')).click()
        tab.wait_for_selector('#changes li')
        wait_until_drawn(tab)
        tab.get_by_role('button', name='Run').click()  # a page with all that is computed for it
        tab.wait_for_url('**/?start=return#changes=*')
        wait_until_drawn(tab)
        assert tab.locator('#changes li').count() == 1
        tab.get_by_role('button', name='Reset').click()
        wait_until_drawn(tab)
        assert tab.locator('#tokens button').count() == 6 and tab.locator('#figure-graph').count()
        for name, kind in (('flow', 'PNG'), ('attention', 'SVG'), ('why', 'CSV')):
            with tab.expect_download():
                tab.locator(f'#figure-{name}').get_by_role('button', name=f'save {kind}').click()


def test_explain_page_runs_no_other_script(chromium, page):
    tab = chromium.new_page()
    tab.goto(f'file://{page}')
    wait_until_drawn(tab)
    tab.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'document.title = "injected"';
        document.body.append(script);
    }""")
    assert 'plainGPT' in tab.title()
    tab.close()


@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (360, 'dark')])
def test_explain_page_fits_screen_and_is_accessible(chromium, page, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    def background(tab):
        return tab.evaluate('getComputedStyle(document.body).backgroundColor')

    with opened(chromium, page, '#tour=3', width=width, color_scheme=scheme) as tab:
        assert tab.evaluate('document.documentElement.scrollWidth') == width
        rules = {'label-content-name-mismatch': {'enabled': True}}
        problems = [f'{x["id"]}: {x["nodes"][0]["html"][:200]}'
                    for x in Axe().run(tab, options={'rules': rules}).response['violations']]
        assert not problems, '\n'.join(problems)
        before = background(tab)
        tab.locator('#theme').click()
        wait_until_drawn(tab)
        assert background(tab) != before
