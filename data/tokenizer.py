"""Text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained on your own text.

All have encode, decode, vocab_size, save and load. A tokenizer is saved whole, as JSON: it travels inside bins and
checkpoints and needs no network to be read again.
"""
import base64
import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, require

END_OF_TEXT = '<|endoftext|>'
# how GPT-2 cuts text into words before merging (Radford et al. 2019; encoder.py of openai/gpt-2, in tiktoken's spelling)
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer:
    """What all tokenizers share.

    token_bytes: the bytes of each id. eot: the id that ends a document, or None.
    """
    eot = None

    @property
    def vocab_size(self):
        return len(self.token_bytes)

    def encode(self, text):
        """text -> list of ids. `<|endoftext|>` in it is the special token, where there is one."""
        ids = []
        for document in text.split(END_OF_TEXT) if self.eot is not None else [text]:
            ids += [*self.encode_to_numpy(document).tolist(), self.eot]
        return ids[:-1]

    def encode_to_numpy(self, text):
        """For data: `<|endoftext|>` in a text is ordinary text here, so that no document can end another."""
        raise NotImplementedError

    def add_end_of_text(self):
        self.eot = len(self.token_bytes)
        self.token_bytes.append(END_OF_TEXT.encode())

    def text_bytes(self):
        """How many bytes of text each token is: `<|endoftext|>` is not in the text, so 0. (vocab_size,)"""
        n_bytes = np.array([len(token) for token in self.token_bytes])
        if self.eot is not None:
            n_bytes[self.eot] = 0
        return n_bytes

    def decode_bytes(self, ids):
        for id_ in ids:
            require(0 <= id_ < self.vocab_size, f'token id {id_} is not below vocab_size = {self.vocab_size}')
        return b''.join(self.token_bytes[id_] for id_ in ids)

    def decode(self, ids):
        """ids -> text; bytes that are no UTF-8 (half a character) become U+FFFD."""
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
                case {'kind': 'gpt2' | 'bpe' as kind, 'pattern': str(pattern), 'tokens': list(tokens)}:
                    return BPETokenizer(kind, pattern, [base64.b64decode(token, validate=True) for token in tokens])
        except (TypeError, ValueError) as error:
            raise UserError(f'not a saved tokenizer: {error}') from None
        raise UserError(f'not a saved tokenizer: {str(saved)[:60]!r}; kinds are char, byte, gpt2 and bpe')


class CharTokenizer(Tokenizer):
    """One id for each character, in the order of `characters`, and one for `<|endoftext|>` if asked for."""
    kind = 'char'

    def __init__(self, characters, end_of_text=False):
        self.characters = characters
        self.token_bytes = [c.encode('utf-8') for c in characters]
        codes = codepoints(characters)
        self._id_of = np.full(int(codes.max(initial=0)) + 1, -1, dtype=np.int64)  # by code point
        self._id_of[codes] = np.arange(len(codes))
        require(len(set(characters)) == len(characters) > 0, 'a character tokenizer needs characters, each of them once')
        if end_of_text:
            self.add_end_of_text()

    def encode_to_numpy(self, text):
        codes = codepoints(text)
        ids = np.where(codes < len(self._id_of), self._id_of[np.minimum(codes, len(self._id_of) - 1)], -1)
        if (ids < 0).any():
            position = int((ids < 0).argmax())
            raise UserError(f'character {text[position]!r} at position {position} is not one of the {len(self.characters)} '
                            f'characters that this tokenizer knows; a byte or bpe tokenizer knows all')
        return ids.astype(np.uint32)

    def to_dict(self):
        return {'kind': 'char', 'characters': self.characters} | ({} if self.eot is None else {'end_of_text': True})


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and `<|endoftext|>` if asked for."""
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
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, run by tiktoken. The last id is `<|endoftext|>`.

    tokens: the bytes of each id without the special one, in the order in which they were merged.
    """

    def __init__(self, kind, pattern, tokens):
        import tiktoken

        self.kind, self.pattern = kind, pattern
        self.token_bytes = list(tokens)
        self.add_end_of_text()
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                           special_tokens={END_OF_TEXT: self.eot})

    def encode_to_numpy(self, text):
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def to_dict(self):
        tokens = [base64.b64encode(token).decode() for token in self.token_bytes[:-1]]
        return {'kind': self.kind, 'pattern': self.pattern, 'tokens': tokens}


def gpt2():
    """GPT-2's own vocabulary of 50257, which tiktoken downloads once. Raises UserError if that fails."""
    import requests
    import tiktoken

    try:
        encoding = tiktoken.get_encoding('gpt2')
    except (requests.RequestException, OSError) as error:
        raise UserError(f'GPT-2\'s vocabulary is not on this machine and cannot be downloaded ({type(error).__name__} at '
                        f'openaipublic.blob.core.windows.net): connect once, set TIKTOKEN_CACHE_DIR to a folder that has '
                        f'it, or prepare your data with --tokenizer=bpe') from None
    return BPETokenizer('gpt2', GPT2_PATTERN, [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])


