"""Tokenizers that travel: written for transformers and read from it, with equal ids and texts."""

import functools
import json
import random
import re
import sys

import pytest
import tokenizers as hf
import transformers
from tokenizers import pre_tokenizers as pre

import checkpoint as ckpt
from data.pairs.prepare import read_example
from helpers import ROOT
from lib import tokenizer
from lib.bpe import train_bpe, train_char
from lib.errors import UserError
from lib.text import cut_before_blank
from lib.write_tokenizer import bpe_merges, tokenizer_files

PIECES = [
    *("'s", "'S", "'ſ", "'LL", " '", "'", '\n', '\r\n', ' ', '  ', '\t', '\u3000', '\x1c', '\x85'),
    *('12', '½', '٣', 'é', 'e\u0301', '\u0301', '中文', '。', '🙂', '//', '!', '...', 'The', ' the'),
    *('<|endoftext|>', '<|im_start|>', '<|im_', '\0', 'K', 'ﬆ', 'İ', '>\u0338', '\u2028', '1'),
]
# digits for Hugging Face's Digits, unassigned for its regular expressions: a newer Unicode
NEW_DIGITS = {*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)}


@functools.cache
def random_strings(n=10_000):
    """White space, digits, contractions, special tokens, and characters of all of Unicode."""
    rng, strings = random.Random(0), ['', ' ', '\n']
    usable = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c not in NEW_DIGITS]
    while len(strings) < n:
        common = rng.choices(PIECES, k=rng.randrange(9))
        end = rng.choice((0x80, 0x3000, 0xFFFF, len(usable)))
        strings.append(''.join(common + [chr(c) for c in rng.choices(usable[:end], k=3)]))
        if rng.random() < 0.5:
            strings[-1] = ''.join(rng.sample(strings[-1], len(strings[-1])))
    return strings


def write(ours, folder, block_size=64, turns=0):
    """A folder as tools/export.py writes it, without a model -> transformers' tokenizer of it."""
    for name, content in tokenizer_files(ours, block_size, turns).items():
        (folder / name).write_text(json.dumps(content), encoding='utf-8')
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_equal(ours, theirs, strings):
    for string in strings:
        ids = ours.encode(string)
        assert theirs.encode(string) == ids, repr(string)
        assert theirs.decode(ids) == ours.decode(ids), repr(string)


# Export -------------------------------------------------------------------------------------------


@functools.cache
def make(kind):
    text = (ROOT / 'train.py').read_text(encoding='utf-8')
    ordinary = [s.replace('<|endoftext|>', '') for s in random_strings()]
    if kind.startswith('char'):
        return train_char([*ordinary, text], end_of_text=kind == 'char')
    if kind.startswith('byte'):
        return tokenizer.ByteTokenizer(end_of_text=kind == 'byte')
    return train_bpe([text + ''.join(ordinary[:3000])], 900)


@pytest.mark.parametrize('kind', ['bpe', 'char', 'byte', 'char without eot', 'byte without eot'])
def test_exported_tokenizer_equals_ours_on_random_strings(kind, tmp_path):
    ours = make(kind)
    theirs = write(ours, tmp_path)
    check_equal(ours, theirs, random_strings())
    assert (theirs.vocab_size, theirs.model_max_length) == (ours.vocab_size, 64)
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot
    assert tokenizer.from_huggingface(tmp_path).to_dict() == ours.to_dict()


def test_exported_gpt2_equals_ours(tmp_path):
    """The merges that follow from the ranks of OpenAI's file, 50,000."""
    ours = tokenizer.gpt2()
    theirs = write(ours, tmp_path, 1024)
    check_equal(ours, theirs, random_strings()[:2000])
    assert theirs.eos_token_id == 50256


@pytest.mark.parametrize('model_type', ['gpt2', 'llama', 'qwen3', 'apertus', 'arcee', 'starcoder2',
                                        'openai-gpt'])  # fmt: skip
