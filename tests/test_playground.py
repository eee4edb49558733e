"""sample.py --serve: OpenAI's API with OpenAI's client, and its page in a browser."""
import contextlib
import http.client
import json
import math
import re
import shutil
import signal
import socket
import struct
import threading
import time
from types import SimpleNamespace

import openai
import pytest
import torch

import checkpoint as ckpt
import sample
from browser import opened, wait_until_drawn
from configurator import configure
from helpers import folder_contents, served, tiny
from lib.errors import UserError
from lib.playground import serve_playground
from lib.serve import MAX_BODY, Server
from lib.tokenizer import ByteTokenizer

CHATTING = {'vocab_size': 257, 'eot_token': 256, 'turns': 2, 'block_size': 64}


@pytest.fixture(scope='module')
def playground(trained):
    """The server of two models, `text` (that of `trained`) and `chat`, in this process: their url,
    the models, and an openai client."""
    config = sample.Config(init_from=str(trained), device='cpu', dtype='float32', serve=True)
    text, tokenizer, _ = sample.load(config, torch.device('cpu'))
    chat = tiny(**CHATTING)
    models = {'text': (text, tokenizer, ''), 'chat': (chat, ByteTokenizer(True), '')}
    server = Server(0)
    thread = threading.Thread(target=serve_playground, args=(server, models, '', config))
    thread.start()
    url = f'http://127.0.0.1:{server.server_address[1]}/'
    with openai.OpenAI(base_url=f'{url}v1', api_key='none', max_retries=0) as client:
        yield SimpleNamespace(url=url, server=server, client=client, text=text,
                              tokenizer=tokenizer, chat=chat)
    server.shutdown()
    thread.join()


def sampled(run, trained, *options):
    """The texts that sample.py prints after the prompt 'def '."""
    shown = run('sample.py', f'--out_dir={trained}', '--dtype=float32', '--start=def ', *options)
    return [text.removeprefix('def ') for text in shown.stdout.split(f'\n{"-" * 15}\n')[:-1]]


def post(playground, body, path='/v1/completions', **headers):
    """(status, JSON) of a POST request."""
    host = playground.url.split('/')[2]
    headers = {'Content-Type': 'application/json'} | {
        name.replace('_', '-'): value for name, value in headers.items()}
    with contextlib.closing(http.client.HTTPConnection(host)) as connection:
        connection.request('POST', path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def wait_until_idle(playground):
    """Until no request is being answered."""
    deadline = time.monotonic() + 30
    while playground.server.answering:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Texts --------------------------------------------------------------------------------------------

def test_completions_equal_what_sample_py_prints(run, trained, playground):
    complete = playground.client.completions.create
    greedy, = sampled(run, trained, '--temperature=0', '--num_samples=1', '--max_new_tokens=60')
    answer = complete(model='text', prompt='def ', temperature=0, max_tokens=60)
    choice, = answer.choices
    assert (choice.text, choice.finish_reason) == (greedy, 'length')
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 60)
    ids = playground.tokenizer.encode('def ')
    for prompt in (['def '], ids, [ids]):
        assert complete(model='text', prompt=prompt, temperature=0,
                        max_tokens=60).choices[0].text == greedy

    options = {'temperature': 1.5, 'seed': 7, 'top_p': 0.9}
    more = {'top_k': 30, 'min_p': 0.01, 'repetition_penalty': 1.2}
    flags = [f'--{key}={value}' for key, value in (options | more).items()]
    texts = sampled(run, trained, *flags, '--num_samples=3', '--max_new_tokens=30')
    asked = {'model': 'text', 'prompt': 'def ', 'n': 3, 'max_tokens': 30, 'extra_body': more,
             **options}
    assert [choice.text for choice in complete(**asked).choices] == texts
    streamed = [''] * 3
    chunks = list(complete(**asked, stream=True, stream_options={'include_usage': True}))
    for chunk in chunks[:-1]:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts and len(chunks) > 60
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 4 + 3 * 30
    assert complete(model='text', prompt='d').choices[0].text != complete(
        model='text', prompt='d').choices[0].text  # no seed: another text


