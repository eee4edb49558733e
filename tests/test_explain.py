"""explain.py on the command line: pages written, pages served, errors."""

import base64
import contextlib
import http.client
import json
import re
import shutil
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import checkpoint as ckpt
import explain
import interpret
from checkpoint import load_model
from helpers import ARCHITECTURES, POST, TEXT, char_tokenizer, collect, served, tiny, tokens
from model import GPT


def unpack(page):
    """(facts, arrays) of the HTML of a page: the inverse of explain.pack, as in web/core.js."""
    facts = json.loads(re.search(r'id="facts">(.*)</script>', page)[1])
    blob = base64.b64decode(re.search(r'id="arrays">(.*)</script>', page)[1])
    arrays = {}
    for name, entry in facts['arrays'].items():
        data = zlib.decompress(blob[entry['start']:entry['end']])
        dtype = np.dtype(entry['dtype'])
        planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
        arrays[name] = planes.T.copy().view(dtype).reshape(entry['shape'])
    return facts, arrays


def test_explain_page_matches_model(run, trained):
    path = trained / 'explain.html'
    result = run('explain.py', f'--out_dir={trained}', f'--start={TEXT}', '--checkpoints=all')
    assert result.stdout.startswith(f'{path}: ') and 'MB' in result.stdout
    assert result.stdout.strip().endswith('; open it in a browser')
    facts, arrays = unpack(path.read_text(encoding='utf-8'))
    model, chars = load_model(trained)
    ids = chars.encode(TEXT)[-32:]  # block_size
    logits, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    assert facts['ids'] == ids
    assert facts['run']['step'] == 20
    assert facts['difference'] < 1e-5
    np.testing.assert_allclose(arrays['logits'][:-1], logits[0].detach().numpy(), atol=1e-5)
    assert arrays['loss'].mean() == pytest.approx(loss.item(), abs=1e-5)
    trace = interpret.run(model, torch.tensor([ids]))
    row, column = np.tril_indices(len(ids))
    attention = trace.attention[:, 0].numpy()[..., row, column]
    np.testing.assert_allclose((arrays['attention'] / 255.0) ** 2, attention, atol=1 / 255)
    probs = logits[0].softmax(dim=-1)
    for t, next_token in enumerate(ids[1:]):
        assert arrays['rank'][t] == 1 + (probs[t] > probs[t, next_token]).sum()
    assert json.loads(bytes(arrays['vocabulary'])) == list(chars.characters)
    assert facts['run']['curves']['loss'][-1][0] == 19
    assert facts['snippets']['path'].endswith('val.bin') and facts['ablation_mean'] == 'validation'
    assert arrays['snippet_ids'].shape[1] == 32
    assert facts['history']['steps'] == [10, 20]
    assert facts['history']['losses'][-1] == pytest.approx(loss.item(), abs=1e-4)


def test_explain_page_loads_nothing_external():
    names = char_tokenizer(48, 40)
    html = explain.build_page(*collect(tiny(), names, tokens(9).tolist()))
    markup = html.split('<script')[0]
    assert not re.search(r"""(src|href)=["']?[^#"'\s]|url\(|@import""", markup)
    assert "default-src 'none'" in html
    assert not re.search(r'^(import|export) ', html, flags=re.M)


