"""Text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained by lib/bpe.py.

All have encode, decode, vocab_size, save and load. A tokenizer is saved whole, as JSON: it travels
inside bins and checkpoints and needs no network to be read again.
"""
import base64
import json
from pathlib import Path

import numpy as np

from lib.errors import UserError, require
from lib.pairs import join_turns

END_OF_TEXT = '<|endoftext|>'
# how GPT-2 splits text before merging (Radford et al. 2019; openai/gpt-2, encoder.py)
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")


class Tokenizer:
    """token_bytes: the bytes of each id. eot: the id that separates documents, or None."""
    eot = None

    @property
    def vocab_size(self):
        return len(self.token_bytes)

    def encode(self, text):
        """text -> list of ids. `<|endoftext|>` becomes the special token, if there is one."""
        if self.eot is None:
            return self.encode_to_numpy(text).tolist()
        ids = []
        for document in text.split(END_OF_TEXT):
            ids += [*self.encode_to_numpy(document).tolist(), self.eot]
        return ids[:-1]

    def encode_to_numpy(self, text):
        """Ids for data, (n,) uint32: `<|endoftext|>` is ordinary text. Raises UserError."""
        raise NotImplementedError

    def add_end_of_text(self):
        self.eot = len(self.token_bytes)
        self.token_bytes.append(END_OF_TEXT.encode())

    def text_bytes(self):
        """Bytes of text per token; `<|endoftext|>`, which is not in the text, has 0. (V,)"""
        n_bytes = np.array([len(token) for token in self.token_bytes])
        if self.eot is not None:
            n_bytes[self.eot] = 0
        return n_bytes

    def decode_bytes(self, ids):
        for id_ in ids:
            require(0 <= id_ < self.vocab_size, f'token id {id_} is not below {self.vocab_size}')
        return b''.join(self.token_bytes[id_] for id_ in ids)

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def save(self, path):
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding='utf-8')

    @staticmethod
    def load(path):
        try:
            return Tokenizer.from_dict(json.loads(Path(path).read_text(encoding='utf-8')))
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: cannot read a tokenizer from it: {error}') from None

    @staticmethod
    def from_dict(saved):
        """The inverse of to_dict. Raises UserError if it is not one."""
        try:
            match saved:
                case {'kind': 'char', 'characters': str(characters)}:
                    return CharTokenizer(characters, saved.get('end_of_text', False))
                case {'kind': 'byte'}:
                    return ByteTokenizer(saved.get('end_of_text', False))
                case {'kind': 'gpt2' | 'bpe' as kind, 'pattern': str(pattern),
                      'tokens': list(tokens)}:
                    tokens = [base64.b64decode(token, validate=True) for token in tokens]
                    return BPETokenizer(kind, pattern, tokens)
        except (TypeError, ValueError) as error:
            raise UserError(f'not a saved tokenizer: {error}') from None
        raise UserError(f'not a saved tokenizer: {str(saved)[:60]!r}; '
                        f'kinds are char, byte, gpt2 and bpe')


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `characters`, then perhaps `<|endoftext|>`."""
    kind = 'char'

    def __init__(self, characters, end_of_text=False):
        self.characters = characters
        self.token_bytes = [c.encode('utf-8') for c in characters]
        codes = code_points(characters)
        self._id_of = np.full(int(codes.max(initial=0)) + 1, -1, dtype=np.int64)  # by code point
        self._id_of[codes] = np.arange(len(codes))
        require(len(set(characters)) == len(characters) > 0,
                'a character tokenizer needs characters, each of them once')
        if end_of_text:
            self.add_end_of_text()

    def encode_to_numpy(self, text):
        codes = code_points(text)
        known = codes < len(self._id_of)
        ids = np.where(known, self._id_of[np.minimum(codes, len(self._id_of) - 1)], -1)
        if (ids < 0).any():
            position = int((ids < 0).argmax())
            raise UserError(f'character {text[position]!r} at position {position} is not one of '
                            f'the {len(self.characters)} characters that this tokenizer knows; '
                            f'a byte or bpe tokenizer can encode any text')
        return ids.astype(np.uint32)

    def to_dict(self):
        end_of_text = {} if self.eot is None else {'end_of_text': True}
        return {'kind': 'char', 'characters': self.characters} | end_of_text


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then perhaps `<|endoftext|>`."""
    kind = 'byte'

    def __init__(self, end_of_text=False):
        self.token_bytes = [bytes([b]) for b in range(256)]
        if end_of_text:
            self.add_end_of_text()

    def encode_to_numpy(self, text):
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8).astype(np.uint32)

    def to_dict(self):
        return {'kind': 'byte'} | ({} if self.eot is None else {'end_of_text': True})


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, by tiktoken; the last id is eot."""

    def __init__(self, kind, pattern, tokens):
        """tokens: the bytes of every id but eot, in merge order."""
        import tiktoken  # char and byte tokenizers don't need it

        self.kind, self.pattern = kind, pattern
        self.token_bytes = list(tokens)
        self.add_end_of_text()
        ranks = {token: i for i, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks,
                                           special_tokens={END_OF_TEXT: self.eot})

    def encode_to_numpy(self, text):
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def to_dict(self):
        return {'kind': self.kind, 'pattern': self.pattern,
                'tokens': [base64.b64encode(token).decode() for token in self.token_bytes[:-1]]}


def gpt2():
    """GPT-2's vocabulary of 50257, which tiktoken downloads once. Raises UserError if it cannot."""
    import requests  # as tiktoken does, for its exceptions
    import tiktoken

    try:
        encoding = tiktoken.get_encoding('gpt2')
    except (requests.RequestException, OSError) as error:
        raise UserError(f'GPT-2\'s vocabulary is not on this machine and cannot be downloaded '
                        f'({type(error).__name__} at openaipublic.blob.core.windows.net): connect '
                        f'once, set TIKTOKEN_CACHE_DIR to a folder that has it, or prepare your '
                        f'data with --tokenizer=bpe') from None
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return BPETokenizer('gpt2', GPT2_PATTERN, tokens)


