"""explain.py as a person uses it: the file it writes, the page in a real browser, and what is refused."""

import base64
import contextlib
import csv
import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import torch
import transformers
from helpers import ARCHITECTURES, awake, tiny, tokens

import checkpoint as ckpt
import explain
import interpret
from checkpoint import load_model
from lib import tokenizer
from lib.generation import filter_logits, sample_next_token
from model import GPT, GPTConfig

NO_RUN = {'run': {'path': 'x', 'step': 0, 'val_loss': None, 'curves': {}}, 'live': False}
TEXT = 'def main(config):\n    return config\n\n\ndef main(con'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
browser_test = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on this machine: apt-get install chromium')


def collect(model, names, ids):
    facts, arrays = explain.collect_weights(model, names)
    more_facts, more_arrays = explain.collect_text(model, names, ids)
    return facts | more_facts, arrays | more_arrays


def unpack(page):
    """(facts, arrays) of a page's text: the inverse of explain.pack, as web/core.js does it."""
    facts = json.loads(re.search(r'id="facts">(.*)</script>', page)[1])
    blob = base64.b64decode(re.search(r'id="arrays">(.*)</script>', page)[1])
    arrays = {}
    for name, entry in facts['arrays'].items():
        planes = np.frombuffer(zlib.decompress(blob[entry['start']:entry['end']]), dtype=np.uint8)
        dtype = np.dtype(entry['dtype'])
        arrays[name] = planes.reshape(dtype.itemsize, -1).T.copy().view(dtype).reshape(entry['shape'])
    return facts, arrays


@pytest.fixture(scope='module')
def page(run, trained):
    """The path of the page of a tiny run, with its two checkpoints."""
    result = run('explain.py', f'--out_dir={trained}', f'--start={TEXT}', '--checkpoints=all')
    path = trained / 'explain.html'
    assert result.stdout.startswith(f'{path}: ') and 'MB; open it in a browser' in result.stdout
    return path


def test_what_the_page_holds_is_what_the_model_computes(page, trained):
    facts, arrays = unpack(page.read_text(encoding='utf-8'))
    model, chars = load_model(trained)
    ids = chars.encode(TEXT)[-32:]  # block_size
    logits, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    assert facts['ids'] == ids and facts['run']['step'] == 20 and facts['difference'] < 1e-5
    np.testing.assert_allclose(arrays['logits'][:-1], logits[0].detach().numpy(), atol=1e-5)
    assert arrays['loss'].mean() == pytest.approx(loss.item(), abs=1e-5)
    trace = interpret.run(model, torch.tensor([ids]))
    row, column = np.tril_indices(len(ids))
    attention = trace.attention[:, 0].numpy()[..., row, column]
    np.testing.assert_allclose((arrays['attention'] / 255.0) ** 2, attention, atol=1 / 255)
    probs = logits[0].softmax(dim=-1)
    for t, target in enumerate(ids[1:]):
        assert arrays['rank'][t] == 1 + (probs[t] > probs[t, target]).sum()
    assert json.loads(bytes(arrays['vocabulary'])) == list(chars.characters)
    assert facts['history']['steps'] == [10, 20] and facts['run']['curves']['loss'][-1][0] == 19
    assert facts['history']['losses'][-1] == pytest.approx(loss.item(), abs=1e-4)


def test_nothing_on_the_page_comes_from_elsewhere(page):
    text = page.read_text(encoding='utf-8')
    assert not re.search(r"""(src|href)=["']?[^#"'\s]|url\(|@import""", text.split('<script')[0])
    assert "default-src 'none'" in text and not re.search(r'^(import|export) ', text, flags=re.M)