def test_texts_end_before_stop_texts(run, trained, playground):
    asked = {'model': 'text', 'prompt': 'def ', 'seed': 1, 'max_tokens': 60}
    plain = playground.client.completions.create(**asked).choices[0].text
    stop = plain[20:23]
    choice, = playground.client.completions.create(**asked, stop=['never', stop]).choices
    assert (choice.text, choice.finish_reason) == (plain[:plain.index(stop)], 'stop')
    chunks = list(playground.client.completions.create(**asked, stop=stop, stream=True))
    assert ''.join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, 'stop']


def test_logprobs_equal_log_softmax(trained, playground):
    model, tokenizer = ckpt.load_model(trained)
    asked = {'model': 'text', 'prompt': 'def ', 'seed': 3, 'temperature': 2, 'max_tokens': 20}
    answer, = playground.client.completions.create(**asked, logprobs=4).choices
    logprobs = answer.logprobs
    assert ''.join(logprobs.tokens) == answer.text and len(logprobs.tokens) == 20
    ids = tokenizer.encode('def ' + answer.text)
    for i, (shown, top) in enumerate(zip(logprobs.token_logprobs, logprobs.top_logprobs)):
        expected = model(torch.tensor([ids[:4 + i]]))[0][0, -1].log_softmax(-1)
        assert shown == pytest.approx(expected[ids[4 + i]].item(), abs=1e-4)
        best = expected.topk(4)
        assert list(top) == [tokenizer.decode([id_]) for id_ in best.indices.tolist()]
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)

    chunks = playground.client.completions.create(**asked, logprobs=0, stream=True)
    streamed = [p for chunk in chunks if (found := chunk.choices[0].logprobs)
                for p in found.token_logprobs]
    assert streamed == pytest.approx(logprobs.token_logprobs, abs=1e-5)


def test_chat_answers_as_the_model_generates(playground):
    model, tokenizer = playground.chat, ByteTokenizer(True)
    asked = [('system', 'Be brief.'), ('user', 'hi'), ('assistant', 'ho'), ('user', 'and é?')]
    ids = [256]  # as the data is prepared: a system message is part of the source after it
    for part in ('Be brief.\n\nhi', 'ho', 'and é?'):
        ids += [*part.encode(), 256]
    expected = model.generate([ids], 64 - len(ids), temperature=0, stop_tokens=[256])[0][len(ids):]
    messages = [{'role': role, 'content': content} for role, content in asked]
    ask = playground.client.chat.completions.create
    answer = ask(model='chat', messages=messages, temperature=0, logprobs=True, top_logprobs=2)
    choice, = answer.choices
    assert choice.message.role == 'assistant'
    assert choice.message.content == tokenizer.decode([id_ for id_ in expected if id_ != 256])
    assert answer.usage.prompt_tokens == len(ids)
    assert b''.join(bytes(token.bytes) for token in choice.logprobs.content) == \
        tokenizer.decode_bytes(expected)
    first = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
    top = choice.logprobs.content[0].top_logprobs
    best = first.topk(2).values.tolist()
    assert [token.logprob for token in top] == pytest.approx(best, abs=1e-4)
    parts = [{'type': 'text', 'text': text} for text in ('and', ' é?')]
    split = [*messages[:-1], {'role': 'user', 'content': parts}]
    assert ask(model='chat', messages=split, temperature=0).choices[0].message == choice.message
    chunks = list(ask(model='chat', messages=messages, temperature=0, stream=True))
    assert ''.join(chunk.choices[0].delta.content for chunk in chunks) == choice.message.content
    assert [chunk.choices[0].delta.role for chunk in chunks][:2] == ['assistant', None]

    longer = [*messages, {'role': 'assistant', 'content': 'yes'}, {'role': 'user', 'content': 'so'}]
    with pytest.raises(openai.BadRequestError, match='3 turns, at most 2 in training'):
        ask(model='chat', messages=longer)
    cut = ask(model='chat', messages=longer, extra_body={'truncation': 'auto'}, max_tokens=9)
    assert cut.usage.prompt_tokens == 5 + len('and é?yesso'.encode()) - 1  # the last two turns
    with pytest.raises(openai.BadRequestError, match='trained on plain text'):
        ask(model='text', messages=messages)


