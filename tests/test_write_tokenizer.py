"""Tokenizers that travel: written for transformers and read from it, with equal ids and texts."""

import functools
import json
import random
import unicodedata

import pytest
import tokenizers as hf
import transformers
from tokenizers import pre_tokenizers as pre

from data.pairs.prepare import read_example
from helpers import ROOT
from lib import tokenizer
from lib.bpe import train_bpe, train_char
from lib.errors import UserError
from lib.text import cut_before_blank
from lib.tokenizer import GPT2_PATTERN, bpe_merges
from lib.write_tokenizer import tokenizer_files

PIECES = [
    *("'s", "'S", "'ſ", "'LL", " '", "'", '\n', '\r\n', ' ', '  ', '\t', '\u3000', '\x1c'),
    *('12', '½', '٣', 'é', 'e\u0301', '\u0301', '中文', '。', '🙂', '//', '!', '...'),
    'The',
    *('<|endoftext|>', '<|im_start|>', '<|im_', '\0', 'K', 'ﬆ', 'İ', '>\u0338', ' the', '1'),
    '\x85',
]


def same_in_all_versions(c):
    """Not a digit of Hugging Face's Digits that its regular expressions do not know yet, nor a mark
    that its NFC does not know yet: its parts follow different versions of Unicode."""
    new_digit = 0x11DE0 <= ord(c) <= 0x11DE9 or 0x16FF4 <= ord(c) <= 0x16FF6
    new_mark = unicodedata.combining(c) and not unicodedata.ucd_3_2_0.combining(c)
    return not new_digit and not new_mark


@functools.cache
def random_strings(n=10_000):
    """White space, digits, contractions, special tokens, and characters of all of Unicode."""
    rng, strings = random.Random(0), ['', ' ', '\n']
    while len(strings) < n:
        codes = [rng.randrange(rng.choice((0x80, 0x3000, 0x10000, 0x110000))) for _ in range(3)]
        characters = [chr(c) for c in codes if not 0xD800 <= c < 0xE000]
        pieces = rng.choices(PIECES, k=rng.randrange(9))
        strings.append(''.join(pieces + list(filter(same_in_all_versions, characters))))
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
    check_equal(ours, theirs, random_strings()[: 1000 if 'without' in kind else None])
    assert (theirs.vocab_size, theirs.model_max_length) == (ours.vocab_size, 64)
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot
    assert tokenizer.from_huggingface(tmp_path).to_dict() == ours.to_dict()


def test_exported_gpt2_equals_ours(tmp_path):
    """OpenAI's file has the bytes in another order: the printable ones first."""
    first = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == 32, b))
    tokens = [bytes([b]) for b in first] + make('bpe').tokens[256:]
    ours = tokenizer.BPETokenizer('gpt2', GPT2_PATTERN, tokens)
    theirs = write(ours, tmp_path, 1024)
    check_equal(ours, theirs, random_strings()[:1000])
    assert theirs.eos_token_id == len(tokens)
    assert tokenizer.from_huggingface(tmp_path).to_dict()['tokens'] == ours.to_dict()['tokens']


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
    with pytest.raises(UserError, match="the merges.*b'abcd'"):
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
        ([message('user', 'a<|endoftext|>b')], 'would end it'),
    ],
)
def test_chat_template_refuses_what_we_refuse(messages, match, tmp_path):
    theirs = write(make('byte'), tmp_path, turns=1)
    with pytest.raises(Exception, match=match):
        theirs.apply_chat_template(messages, add_generation_prompt=True)


# Import -------------------------------------------------------------------------------------------

GPT2 = pre.ByteLevel(add_prefix_space=False)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
DIGITS = pre.Sequence([pre.Digits(individual_digits=True), GPT2])


def split_by(pattern):
    split = pre.Split(hf.Regex(pattern), 'isolated')
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


RULES = {
    'gpt2': GPT2,
    'smollm, starcoder2': DIGITS,
    'qwen2': split_by(QWEN2),
    'llama3': split_by(QWEN2.replace(r'\p{N}|', r'\p{N}{1,3}|')),
}