def test_a_page_is_replaced_with_a_word_and_hostile_text_stays_text(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out', ignore=shutil.ignore_patterns('.lock'))
    (tmp_path / 'prompt.txt').write_text('</script><!--"x"', encoding='utf-8')
    arguments = f'--out_dir={tmp_path / "out"}', f'--start=FILE:{tmp_path}/prompt.txt'
    (tmp_path / 'out' / 'explain.html').unlink(missing_ok=True)
    assert 'in place' not in run('explain.py', *arguments).stdout
    assert 'in place of the one before' in run('explain.py', *arguments).stdout
    facts, arrays = unpack((tmp_path / 'out' / 'explain.html').read_text(encoding='utf-8'))
    characters = json.loads(bytes(arrays['vocabulary']))
    assert ''.join(characters[i] for i in facts['ids']) == '</script><!--"x"'


@pytest.mark.parametrize('options', ARCHITECTURES, ids=str)
@pytest.mark.parametrize('T', [1, 2, 9])
def test_every_architecture_and_the_shortest_texts(options, T):
    characters = tokenizer.CharTokenizer(''.join(map(chr, range(48, 88))))
    facts, arrays = unpack(explain.build_page(*collect(tiny(**options), characters, tokens(T).tolist())))
    assert facts['difference'] < 1e-4
    np.testing.assert_allclose(arrays['parts'].sum(axis=0), arrays['part_logits'], atol=1e-4)
    assert not np.isnan(arrays['scores']).any() and len(facts['ids']) == T
    assert arrays['by_source'].shape == (2, 4, T * (T + 1) // 2)


def test_gpt2s_weights_a_large_vocabulary_and_a_page_that_would_be_too_large(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=6000, n_positions=64)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    names = tokenizer.CharTokenizer(''.join(map(chr, range(0x3400, 0x3400 + 5990))))  # the model's vocabulary is padded
    facts, arrays = collect(model.eval(), names, tokens(60, vocab_size=5990).tolist())
    whole = explain.build_page(facts, arrays)
    logits = theirs(torch.tensor([facts['ids']])).logits[0, :, :5990].detach().numpy()
    kept = {name: array.numpy() for name, array in arrays.items()}
    np.testing.assert_allclose(kept['last_logits'], logits[-1], atol=1e-4)
    best = np.take_along_axis(logits, kept['top_ids'], axis=1)
    np.testing.assert_allclose(kept['top_logits'], best, atol=1e-4)
    assert (kept['tail'].sum(axis=1) == 5990 - 512).all()
    position = logits.max(axis=1)[:, None] - (np.arange(2048) + 0.5) / 32
    for temperature in (0.5, 1.0, 2.0):  # kept in steps of 1/32 nat, the rest weighs what it weighs
        said = (kept['tail'] * np.exp(position / temperature)).sum(axis=1) + np.exp(best / temperature).sum(axis=1)
        np.testing.assert_allclose(said, np.exp(logits / temperature).sum(axis=1), rtol=1e-3)

    monkeypatch.setattr(explain, 'LARGEST', len(whole) + 500_000 - 200_000)
    smaller, kept = unpack(explain.build_page(facts, arrays))
    assert smaller['dropped'] and 'by_source' not in kept and 'logits' not in kept and 'parts' in kept
    monkeypatch.setattr(explain, 'LARGEST', 0)
    assert unpack(explain.build_page(facts, arrays))[0]['dropped'] == list(explain.DROPPABLE.values())


def test_mistakes_are_one_sentence(refused, trained, tmp_path):
    (tmp_path / 'broken').mkdir()
    checkpoint = ckpt.load(trained)
    checkpoint.model['lm_head.weight'] = checkpoint.model['lm_head.weight'] * float('nan')
    ckpt.save(tmp_path / 'broken', checkpoint)
    (tmp_path / 'folder' / 'explain.html').mkdir(parents=True)
    refused('explain.py', f'--out_dir={trained}', says=('start is empty', '--start='))
    refused('explain.py', f'--out_dir={trained}', '--start=é', says=("'é'", 'start'))
    refused('explain.py', f'--out_dir={trained}', '--start=é', '--serve', says=("'é'", 'start'))
    refused('explain.py', f'--out_dir={tmp_path}/nowhere', '--start=a', says='there is no checkpoint')
    refused('explain.py', '--init_from=gpt2', '--checkpoints=all', '--start=a', says=('checkpoints = all', 'gpt2'))
    refused('explain.py', f'--out_dir={trained}', '--start=a', '--port=70000', says='port = 70000')
    refused('explain.py', f'--out_dir={trained}', '--start=FILE:nowhere.txt', says='nowhere.txt')
    refused('explain.py', f'--out_dir={tmp_path}/broken', '--start=a', says='not finite')
    refused('explain.py', f'--init_from={trained}', f'--out_dir={tmp_path}/folder', '--start=a', says='explain.html')
    assert not (tmp_path / 'nowhere').exists() and not list(tmp_path.glob('broken/explain*'))


def test_a_served_page_takes_new_texts_and_lets_no_foreign_name_in(clone, trained):
    command = [sys.executable, str(clone / 'explain.py'), f'--out_dir={trained}', '--start=def', '--serve', '--port=0']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=clone) as server:
        killer = threading.Timer(100, server.kill)
        killer.start()
        try:
            url = server.stdout.readline().split()[0]

            def get(path, **headers):
                try:
                    with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers)) as answer:
                        return answer.status, answer.read().decode()
                except urllib.error.HTTPError as error:
                    return error.code, error.read().decode()

            status, text = get('')
            assert status == 200 and len(unpack(text)[0]['ids']) == 3 and unpack(text)[0]['live']
            status, text = get('?start=return')
            assert status == 200 and len(unpack(text)[0]['ids']) == 6
            status, text = get('?start=%C3%A9')
            facts = unpack(text)[0]
            assert status == 400 and 'é' in facts['error'] and facts['text'] == 'é' and len(facts['ids']) == 3
            status, text = get('?start=')
            assert status == 400 and 'empty' in unpack(text)[0]['error']
            assert get('../config.py')[0] == get('', Host='[')[0] == get('', Host='')[0] == 404
            assert get('', Host='evil.example:80')[0] == 404

            def ask():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    get('?start=' + 20 * 'return+')

            threading.Thread(target=ask).start()
            time.sleep(0.3)
            server.send_signal(2)  # also while a page is on its way
            assert server.wait(20) == 130 and 'Traceback' not in server.stderr.read()
        finally:
            killer.cancel()
            server.kill()