def test_explain_page_is_replaced_and_escapes_text(run, trained, tmp_path):
    out_dir = tmp_path / 'out'
    shutil.copytree(trained, out_dir, ignore=shutil.ignore_patterns('.lock', 'explain.html'))
    hostile = '</script><!--"x"'
    (tmp_path / 'prompt.txt').write_text(hostile, encoding='utf-8')
    arguments = (f'--out_dir={out_dir}', f'--start=FILE:{tmp_path}/prompt.txt')
    assert 'replacing' not in run('explain.py', *arguments).stdout
    assert 'replacing the previous page' in run('explain.py', *arguments).stdout
    facts, arrays = unpack((out_dir / 'explain.html').read_text(encoding='utf-8'))
    characters = json.loads(bytes(arrays['vocabulary']))
    assert ''.join(characters[i] for i in facts['ids']) == hostile


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST], ids=str)
@pytest.mark.parametrize('T', [1, 2, 9])
def test_explain_page_supports_architecture(options, T):
    names = char_tokenizer(48, 40)
    html = explain.build_page(*collect(tiny(**options), names, tokens(T).tolist()))
    facts, arrays = unpack(html)
    assert len(facts['ids']) == T
    assert facts['difference'] < 1e-4
    np.testing.assert_allclose(arrays['parts'].sum(axis=0), arrays['part_logits'], atol=1e-4)
    assert not np.isnan(arrays['scores']).any()
    assert arrays['by_source'].shape == (2, 4, T * (T + 1) // 2)


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """(a Hugging Face GPT-2 with 6000 tokens, facts and arrays of the same model in plainGPT)."""
    torch.manual_seed(0)
    sizes = {'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'n_positions': 64}
    config = transformers.GPT2Config(vocab_size=6000, **sizes)
    reference = transformers.GPT2LMHeadModel(config).eval()
    path = tmp_path_factory.mktemp('gpt2')
    reference.save_pretrained(path)
    model = GPT.from_pretrained(str(path)).eval()
    names = char_tokenizer(0x3400, 5990)  # the last 10 rows of the embedding are padding
    return reference, *collect(model, names, tokens(60, vocab_size=5990).tolist())


def test_explain_page_large_vocabulary_keeps_top_logits_and_histogram(gpt2):
    reference, facts, arrays = gpt2
    logits = reference(torch.tensor([facts['ids']])).logits[0, :, :5990].detach().numpy()
    stored = {name: array.numpy() for name, array in arrays.items()}
    assert 'logits' not in stored
    np.testing.assert_allclose(stored['last_logits'], logits[-1], atol=1e-4)
    top = np.take_along_axis(logits, stored['top_ids'], axis=1)
    np.testing.assert_allclose(stored['top_logits'], top, atol=1e-4)
    assert (stored['tail'].sum(axis=1) == 5990 - 512).all()
    centers = logits.max(axis=1)[:, None] - (np.arange(2048) + 0.5) / 32  # of the bins
    for temperature in (0.5, 1.0, 2.0):
        in_tail = (stored['tail'] * np.exp(centers / temperature)).sum(axis=1)
        total = in_tail + np.exp(top / temperature).sum(axis=1)
        expected = np.exp(logits / temperature).sum(axis=1)
        np.testing.assert_allclose(total, expected, rtol=1e-3)


def test_explain_page_too_large_drops_arrays(gpt2, monkeypatch):
    _, facts, arrays = gpt2
    whole = explain.build_page(facts, arrays)
    monkeypatch.setattr(explain, 'MAX_PAGE_BYTES', len(whole) + explain.CODE_BYTES - 450_000)
    smaller, stored = unpack(explain.build_page(facts, arrays))
    assert smaller['dropped']
    assert 'by_source' not in stored and 'logits' not in stored and 'parts' in stored
    monkeypatch.setattr(explain, 'MAX_PAGE_BYTES', 0)
    smallest, _ = unpack(explain.build_page(facts, arrays))
    assert smallest['dropped'] == [description for name, description in explain.DROPPABLE.items()
                                   if name in arrays]


def test_explain_rejects_bad_arguments(refused, trained, tmp_path):
    def check(*arguments, says, out_dir=trained):
        refused('explain.py', f'--out_dir={out_dir}', *arguments, says=says)

    check(says=('start is empty', '--start='))
    check('--start=é', says=("'é'", 'start'))
    check('--start=é', '--serve', says=("'é'", 'start'))
    check('--start=FILE:nowhere.txt', says='nowhere.txt')
    check('--start=a', '--port=70000', says='port = 70000')
    check('--start=a', out_dir=tmp_path / 'nowhere', says='there is no checkpoint')
    assert not (tmp_path / 'nowhere').exists()
    refused('explain.py', '--init_from=gpt2', '--checkpoints=all', '--start=a',
            says=('checkpoints = all', 'gpt2'))


def test_explain_rejects_unusable_files(refused, trained, tmp_path):
    (tmp_path / 'broken').mkdir()
    checkpoint = ckpt.load(trained)
    checkpoint.model['lm_head.weight'] = checkpoint.model['lm_head.weight'] * float('nan')
    ckpt.save(tmp_path / 'broken', checkpoint)
    refused('explain.py', f'--out_dir={tmp_path}/broken', '--start=a', says='not finite')
    assert not list(tmp_path.glob('broken/explain*'))
    (tmp_path / 'folder' / 'explain.html').mkdir(parents=True)
    refused('explain.py', f'--init_from={trained}', f'--out_dir={tmp_path}/folder', '--start=a',
            says='explain.html')


def get(url, **headers):
    """(status, body) of a GET request."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_serve_renders_new_texts_and_rejects_foreign_hosts(clone, trained):
    with served(clone, f'--out_dir={trained}', '--start=def') as (server, url):
        status, page = get(url)
        facts, _ = unpack(page)
        assert status == 200 and len(facts['ids']) == 3 and facts['live']

        status, page = get(url + '?start=return')
        facts, _ = unpack(page)
        assert status == 200 and len(facts['ids']) == 6

        status, page = get(url + '?start=%C3%A9')
        facts, _ = unpack(page)
        assert status == 400 and 'é' in facts['error']
        assert facts['text'] == 'é' and len(facts['ids']) == 3  # the page of the initial text

        status, page = get(url + '?start=')
        facts, _ = unpack(page)
        assert status == 400 and 'empty' in facts['error']

        assert get(url + '../config.py')[0] == 404
        for host in ('[', '', 'evil.example:80'):
            assert get(url, Host=host)[0] == 404
        assert get(url, Host='LOCALHOST:80')[0] == 200
        with contextlib.closing(http.client.HTTPConnection(url.split('/')[2])) as connection:
            connection.request('HEAD', '/')
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read() == b''
            assert int(answer.headers['Content-Length']) > 10_000

        def request_page():
            with contextlib.suppress(OSError, http.client.HTTPException):
                get(url + '?start=' + 20 * 'return+')

        threading.Thread(target=request_page).start()
        time.sleep(0.3)
        server.send_signal(2)  # while a request is being processed
        assert server.wait(20) == 130
        assert 'Traceback' not in server.stderr.read()


def is_closed(connection):
    """Whether the server has closed a connection on which it has sent nothing."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.slow
def test_serve_answers_while_300_connections_are_half_open(clone, trained):
    with served(clone, f'--out_dir={trained}', '--start=def') as (server, url), \
            contextlib.ExitStack() as stack:
        port = int(url.strip('/').rsplit(':', 1)[1])
        connections = []
        for _ in range(300):
            connection = stack.enter_context(socket.create_connection(('127.0.0.1', port)))
            connection.send(b'GET / HTTP/1.1\r\nHost: 127')  # and then nothing
            connections.append(connection)
        start = time.monotonic()
        assert get(url)[0] == 200 and time.monotonic() - start < 9  # they time out at 10
        time.sleep(1)
        assert sum(map(is_closed, connections)) >= 260  # at once
        status = Path(f'/proc/{server.pid}/status').read_text()
        assert int(re.search(r'Threads:\s+(\d+)', status)[1]) < 60
        time.sleep(11)
        assert all(map(is_closed, connections))
        assert get(url)[0] == 200


def test_serve_sends_security_headers_with_every_answer(clone, trained):
    with served(clone, f'--out_dir={trained}', '--start=def') as (server, url):
        for path, status in (('', 200), ('?start=%C3%A9', 400), ('nowhere', 404)):
            with contextlib.closing(http.client.HTTPConnection(url.split('/')[2])) as connection:
                connection.request('GET', '/' + path)
                answer = connection.getresponse()
                assert answer.status == status
                policy = dict(part.split(' ', 1)
                              for part in answer.headers['Content-Security-Policy'].split('; '))
                assert policy['default-src'] == "'none'"
                assert policy['frame-ancestors'] == "'none'"
                scripts = re.fullmatch(r"'sha256-[\w+/]{43}=' 'wasm-unsafe-eval'",
                                       policy['script-src'])
                assert scripts and policy['worker-src'] == 'blob:'
                assert answer.headers['X-Frame-Options'] == 'DENY'
                assert answer.headers['X-Content-Type-Options'] == 'nosniff'
                assert answer.headers['Referrer-Policy'] == 'no-referrer'
        connection = socket.create_connection(('127.0.0.1', int(url.strip('/').rsplit(':', 1)[1])))
        connection.send(b'GET / HTTP/1.1\r\n')
        linger = struct.pack('ii', 1, 0)  # close with a reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        assert get(url)[0] == 200
        server.send_signal(2)
        assert server.wait(20) == 130
        assert 'Traceback' not in server.stderr.read()
