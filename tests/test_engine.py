"""The model in the page (web/engine.js, web/tokenizer.js) in Chromium against PyTorch."""
import base64
import random
import re
import unicodedata

import numpy as np
import pytest
import torch

import architectures
import interpret
from browser import opened, write_page
from helpers import ARCHITECTURES, POST, TEXT, awake, char_tokenizer, collect, tokens
from lib import page_weights
from lib.bpe import train_bpe
from lib.errors import UserError
from lib.page import page_template
from lib.page_weights import pack_weights, round_weight, weights_for_page
from lib.tokenizer import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    GPT4_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    encode_turns,
)

PAIRS = {'eot_token': 3, 'turns': 2, 'prefix_lm': True, 'position': 'rope', 'ngram': 3,
         'ngram_rows': 97}
MODELS = [*ARCHITECTURES, POST, POST | {'norm': 'rmsnorm', 'n_kv_head': 2}, PAIRS]


@pytest.fixture(scope='module')
def tab(chromium):
    """A tab that has the classes of the Worker."""
    page, _ = page_template('page.html', computes=True)
    code = re.search('<script type="text/plain" id="worker">(.+?)</script>', page, re.S)[1]
    tab = chromium.new_page()
    tab.add_script_tag(content=code + '''
        const unpack = text => Uint8Array.from(atob(text), byte => byte.charCodeAt(0));
        window.build = async (facts, text) => {
            const {weights} = await readWeights(unpack(text), facts.arrays);
            engine = new Engine(facts.config, weights);
        };
        window.logits = (ids, hooks) => Array.from(engine.run(ids, hooks).logits);
        window.tokenize = saved => (tokenizer = new PageTokenizer(saved));
        window.attempt = f => { try { return f(); } catch (error) { return error.message; } };
    ''')
    yield tab
    tab.close()


def load(tab, model, format='float32'):
    facts, data, rounded = pack_weights(model, char_tokenizer(48, 40), format)
    tab.evaluate('([facts, text]) => build(facts, text)',
                 [facts, base64.b64encode(data).decode()])
    return rounded


def assert_logits(tab, model, ids, atol):
    idx = torch.tensor([ids])
    expected = model(idx, idx)[0][0].detach()
    shown = torch.tensor(tab.evaluate('ids => logits(ids)', ids)).view_as(expected)
    torch.testing.assert_close(shown, expected, atol=atol, rtol=0)


def text_of(model, length=13):
    ids = tokens(length).tolist()
    if model.config.eot_token is not None:
        starts = [0, 5, 8, 9] if model.config.turns else [5]
        ids = [3 if t in starts else id_ for t, id_ in enumerate(ids)]
    return ids