# In a browser -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                     '--disable-component-update', '--disable-sync']  # fmt: skip
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium, path, state='', width=1280, **options):
    """The page in a new tab, drawn to its end; whatever it logs, or asks of the network, is a failure."""
    tab = chromium.new_page(viewport={'width': width, 'height': 900}, **options)
    said = []
    tab.on('console', lambda message: said.append(message.text))
    tab.on('pageerror', lambda error: said.append(str(error)))
    tab.on('request', lambda request: request.url.startswith(('file:', 'data:', 'blob:')) or said.append(request.url))
    tab.goto(f'file://{path}{state}')
    settled(tab)
    yield tab
    tab.close()
    assert not said


def settled(tab):
    tab.wait_for_selector('html[data-ready][data-settled]', timeout=30_000)


def table(tab, name):
    """The rows of the table behind a figure."""
    figure = tab.locator(f'#figure-{name}')
    if figure.locator('.behind').is_hidden():
        figure.get_by_role('button', name='table').click()
    return figure.locator('.behind tbody').evaluate('x => [...x.rows].map(row => [...row.cells].map(cell => cell.textContent))')


PANELS = ('next', 'flow', 'embedding', 'heads', 'head', 'mlp', 'lens', 'why', 'circuits', 'bigrams', 'training')


