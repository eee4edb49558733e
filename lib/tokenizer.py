"""Text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained by lib/bpe.py.

All have encode, decode, vocab_size and to_dict. A tokenizer is saved whole: it travels inside bins
and checkpoints and needs no network to be read again.

One rule for `<|endoftext|>` in a text: where the tokenizer has this token, it ends a document, in
data, prompts and evaluations alike. In a side of a pair or a message of a chat it is plain text.
"""
import base64
import itertools
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

from lib.errors import UserError, plural, require, restate
from lib.files import find, read_json, read_text
from lib.pairs import join_turns

END_OF_TEXT = '<|endoftext|>'
# how GPT-2 splits text before merging (Radford et al. 2019; openai/gpt-2, encoder.py)
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# the same within what is left when each digit is a word (StarCoder2, SmolLM)
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s"
# GPT-4, Llama 3 (\p{N}{1,3}), Qwen2 and Qwen3 (\p{N})
GPT4_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# how tokenizer.json splits text into characters; (?m) lets the dot match newlines in Oniguruma
CHARACTERS = {'type': 'Split', 'pattern': {'Regex': '(?m:.)'}, 'behavior': 'Isolated',
              'invert': False}


class Tokenizer:
    """token_bytes: the bytes of each id. special: {text: id}. eot: the id of `<|endoftext|>`, which
    separates documents, or None. cuts_anywhere: whether a text may be cut at any character.

    Subclasses define encode_ordinary(text): ids, (n,) uint32, where special tokens are plain text.
    """
    cuts_anywhere = True

    @property
    def vocab_size(self):
        return len(self.token_bytes)

    def set_special(self, special):
        """Recognize these texts: {text: id}."""
        self.special, self.eot = special, special.get(END_OF_TEXT)
        for text, id_ in special.items():
            self.token_bytes[id_:id_ + 1] = [text.encode()]
        longest_first = sorted(special, key=len, reverse=True)
        self._find_special = re.compile(f'({"|".join(map(re.escape, longest_first))})')

    def encode(self, text):
        """text -> list of ids; special tokens in it are recognized. Raises UserError."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        """The same, (n,) uint32."""
        if not self.special:
            return self.encode_ordinary(text)
        parts = []
        for i, part in enumerate(self._find_special.split(text)):  # ordinary, special, ordinary ...
            parts.append([self.special[part]] if i % 2 else self.encode_ordinary(part))
        return np.concatenate(parts).astype(np.uint32)

    def text_bytes(self):
        """Bytes of text per token; special tokens, which are not in the text, have 0. (V,)"""
        n_bytes = np.array([len(token) for token in self.token_bytes])
        n_bytes[list(self.special.values())] = 0
        return n_bytes

    def decode_bytes(self, ids):
        for id_ in ids:
            require(0 <= id_ < self.vocab_size, f'token id {id_} is not below {self.vocab_size}')
        return b''.join(self.token_bytes[id_] for id_ in ids)

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    @staticmethod
    def from_dict(saved):
        """The inverse of to_dict. Raises UserError if it is not one."""
        wrong = (TypeError, ValueError, AttributeError, OverflowError)
        with restate(wrong, 'not a saved tokenizer'):
            match saved:
                case {'kind': 'char', 'characters': str(characters), **options}:
                    return CharTokenizer(characters, **options)
                case {'kind': 'byte', **options}:
                    return ByteTokenizer(**options)
                case {'kind': 'ids', 'names': list(names)}:
                    return IdTokenizer(names)
                case {'kind': 'gpt2' | 'bpe' as kind, 'pattern': str(pattern),
                      'tokens': list(tokens), **options}:
                    tokens = [base64.b64decode(token, validate=True) for token in tokens]
                    return BPETokenizer(kind, pattern, tokens, **options)
        raise UserError(f'not a saved tokenizer: {str(saved)[:60]!r}; '
                        f'kinds are char, byte, ids, gpt2 and bpe')


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `characters`, then perhaps `<|endoftext|>`."""
    kind = 'char'

    def __init__(self, characters, end_of_text=False):
        self.characters = characters
        self.token_bytes = [c.encode('utf-8') for c in characters]
        self._id_of = np.full(sys.maxunicode + 1, -1, dtype=np.int32)  # by code point
        self._id_of[code_points(characters)] = np.arange(len(characters))
        require(len(set(characters)) == len(characters) > 0,
                'a character tokenizer needs characters, each of them once')
        self.set_special(end_of_text_after(self.token_bytes, end_of_text))

    def encode_ordinary(self, text):
        ids = self._id_of[code_points(text)]
        if (ids < 0).any():
            position = int((ids < 0).argmax())
            raise UserError(f'character {text[position]!r} at position {position} is not one of '
                            f'the {plural(len(self.characters), "character")} that this tokenizer '
                            f'knows; a byte or bpe tokenizer can encode any text')
        return ids.astype(np.uint32)

    def to_dict(self):
        end_of_text = {} if self.eot is None else {'end_of_text': True}
        return {'kind': 'char', 'characters': self.characters} | end_of_text


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then perhaps `<|endoftext|>`."""
    kind = 'byte'

    def __init__(self, end_of_text=False):
        self.token_bytes = [bytes([b]) for b in range(256)]
        self.set_special(end_of_text_after(self.token_bytes, end_of_text))

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8).astype(np.uint32)

    def to_dict(self):
        return {'kind': 'byte'} | ({} if self.eot is None else {'end_of_text': True})


class IdTokenizer(Tokenizer):
    """Ids without a rule that makes them from text: nanoGPT's bins with a meta.pkl that has names
    for some ids, or none. A text is token ids, separated by blanks."""
    kind = 'ids'

    def __init__(self, names):
        """names: the text of each id, or None."""
        require(names and all(isinstance(name, str | None) for name in names),
                'names must be texts or null')
        self.names = names
        self.token_bytes = [(f' {i}' if name is None else name).encode('utf-8')
                            for i, name in enumerate(names)]
        self.set_special({})

    def encode_ordinary(self, text):
        words = text.split()
        require(all(word.isascii() and word.isdecimal() for word in words),
                f'this data set has ids but no rule that makes them from text: give ids, such as '
                f'0 1 2, instead of {text[:40]!r}')
        ids = [int(word[:20]) for word in words]
        require(all(id_ < self.vocab_size for id_ in ids),
                f'a token id is not below {self.vocab_size}')
        return np.array(ids, dtype=np.uint32)

    def to_dict(self):
        return {'kind': 'ids', 'names': self.names}


def end_of_text_after(token_bytes, end_of_text):
    """The special tokens of a char or byte tokenizer: `<|endoftext|>` as the last id, or none."""
    require(isinstance(end_of_text, bool), f'end_of_text = {end_of_text!r} is not a bool')
    return {END_OF_TEXT: len(token_bytes)} if end_of_text else {}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, by tiktoken."""
    cuts_anywhere = False

    def __init__(self, kind, pattern, tokens, ids=None, special=None, unused=None, normalizer=None):
        """tokens: bytes, in the order of their merges. ids: of the tokens; None: 0, 1, ... special:
        {text: id}; None: `<|endoftext|>` after the tokens. unused: {text: id} of what no text
        becomes. normalizer: 'NFC': tokens stand for the text in this form. Raises UserError,
        ValueError."""
        import tiktoken  # char and byte tokenizers don't need it

        ids = list(range(len(tokens))) if ids is None else ids
        special = {END_OF_TEXT: len(tokens)} if special is None else special
        unused = unused or {}
        self.kind, self.pattern, self.tokens, self.ids = kind, pattern, tokens, ids
        self.unused, self.normalizer = unused, normalizer
        require(pattern, 'its pattern is empty')
        require(normalizer in (None, 'NFC'), f'its normalizer is {normalizer!r}, not NFC')
        require(all(isinstance(text, str) and text for text in [*special, *unused]),
                'a special token is empty')
        every = [*ids, *special.values(), *unused.values()]
        require(len(ids) == len(tokens) and all(type(id_) is int for id_ in every),
                'each token needs an id')
        require(len(set(every)) == len(every) and 0 <= min(every)
                and max(every) < 2 * len(every) + 2**10, 'the ids are not 0, 1, 2, ...')
        ranks = {token: i for i, token in enumerate(tokens)}
        require(len(ranks) == len(tokens) and b'' not in ranks, 'a token is empty or there twice')
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        require(not missing, f'no token stands for the byte {missing[:1]}')
        self.token_bytes = [b''] * (max(every) + 1)
        for id_, token in zip([*ids, *unused.values()], [*tokens, *map(str.encode, unused)]):
            self.token_bytes[id_] = token
        self.set_special(special)
        # without a special token, tiktoken looks for an empty one at each character: twice as slow
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks,
                                           special_tokens={END_OF_TEXT: len(tokens)})
        self._ids = np.array(ids, dtype=np.uint32)
        self._n_bytes = np.array([len(token) for token in tokens])

    def encode_ordinary(self, text):
        if self.normalizer:
            text = unicodedata.normalize(self.normalizer, text)
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # tiktoken's regex engine goes back blank by blank
            require('Max stack' not in str(error), 'the text has a million blanks in a row')
            raise
        if self.pattern != GPT2_PATTERN:
            require(self._n_bytes[ranks].sum() == len(text.encode('utf-8')),
                    f'the pattern of this tokenizer leaves out some of the text: {self.pattern}')
        return self._ids[ranks]

    def to_dict(self):
        saved = {'kind': self.kind, 'pattern': self.pattern,
                 'tokens': [base64.b64encode(token).decode() for token in self.tokens]}
        n = len(self.tokens)
        if self.ids != list(range(n)):
            saved['ids'] = self.ids
        if self.unused:
            saved['unused'] = self.unused
        if self.normalizer:
            saved['normalizer'] = self.normalizer
        return saved if self.special == {END_OF_TEXT: n} else saved | {'special': self.special}