# Mistakes -----------------------------------------------------------------------------------------

LONG = 'd' * 33  # block_size = 32


@pytest.mark.parametrize('change, says', [
    ({'model': 'nothing'}, 'model = \'nothing\': there is text and chat'),
    ({'prompt': LONG}, 'the prompt has 33 tokens: at most 32 fit'),
    ({'prompt': 'é日'}, 'prompt: character \'é\' at position 0'),
    ({'prompt': None}, 'prompt: give a text'),
    ({'prompt': []}, 'prompt: give a text'),
    ({'prompt': [1, 'a']}, 'prompt: give texts, or ids below'),
    ({'prompt': [99999]}, 'prompt: give texts, or ids below'),
    ({'temperature': -1}, 'temperature = -1.0: give 0'),
    ({'temperature': 'hot'}, "temperature = 'hot': expected float"),
    ({'top_p': 0}, 'top_p = 0'),
    ({'max_tokens': 0}, 'max_tokens = 0: give at least 1'),
    ({'stop': 'z' * 1001}, 'stop: give at most 16 texts of at most 1,000 characters'),
    ({'n': 129}, 'n = 129: give 1 to 128'),
    ({'n': 100, 'prompt': ['a', 'b']}, '200 texts: at most 128 at a time'),
    ({'seed': 2**70}, 'seed = '),
    ({'stop': ['']}, 'stop: an empty text'),
    ({'stop': [99999]}, 'stop = 99999: there is no such id'),
    ({'logprobs': 21}, 'logprobs = 21: give 0 to 20'),
    ({'logit_bias': {'5': 1}}, "logit_bias = {'5': 1} is not supported"),
    ({'best_of': 4}, 'best_of = 4 is not supported'),
    ({'temprature': 1}, 'did you mean temperature?'),
    ({'stream_options': {'include_usage': True}}, 'stream = true'),
])
def test_mistakes_are_one_sentence(playground, change, says):
    status, answer = post(playground, json.dumps({'model': 'text', 'prompt': 'd'} | change))
    assert status == (404 if 'model' in change else 400)
    assert says in answer['error']['message']


def test_client_raises_errors_and_harmless_parameters_are_accepted(playground):
    complete = playground.client.completions.create
    with pytest.raises(openai.NotFoundError) as caught:
        complete(model='gpt-5', prompt='d')
    assert caught.value.code == 'model_not_found'
    with pytest.raises(openai.BadRequestError) as caught:
        complete(model='text', prompt=LONG)
    assert caught.value.code == 'context_length_exceeded'
    status, answer = post(playground, json.dumps({'prompt': 'd' * (9 * MAX_BODY)}))
    assert status == 400 and 'at most 2,000,000 bytes' in answer['error']['message']
    for prompt in (LONG, playground.tokenizer.encode(LONG)):
        cut = complete(model='text', prompt=prompt, max_tokens=1, extra_body={'truncation': 'auto'})
        assert cut.usage.prompt_tokens == 32
    complete(model='text', prompt='d', max_tokens=1, user='me', logit_bias={}, best_of=1,
             presence_penalty=0, extra_body={'metadata': {'a': 'b'}, 'suffix': None})
    assert [model.id for model in playground.client.models.list()] == ['text', 'chat']
    for body in (b'{', b'[]', b'\xff', b'[' * 10_000, b'{"prompt": "d", "temperature": NaN}'):
        assert post(playground, body)[0] == 400


@torch.no_grad()
def test_weights_that_overflow_are_a_sentence(playground):
    weight = playground.chat.lm_head.weight
    before = weight.clone()
    weight.fill_(float('nan'))
    ask = {'model': 'chat', 'messages': [{'role': 'user', 'content': 'hi'}]}
    try:
        for stream in (False, True):
            with pytest.raises(openai.APIError, match='the logits are not finite'):
                list(playground.client.chat.completions.create(**ask, stream=stream))
    finally:
        weight.copy_(before)


