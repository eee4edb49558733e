"""The page of explain.py --serve of a model that is too large for a page: PyTorch answers it."""
import http.client
import json
import threading
from urllib.parse import urlencode

import pytest
import torch

import explain
from browser import NO_RUN, assert_close, opened, table, wait_until_drawn
from helpers import awake, collect
from interpret.answers import Answers
from lib.errors import UserError
from lib.page import page_template
from lib.serve import MAX_BODY, Server
from lib.tokenizer import encode_prompt, encode_turns
from test_changes import (
    CASES,
    GROUPED,
    IDS,
    TEXT,
    answers_of,
    changed,
    logits_of,
    logits_shown,
    patched_answers,
    scaled,
    visit,
)
from test_live import (
    CHARACTERS,
    PAIRS,
    SOURCES,
    assert_same,
    generated,
    tables,
    type_text,
    write_live_page,
)


class Served:
    """The served page of a model, in this process, as explain.main serves it."""

    def __init__(self, model, ids, tokenizer=CHARACTERS):
        def encode(text):
            if model.config.turns:
                return encode_turns(text.split('<|endoftext|>'), tokenizer)
            return encode_prompt(text, tokenizer)

        facts, arrays = collect(model, tokenizer, ids)
        page = explain.build_page(NO_RUN | facts | {'server': True}, arrays)
        self.server = Server(0)
        policy = page_template('page.html', connects=True)[1]
        self.thread = threading.Thread(target=explain.serve_pages, args=(
            self.server, page, lambda *_: page, '', policy,
            lambda: Answers(model, tokenizer, encode, 16)))

    def __enter__(self):
        self.thread.start()
        return f'http://127.0.0.1:{self.server.server_address[1]}/'

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()


@pytest.mark.slow
def test_typed_text_and_changes_equal_pytorch_hooks(chromium):
    model = awake(**GROUPED)
    before = logits_of(model, IDS)
    with Served(model, [5, 6, 7]) as url, opened(chromium, url) as tab:
        type_text(tab, TEXT)
        assert_close(logits_shown(tab)[0], before[8])
        for changes, frozen, change in CASES.values():
            visit(tab, text=TEXT, changes=f'{changes},L9.H0=0', frozen=frozen)
            logits, p_before = logits_shown(tab)
            assert_close(logits, logits_of(model, IDS, change)[8])
            assert_close(p_before, before[8].softmax(dim=-1))
        tab.get_by_role('button', name='Reset').click()
        wait_until_drawn(tab)
        assert_close([row[2] for row in table(tab, 'next-token')],
                     before[8].sort(descending=True).values)
        type_text(tab, '5é')
        assert 'character \'é\' at position 1' in tab.locator('#notice').text_content()


STATE = {'text': TEXT, 'layer': 1, 'head': 3, 'lens': 1, 't': 8, 'source': 2}
CHANGED = {'changes': 'L1.H2=0.5,L0.n7=0,mlp1=0.5,positions=0.5,L1.H3@8.2=0.5'}


@pytest.mark.slow
@pytest.mark.parametrize('options, changes', [
    (GROUPED, CHANGED),
    (GROUPED, {}),
    (GROUPED, {'frozen': TEXT[2:] + 'A', 'changes': 'ngrams=0'}),
    ({'activation': 'swiglu', 'norm_position': 'post', 'position': 'sinusoidal'},
     {'changes': 'attn0=2,L1.n3=0'}),
    (SOURCES, {'text': 'AB0C<|endoftext|>CAB4', 'changes': 'L1.H2=0'}),
], ids=str)
def test_all_tables_equal_those_of_a_page_with_the_model(chromium, tmp_path, options, changes):
    model = awake(**options)
    tokenizer = PAIRS if model.config.turns else CHARACTERS
    ids = [40, 6, 7, 40, 5, 40] if model.config.turns else [5, 6, 7]
    state = '#' + urlencode(STATE | changes)
    shown = []
    with Served(model, ids, tokenizer) as url:
        for page in (write_live_page(tmp_path / 'page.html', model, ids, tokenizer), url):
            with opened(chromium, page, state) as tab:
                tab.locator('#ablation').scroll_into_view_if_needed()
                tab.wait_for_selector('#figure-ablation canvas')
                shown.append((tables(tab), tab.locator('#changes').text_content()))
    (expected, said_in_page), (served, said) = shown
    assert_same(served, expected)
    assert said == said_in_page and ('Mean loss' in said) == bool(changes)