@browser_test
def test_every_table_is_what_the_model_computes(chromium, tmp_path):
    """Each number on the page, as a browser shows it, against PyTorch: a model with grouped queries, gains and biases awake."""
    model, t, l, k = awake(n_layer=3, n_kv_head=2, activation='gelu'), 5, 2, 3  # noqa: E741
    names = tokenizer.CharTokenizer(''.join(map(chr, range(48, 88))))
    ids = tokens(9).tolist()
    facts, arrays = collect(model, names, ids)
    (tmp_path / 'page.html').write_text(explain.build_page(facts | NO_RUN, arrays), encoding='utf-8')
    trace, V = interpret.run(model, torch.tensor([ids])), range(40)
    letter = {chr(48 + i): i for i in V}
    close = lambda said, true, off=2e-3: np.testing.assert_allclose([float(x) for x in said], true, atol=off, rtol=2e-3)  # noqa: E731
    with opened(chromium, tmp_path / 'page.html', f'#t={t}&layer={l}&head={k}&lens=1&source=3') as tab:
        sizes = [float(row[1]) for row in table(tab, 'flow') if row[1]]
        writes = [x[0, t].norm().item() for x in trace.embeddings.values()]
        writes += [x[i, 0, t].norm().item() for i in range(3) for x in (trace.attn_out, trace.mlp_out)]
        close(sizes, writes)
        close([row[2] for row in table(tab, 'flow') if row[2]], trace.residual[:, 0, t].norm(dim=-1).numpy())
        token, position, total = np.array(table(tab, 'embedding'), dtype=float).T[1:]
        close(token, model.transformer.wte.weight[ids[t]].detach().numpy())
        close(position, model.transformer.wpe.weight[t].detach().numpy())
        close(total, trace.residual[0, 0, t].numpy())
        scores, _ = interpret.head_scores(model)
        for layer, head, *said in table(tab, 'heads'):
            close(said[:4], [score[int(layer), int(head)].item() for score in scores.values()])
        for query, key, p in table(tab, 'attention'):
            close([p], trace.attention[l, 0, k, int(query.split()[0]), int(key.split()[0])].item())
        q, kk = trace.q[l, 0, k], interpret.per_head(model, trace.k[l, 0])[k]
        for s, (_, product, divided, masked, p) in enumerate(table(tab, 'scores')):
            raw = (q[t] @ kk[s]).item()
            close([product, divided], [raw, raw / 8**0.5], 2e-2)
            close([p], trace.attention[l, 0, k, t, s].item())
            assert (masked == '-Infinity') == (s > t)
        d, said_q, said_k, said_product = np.array(table(tab, 'terms'), dtype=float).T
        close(said_q, q[t].numpy()), close(said_k, kk[3].numpy()), close(said_product, (q[t] * kk[3]).numpy(), 2e-2)
        U = interpret.unembedding(model)[0].detach()
        W_O = model.transformer.h[l].attn.c_proj.weight[:, k * 8:(k + 1) * 8].detach()
        effect = (U - U.mean(dim=0)) @ W_O @ trace.mixed[l, 0, k, t] * trace.final_scale[0, t]
        for letter_, value in table(tab, 'promoted'):
            close([value], effect[letter[letter_]].item(), 2e-2)
        best = effect.argsort(descending=True).tolist()
        assert [letter[x] for x, _ in table(tab, 'promoted')] == best[:5] + best[:-6:-1]
        shares = [float(value) for _, value in table(tab, 'by-source')]
        parts = dict(table(tab, 'why'))
        assert len(shares) == t + 1 and sum(shares) == pytest.approx(float(parts[f'head {l}.{k}']), abs=2e-2)
        logit = trace.logits[0, t, ids[t + 1]].item()
        assert float(parts['sum']) == pytest.approx(logit, abs=1e-4) and 'biases' in parts and 'MLP 2' in parts
        U_out = (U - U.mean(dim=0)) @ model.transformer.h[l].mlp.c_proj.weight.detach()
        for neuron, pre, post, up, down in table(tab, 'neurons'):
            close([pre, post], [trace.pre[l, 0, t, int(neuron)].item(), trace.post[l, 0, t, int(neuron)].item()])
            order = U_out[:, int(neuron)].argsort(descending=True).tolist()
            assert [letter[x] for x in up.split()] == order[:5] and [letter[x] for x in down.split()] == order[:-6:-1]
        lens = list(interpret.logit_lens(model, trace))
        for after, at, _, likeliest, p in table(tab, 'logit-lens'):
            layer = {'embedding': 0, 'final': 3}.get(after) if 'layer' not in after else int(after.split()[1]) + 1
            assert letter[likeliest] == lens[layer][int(at)].argmax()
            close([p], lens[layer][int(at)].max().item())
        for letter_, p in table(tab, 'lens-top'):
            close([p], lens[1][t, letter[letter_]].item())
        composition = interpret.composition_scores(model)['k']
        edges = table(tab, 'composition')
        assert len(edges) == 3 * 16
        for writer, reader, above in edges:
            (a, b), (c, e) = (map(int, head.split('.')) for head in (writer, reader))
            close([above], composition[4 * c + e, 4 * a + b].item() - 32**-0.5)
        eigenvalues = interpret.ov_eigenvalues(model)[l, k]
        real, imaginary = np.array(table(tab, 'eigenvalues'), dtype=float).T
        close(real, eigenvalues.real.numpy(), 0.05), close(imaginary, eigenvalues.imag.numpy(), 0.05)
        qk, ov = interpret.token_circuits(model, torch.tensor(facts['circuit_ids']), trace.final_scale.mean().item())
        for name, circuit in (('qk', qk), ('ov', ov)):
            close([row[2] for row in table(tab, name)], circuit[l, k].flatten().numpy(), 0.05)
        for name, x in zip(('whole', 'direct'), interpret.bigrams(model, torch.tensor(V))):
            for letter_, p in table(tab, f'bigram-{name}'):
                close([p], x[ids[t], letter[letter_]].item())
            close([row[2] for row in table(tab, f'bigrams-{name}')], x.flatten().numpy(), 5e-3)
        base = trace.logits[0, t].softmax(dim=-1)
        entropy = -(base * base.log2()).sum().item()
        assert tab.locator('#entropy').text_content() == f'{entropy:.3f} bits'
        losses = [float(row[1]) for row in table(tab, 'repeats')]
        close(losses, interpret.head_scores(model)[1].numpy())
        first, second = np.mean(losses[:7]), np.mean(losses[8:])
        said = re.search(r'loss (\S+) in the first half, (\S+) in', tab.locator('#figure-repeats .readout').text_content())
        assert float(said[1]) == pytest.approx(first, abs=0.006) and float(said[2]) == pytest.approx(second, abs=0.006)