# Clients ------------------------------------------------------------------------------------------

def test_two_clients_take_turns_and_a_gone_one_stops(playground):
    endless = {'model': 'text', 'prompt': 'd', 'max_tokens': 100_000, 'seed': 1}
    complete = playground.client.completions.create
    with complete(**endless, stream=True) as first:
        chunks = iter(first)
        next(chunks)
        short = complete(model='text', prompt='def ', max_tokens=20, timeout=100)
        assert short.usage.completion_tokens == 20
        next(chunks)
        assert playground.server.answering
    wait_until_idle(playground)  # the client has closed its stream
    with pytest.raises(openai.APITimeoutError):  # it has streamed nothing, and leaves
        complete(**endless, timeout=0.5)
    wait_until_idle(playground)


def test_a_request_waits_until_its_cache_fits(playground, monkeypatch):
    complete = playground.client.completions.create
    monkeypatch.setattr('lib.playground.device_memory', lambda device: 1)
    with complete(model='text', prompt='d', max_tokens=100_000, stream=True) as first:
        next(iter(first))
        with pytest.raises(openai.APITimeoutError):
            complete(model='text', prompt='d', max_tokens=1, timeout=0.5)
    wait_until_idle(playground)
    assert complete(model='text', prompt='d', max_tokens=1).usage.completion_tokens == 1


def test_broken_clients_disturb_nobody(playground):
    address = playground.server.server_address
    head = (f'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n'
            f'Content-Type: application/json\r\nContent-Length: ')
    body = json.dumps({'prompt': 'd', 'max_tokens': 100_000, 'stream': True})
    with contextlib.ExitStack() as stack:
        def send(text):
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(text.encode())
            return connection

        for text in ('', head, f'{head}900\r\n\r\n{{"prompt":', f'{head}-1\r\n\r\n', '\0\r\n\r\n'):
            send(text)
        reset = send(f'{head}{len(body)}\r\n\r\n{body}')
        assert reset.recv(100)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        reset.close()
        send(f'{head}{len(body)}\r\n\r\n{body}')  # never reads
        answer = playground.client.completions.create(model='text', prompt='d', max_tokens=5)
        assert answer.usage.completion_tokens == 5
    wait_until_idle(playground)


def test_only_local_hosts_and_the_own_origin_are_answered(playground):
    body = json.dumps({'prompt': 'd', 'max_tokens': 1})
    own = playground.url.rstrip('/')
    assert post(playground, body)[0] == post(playground, body, Origin=own)[0] == 200
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:1', f'https{own[4:]}'):
        assert post(playground, body, Origin=origin)[0] == 400
    assert post(playground, body, Host='evil.example', Origin='http://evil.example')[0] == 404
    assert post(playground, body, Host='localhost:evil.example')[0] == 404
    assert post(playground, body, Content_Type='text/plain')[0] == 400
    assert post(playground, body, path='/v1/embeddings')[0] == 404
    with contextlib.closing(http.client.HTTPConnection(own.split('/')[2])) as connection:
        connection.request('GET', '/v1/models', headers={'Origin': 'http://evil.example'})
        assert connection.getresponse().status == 400