@pytest.mark.parametrize('options', MODELS, ids=architectures.describe)
def test_logits_equal_those_of_the_model(tab, options):
    model = awake(**options)
    load(tab, model)
    ids = text_of(model)
    assert_logits(tab, model, ids, 1e-4)
    for n in (5, 6, 9):  # the beginning of the text before is used again
        assert_logits(tab, model, ids[:n], 1e-4)
    assert_logits(tab, model, ids[:4] + [7, 7, *ids[6:]], 1e-4)
    assert_logits(tab, model, ids, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('options', architectures.one_by_one() + architectures.combined(),
                         ids=architectures.describe)
def test_logits_of_every_architecture_at_every_length(tab, options):
    model = awake(**architectures.SIZES | options)
    load(tab, model)
    ids = text_of(model, 16)
    for n in range(1, 17):
        assert_logits(tab, model, ids[:n], 1e-4)
    tab.evaluate('() => { engine.matmul.kernel = null; engine.last = null;'
                 'for (const [name, {nOut, nIn}] of Object.entries(engine.packed))'
                 'engine.packed[name] = engine.matmul.pack(engine.weight(name), nOut, nIn); }')
    assert_logits(tab, model, ids, 1e-4)  # in plain JavaScript


@pytest.mark.parametrize('options', [{}, PAIRS, ARCHITECTURES[-2]], ids=architectures.describe)
def test_rounded_weights_give_their_logits(tab, options):
    model = awake(**options)
    for format in ('float16', 'int8'):
        rounded = load(tab, model, format)
        assert_logits(tab, rounded, text_of(model), 1e-4)
    half = load(tab, model, 'float16')
    idx = torch.tensor([text_of(model)])
    logits = model(idx, idx)[0]
    assert 0 < (logits - half(idx, idx)[0]).abs().max() <= 2e-3 * logits.abs().max()


def test_int8_is_within_half_a_step():
    weight = torch.randn(5, 64) * torch.tensor([1e-9, 1, 10, 0, 1e4])[:, None]
    arrays, rounded = round_weight(weight, 'int8')
    step = weight.abs().amax(dim=1) / 127
    assert arrays[''].dtype == torch.uint8
    assert ((rounded - weight).abs().amax(dim=1) <= 0.5001 * step).all()


@pytest.mark.parametrize('options', [{}, POST, PAIRS, {'activation': 'swiglu', 'n_kv_head': 2}],
                         ids=architectures.describe)
def test_trace_equals_that_of_interpret(tab, options):
    model = awake(**options)
    load(tab, model)
    ids = text_of(model)
    trace = interpret.run(model, torch.tensor([ids]))
    for name in ('residual', 'middle', 'q', 'k', 'v', 'attention', 'mixed', 'attn_out', 'pre',
                 'post', 'mlp_out'):
        shown = tab.evaluate('([ids, name]) => engine.run(ids)[name].flatMap(x => Array.from(x))',
                             [ids, name])
        expected = getattr(trace, name)[:, 0]
        torch.testing.assert_close(torch.tensor(shown).view_as(expected), expected,
                                   atol=1e-4, rtol=1e-5)
    mask = tab.evaluate('ids => Array.from(engine.run(ids).mask)', ids)
    assert mask == trace.mask[0].int().flatten().tolist()
    scale = tab.evaluate('ids => Array.from(engine.run(ids).final_scale)', ids)
    torch.testing.assert_close(torch.tensor(scale).float(), trace.final_scale[0])
    for name, part in trace.embeddings.items():
        shown = tab.evaluate('([ids, name]) => Array.from(engine.run(ids).embeddings[name])',
                             [ids, name])
        torch.testing.assert_close(torch.tensor(shown).view_as(part[0]), part[0])


# Hooks against those of PyTorch -------------------------------------------------------------------

def hooked_logits(model, ids, hooks):
    """The logits while {module name: function of its output} act as forward hooks."""
    handles = [model.get_submodule(name).register_forward_hook(
                   lambda module, args, output, change=change: change(output))
               for name, change in hooks.items()]
    idx = torch.tensor([ids])
    with torch.no_grad():
        logits = model(idx, idx)[0][0]
    for handle in handles:
        handle.remove()
    return logits


HOOKS = {
    'mlp': ('{mlpOut: (layer, x) => { if (layer === 1) x.fill(0); }}',
            {'transformer.h.1.mlp': torch.zeros_like}),
    'attention': ('{attnOut: (layer, x) => { if (!layer) x.forEach((v, i) => (x[i] = 2 * v)); }}',
                  {'transformer.h.0.attn.c_proj': lambda x: 2 * x}),
    'tokens': ('{embedding: (name, x) => { if (name === "token") x.fill(0); }}',
               {'transformer.wte': torch.zeros_like}),
    'stream': ('{residual: (layer, x) => { if (layer === 1) x.fill(0.5); }}',
               {'transformer.h.0': lambda x: torch.full_like(x, 0.5)}),
}


@pytest.mark.parametrize('options', [{}, {'n_kv_head': 2, 'position': 'rope'}],
                         ids=architectures.describe)
@pytest.mark.parametrize('name', HOOKS)
def test_hooks_act_as_those_of_pytorch(tab, name, options):
    model = awake(**options)
    load(tab, model)
    ids = text_of(model)
    script, hooks = HOOKS[name]
    expected = hooked_logits(model, ids, hooks)
    shown = torch.tensor(tab.evaluate(f'ids => logits(ids, {script})', ids)).view_as(expected)
    torch.testing.assert_close(shown, expected, atol=1e-4, rtol=1e-5)
    assert (expected - model(torch.tensor([ids]), torch.tensor([ids]))[0][0]).abs().max() > 0.1
    assert_logits(tab, model, ids, 1e-4)  # a run without hooks is not changed by one with hooks


def test_heads_neurons_and_attention_can_be_changed(tab):
    model = awake()
    load(tab, model)
    ids = text_of(model)
    T = len(ids)

    def compare(script, change):
        expected = change()
        shown = torch.tensor(tab.evaluate(f'ids => logits(ids, {script})', ids)).view_as(expected)
        torch.testing.assert_close(shown, expected, atol=1e-4, rtol=1e-5)

    def without_head():  # its columns of the output projection
        weight = model.transformer.h[1].attn.c_proj.weight
        before = weight.data.clone()
        weight.data[:, 16:24] = 0
        logits = hooked_logits(model, ids, {})
        weight.data = before
        return logits

    compare('{mixed: (layer, x) => {'
            f'  if (layer === 1) x.fill(0, 2 * {T} * 8, 3 * {T} * 8);'
            '}}', without_head)

    def without_neuron():  # its column
        weight = model.transformer.h[0].mlp.c_proj.weight
        before = weight.data.clone()
        weight.data[:, 7] = 0
        logits = hooked_logits(model, ids, {})
        weight.data = before
        return logits

    compare('{post: (layer, x) => {'
            '  if (!layer) for (let i = 7; i < x.length; i += 128) x[i] = 0;'
            '}}', without_neuron)

    def to_the_first_token():
        v = interpret.run(model, torch.tensor([ids])).v[0, 0]  # (nh, T, hs)
        mixed = v[:, :1].expand(-1, T, -1).transpose(0, 1).flatten(1)
        out = model.transformer.h[0].attn.c_proj(mixed)[None]
        return hooked_logits(model, ids, {'transformer.h.0.attn': lambda x: out})

    compare('{attention: (layer, x) => {'
            f'  if (!layer) x.forEach((p, i) => (x[i] = i % {T} === 0 ? 1 : 0));'
            '}}', to_the_first_token)
    compare('{scores: (layer, x) => {'  # the same before the softmax
            f'  if (!layer) x.forEach((p, i) => (x[i] = i % {T} === 0 ? 0 : -Infinity));'
            '}}', to_the_first_token)


@pytest.mark.parametrize('options', [{}, POST | {'ngram': 2}], ids=architectures.describe)
def test_activation_is_patched_from_a_second_text(tab, options):
    model = awake(**options)
    load(tab, model)
    ids, others = text_of(model), tokens(13, seed=2).tolist()
    there = interpret.run(model, torch.tensor([others])).residual[1, 0, 4]

    def patched(x):
        x = x.clone()
        x[0, 4] = there
        return x

    expected = hooked_logits(model, ids, {'transformer.h.0': patched})
    shown = tab.evaluate('''([ids, others]) => {
        const C = engine.C;
        const there = engine.run(others).residual[1].slice(4 * C, 5 * C);
        return logits(ids, {residual: (layer, x) => { if (layer === 1) x.set(there, 4 * C); }});
    }''', [ids, others])
    torch.testing.assert_close(torch.tensor(shown).view_as(expected), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('options', [
    {'position': 'rope', 'head_size': 6},
    pytest.param({'position': 'sinusoidal', 'ngram': 2}, marks=pytest.mark.slow),
], ids=architectures.describe)
def test_logits_of_long_texts(tab, options):
    model = awake(block_size=600, n_layer=1, **options)
    load(tab, model)
    ids = tokens(600).tolist()
    assert_logits(tab, model, ids, 2e-4)  # angles of up to 600 rad in float32
    assert_logits(tab, model, ids[:300], 2e-4)
    refused = tab.evaluate('ids => attempt(() => engine.run([...ids, 1]))', ids)
    assert refused == 'Give 1 to 600 tokens, not 601.'


# Tokenizers ---------------------------------------------------------------------------------------

ALPHABET = [
    *'abeist THE 019', '  ', '\n', '\n\n', '\t', '\r\n', "'s", "'LL", "'\u017f", 'é', 'ß', 'İ',
    '中', '\u0301', '\x85', '\ufeff', '\xa0', '\u2028', '\x1c', '\0', '🙂', '👩\u200d👩', '½',
    '٣', '<|endoftext|>', '<|', '...', '!?', 'https://', '_', '\u200b',
]


def random_texts(n, seed=0):
    """Of telling pieces and of any characters that Unicode had assigned before this Python."""
    rng = random.Random(seed)
    characters = [chr(rng.randrange(0x30000)) for _ in range(n)]
    others = [c for c in characters if unicodedata.category(c) not in ('Cn', 'Cs')]
    pieces = ALPHABET + rng.sample(others, len(ALPHABET))
    return [''.join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(n)]


def gapped_bpe():
    """Ids as in a Hugging Face model: not in the order of merges, unused ones, gaps."""
    plain = bpe_tokenizer()
    ids = [2 * (i // 2) + 1 - i % 2 for i in range(400)]
    return BPETokenizer('bpe', GPT2_PATTERN, plain.tokens, ids, {'<|endoftext|>': 450},
                        {'[unused]': 430})


def bpe_tokenizer(**options):
    # ' undefined' is a token, as GPT-2's: JavaScript's ' ' + undefined
    corpus = TEXT * 3 + ' undefined' * 500
    corpus += ''.join(random_texts(500, seed=1)).replace('<|endoftext|>', '')
    tokens = train_bpe([corpus], 401).tokens[:400]
    return BPETokenizer('bpe', options.pop('pattern', GPT2_PATTERN), tokens, **options)


TOKENIZERS = {
    'byte': lambda: ByteTokenizer(),
    'byte with an end': lambda: ByteTokenizer(end_of_text=True),
    'bpe': bpe_tokenizer,
    'bpe with gaps': gapped_bpe,
    'bpe of digits': lambda: bpe_tokenizer(pattern=DIGITS_PATTERN),
    'bpe like GPT-4': lambda: bpe_tokenizer(pattern=GPT4_PATTERN, normalizer='NFC'),
    'other specials': lambda: bpe_tokenizer(special={'<|endoftext|>': 400, '<|': 401}),
}


@pytest.mark.parametrize('name', [
    name if name in ('byte with an end', 'bpe with gaps', 'bpe like GPT-4')
    else pytest.param(name, marks=pytest.mark.slow) for name in TOKENIZERS
])
def test_tokenizers_give_the_same_ids_and_texts(tab, name):
    tokenizer = TOKENIZERS[name]()
    texts = random_texts(1000)
    tab.evaluate('saved => tokenize(saved) && null', tokenizer.to_dict())
    ids = tab.evaluate('texts => texts.map(text => tokenizer.encode(text))', texts)
    assert ids == [tokenizer.encode(text) for text in texts]
    long = 'ab' * 20_000  # one word
    assert tab.evaluate('text => tokenizer.encode(text)', long) == tokenizer.encode(long)
    pieces = [list(np.random.default_rng(i).integers(0, tokenizer.vocab_size, 5).tolist())
              for i in range(500)]
    decoded = tab.evaluate('all => all.map(ids => tokenizer.decode(ids))', ids + pieces)
    assert decoded == [tokenizer.decode(row) for row in ids + pieces]
    if tokenizer.eot is not None:
        sides = [[a, b] for a, b in zip(texts[::2], texts[1::2]) if a.strip() and b.strip()]
        turns = tab.evaluate('sides => sides.map(texts => tokenizer.encodeTurns(texts))', sides)
        assert turns == [encode_turns(pair, tokenizer) for pair in sides]


def test_characters_and_ids_are_tokenized_or_refused(tab):
    tokenizer = CharTokenizer('abé🙂\n', end_of_text=True)
    tab.evaluate('saved => tokenize(saved) && null', tokenizer.to_dict())
    encode = 'text => attempt(() => tokenizer.encode(text))'
    text = 'é🙂a<|endoftext|>b\n'
    assert tab.evaluate(encode, text) == tokenizer.encode(text)
    assert tab.evaluate(encode, 'abc') == 'This model does not know the character "c".'
    unknown = 'This model does not know the characters "y", "z".'
    assert tab.evaluate(encode, 'ay\nzby') == unknown
    assert 'UTF-8' in tab.evaluate('() => attempt(() => tokenizer.encode("a\\ud83d"))')
    with pytest.raises(UserError):
        tokenizer.encode('abc')
    tokenizer = IdTokenizer(['a', None, 'c'])
    tab.evaluate('saved => tokenize(saved) && null', tokenizer.to_dict())
    assert tab.evaluate(encode, ' 0 2\n1') == tokenizer.encode(' 0 2\n1')
    assert 'from 0 to 2' in tab.evaluate(encode, '0 3')
    assert tab.evaluate('ids => tokenizer.decode(ids)', [0, 1, 2]) == tokenizer.decode([0, 1, 2])


def test_only_models_that_fit_travel_in_the_page(monkeypatch):
    for name in ('MAX_FP32_BYTES', 'MAX_FP16_BYTES', 'MAX_BYTES'):
        monkeypatch.setattr(page_weights, name, getattr(page_weights, name) // 10)
    model = awake()
    facts, data, rounded = weights_for_page(model, char_tokenizer(48, 40))
    assert facts['format'] == 'float32' and rounded.lm_head.weight.equal(model.lm_head.weight)
    for n, format in ((200_000, 'float16'), (600_000, 'int8'), (3_000_000, None)):
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(torch.randn(n // 32, 32))
        packed = weights_for_page(model, char_tokenizer(48, 40))
        assert (packed and packed[0]['format']) == format


def test_page_with_weights_starts_the_model_and_states_their_rounding(chromium, tmp_path):
    model, names = awake(), char_tokenizer(48, 40)
    facts, arrays = collect(model, names, text_of(model))
    path = tmp_path / 'page.html'
    engine, weights, _ = pack_weights(model, names, 'int8')
    facts['engine'] = engine | {'difference': 0.0123}
    with opened(chromium, write_page(path, dict(facts), arrays, weights)) as tab:
        tab.wait_for_selector('html[data-engine]')  # its policy lets the Worker start
        assert ('int8, with a scale for each row: this changes the logits of this text by up to '
                '0.012.') in tab.locator('#accuracy').text_content()
        assert tab.evaluate('''() => new Promise(resolve => {
            const check = '; self.postMessage(new Matmul(64, 8, 8).kernel !== null);';
            const code = document.getElementById('worker').textContent + check;
            const worker = new Worker(URL.createObjectURL(new Blob([code])));
            worker.onmessage = ({data}) => resolve(data);
        })''')  # not the slower plain JavaScript: the policy allows WebAssembly
    del facts['engine']
    page = write_page(path, facts, arrays).read_text(encoding='utf-8')
    assert 'worker-src' not in page and 'wasm-unsafe-eval' not in page and 'id="worker"' not in page