def train(rule, **options):
    """A tokenizer of Hugging Face with special tokens at 0 and 1, as SmolLM has them."""
    theirs = hf.Tokenizer(hf.models.BPE(**options))
    theirs.pre_tokenizer, theirs.decoder = rule, hf.decoders.ByteLevel()
    text = (ROOT / 'train.py').read_text(encoding='utf-8') + ''.join(random_strings()[:3000])
    trainer = hf.trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=['<|endoftext|>', '<|im_start|>'])  # fmt: skip
    theirs.train_from_iterator([text], trainer)
    return theirs


def read(theirs, folder):
    theirs.save(str(folder / 'tokenizer.json'))
    return tokenizer.from_huggingface(folder)


@pytest.mark.parametrize('name', RULES)
def test_tokenizers_that_split_in_other_ways_give_their_ids(name, tmp_path):
    theirs = train(RULES[name])
    if name == 'qwen2':
        theirs.normalizer = hf.normalizers.NFC()
    ours = read(theirs, tmp_path)
    saved = tokenizer.Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    for string in random_strings()[:6000]:
        ids = theirs.encode(string).ids
        assert ours.encode(string) == ids, repr(string)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        # prepare scripts tokenize in pieces
        cut = cut_before_blank(string)
        pieces = [ours.encode_ordinary(part).tolist() for part in (string[:cut], string[cut:])]
        assert sum(pieces, []) == ours.encode_ordinary(string).tolist(), repr(string)
    assert saved.encode('e\u0301 12\n34') == ours.encode('e\u0301 12\n34')
    (tmp_path / 'again').mkdir()
    check_equal(ours, write(ours, tmp_path / 'again'), random_strings()[:500])
    assert tokenizer.from_huggingface(tmp_path / 'again').to_dict() == ours.to_dict()


def test_normalized_text_is_what_tokens_stand_for(tmp_path):
    theirs = train(RULES['qwen2'])
    theirs.normalizer = hf.normalizers.NFC()
    ours = read(theirs, tmp_path)
    ids = ours.encode('cafe\u0301')
    assert ours.decode(ids) == 'caf\u00e9' and ours.text_bytes()[ids].sum() == 5
    theirs.add_tokens([hf.AddedToken('>', normalized=True)])  # of >\u0338 or of its normal form?
    with pytest.raises(UserError, match='its normalizer, NFC'):
        read(theirs, tmp_path)


def test_merges_that_are_ignored_for_whole_words_change_nothing_or_are_refused(tmp_path):
    theirs = train(RULES['llama3'], ignore_merges=True)
    ours = read(theirs, tmp_path)
    assert theirs.to_str().count('"ignore_merges":true') == 1
    assert all(ours.encode(s) == theirs.encode(s).ids for s in random_strings()[:2000])
    saved = json.loads(theirs.to_str())
    saved['model']['vocab']['<!>'] = 900
    (tmp_path / 'tokenizer.json').write_text(json.dumps(saved))
    assert hf.Tokenizer.from_file(str(tmp_path / 'tokenizer.json')).encode('<!>').ids == [900]
    with pytest.raises(UserError, match="ignore_merges = True.*'<!>'"):
        tokenizer.from_huggingface(tmp_path)


@pytest.mark.parametrize(
    ('part', 'value', 'match'),
    [
        ('pre_tokenizer', split_by(r'\S+|\s+'), 'other words'),
        ('pre_tokenizer', pre.Sequence([pre.Digits(individual_digits=False), GPT2]), 'other words'),
        ('pre_tokenizer', pre.Sequence([pre.Split(' ', 'isolated'), GPT2]), 'other words'),
        ('pre_tokenizer', pre.ByteLevel(add_prefix_space=False, use_regex=False), 'use_regex'),
        ('pre_tokenizer', pre.Metaspace(), 'other words'),
        ('normalizer', hf.normalizers.NFKC(), 'NFKC'),
        (
            'post_processor',
            hf.processors.TemplateProcessing('<|im_start|> $A', None, [('<|im_start|>', 1)]),
            'TemplateProcessing',
        ),
    ],
)
def test_what_we_cannot_do_is_named(part, value, match, tmp_path):
    theirs = train(GPT2)
    setattr(theirs, part, value)
    with pytest.raises(UserError, match=f'(?s)tokenizer.json: .*{part}.*{match}|{match}.*{part}'):
        read(theirs, tmp_path)