@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_program_serves_two_models_and_ends_quietly(clone, run, refused, trained, tmp_path, number,
                                                    code):
    other = shutil.copytree(trained, tmp_path / 'other')
    before = [folder_contents(folder) for folder in (trained, other, clone)]
    with served(clone, f'--out_dir={trained}', f'--compare={other}', '--device=cpu',
                script='sample.py') as (server, url):
        with openai.OpenAI(base_url=f'{url}v1', api_key='none', max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [str(trained), str(other)]
            text = client.completions.create(model=str(other), prompt='def ', max_tokens=9, seed=4)
            assert text.choices[0].text == sampled(run, other, '--num_samples=1', '--seed=4',
                                                   '--max_new_tokens=9')[0]
            refused('sample.py', '--out_dir=nothing', '--serve', f'--port={url.split(":")[2][:-1]}',
                    says='cannot listen')  # before the model is looked for
            endless = client.completions.create(model=str(trained), prompt='d', max_tokens=100_000,
                                                stream=True)
            next(iter(endless))
            server.send_signal(number)
            assert server.wait(600) == code
            endless.close()
        assert [line.split(': ')[0].split('/')[-2] for line in server.stderr] == ['out', 'other']
        assert server.stdout.read() == ''
    assert [folder_contents(folder) for folder in (trained, other, clone)] == before


@pytest.mark.parametrize('flags, says', [
    (['--serve', '--interactive'], 'interactive = True: --serve cannot do that'),
    (['--serve', '--num_beams=2'], 'num_beams = 2: --serve cannot do that'),
    (['--serve', '--compile'], 'compile = True: --serve cannot do that'),
    (['--compare=x'], 'add --serve'),
    (['--serve', '--out_dir=x', '--compare=x'], 'compare = x is the model itself'),
])
def test_flags_that_do_not_go_together_are_refused(flags, says):
    config, _ = configure(sample.Config, flags)
    with pytest.raises(UserError, match=says):
        sample.check(config)


# The page -----------------------------------------------------------------------------------------

def texts_in(tab, number):
    """What the column of a model shows, without the sign of an end."""
    texts = tab.locator('#columns section').nth(number).locator('.generated:visible')
    return [text.removesuffix('■') for text in texts.all_text_contents()]


def wait_until_written(tab):
    tab.wait_for_selector('#stop[aria-disabled=true]')
    wait_until_drawn(tab)


@pytest.mark.slow
def test_page_writes_with_two_models_and_shows_probabilities(chromium, playground):
    complete = playground.client.completions.create
    options = {'temperature': 1.5, 'max_tokens': 30, 'seed': 5, 'stop': ['\n\n']}
    more = {'top_k': None, 'min_p': 0.02, 'repetition_penalty': 1.1}
    fields = {'temperature': '1.5', 'max_tokens': '30', 'seed': '5', 'stop': '\\n\\n', 'top_k': '0',
              'min_p': '0.02', 'repetition_penalty': '1.1', 'n': '2'}

    def expected(model, seed, logprobs=None):
        return complete(model=model, prompt='def ', n=2, extra_body=more, logprobs=logprobs,
                        **options | {'seed': seed}).choices

    with opened(chromium, playground.url) as tab:
        for key, value in fields.items():
            tab.locator(f'#option-{key}').fill(value)
        tab.locator('#input').fill('def ')
        tab.keyboard.press('Control+Enter')
        wait_until_written(tab)
        for number, model in enumerate(('text', 'chat')):
            assert texts_in(tab, number) == [choice.text for choice in expected(model, 5)]

        logprobs = expected('text', 5, 5)[0].logprobs
        text = tab.locator('.generated').first
        text.focus()
        for _ in range(3):
            tab.keyboard.press('ArrowRight')
        chosen = tab.locator('.picked').text_content()
        tip = tab.locator('#tip')
        tip.wait_for()
        assert chosen == logprobs.tokens[2] and tip.text_content() in (
            tab.locator('#readout').text_content().replace(', ', '\n'))
        lines = tip.text_content().splitlines()
        assert len(lines) in (5, 6) and sum(line.startswith('▸') for line in lines) == 1
        best = max(logprobs.top_logprobs[2].items(), key=lambda item: item[1])
        shown, token = re.search(r'([\d.]+)% “(.+)”', lines[0]).groups()
        assert token.replace('↵', '\n') == best[0]
        assert float(shown) == pytest.approx(100 * math.exp(best[1]), abs=0.51)
        tab.locator('#input').focus()
        tip.wait_for(state='hidden')
        text.locator('span').nth(4).hover()
        assert f'“{logprobs.tokens[4]}”'.replace('\n', '↵') in tip.text_content()

        tab.get_by_role('button', name='Retry').click()
        wait_until_written(tab)
        assert tab.locator('#option-seed').input_value() == '6'
        assert texts_in(tab, 0) == [choice.text for choice in expected('text', 6)]
        written = texts_in(tab, 0)[1]
        tab.get_by_role('button', name='Go on from here').nth(1).click()
        assert tab.locator('#input').input_value() == f'def {written}'
        state = '#' + tab.url.split('#')[1]
        tab.get_by_role('button', name='Reset options').click()
        wait_until_drawn(tab)
        assert 'temperature' not in tab.url

        tab.locator('#option-max_tokens').fill('100000')
        tab.locator('#go').click()
        text.locator('span').nth(9).wait_for()
        assert playground.server.answering
        tab.keyboard.press('Escape')
        wait_until_written(tab)
        wait_until_idle(playground)
        assert 'stopped' in tab.locator('#columns [role=status]').all_text_contents()[0]
    with opened(chromium, playground.url, state) as tab:  # the URL keeps the options
        assert {key: tab.locator(f'#option-{key}').input_value() for key in fields} == (
            fields | {'seed': '6'})


@pytest.mark.slow
def test_page_chats_with_models_that_were_trained_on_chats(chromium, playground):
    ask = playground.client.chat.completions.create
    with opened(chromium, playground.url, '#mode=chat&max_tokens=8&temperature=0.7&seed=2') as tab:
        messages = []
        for number, message in enumerate(('<b>hi</b>', 'and', 'so')):
            tab.locator('#input').fill(message)
            tab.keyboard.press('Enter')
            wait_until_written(tab)
            messages.append({'role': 'user', 'content': message})
            asked = {'model': 'chat', 'messages': messages, 'max_tokens': 8, 'temperature': 0.7,
                     'extra_body': {'truncation': 'auto'}}
            answer = ask(**asked, seed=2).choices[0].message.content
            assert texts_in(tab, 1)[number] == answer.removesuffix('■') and answer.strip()
            messages.append({'role': 'assistant', 'content': answer})
        messages.pop()
        tab.get_by_role('button', name='Retry').click()
        wait_until_written(tab)
        assert len(texts_in(tab, 1)) == 3
        assert texts_in(tab, 1)[2] == ask(**asked, seed=3).choices[0].message.content
        questions = tab.locator('.question').all_text_contents()
        assert questions == ['<b>hi</b>', 'and', 'so']
        assert 'not on chats' in tab.locator('#columns .notice').first.text_content()
        tab.get_by_role('button', name='Clear').click()
        assert texts_in(tab, 1) == [] and tab.locator('.question').count() == 0


@pytest.mark.slow
@pytest.mark.parametrize('width', [1280, 360])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_page_fits_screen_and_is_accessible(chromium, playground, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    def check(tab):
        assert tab.evaluate('document.documentElement.scrollWidth') == width
        assert not [f'{x["id"]}: {x["nodes"][0]["html"][:200]}'
                    for x in Axe().run(tab).response['violations']]

    with opened(chromium, playground.url, '#max_tokens=20', width, color_scheme=scheme) as tab:
        focused = 'document.activeElement.id'
        for _ in range(20):  # by keyboard alone
            tab.keyboard.press('Tab')
            if tab.evaluate(focused) == 'input':
                break
        tab.keyboard.type('def ')
        tab.keyboard.press('Tab')
        assert tab.evaluate(focused) == 'go'
        tab.keyboard.press('Enter')
        wait_until_written(tab)
        assert tab.evaluate(focused) == 'go'
        while not tab.evaluate('document.activeElement.matches(".generated")'):
            tab.keyboard.press('Tab')
        tab.keyboard.press('End')
        tab.locator('#tip').wait_for()
        check(tab)
        tab.get_by_role('button', name='Chat').click()
        tab.locator('#input').fill('hi')
        tab.keyboard.press('Enter')
        wait_until_written(tab)
        if not tab.locator('#options').get_attribute('open') == '':
            tab.get_by_text('Options', exact=True).click()
        check(tab)


@pytest.mark.slow
def test_page_shows_mistakes(chromium, playground):
    tab = chromium.new_page()
    tab.goto(playground.url)
    wait_until_drawn(tab)
    tab.locator('#input').fill('日')
    tab.locator('#go').click()
    tab.get_by_text("prompt: character '日' at position 0").wait_for()
    tab.close()