@browser_test
def test_every_panel_has_content_and_follows_the_token(chromium, page):
    with opened(chromium, page) as tab:
        for name in PANELS:
            figures = tab.locator(f'#{name} figure')
            assert figures.count() >= 1, name
            for i in range(figures.count()):
                drawn = figures.nth(i).locator('.picture svg, .picture canvas, .picture table, .picture .thumbs, .picture .note')
                assert drawn.count() >= 1, (name, i)
        assert tab.locator('#heads .thumbs button').count() == 4
        assert 'model(idx)' in tab.locator('#truth').text_content()
        before = {name: tab.locator(f'#{name}').inner_html() for name in ('next', 'flow', 'mlp', 'lens', 'why', 'bigrams')}
        where = tab.locator('#where').text_content()
        tab.locator('#tokens button').nth(4).click()
        settled(tab)
        assert tab.locator('#where').text_content().startswith('Position 4 of 0 to 31') and where.startswith('Position 31 ')
        assert tab.locator('#tokens button').nth(4).get_attribute('aria-pressed') == 'true'
        for name, html in before.items():
            assert tab.locator(f'#{name}').inner_html() != html, name
        tab.keyboard.press('ArrowRight')
        tab.keyboard.press('ArrowRight')
        settled(tab)
        assert tab.locator('#where').text_content().startswith('Position 6 ') and 't=6' in tab.url
        tab.locator('#heads .thumbs button').nth(3).click()
        settled(tab)
        assert tab.locator('#head select').nth(0).input_value() == '1' and tab.locator('#head select').nth(1).input_value() == '1'


@browser_test
@pytest.mark.parametrize('t, temperature, k, p', [(31, 0.8, 20, 1), (3, 1, 200, 0.6), (10, 0.3, 5, 0.9), (7, 0, 9, 1)])
def test_probabilities_and_draws_are_those_of_sample(chromium, page, trained, run, t, temperature, k, p):
    model, chars = load_model(trained)
    ids = chars.encode(TEXT)[-32:]
    logits, _ = model(torch.tensor([ids[:t + 1]]))
    filtered = filter_logits(logits[:, -1], temperature, k, p) if temperature else torch.full((1, chars.vocab_size), -torch.inf)
    if not temperature:
        filtered[0, logits[0, -1].argmax()] = 0.0
    expected = filtered.softmax(dim=-1)[0]
    k = min(k, chars.vocab_size)
    with opened(chromium, page, f'#t={t}&temperature={temperature}&k={k}&p={p}&seed=7') as tab:
        rows = table(tab, 'next-token')
        assert len(rows) == chars.vocab_size
        for _, id_, logit, base, left in rows:
            assert float(logit) == pytest.approx(logits[0, -1, int(id_)].item(), abs=1e-4)
            assert float(base) == pytest.approx(logits[0, -1].softmax(dim=-1)[int(id_)].item(), abs=1e-5)
            assert float(left) == pytest.approx(expected[int(id_)].item(), abs=1e-5)
        assert int(tab.locator('#kept').text_content().split()[0]) == (expected > 0).sum()
        draws = tab.locator('#draws .token').evaluate_all('all => all.map(x => JSON.parse(x.title))')
    prompt = chars.decode(ids[:t + 1])
    result = run('sample.py', f'--out_dir={trained}', f'--start={prompt}', '--num_samples=10', '--max_new_tokens=1', '--seed=7',
                 '--dtype=float32', f'--temperature={temperature}', f'--top_k={k}', f'--top_p={p}')  # fmt: skip
    samples = result.stdout.split('\n' + '-' * 15 + '\n')[:-1]
    assert draws == [sample.removeprefix(prompt) for sample in samples]