def gpt2():
    """GPT-2's vocabulary of 50257, which tiktoken downloads once. Raises UserError if it cannot."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding('gpt2')
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(f'GPT-2\'s vocabulary cannot be downloaded ({type(error).__name__} at '
                        f'openaipublic.blob.core.windows.net): connect once, set TIKTOKEN_CACHE_DIR'
                        f' to a folder that has it, or prepare with --tokenizer=bpe') from None
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return BPETokenizer('gpt2', GPT2_PATTERN, tokens)


def from_huggingface(folder):
    """The byte-level BPE of a folder with tokenizer.json, or with vocab.json (and merges.txt), or a
    tokenizer that tools/export.py wrote; None if there is none. Ids are the file's. Raises
    UserError."""
    folder = Path(folder)
    whole, vocab = folder / 'tokenizer.json', folder / 'vocab.json'
    path = whole if whole.exists() else vocab
    if not path.exists():
        return None
    with restate((ValueError, KeyError, TypeError, AttributeError), path,
                 'cannot read a byte-level BPE, such as GPT-2\'s, from it'):
        if path == whole:
            saved = read_json(path)
            if saved.get('pre_tokenizer') == CHARACTERS:
                return read_characters(saved)
            return make_byte_level(*read_tokenizer_json(saved))
        vocabulary, merges = read_json(path), None
        if (folder / 'merges.txt').exists():
            lines = read_text(folder / 'merges.txt').splitlines()
            merges = [line.split(' ') for line in lines if line and not line.startswith('#version')]
        return make_byte_level(vocabulary, merges, read_added_tokens(folder, vocabulary))


def read_characters(saved):
    """The CharTokenizer of a tokenizer.json that lib/write_tokenizer.py wrote. Raises UserError."""
    vocabulary = saved['model']['vocab']
    added = {token['content']: token['id'] for token in saved['added_tokens']}
    characters = [c for c in sorted(vocabulary, key=vocabulary.get) if c not in added]
    tokenizer = CharTokenizer(''.join(characters), END_OF_TEXT in added)
    ids = {token.decode('utf-8'): id_ for id_, token in enumerate(tokenizer.token_bytes)}
    require(saved['model']['type'] == 'WordLevel' and not saved['normalizer']
            and added == tokenizer.special and ids == vocabulary, 'it was changed after its export')
    return tokenizer


def read_tokenizer_json(saved):
    """(vocabulary, merges, added tokens {text: id}, pattern, normalizer) of tokenizer.json. Raises
    UserError if we cannot make the same tokens."""
    model, normalizer = saved['model'], (saved.get('normalizer') or {}).get('type')
    require(model.get('type', 'BPE') == 'BPE', f'its type is {model.get("type")!r}, not BPE')
    pattern = read_pattern(saved.get('pre_tokenizer') or {})
    for key, supported in (('normalizer', 'NFC'), ('decoder', 'ByteLevel'),
                           ('post_processor', 'ByteLevel')):
        kind = (saved.get(key) or {}).get('type', supported)
        require(kind == supported, f'its {key}, {kind}, changes the text or its ids')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'):
        require(not model.get(key), f'{key} = {model.get(key)!r}')
    tokens = saved.get('added_tokens') or []
    require(not normalizer or not any(token.get('normalized') for token in tokens),
            f'its normalizer, {normalizer}, also changes the text in which added tokens are found')
    merges = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    added, made = check_added(tokens, model['vocab']), {left + right for left, right in merges}
    for text in model['vocab'] if model.get('ignore_merges') else ():
        require(len(text) == 1 or text in made or text in added,
                f'ignore_merges = True, and no merge makes the token {text!r}')
    return model['vocab'], merges, added, pattern, normalizer


def read_pattern(pre_tokenizer):
    """The pattern of words that a pre_tokenizer of tokenizer.json stands for, '' if it leaves the
    text whole. Raises UserError.

    Only patterns that we know: another might mean something else in tiktoken's regex engine than
    in Hugging Face's, and read_pieces (lib/text.py) must know where words end.
    """
    *before, byte_level = pre_tokenizer.get('pretokenizers') or [pre_tokenizer]
    words, pattern = byte_level.get('use_regex', True), None
    match before:
        case []:
            pattern = GPT2_PATTERN if words else ''
        case [{'type': 'Digits', 'individual_digits': True}] if words:
            pattern = DIGITS_PATTERN
        case [{'type': 'Split', 'pattern': {'Regex': str(regex)}, 'behavior': 'Isolated',
               'invert': False}] if not words:
            if re.sub(r'\{1,\d\}', '', regex) == GPT4_PATTERN.replace('{1,3}', ''):
                pattern = regex
    byte_level_alone = (byte_level.get('type'), byte_level.get('add_prefix_space', True))
    require(pattern is not None and byte_level_alone == ('ByteLevel', False),
            f'pre_tokenizer = {str(pre_tokenizer)[:300]} splits text into other words than those '
            f'of GPT-2, StarCoder2, Qwen2 and Llama 3')
    return pattern


def read_added_tokens(folder, vocabulary):
    """{text: id} of the tokens that GPT2Tokenizer would add to vocab.json. Raises UserError."""
    files = {}
    for name in ('added_tokens', 'tokenizer_config', 'special_tokens_map'):
        path = folder / f'{name}.json'
        files[name] = read_json(path) if path.exists() else {}
    added, config = dict(files['added_tokens']), files['tokenizer_config']
    if END_OF_TEXT in vocabulary:
        added[END_OF_TEXT] = vocabulary[END_OF_TEXT]
    decoder = (config.get('added_tokens_decoder') or {}).items()
    added |= check_added([token | {'id': int(id_)} for id_, token in decoder], vocabulary | added)
    require(not config.get('add_prefix_space'), 'tokenizer_config.json: add_prefix_space = True')
    for name, token in files['special_tokens_map'].items():
        text = token['content'] if isinstance(token, dict) else token
        require(not isinstance(text, str) or text in vocabulary or text in added,
                f'special_tokens_map.json: {name} = {text!r} has no id')
    return added


def check_added(tokens, vocabulary):
    """{text: id} of added tokens [{'content': text, 'id': id, ...}]. Raises UserError unless they
    are found as Hugging Face does: all that are not normalized, then the others in the rest."""
    added, normalized = {}, {}
    for token in tokens:
        text, id_ = token['content'], token['id']
        require(not (token.get('lstrip') or token.get('rstrip') or token.get('single_word')),
                f'the added token {text!r} takes blanks with it')
        require(id_ == vocabulary.get(text, id_) == added.get(text, id_),
                f'the added token {text!r} has two ids')
        added[text], normalized[text] = id_, bool(token.get('normalized'))
    for a, b in itertools.permutations(added, 2):
        overlap = normalized[a] != normalized[b] and any(
            a.startswith(b, i) or b.startswith(a[i:]) for i in range(len(a)))
        require(not overlap, f'the added tokens {a!r} and {b!r} overlap, but one is normalized')
    return added


def make_byte_level(vocabulary, merges, added, pattern=GPT2_PATTERN, normalizer=None):
    """A BPETokenizer of Hugging Face's {text: id}, [(left, right)] or None, {text: id}."""
    byte_of = printable_bytes()
    vocabulary = vocabulary | added
    if not pattern:
        tokenizer = ByteTokenizer(END_OF_TEXT in added)
        require(not merges and vocabulary == byte_of | tokenizer.special,
                'use_regex = False in its pre_tokenizer')
        return tokenizer
    if merges is None:  # ids were given in the order of the merges
        ordered = [text for text in sorted(vocabulary, key=vocabulary.get) if text != END_OF_TEXT]
    else:
        single = [text for text in sorted(vocabulary, key=vocabulary.get) if text in byte_of]
        ordered = list(dict.fromkeys([*single, *(left + right for left, right in merges)]))
    bytes_of = {}
    for text in ordered:
        if text not in added:
            require(set(text) <= byte_of.keys(), f'the token {text!r} has characters of no byte')
            bytes_of[text] = bytes(byte_of[c] for c in text)
    tokens, ids = list(bytes_of.values()), [vocabulary[text] for text in bytes_of]
    unused = {text: id_ for text, id_ in vocabulary.items()
              if text not in bytes_of and text not in added}
    for text in unused:
        require(re.fullmatch(r'<.+>|\[.+\]', text), f'no merge makes the token {text!r}')
    require(merges or sorted(vocabulary.values()) == list(range(len(vocabulary))),
            'the ids are not 0, 1, 2, ...')
    if merges:  # tiktoken merges any two tokens whose bytes together are a token
        theirs = [(bytes_of[left], bytes_of[right]) for left, right in merges]
        require(theirs == bpe_merges(tokens),
                'its merges are not in the order in which a BPE is trained')
    kind = 'gpt2' if len(tokens) == 50256 and pattern == GPT2_PATTERN else 'bpe'
    return BPETokenizer(kind, pattern, tokens, ids, added, unused, normalizer)


