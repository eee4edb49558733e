"""Token bins: train.bin and val.bin, one long row of token ids each, with meta.json beside them.

Writing never leaves half a data set and never wraps an id. Reading maps the files and draws batches as a pure function of
(seed, number of samples seen). nanoGPT's bins (uint16, no meta.json, perhaps a meta.pkl) are read too.
"""
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, first_line, require
from data.tokenizer import CharTokenizer, Tokenizer, gpt2
from files import lock, replace, write_synced, write_text

FORMAT = 1
COMMIT_BYTES = 2**26  # of text, after which a prepare saves how far it is
PIECE_BYTES = 2**20  # a text file is read in pieces of at most this size, each tokenized by one thread


# Writing ------------------------------------------------------------------------------------------------------------------

class BinWriter:
    """Appends token ids to a file of uint16, or uint32 where the vocabulary needs it. Raises UserError on an id beyond it.

    To be used in a with statement, which closes the file; what is written is on the disk after `sync`.
    """

    def __init__(self, path, vocab_size, n_tokens=0):
        """n_tokens: so many of an earlier process are kept."""
        self.file = open(path, 'r+b' if n_tokens else 'wb')
        self.dtype = np.dtype('<u2' if vocab_size <= 2**16 else '<u4')
        self.vocab_size = vocab_size
        self.n_tokens = n_tokens
        self.file.truncate(n_tokens * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)

    def append(self, ids):
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            raise UserError(f'{self.file.name}: token id {ids[wrong]} at position {self.n_tokens + wrong} does not fit '
                            f'a vocabulary of {self.vocab_size}')
        self.file.write(ids.astype(self.dtype).tobytes())
        self.n_tokens += ids.size

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@dataclass
class Piece:
    """A piece of text on its way into a bin."""
    split: str  # 'train' or 'val'
    text: str
    ends_document: bool = False  # `<|endoftext|>` follows, where the tokenizer has one


def write_dataset(folder, pieces, tokenizer, source, total_bytes=None, max_tokens=None):
    """Tokenize pieces into folder/train.bin and val.bin, with meta.json; returns meta. Memory stays bounded.

    source: what the text is, for meta.json. total_bytes: for the progress bar. max_tokens: stop after so many.
    Everything is written under temporary names and renamed at the end, val.bin last: only a whole data set has all three. Every
    64 MB of text what is there so far is committed: killed or interrupted and called again, it goes on from there.
    """
    require(max_tokens is None or max_tokens > 0, f'max_tokens = {max_tokens}: give more than 0')
    folder = Path(folder)
    names = ('meta.json', 'train.bin', 'val.bin')
    temporary = {name: folder / f'{name}.tmp' for name in names}
    held = lock(folder, str(folder))
    keep = False
    try:
        made_by = hashlib.sha256(json.dumps([source, max_tokens, tokenizer.to_dict()]).encode()).hexdigest()
        done = read_progress(folder, made_by, np.dtype('u2' if tokenizer.vocab_size <= 2**16 else 'u4').itemsize)
        keep = done['pieces'] > 0  # what was committed outlives whatever stops this process
        if not keep:
            (folder / 'progress.json').unlink(missing_ok=True)  # of another text
        sha256, n_bytes, n_pieces = hashlib.sha256(), {'train': 0, 'val': 0}, 0
        with BinWriter(temporary['train.bin'], tokenizer.vocab_size, done['train']) as train, \
                BinWriter(temporary['val.bin'], tokenizer.vocab_size, done['val']) as val, \
                tqdm(total=total_bytes, unit='B', unit_scale=True, desc='tokenize') as bar, ThreadPoolExecutor() as pool:
            writers = {'train': train, 'val': val}

            def count(piece):
                nonlocal n_pieces
                raw = piece.text.encode('utf-8')
                sha256.update(raw)
                n_bytes[piece.split] += len(raw)
                n_pieces += 1
                bar.update(len(raw))

            pieces = iter(pieces)
            for piece in itertools.islice(pieces, done['pieces']):  # in the bins already
                count(piece)
            keep = keep and (done['sha256'], done['bytes']) == (sha256.hexdigest(), n_bytes)
            require(keep or not done['pieces'],
                    f'{source} has changed since a prepare of it was interrupted, which is forgotten now: run this again')
            committed = sum(n_bytes.values())
            for piece, ids in encoded(pieces, tokenizer, pool):
                writers[piece.split].append(ids)
                if piece.ends_document and tokenizer.eot is not None:
                    writers[piece.split].append([tokenizer.eot])
                count(piece)
                if max_tokens and train.n_tokens + val.n_tokens >= max_tokens:
                    break
                if sum(n_bytes.values()) - committed >= COMMIT_BYTES:
                    train.sync()
                    val.sync()
                    write_text(folder / 'progress.json', json.dumps({
                        'made_by': made_by, 'pieces': n_pieces, 'sha256': sha256.hexdigest(), 'bytes': n_bytes,
                        'train': train.n_tokens, 'val': val.n_tokens}))
                    committed, keep = sum(n_bytes.values()), True
            train.sync()
            val.sync()
        keep = False
        meta = {'format': FORMAT, 'source': source, 'source_sha256': sha256.hexdigest(),
                'vocab_size': tokenizer.vocab_size, 'dtype': writers['train'].dtype.name,
                **{f'{split}_tokens': writer.n_tokens for split, writer in writers.items()},
                **{f'{split}_bytes': n_bytes[split] for split in writers}, 'tokenizer': tokenizer.to_dict()}
        for split, writer in writers.items():
            require(writer.n_tokens > 1, f'{source}: too little text, nothing is left for {split}.bin')
        write_synced(temporary['meta.json'], json.dumps(meta, ensure_ascii=False))
        if (folder / 'train.bin').exists():
            print(f'replacing the data set that was in {folder}')
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for name in names:
            replace(temporary[name], folder / name)
    except OSError as error:
        raise UserError(f'{folder}: cannot write there: {error.strerror or error}') from None
    finally:
        if keep:
            print('interrupted; the same command goes on from here')
        for path in [] if keep else [*temporary.values(), folder / 'progress.json']:
            with contextlib.suppress(OSError):
                path.unlink()
        held.close()
    bytes_per_token = sum(n_bytes.values()) / (meta['train_tokens'] + meta['val_tokens'])
    print(f'{folder}: train.bin {meta["train_tokens"]:,} tokens, val.bin {meta["val_tokens"]:,} tokens, '
          f'vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}), {bytes_per_token:.2f} bytes/token')
    return meta