@browser_test
def test_of_a_large_vocabulary_the_likeliest_are_exact_and_the_others_counted(chromium, tmp_path):
    model = tiny(vocab_size=6000, block_size=64)
    names = tokenizer.CharTokenizer(''.join(map(chr, range(0x3400, 0x3400 + 6000))))
    facts, arrays = collect(model, names, tokens(60, vocab_size=6000).tolist())
    (tmp_path / 'page.html').write_text(explain.build_page(facts | NO_RUN, arrays), encoding='utf-8')
    logits, _ = model(torch.tensor([facts['ids']]), torch.tensor([facts['ids']]))
    for t, k, p in ((20, 300, 0.5), (20, 6000, 0.97), (59, 6000, 0.97)):
        expected = filter_logits(logits[:, t], 1.5, k, p).softmax(dim=-1)[0]
        with opened(chromium, tmp_path / 'page.html', f'#t={t}&temperature=1.5&k={k}&p={p}') as tab:
            for _, id_, _, _, left in table(tab, 'next-token')[:500]:
                assert float(left) == pytest.approx(expected[int(id_)].item(), rel=2e-3, abs=1e-7)
            draws = tab.locator('#draws .token').evaluate_all('all => all.map(x => x.textContent)')
            if k == 300:  # within what is exact: sample_next's draws, row after row from one generator
                generator = torch.Generator().manual_seed(1337)
                drawn = sample_next_token(logits[:, t].expand(10, -1), 1.5, k, p, generator=generator)
                assert draws == [names.decode([id_]) for id_ in drawn.tolist()]
            base, mass = logits[0, t].softmax(dim=-1), float(tab.locator('#mass').text_content()[:-1]) / 100
            assert mass == pytest.approx(base[expected > 0].sum().item(), abs=0.01)
            entropy = -(expected * expected.clamp(min=1e-30).log2()).sum().item()
            assert float(tab.locator('#entropy-left').text_content().split()[0]) == pytest.approx(entropy, rel=0.01)
            kept = int(tab.locator('#kept').text_content().split()[0].replace(',', ''))
            assert kept == pytest.approx((expected > 0).sum().item(), rel=0.01)


@browser_test
def test_sliders_menus_and_the_address_change_what_they_should(chromium, page):
    with opened(chromium, page) as tab:
        tab.get_by_role('slider', name='Temperature').fill('0')
        settled(tab)
        assert tab.locator('#kept').text_content().startswith('1 of') and 'temperature=0' in tab.url
        tab.locator('#again').click()
        assert tab.locator('#seed').input_value() == '1338'
        total = float(re.search(r'sum to (\S+);', tab.locator('#figure-why .readout').text_content())[1].replace('−', '-'))
        assert sum(float(x) for name, x in table(tab, 'why')[:-1]) == pytest.approx(total, abs=1e-3)
        tab.locator('#versus').select_option(index=2)
        settled(tab)
        assert 'rather than' in tab.locator('#figure-why h3').text_content()
        tab.get_by_role('group', name='Measure of the heads').get_by_text('induction').click()
        tab.get_by_role('group', name='Order of the heads').get_by_text('by measure').click()
        settled(tab)
        scores = [float(x) for x in tab.locator('#heads .name span:last-child').all_text_contents()]
        assert scores == sorted(scores, reverse=True)
        address = tab.url
    with opened(chromium, page, '#' + address.split('#')[1]) as tab:  # the address brings all of it back
        assert tab.locator('#kept').text_content().startswith('1 of')
        assert 'rather than' in tab.locator('#figure-why h3').text_content()
    with opened(chromium, page, '#t=999&layer=-1&k=x&by=nonsense&temperature=&theme=7') as tab:
        assert tab.locator('#where').text_content().startswith('Position 31 ')