def from_huggingface(folder):
    """GPT-2's vocabulary from a folder's vocab.json or tokenizer.json; None if there is neither."""
    folder = Path(folder)
    try:
        if (folder / 'vocab.json').exists():
            vocabulary = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
        elif (folder / 'tokenizer.json').exists():
            vocabulary = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))['model']['vocab']
        else:
            return None
        # in these files each byte stands as a printable character: itself, or the next of U+0100, U+0101, ...
        printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
        byte_of = {chr(b): b for b in printable}
        byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
        texts = sorted((t for t in vocabulary if t != END_OF_TEXT), key=vocabulary.get)
        return BPETokenizer('gpt2', GPT2_PATTERN, [bytes(byte_of[c] for c in text) for text in texts])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder}: cannot read GPT-2\'s vocabulary from it: {error!r}') from None


def train_char(texts, end_of_text=False):
    """A CharTokenizer of the characters that occur in texts, sorted."""
    characters = set()
    for text in texts:
        characters.update(text)
    require(characters, 'the text is empty')
    return CharTokenizer(''.join(sorted(characters)), end_of_text)


def train_bpe(texts, vocab_size, max_characters=16 * 2**20):
    """A BPETokenizer of vocab_size ids (256 bytes, merges, `<|endoftext|>`), trained on about the first max_characters of texts.

    Sennrich et al. 2016, algorithm 1, on bytes inside GPT-2's words. Each merge joins the most frequent pair of tokens
    (of equally frequent ones the pair with the lowest ids), visiting only the words that hold it. Raises UserError if the
    text has not enough pairs.
    """
    import regex

    require(vocab_size >= 257, f'vocab_size = {vocab_size}: bpe needs at least 257 (256 bytes and {END_OF_TEXT})')
    counts, n_characters = Counter(), 0
    for text in texts:
        counts.update(regex.findall(GPT2_PATTERN, text))
        n_characters += len(text)
        if n_characters >= max_characters:
            break
    words = [list(word.encode('utf-8')) for word in counts]
    frequency = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs; in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += frequency[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    bar = tqdm(total=vocab_size - 1, initial=len(tokens), desc='train bpe', unit='token')
    while len(tokens) < vocab_size - 1:
        while heap and -heap[0][0] != pairs[heap[0][1]]:
            heapq.heappop(heap)  # its count has changed since; the new count is in the heap too
        if not heap or heap[0][0] == 0:
            bar.close()
        require(heap and heap[0][0] < 0, f'vocab_size = {vocab_size}: the text has pairs for {len(tokens) + 1} tokens only; '
                                         f'ask for at most that')
        pair = heapq.heappop(heap)[1]
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = Counter()
        for i in where.pop(pair):
            old, merged, j = words[i], [], 0
            while j < len(old):
                both = j + 1 < len(old) and (old[j], old[j + 1]) == pair
                merged.append(new if both else old[j])
                j += 2 if both else 1
            words[i] = merged
            for p in zip(old, old[1:]):
                changed[p] -= frequency[i]
            for p in zip(merged, merged[1:]):
                changed[p] += frequency[i]
                where[p].add(i)
        for p, difference in changed.items():
            if difference:
                pairs[p] += difference
                heapq.heappush(heap, (-pairs[p], p))
        del pairs[pair]
        bar.update()
    bar.close()
    return BPETokenizer('bpe', GPT2_PATTERN, tokens)


def make(kind, texts, vocab_size, end_of_text=False):
    """The tokenizer of a prepare script's --tokenizer: texts() iterates over the text it may be trained on. end_of_text: with
    `<|endoftext|>`, which bpe and gpt2 have anyway.
    """
    if kind == 'gpt2':
        return gpt2()
    if kind == 'byte':
        return ByteTokenizer(end_of_text)
    return train_char(texts(), end_of_text) if kind == 'char' else train_bpe(texts(), vocab_size)


def read_prompt(start):
    """The text of --start: itself, or FILE:path for that of a file. Raises UserError."""
    if not start.startswith('FILE:'):
        return start
    try:
        return Path(start[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        require(False, f'start = {start!r}: cannot read that file: {getattr(error, "strerror", None) or error}')


def encode_prompt(text, tokenizer):
    """Token ids of a prompt. Raises UserError if it is empty or has an unknown character."""
    ids = encode_start(text, tokenizer.encode) or ([tokenizer.eot] if tokenizer.eot is not None else [])
    require(ids, 'start is empty: give at least one character to continue')
    return ids


def encode_turns(texts, tokenizer):
    """Token ids of a source, or of source, target, source, ..., as they stand in data.bins.Pairs: what answers the last one
    follows. Raises UserError as encode_prompt.
    """
    ids = [tokenizer.eot]
    for text in texts:
        require(text.strip(), 'start is empty: give a source')
        ids += [*encode_start(text.strip(), tokenizer.encode_to_numpy), tokenizer.eot]
    return ids


def encode_start(text, encode):
    try:
        text.encode('utf-8')
        return [int(id_) for id_ in encode(text)]
    except UnicodeEncodeError:
        raise UserError('start: this is not UTF-8 text') from None
    except UserError as error:
        raise UserError(f'start: {error}') from None


def codepoints(text):
    """text -> its Unicode code points, (n,) uint32"""
    return np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype=np.uint32)