def test_generation_and_patching_with_a_head_off_equal_pytorch_hooks(chromium):
    model = awake(**GROUPED)
    start = IDS[:3]
    with changed(model, lambda model: scaled(
            model.transformer.h[1].attn.c_proj, slice(16, 24), 0)):
        expected = model.generate(torch.tensor([start]), 13, 1.5, 30, top_p=0.9, seed=7)
        clean = expected[0].tolist()
        corrupted = [*clean[:9], 11, *clean[10:]]
        logits = logits_of(model, clean)
        pair = answers_of(model, clean, corrupted)
        answers, _ = patched_answers(model, clean, corrupted, pair)
    state = {'temperature': 1.5, 'k': 30, 'p': 0.9, 'seed': 7, 'text': CHARACTERS.decode(start),
             'changes': 'L1.H2=0'}
    with Served(model, [5]) as url, opened(chromium, url, '#' + urlencode(state)) as tab:
        generated(tab)
        assert tab.locator('#live-text').input_value() == CHARACTERS.decode(clean)
        assert_close(logits_shown(tab)[0], logits[-1])
        parts = [float(row[1]) for row in table(tab, 'why')]
        assert_close([sum(parts[:-1]), parts[-1]], logits[-1].max().expand(2))
        assert not tab.locator('.failure').count()  # all panels
        tab.locator('#patch-text').fill(CHARACTERS.decode(corrupted))
        tab.wait_for_selector(f'#figure-patching[data-cells="{answers.numel()}"]')
        assert_close([row[4] for row in table(tab, 'patching')], answers.flatten())
        tab.locator('#patch-text').fill('AB')
        tab.wait_for_selector('text=both texts need the same number')


def post(url, body, **headers):
    """(status, text) of a message from the page, unless the headers say otherwise."""
    host = url.split('/')[2]
    headers = {'Origin': f'http://{host}', 'Content-Type': 'application/json'} | {
        name.replace('_', '-'): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(host)
    connection.request('POST', '/ask', body, headers)
    answer = connection.getresponse()
    status, text = answer.status, answer.read().decode(errors='replace')
    connection.close()
    return status, text


def test_only_its_own_page_is_answered():
    show = json.dumps({'kind': 'show', 'page': 'a', 'text': TEXT, 'changes': '', 'frozen': '',
                       'selection': {}})
    more = json.dumps({'kind': 'more', 'page': 'b', 'wishes': [['lensAt', [0]]]})
    with Served(awake(), [5]) as url:
        assert post(url, show)[0] == 200
        assert post(url, show, Origin='http://evil.example')[0] == 400
        assert post(url, show, Origin='null')[0] == 400
        assert post(url, show, Content_Type='text/plain')[0] == 400
        assert post(url, show, Host='evil.example', Origin='http://evil.example')[0] == 404
        assert post(url, '', Content_Length=str(MAX_BODY + 1))[0] == 400
        assert 'reload this one' in post(url, more)[1]  # it has shown no text


def test_a_taken_port_is_noticed_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(explain.ckpt, 'load', lambda *_, **__: pytest.fail('it has begun to work'))
    with Server(0) as server:
        port = server.server_address[1]
        config = explain.Config(init_from='gpt2', out_dir=str(tmp_path), start='x', serve=True,
                                port=port)
        with pytest.raises(UserError, match=f'port = {port}: cannot listen'):
            explain.main(config)