@pytest.mark.parametrize('kind', ['bpe', 'char', 'byte'])
def test_autotokenizer_keeps_the_rules_whatever_the_model(kind, model_type, tmp_path):
    """Some classes of transformers rebuild their own pre-tokenizer."""
    config = {'model_type': model_type, 'eos_token_id': 0, 'bos_token_id': 0}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    check_equal(make(kind), write(make(kind), tmp_path), random_strings()[:200])


def test_unknown_character_is_an_error_there_too(tmp_path):
    ours = train_char(['abc \n'], end_of_text=True)
    theirs = write(ours, tmp_path)
    assert theirs.decode(theirs.encode('a b\nc<|endoftext|>')) == 'a b\nc<|endoftext|>'
    with pytest.raises(Exception, match='UNK'):
        theirs.encode('abé')


def test_ids_without_a_rule_have_no_files():
    assert tokenizer_files(tokenizer.IdTokenizer(['a', None]), 64, 0) == {}


def test_tokens_that_no_merge_makes_are_refused():
    tokens = [bytes([b]) for b in range(256)]
    assert bpe_merges([*tokens, b'ab', b'abc']) == [(b'a', b'b'), (b'ab', b'c')]
    with pytest.raises(UserError, match="b'abcd'"):
        bpe_merges([*tokens, b'ab', b'abcd'])
    unknown = tokenizer.BPETokenizer('bpe', r'\S+|\s+', tokens)
    with pytest.raises(UserError, match='pre_tokenizer'):
        tokenizer_files(unknown, 64, 0)


# Chats --------------------------------------------------------------------------------------------


def message(role, content):
    return {'role': role, 'content': content}


CHATS = [
    [message('user', ' hi \n')],
    [message('system', 'Be\nbrief. '), message('user', '  hello')],
    [message('user', 'a'), message('assistant', '\u3000b '), message('user', ' c\n\nd ')],
    [message('user', [{'type': 'text', 'text': 'x '}, {'type': 'text', 'text': 'y'}])],
    [message('user', 'a '), message('user', ' b'), message('assistant', 'c'),
     message('system', 'd'), message('user', 'e')],
]  # fmt: skip


@pytest.mark.parametrize('kind', ['bpe', 'char', 'byte'])
def test_chat_template_gives_the_ids_of_our_rows(kind, tmp_path):
    """Roles, joins and white space are those of data/pairs/prepare.py."""
    ours = make(kind)
    theirs = write(ours, tmp_path, turns=3)
    for chat in CHATS:
        answered = [*chat, message('assistant', ' fine ')]
        sides = [part.strip() for part in read_example({'messages': answered})]
        for messages, n in ((chat, -1), (answered, None)):
            ids = tokenizer.encode_turns(sides[:n], ours)
            for prompt in (True, False):
                found = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
                assert found['input_ids'] == ids


@pytest.mark.parametrize(
    ('messages', 'match'),
    [
        ([message('tool', 'x')], 'no such role: tool'),
        ([message('user', ' \n')], 'is empty'),
        ([message('user', None)], 'is empty'),
        ([message('assistant', 'x')], 'the first message'),
        ([message('user', [{'type': 'image'}])], 'not text: image'),
        ([message('user', 'a'), message('assistant', 'x') | {'tool_calls': [{}]}], 'tool_calls'),
        ([message('user', 'a<|endoftext|>b')], 'sanitize_control_tokens'),
    ],
)
def test_chat_template_refuses_what_we_refuse(messages, match, tmp_path):
    theirs = write(make('byte'), tmp_path, turns=1)
    with pytest.raises(Exception, match=match):
        theirs.apply_chat_template(messages, add_generation_prompt=True)


def test_separator_in_a_message_is_plain_text_when_transformers_is_told(tmp_path):
    ours, chat = make('bpe'), [message('user', 'a<|endoftext|>b')]
    theirs = write(ours, tmp_path, turns=1)
    found = theirs.apply_chat_template(chat, sanitize_control_tokens=True)
    assert found['input_ids'] == tokenizer.encode_turns(['a<|endoftext|>b'], ours)
