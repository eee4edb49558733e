"""The course of explain.py's page (web/course.js, web/breaking.js), and the phrases at its end."""
import itertools
import math
import re

import pytest
import torch
from torch.nn import functional as F

import interpret
from browser import opened, wait_until_drawn, write_page
from data.phrases.prepare import phrases
from helpers import awake, char_tokenizer, collect, tokens
from test_changes import GROUPED, changed, scaled_positions, visit
from test_live import SOURCES, write_live_page

IDS = tokens(9).tolist()
SENTENCE = [40, 1, 2, 3, 40, 4, 5, 40]  # a source and a target, as in lib/pairs.py
BROKEN = re.compile(r'undefined|NaN|n/a|cannot|missing|∅|\[object')
KINDS = {
    'static': (dict(norm_position='post', position='sinusoidal'), IDS, False, 16),
    'sources': (SOURCES, SENTENCE, True, 19),
    'default': ({}, IDS, True, 19),
    'grouped': (GROUPED, IDS, True, 19),
    'gated': (dict(position='none', activation='swiglu', logit_softcap=5.0), IDS, True, 18),
    'one token': ({}, [5], True, 19),
}
FAST = ('sources',)


def open_stop(tab, stop):
    tab.evaluate(f'location.hash = "tour={stop}"')
    tab.wait_for_function(f'document.querySelector("#tour .bar span").textContent[0] > 0 && '
                          f'document.querySelector("#tour .bar span").textContent'
                          f'.startsWith("{stop} ")')
    wait_until_drawn(tab)


def assert_shown(tab, name):
    """A figure is highlighted, and nothing covers its top."""
    tab.wait_for_selector(f'#{name}.visited')
    tab.wait_for_function("""name => {
        const top = document.getElementById(name).getBoundingClientRect().top;
        return top >= document.getElementById('strip').getBoundingClientRect().bottom
            && top < innerHeight / 2;
    }""", arg=name)


def number(text, before, after=''):
    """The number between two texts."""
    found = re.search(re.escape(before) + r'([−\d.]+)' + re.escape(after), text)
    return float(found[1].replace('−', '-').rstrip('.'))


@pytest.mark.parametrize('kind', [
    pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in KINDS])
def test_course_suits_every_model(chromium, tmp_path, kind):
    options, ids, has_model, n_stops = KINDS[kind]
    model, tokenizer = awake(**options), char_tokenizer(48, options.get('vocab_size', 40))
    path = tmp_path / 'page.html'
    if has_model:
        write_live_page(path, model, ids, tokenizer)
    else:
        write_page(path, *collect(model, tokenizer, ids))
    with opened(chromium, path, '#tour=1') as tab:
        tour, titles = tab.locator('#tour'), []
        for stop in range(1, n_stops + 1):
            assert tour.locator('.bar span').text_content() == f'{stop} of {n_stops}'
            titles.append(tour.locator('h2').text_content())
            shown = tour.text_content()
            assert not BROKEN.search(shown), shown
            assert tour.locator('summary').text_content().endswith('?')
            for part in ('.look', 'details p'):
                assert len(tour.locator(part).text_content()) > 20, titles
            assert tab.locator('.visited').count() == 1, titles
            tour.locator('.bar button').nth(1).click()
            wait_until_drawn(tab)
        assert len(set(titles)) == n_stops and tour.is_hidden()
        assert sum(title.startswith('Break it') for title in titles) == n_stops - 15


def test_course_examples_equal_pytorch(chromium, tmp_path):
    model = awake()
    path = write_live_page(tmp_path / 'page.html', model, IDS)
    idx, targets = torch.tensor([IDS]), torch.tensor(IDS[1:])

    def losses():
        return F.cross_entropy(model(idx, idx)[0][0, :-1], targets, reduction='none')

    logits = model(idx, idx)[0][0]
    with opened(chromium, path, '#tour=14&t=4') as tab:
        example, answer = tab.locator('#tour .look'), tab.locator('#tour details p')
        text = example.text_content()
        assert number(text, 'a loss of ') == pytest.approx(losses()[4].item(), abs=0.006)
        assert number(text, 'the text is ') == pytest.approx(losses().mean().item(), abs=0.006)
        assert f'ln 40 = {math.log(40):.2f} nats' in answer.text_content()
        open_stop(tab, 15)
        for temperature in (0.8, 1, 2):
            p = (logits[-1] / temperature).softmax(dim=-1).max().item()
            shown = re.search(rf'([\d.]+)% at {temperature}\b', example.text_content())[1]
            assert float(shown) == pytest.approx(100 * p, abs=0.51)
        assert '100% at temperature 0,' in example.text_content()
        open_stop(tab, 16)
        before = losses().mean().item()
        tab.get_by_role('button', name='Try it').click()
        tab.wait_for_function('document.querySelector("#tour .look").textContent.includes("→")')
        wait_until_drawn(tab)
        assert 'changes=positions%3D0' in tab.url
        assert_shown(tab, 'figure-next-token')
        with changed(model, lambda model: scaled_positions(model, 0)):
            after = losses().mean().item()
        text = example.text_content()
        assert number(text, 'Mean loss: ', ' →') == pytest.approx(before, abs=0.006)
        assert number(text, '→ ', ' nats') == pytest.approx(after, abs=0.006)
        tab.locator('#tour .bar button').nth(1).click()  # the next stop begins with a whole model
        wait_until_drawn(tab)
        assert 'changes' not in tab.url
        assert_shown(tab, 'figure-heads')
        open_stop(tab, 19)
        for name, state in (('Temperature 0', 'temperature=0'), ('Temperature 2', 'temperature=2')):
            tab.get_by_role('button', name=name).click()
            wait_until_drawn(tab)
            assert state in tab.url
        tab.get_by_role('button', name='Undo').click()
        wait_until_drawn(tab)
        assert 'temperature' not in tab.url


