"""Tokenizers against tiktoken and Hugging Face's tokenizers, on real text."""

import json

import pytest
import tiktoken
import tokenizers as hf

from configurator import UserError
from data import tokenizer

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
    return tokenizer.train_bpe([text], 500)


def kinds(text, bpe):
    return {'char': tokenizer.train_char([text, *TEXTS]), 'byte': tokenizer.ByteTokenizer(), 'bpe': bpe}


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_what_is_encoded_is_decoded_also_after_saving(kind, text, bpe, tmp_path):
    made = kinds(text, bpe)[kind]
    made.save(tmp_path / 'tokenizer.json')
    loaded = tokenizer.Tokenizer.load(tmp_path / 'tokenizer.json')
    assert loaded.vocab_size == made.vocab_size == len(made.token_bytes)
    for sample in [*TEXTS, text]:
        ids = made.encode(sample)
        assert made.decode(ids) == sample
        assert loaded.encode(sample) == ids == made.encode_to_numpy(sample).tolist() == loaded.encode_to_numpy(sample).tolist()
        assert all(0 <= i < made.vocab_size for i in ids)
        assert b''.join(made.token_bytes[i] for i in ids) == sample.encode()


def test_an_unknown_character_is_named_with_its_position():
    made = tokenizer.train_char(['abc\n'])
    with pytest.raises(UserError, match="'é' at position 2 "):
        made.encode('abé')
    with pytest.raises(UserError, match="'🙂' at position 0 "):
        made.encode('🙂')
    with pytest.raises(UserError, match='token id 4 '):
        made.decode([4])


def test_bpe_merges_the_most_frequent_pair_first():
    # the example of Sennrich et al. 2016, by hand: low x5 lower x2 newest x6 widest x3; e+s and s+t are both in 9 words
    words = 'low ' * 5 + 'lower ' * 2 + 'newest ' * 6 + 'widest ' * 3
    made = tokenizer.train_bpe([words.replace(' ', '\n')], 256 + 4 + 1)
    assert made.token_bytes[256:] == [b'es', b'est', b'lo', b'low', b'<|endoftext|>']


def test_bpe_compresses_as_well_as_hugging_faces_trainer(text, bpe):
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(
        [text],
        hf.trainers.BpeTrainer(vocab_size=499, show_progress=False, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()),
    )
    assert len(bpe.encode(text)) == pytest.approx(len(theirs.encode(text).ids), rel=0.005)  # they break ties differently


def test_bpe_is_run_by_tiktoken_and_keeps_documents_apart(bpe):
    assert bpe.vocab_size == 500 and bpe.eot == 499
    assert bpe.encode('a<|endoftext|>b') == [97, 499, 98]
    assert 499 not in bpe.encode_to_numpy('a<|endoftext|>b').tolist()  # in data it is text like any other
    assert bpe.decode([97, 499]) == 'a<|endoftext|>'


def test_bpe_asks_for_what_it_needs():
    with pytest.raises(UserError, match='at least 257'):
        tokenizer.train_bpe(['abc'], 100)
    with pytest.raises(UserError, match='vocab_size = 1000.* 259 tokens'):
        tokenizer.train_bpe(['ab ab'], 1000)


def test_gpt2s_files_are_read_like_tiktoken_reads_them(tmp_path, text):
    """A GPT-2 vocabulary in miniature: vocab.json in its order, with bytes as printable characters; then run by tiktoken."""
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer, theirs.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    theirs.train_from_iterator([text], hf.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))
    theirs.add_special_tokens(['<|endoftext|>'])
    theirs.save(str(tmp_path / 'tokenizer.json'))
    ours = tokenizer.from_huggingface(tmp_path)
    (tmp_path / 'vocab.json').write_text(json.dumps(theirs.get_vocab()))
    for made in (ours, tokenizer.from_huggingface(tmp_path)):
        assert made.vocab_size == theirs.get_vocab_size() and made.eot == theirs.token_to_id('<|endoftext|>')
        for sample in [*TEXTS, text]:
            assert made.encode(sample) == theirs.encode(sample).ids
            assert made.decode(made.encode(sample)) == sample


def test_gpt2_without_a_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nobody listens there
    tiktoken.registry.ENCODINGS.pop('gpt2', None)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR.*--tokenizer=bpe'):
        tokenizer.gpt2()


@pytest.mark.parametrize(
    'saved',
    [
        '{',
        '[]',
        '{"kind": "char"}',
        '{"kind": "char", "characters": "aa"}',
        '{"kind": "magic"}',
        '{"kind": "bpe", "pattern": "x", "tokens": ["!"]}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(saved, tmp_path):
    (tmp_path / 't.json').write_text(saved)
    with pytest.raises(UserError, match='t.json'):
        tokenizer.Tokenizer.load(tmp_path / 't.json')