@browser_test
def test_the_keyboard_reads_matrices_and_the_tour_leads_through(chromium, page):
    with opened(chromium, page) as tab:
        tab.locator('#figure-attention canvas').focus()
        for key in ('ArrowRight', 'ArrowDown', 'ArrowDown'):
            tab.keyboard.press(key)
        said = tab.locator('#figure-attention .readout').text_content()
        assert re.search(r'\(2\) looks at .*\(0\).*attention 0\.\d+', said), said
        tab.keyboard.press('Enter')
        settled(tab)
        assert tab.locator('#where').text_content().startswith('Position 2 ')
        tab.keyboard.press('ArrowDown')  # it goes on from where it was
        assert '(3) looks at' in tab.locator('#figure-attention .readout').text_content()
        tab.locator('#lens .lens').focus()
        tab.keyboard.press('ArrowDown')
        settled(tab)
        assert 'After layer 0' in tab.locator('#figure-lens-top h3').text_content()
        tab.get_by_role('button', name='Take the tour').click()
        titles = set()
        for step in range(1, 14):
            assert tab.locator('#tour .bar span').text_content() == f'{step} of 13'
            titles.add(tab.locator('#tour-title').text_content())
            assert len(tab.locator('#tour .look').text_content()) > 20
            tab.keyboard.press('Enter')
        assert len(titles) == 13 and tab.locator('#tour').is_hidden()


@browser_test
def test_pictures_and_tables_are_saved(chromium, page, tmp_path):
    with opened(chromium, page, accept_downloads=True) as tab:
        for figure, kind, begins in (('why', 'SVG', b'<svg'), ('flow', 'PNG', b'\x89PNG'), ('attention', 'PNG', b'\x89PNG'),
                                     ('next-token', 'CSV', b'token,id,logit'), ('attention', 'SVG', b'<svg')):  # fmt: skip
            with tab.expect_download() as download:
                tab.locator(f'#figure-{figure}').get_by_role('button', name=f'save {kind}').click()
            path = tmp_path / download.value.suggested_filename
            download.value.save_as(path)
            assert path.name == f'{figure}.{kind.lower()}' and path.read_bytes().startswith(begins) and path.stat().st_size > 300
        rows = list(csv.reader((tmp_path / 'next-token.csv').read_text(encoding='utf-8').splitlines()))
        assert sum(float(row[3]) for row in rows[1:]) == pytest.approx(1, abs=1e-3)


@browser_test
@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (360, 'dark')])
def test_it_fits_the_screen_and_everybody_can_use_it(chromium, page, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, page, '#tour=3', width=width, color_scheme=scheme) as tab:
        assert tab.evaluate('document.documentElement.scrollWidth') == width
        found = Axe().run(tab).response['violations']
        serious = [f'{x["id"]}: {x["nodes"][0]["html"][:200]}' for x in found if x['impact'] in ('serious', 'critical')]
        assert not serious, '\n'.join(serious)
        theme = tab.locator('#theme')
        before = tab.evaluate('getComputedStyle(document.body).backgroundColor')
        theme.click()
        settled(tab)
        assert tab.evaluate('getComputedStyle(document.body).backgroundColor') != before


@browser_test
def test_a_page_from_which_all_was_left_out_still_works(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, 'LARGEST', 0)
    facts, arrays = collect(tiny(), tokenizer.CharTokenizer(''.join(map(chr, range(48, 88)))), tokens(9).tolist())
    hostile = '</script><script>document.title = "x"</script><!--'
    facts |= NO_RUN | {'live': True, 'error': hostile}
    (tmp_path / 'page.html').write_text(explain.build_page(facts, arrays), encoding='utf-8')
    with opened(chromium, tmp_path / 'page.html', '#tour=1') as tab:
        for _ in range(13):
            tab.locator('#tour .bar button').nth(1).click()
            settled(tab)
        assert tab.locator('#tour').is_hidden() and tab.locator('#heads .thumbs button').count() == 8
        assert tab.locator('#live-error').text_content() == hostile and 'Left out' in tab.locator('#truth').text_content()


@browser_test
def test_one_token_and_one_layer(chromium, tmp_path):
    characters = tokenizer.CharTokenizer(''.join(map(chr, range(48, 88))))
    model = GPT(GPTConfig(block_size=2, vocab_size=40, n_layer=1, n_head=1, n_embd=8, position='none')).eval()
    facts, arrays = collect(model, characters, [5])
    (tmp_path / 'page.html').write_text(explain.build_page(facts | NO_RUN | {'live': True}, arrays), encoding='utf-8')
    with opened(chromium, tmp_path / 'page.html') as tab:
        assert tab.locator('#where').text_content().startswith('Position 0 of 0 to 0')
        assert tab.locator('#live-text').input_value() == '5'
        assert tab.locator('#figure-why .picture svg').count() == 1