def from_huggingface(folder):
    """GPT-2's vocabulary from a folder's vocab.json or tokenizer.json; None if there is neither."""
    folder = Path(folder)
    try:
        if (folder / 'vocab.json').exists():
            vocabulary = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
        elif (folder / 'tokenizer.json').exists():
            tokenizer = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
            vocabulary = tokenizer['model']['vocab']
        else:
            return None
        byte_of = printable_bytes()
        texts = sorted((t for t in vocabulary if t != END_OF_TEXT), key=vocabulary.get)
        tokens = [bytes(byte_of[c] for c in text) for text in texts]
        return BPETokenizer('gpt2', GPT2_PATTERN, tokens)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder}: cannot read GPT-2\'s vocabulary from it: {error!r}') from None


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
    try:
        return Path(start[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'start = {start!r}: cannot read that file: '
                        f'{getattr(error, "strerror", None) or error}') from None


def encode_prompt(text, tokenizer):
    """Token ids of a prompt, `<|endoftext|>` if it is empty. Raises UserError."""
    ids = encode_start(text, tokenizer.encode)
    if len(ids) == 0 and tokenizer.eot is not None:
        ids = [tokenizer.eot]
    require(len(ids), 'start is empty: give at least one character to continue')
    return ids


def encode_turns(texts, tokenizer):
    """Token ids of source, or source, target, source, ... (lib/pairs.py). Raises UserError."""
    require(all(text.strip() for text in texts), 'start is empty: give a source')
    parts = [encode_start(text.strip(), tokenizer.encode_to_numpy) for text in texts]
    return join_turns(parts, tokenizer.eot).tolist()


def encode_start(text, encode):
    try:
        text.encode('utf-8')
        return encode(text)
    except UnicodeEncodeError:
        raise UserError('start: this is not UTF-8 text') from None
    except UserError as error:
        raise UserError(f'start: {error}') from None


def code_points(text):
    """text -> its Unicode code points, (n,) uint32"""
    return np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype=np.uint32)
