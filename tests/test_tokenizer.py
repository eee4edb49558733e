"""Tokenizers, against tiktoken and Hugging Face's tokenizers, on real text."""

import json
import random
from collections import Counter

import pytest
import regex
import tiktoken
import tokenizers as hf

from lib import tokenizer
from lib.bpe import train_bpe, train_char
from lib.errors import UserError

TEXTS = [
    '',
    'a',
    'def main(x):\n    return x + 1\n',
    'naïve café, 日本語 🙂 \U0001f468‍\U0001f469',
    "it's 2024's   \n\n\t end ",
    'x' * 5000,
]


@pytest.fixture(scope='module')
def bpe(text):
    return train_bpe([text], 500)


def make_tokenizers(text, bpe):
    return {
        'char': train_char([text, *TEXTS]),
        'byte': tokenizer.ByteTokenizer(),
        'bpe': bpe,
    }


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_tokenizer_round_trips_text_after_saving(kind, text, bpe):
    tok = make_tokenizers(text, bpe)[kind]
    loaded = tokenizer.Tokenizer.from_dict(json.loads(json.dumps(tok.to_dict())))
    assert loaded.vocab_size == tok.vocab_size == len(tok.token_bytes)
    for sample in [*TEXTS, text]:
        ids = tok.encode(sample)
        assert tok.decode(ids) == sample
        assert (
            loaded.encode(sample)
            == ids
            == tok.encode_to_numpy(sample).tolist()
            == loaded.encode_to_numpy(sample).tolist()
        )
        assert all(0 <= i < tok.vocab_size for i in ids)
        assert b''.join(tok.token_bytes[i] for i in ids) == sample.encode()


def test_tokenizer_char_reports_unknown_character():
    tok = train_char(['abc\n'])
    with pytest.raises(UserError, match="'é' at position 2 "):
        tok.encode('abé')
    with pytest.raises(UserError, match="'🙂' at position 0 "):
        tok.encode('🙂')
    with pytest.raises(UserError, match='token id 4 '):
        tok.decode([4])


def test_bpe_merges_most_frequent_pair_first():
    # by hand, the example of Sennrich et al. 2016: e+s and s+t both occur 9 times
    words = 'low ' * 5 + 'lower ' * 2 + 'newest ' * 6 + 'widest ' * 3
    tok = train_bpe([words.replace(' ', '\n')], 256 + 4 + 1)
    assert tok.token_bytes[256:] == [b'es', b'est', b'lo', b'low', b'<|endoftext|>']


def test_bpe_compresses_like_huggingface(text, bpe):
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(
        [text],
        hf.trainers.BpeTrainer(
            vocab_size=499,
            show_progress=False,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    # ties are broken differently
    assert len(bpe.encode(text)) == pytest.approx(len(theirs.encode(text).ids), rel=0.005)


def test_bpe_encodes_eot_only_between_documents(bpe):
    assert bpe.vocab_size == 500 and bpe.eot == 499
    assert bpe.encode('a<|endoftext|>b') == [97, 499, 98]
    # in a side of a pair it is plain text
    assert 499 not in bpe.encode_ordinary('a<|endoftext|>b').tolist()
    assert bpe.decode([97, 499]) == 'a<|endoftext|>'


def naive_merges(words, n):
    """Sennrich et al. 2016, algorithm 1: count all pairs again for each merge; ties: lowest ids."""
    words = [list(word.encode()) for word in words]
    tokens = [bytes([b]) for b in range(256)]
    for new in range(256, 256 + n):
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [new]
                i += 1
        tokens.append(tokens[left] + tokens[right])
    return tokens


def test_bpe_merges_equal_those_of_counting_again(text):
    """Also where pairs overlap, in few and long words, and in other scripts."""
    rng = random.Random(0)
    for content, n in (
        (text[:2000], 40),
        (''.join(rng.choices('ACGT', k=1000)), 60),
        (''.join(rng.choices('ab', k=1000)), 40),
        ('a' * 999, 9),
        ('aaab' * 100 + 'aa' * 77, 10),
        (''.join(rng.choices('日本語文字', k=600)), 30),
    ):
        words = regex.findall(tokenizer.GPT2_PATTERN, content)
        assert train_bpe([content], 257 + n).tokens == naive_merges(words, n), content[:20]


def test_bpe_reports_unreachable_vocab_size():
    with pytest.raises(UserError, match='at least 257'):
        train_bpe(['abc'], 100)
    with pytest.raises(UserError, match='vocab_size = 1000.* 259 tokens'):
        train_bpe(['ab ab'], 1000)


def test_tokenizer_from_huggingface_matches_huggingface(tmp_path, text):
    """A tiny GPT-2 vocabulary, whose vocab.json maps bytes to printable characters."""
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer, theirs.decoder = (
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        hf.decoders.ByteLevel(),
    )
    theirs.train_from_iterator(
        [text],
        hf.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet),
    )
    theirs.add_special_tokens(['<|endoftext|>'])
    theirs.save(str(tmp_path / 'tokenizer.json'))
    ours = tokenizer.from_huggingface(tmp_path)
    (tmp_path / 'vocab.json').write_text(json.dumps(theirs.get_vocab()))
    for tok in (ours, tokenizer.from_huggingface(tmp_path)):
        assert tok.vocab_size == theirs.get_vocab_size()
        assert tok.eot == theirs.token_to_id('<|endoftext|>')
        for sample in [*TEXTS, text]:
            assert tok.encode(sample) == theirs.encode(sample).ids
            assert tok.decode(tok.encode(sample)) == sample


def test_tokenizer_gpt2_reports_missing_network(monkeypatch, tmp_path):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nothing listens there
    tiktoken.registry.ENCODINGS.pop('gpt2', None)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR.*--tokenizer=bpe'):
        tokenizer.gpt2()


@pytest.mark.parametrize(
    'saved',
    [
        [],
        {'kind': 'char'},
        {'kind': 'char', 'characters': 'aa'},
        {'kind': 'char', 'characters': 'a', 'lower': True},
        {'kind': 'magic'},
        {'kind': 'bpe', 'pattern': 'x', 'tokens': ['!']},
    ],
)
def test_what_is_no_saved_tokenizer_is_refused(saved):
    with pytest.raises(UserError) as error:
        tokenizer.Tokenizer.from_dict(saved)
    assert '__init__' not in str(error.value)