def read_progress(folder, made_by, itemsize):
    """What a prepare of the same text by the same tokenizer committed before it was interrupted; nothing, if there was none."""
    try:
        progress = json.loads((folder / 'progress.json').read_text(encoding='utf-8'))
        whole = all((folder / f'{split}.bin.tmp').stat().st_size >= progress[split] * itemsize for split in ('train', 'val'))
        if progress['made_by'] == made_by and whole:
            print(f'{folder}: going on behind the {progress["train"] + progress["val"]:,} tokens of an interrupted prepare')
            return progress
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {'pieces': 0, 'train': 0, 'val': 0}


def encoded(pieces, tokenizer, pool, size=2**24):
    """(piece, its ids) for each piece, in order; the threads of pool work on about `size` characters at a time."""
    group, n = [], 0
    for piece in itertools.chain(pieces, [None]):
        if piece is not None:
            group.append(piece)
            n += len(piece.text)
        if piece is None or n >= size:
            yield from zip(group, pool.map(lambda piece: tokenizer.encode_to_numpy(piece.text), group))
            group, n = [], 0


def hub_documents(path, name, val_every):
    """The texts of a data set of Hugging Face's hub (or of a local folder of parquet or JSON lines), streamed shard by shard,
    as Pieces: every val_every-th document goes to the val split. Raises UserError where the optional `datasets` is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError('streaming from the hub needs the optional package datasets: pip install datasets') from None

    def pieces():
        try:
            for i, document in enumerate(load_dataset(path, name, split='train', streaming=True)):
                yield Piece('val' if i % val_every == val_every - 1 else 'train', document['text'], ends_document=True)
        except (OSError, ValueError, KeyError) as error:  # no network, no such data set, no column of text
            raise UserError(f'{path}: cannot be read: {first_line(error)}; check the network and the name') from None

    return pieces()


def split_at_end(texts, total_bytes, val_fraction=0.1):
    """(text, ends_document) of a row of documents -> Pieces: the last val_fraction of the bytes is the val split."""
    boundary, done = int(total_bytes * (1 - val_fraction)), 0
    for text, ends_document in texts:
        raw = text.encode('utf-8')
        if done < boundary < done + len(raw):
            cut = len(raw[:boundary - done].decode('utf-8', errors='ignore'))
            yield Piece('train', text[:cut])
            yield Piece('val', text[cut:], ends_document)
        else:
            yield Piece('train' if done < boundary else 'val', text, ends_document)
        done += len(raw)


def read_pieces(path, size=PIECE_BYTES):
    """The text of a UTF-8 file in pieces of about `size` bytes, cut behind a line or a word where there is one."""
    decoder, rest, position = codecs.getincrementaldecoder('utf-8')(), '', 0
    with open(path, 'rb') as file:
        while True:
            block = file.read(size)
            try:
                text = rest + decoder.decode(block, final=not block)  # the decoder keeps half a character for the next block
            except UnicodeDecodeError as error:
                position += error.start + len(block) - len(error.object)
                raise UserError(f'{path}: byte {position} is not UTF-8 text; convert the file to UTF-8') from None
            position += len(block)
            end = max(text.rfind('\n'), text.rfind(' ')) + 1 if block else 0
            if text[:end or None]:
                yield text[:end or None]
            rest = text[end:] if end else ''
            if not block:
                return


# Reading ------------------------------------------------------------------------------------------------------------------

class TokenBin:
    """A mapped bin of n_tokens ids, cut into windows of block_size. Raises UserError if it cannot be used for that."""

    def __init__(self, path, dtype, vocab_size, block_size):
        try:
            n_bytes = os.path.getsize(path)
        except OSError as error:
            raise UserError(f'{path}: {error.strerror}; prepare the data set again') from None
        require(n_bytes > 0, f'{path} is empty; prepare the data set again')
        require(n_bytes % dtype.itemsize == 0, f'{path}: its size, {n_bytes} bytes, is not a multiple of {dtype.itemsize} '
                                               f'({dtype.name}): the file is cut off; prepare the data set again')
        self.path, self.vocab_size, self.block_size = path, vocab_size, block_size
        self.tokens = np.memmap(path, dtype=dtype, mode='r')
        self.n_tokens = len(self.tokens)
        require(self.n_tokens > block_size, f'{path} has {self.n_tokens} tokens: block_size = {block_size} needs at least '
                                            f'{block_size + 1}; lower --block_size or prepare more text')
        self.n_windows = -(-(self.n_tokens - 1) // block_size)  # of the whole split, the last one perhaps shorter
        if vocab_size <= np.iinfo(dtype).max:
            for first in range(0, min(self.n_tokens, 2**29), 2**24):  # 1 GB of uint16; what lies beyond is checked as read
                block = self.tokens[first:first + 2**24]
                if block.max() >= vocab_size:
                    self._read(first + np.argmax(block >= vocab_size))

    def _read(self, at):
        """The ids at these positions, as int64. Raises UserError if one is beyond the vocabulary."""
        ids = self.tokens[at]
        if ids.max(initial=0) >= self.vocab_size:
            wrong = np.argmax(ids >= self.vocab_size)
            raise UserError(f'{self.path}: token id {ids.flat[wrong]} at position {at.flat[wrong]} is not below vocab_size = '
                            f'{self.vocab_size}; it was made with another tokenizer: prepare the data set again')
        return ids.astype(np.int64)

    def batch(self, first_sample, count, seed):
        """Samples first_sample .. first_sample + count - 1 of the endless, shuffled row of training samples.

        Each epoch visits every block of block_size tokens once, in an order and with an offset that follow from
        (seed, epoch) alone: no state, so that any batch can be drawn again. -> x, y (count, block_size) int64, y the
        tokens that follow x.
        """
        T = self.block_size
        n_blocks = max(1, (self.n_tokens - 1 - T) // T)
        sample = np.arange(first_sample, first_sample + count, dtype=np.uint64)
        epoch, place = np.divmod(sample, np.uint64(n_blocks))
        block, offset = np.empty_like(place), np.empty_like(place)
        for e in np.unique(epoch):
            key = mix(mix(seed) ^ mix(e))
            here = epoch == e
            block[here] = permute(place[here], n_blocks, key)
            offset[here] = mix(key) % np.uint64(min(T, self.n_tokens - n_blocks * T))
        start = (block * np.uint64(T) + offset).astype(np.int64)
        window = self._read(start[:, None] + np.arange(T + 1))  # (count, T + 1)
        return window[:, :-1], window[:, 1:]

    def windows(self, index):
        """Windows of the split laid end to end, by number. -> x, y (len(index), block_size) int64; y is -1 past the end."""
        T = self.block_size
        at = np.asarray(index, dtype=np.int64)[:, None] * T + np.arange(T + 1)
        window = self._read(np.minimum(at, self.n_tokens - 1))  # (len(index), T + 1)
        return window[:, :-1], np.where(at[:, 1:] < self.n_tokens, window[:, 1:], -1)

    def evaluation_windows(self, count):
        """Numbers of `count` windows, always the same ones, spread over the split by chance; -1: all."""
        if count < 0 or count >= self.n_windows:
            return np.arange(self.n_windows)
        return np.sort(permute(np.arange(count, dtype=np.uint64), self.n_windows, np.uint64(0))).astype(np.int64)


@dataclass
class Dataset:
    train: TokenBin
    val: TokenBin
    tokenizer: Tokenizer
    token_bytes: np.ndarray  # (vocab_size,) the length of each token's text; `<|endoftext|>` is not in the text: 0

    def fingerprint(self):
        """A sha256 by which a resumed run knows its data again: of all bytes of a bin up to 64 MB, else of its length and 64
        pieces of 1 MB, evenly spread.
        """
        sha256 = hashlib.sha256()
        for split in (self.train, self.val):
            content = split.tokens.view(np.uint8)
            sha256.update(f'{split.tokens.dtype.str} {len(content)} '.encode())
            if len(content) <= 2**26:
                sha256.update(content)
            else:
                for start in np.linspace(0, len(content) - 2**20, 64, dtype=np.int64):
                    sha256.update(content[start:start + 2**20])
        return sha256.hexdigest()


def find_dataset(name):
    """The folder of a data set: data/<name> here or beside this file, or a path."""
    for folder in (Path('data') / name, Path(__file__).parent / name, Path(name)):
        if (folder / 'train.bin').exists() or (folder / 'val.bin').exists():
            return folder
    return Path('data') / name


def open_dataset(folder, block_size):
    """Map both bins of a folder and read their tokenizer. Raises UserError, which names the file, if anything is wrong.

    Without meta.json the bins are nanoGPT's: uint16, with the characters of meta.pkl, else GPT-2's vocabulary.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    tokenizer = open_tokenizer(folder) or gpt2()
    dtype = np.dtype(meta['dtype'] if meta else 'uint16').newbyteorder('<')
    train, val = (TokenBin(folder / f'{split}.bin', dtype, tokenizer.vocab_size, block_size) for split in ('train', 'val'))
    for split, tokens in (('train', train), ('val', val)):
        require(meta is None or tokens.n_tokens == meta[f'{split}_tokens'],
                f'{tokens.path} has {tokens.n_tokens} tokens where meta.json says {meta and meta[f"{split}_tokens"]}; '
                f'prepare the data set again')
    token_bytes = np.array([len(token) for token in tokenizer.token_bytes])
    if tokenizer.eot is not None:
        token_bytes[tokenizer.eot] = 0
    return Dataset(train, val, tokenizer, token_bytes)