def bpe_merges(tokens):
    """[(left, right), ...] in order: of each token longer than a byte, the two tokens that the
    merges before it leave of its bytes. tokens: bytes, in the order of their merges. Raises
    UserError if more than two are left, so that no merge makes the token."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            first = min(joined)
            require(first < rank, f'the merges before it do not make the token {token!r}')
            i = joined.index(first)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def printable_bytes():
    """{character: byte} of GPT-2's vocab.json: itself if printable, else U+0100, U+0101, ..."""
    ranges = (('!', '~'), ('¡', '¬'), ('®', 'ÿ'))
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def read_prompt(start):
    """The text of --start: itself, or FILE:path for that of a file. Raises UserError."""
    if not start.startswith('FILE:'):
        return start
    with restate(UserError, f'start = {start!r}', 'cannot read that file'):
        return read_text(find(start[5:]))


def encode_prompt(text, tokenizer, key='start'):
    """Token ids of a prompt, `<|endoftext|>` if it is empty. Raises UserError, which names key."""
    ids = encode_start(text, tokenizer.encode, key)
    if len(ids) == 0 and tokenizer.eot is not None:
        ids = [tokenizer.eot]
    require(len(ids), f'{key} is empty: give at least one character to continue')
    return ids


def encode_turns(texts, tokenizer, key='start'):
    """Token ids of source, or source, target, source, ... (lib/pairs.py). Raises UserError."""
    require(all(text.strip() for text in texts), f'{key} is empty: give a source')
    parts = [encode_start(text.strip(), tokenizer.encode_ordinary, key) for text in texts]
    return join_turns(parts, tokenizer.eot).tolist()


def encode_start(text, encode, key):
    with restate(UserError, key):
        require(not re.search(r'[\ud800-\udfff]', text), 'this is not UTF-8 text')
        return encode(text)


def code_points(text):
    """text -> its Unicode code points, (n,) uint32"""
    return np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype=np.uint32)