@pytest.mark.slow
def test_course_names_what_a_neuron_raises(chromium, tmp_path):
    model = awake(activation='swiglu')  # whose activations may be negative
    path = write_live_page(tmp_path / 'page.html', model, IDS)
    trace = interpret.run(model, torch.tensor([IDS]))
    signs = set()
    with opened(chromium, path, '#tour=12') as tab:
        for layer, t in itertools.product(range(2), range(9)):
            neuron = interpret.strongest_neurons(model, trace, 1)[layer, t, 0]
            post = trace.post[layer, 0, t, neuron]
            written = post * model.transformer.h[layer].mlp.c_proj.weight[:, neuron]
            raised = (interpret.against_mean(model, 40) @ written).topk(3).indices
            visit(tab, tour=12, layer=layer, t=t)
            shown = re.search(r'it makes (.*) more likely', tab.locator('.look').text_content())[1]
            assert shown == ', '.join(f'“{chr(48 + i)}”' for i in raised)
            signs.add(post.item() < 0)
    assert signs == {True, False}


def test_course_by_keyboard(chromium, tmp_path):
    path = write_live_page(tmp_path / 'page.html', awake(**SOURCES), SENTENCE,
                           char_tokenizer(48, 41))
    with opened(chromium, path, '#t=2') as tab:
        tab.locator('#tour-start').focus()
        tab.keyboard.press('Enter')
        for _ in range(4):
            tab.keyboard.press('Enter')  # Next has the focus
        assert tab.locator('#tour h2').text_content() == 'Attention mask'
        # position 1 of the source sees all of it: tokens 0 to 3; the last of the target sees 0 to 6
        assert re.search(r'position 1\) is in the source: it can attend to 4 of 8 tokens, also to '
                         r'later ones, up to .*position 3\). .*position 6\) can attend to 7 of 8',
                         tab.locator('#tour .look').text_content())
        answer = tab.locator('#tour details p')
        assert answer.is_hidden()
        tab.keyboard.press('Shift+Tab')  # Back
        tab.keyboard.press('Shift+Tab')
        tab.keyboard.press('Enter')
        assert answer.is_visible() and 'both directions' in answer.text_content()
        tab.keyboard.press('Escape')
        assert tab.locator('#tour').is_hidden()


def test_pairs_begin_at_the_end_of_the_target(chromium, tmp_path):
    path = write_live_page(tmp_path / 'page.html', awake(**SOURCES), SENTENCE,
                           char_tokenizer(48, 41))
    with opened(chromium, path) as tab:
        assert tab.locator('#where').text_content().startswith('Position 6 (0 to 7)')
        colors = tab.locator('#tokens button').evaluate_all(
            'all => all.map(x => x.style.background)')
        assert len(set(colors[:5])) == 1  # the source is not predicted: no loss
        assert colors[0] not in colors[5:]


# Phrases ------------------------------------------------------------------------------------------

def test_phrases_are_italian():
    pairs = dict(phrases())
    assert len(pairs) == len(phrases()) > 5000
    assert pairs['I love you very much'] == 'Ti amo molto'
    assert pairs['Does she help Marco every day?'] == 'Aiuta Marco ogni giorno?'
    assert pairs['We do not thank the children a lot'] == 'Non ringraziamo molto i bambini'
    assert pairs['Anna does not see them today'] == 'Anna non li vede oggi'
    assert not {'I love me', 'We see us', 'Anna loves Anna'} & pairs.keys()


@pytest.mark.slow
def test_phrases_are_learned(run, clone):
    run('train.py', 'config/phrases_en_it.py', '--device=cpu')
    output = run('tools/evaluate.py', '--out_dir=out-phrases').stdout
    n, exact = re.search(r'pairs: ([\d,]+) targets, beam 1: exact match ([\d.]+)%', output).groups()
    assert int(n.replace(',', '')) > 1000 and float(exact) >= 99
    options = ('--start=I love you very much', '--num_samples=1', '--temperature=0')
    assert 'Ti amo molto\n' in run('sample.py', '--out_dir=out-phrases', *options).stdout
    run('explain.py', '--out_dir=out-phrases',
        '--start=I love you very much<|endoftext|>Ti amo molto')
    assert (clone / 'out-phrases' / 'explain.html').exists()