def read_meta(folder):
    """folder/meta.json, None if there is none. Raises UserError if it is not ours."""
    path = Path(folder) / 'meta.json'
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        require(meta['format'] == FORMAT, f'format {meta["format"]} is not {FORMAT}, the one this version reads')
        require(meta['dtype'] in ('uint16', 'uint32'), f'dtype = {meta["dtype"]!r} is neither uint16 nor uint32')
        meta['tokenizer'], meta['train_tokens'], meta['val_tokens']  # KeyError where one is missing
        return meta
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: {error}; prepare the data set again') from None


def open_tokenizer(folder):
    """The tokenizer of a data folder: from meta.json, else from nanoGPT's meta.pkl, else None."""
    folder = Path(folder)
    meta = read_meta(folder)
    if meta:
        return Tokenizer.from_dict(meta['tokenizer'])
    return read_nanogpt_meta(folder / 'meta.pkl') if (folder / 'meta.pkl').exists() else None


def read_nanogpt_meta(path):
    """nanoGPT's meta.pkl -> CharTokenizer. Plain dicts, strings and numbers are read; a pickle that names code is refused."""

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            raise UserError(f'{path}: refused: this pickle would run {module}.{name}; prepare the data set again')

    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
        characters = ''.join(meta['itos'][i] for i in range(meta['vocab_size']))
        require(len(characters) == meta['vocab_size'], 'its tokens are not single characters')
        return CharTokenizer(characters)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f'{path}: {error}') from None
    except Exception as error:  # whatever unpickling garbage raises
        raise UserError(f'{path}: not nanoGPT\'s meta.pkl ({error!r}); prepare the data set again') from None


# A random order without a table ---------------------------------------------------------------------------------------------

def mix(x):
    """splitmix64's finalizer (Steele et al. 2014) on uint64: written out, since library generators promise no stream."""
    with np.errstate(over='ignore'):
        x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def seed_of(seed, number):
    """A seed for torch.manual_seed that follows from a run's seed and a counter."""
    return int(mix(mix(seed) ^ mix(~np.uint64(number)))) % 2**63


def permute(index, n, key):
    """A permutation of 0 .. n-1, chosen by key, applied to index (uint64 array).

    A Feistel network of 6 rounds (Luby & Rackoff 1988) permutes the next power of 4; a value that lands at n or above is
    sent through again until it lands below (cycle-walking: Black & Rogaway 2002).
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    index = np.array(index, dtype=np.uint64)
    todo = np.ones(index.shape, dtype=bool)
    while todo.any():
        left, right = index[todo] >> half, index[todo] & low
        for round_ in range(6):
            left, right = right, left ^ (mix(right ^ mix(key ^ np.uint64(round_))) & low)
        index[todo] = (left << half) | right
        todo = index >= n
    return index
