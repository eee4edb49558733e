"""Write token bins: whole or not at all, in bounded memory, resumable."""
import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.bins import DATA, FORMAT, shard_path
from lib.errors import DISK_FULL, UserError, require
from lib.files import (
    check_kinds,
    create,
    lock,
    open_own,
    read_json,
    replace,
    temporary,
    write_synced,
    write_text,
)

SHARD_BYTES = 2 * 10**9  # most bytes of tokens per file
COMMIT_BYTES = 2**26  # bytes of text between commits of the progress
ESTIMATE_BYTES = 2**24  # bytes of text before the estimate of size and time


def dataset_folder(dataset):
    """data/<dataset>, where a prepare script writes. Raises UserError if that is not a name."""
    require(re.fullmatch(r'\w[\w.-]*', dataset),
            f'dataset = {dataset!r}: give the name of a folder in data/')
    return DATA / dataset


def token_dtype(vocab_size):
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


class BinWriter:
    """Appends token ids to the files of a split, under temporary names, in a with statement.

    What is written is on the disk after `sync`. Raises UserError on an id beyond the vocabulary.
    """

    def __init__(self, folder, split, vocab_size, n_tokens=0):
        """n_tokens: keep so many of an interrupted prepare."""
        self.folder, self.split, self.vocab_size = Path(folder), split, vocab_size
        self.n_tokens = n_tokens
        self.dtype = token_dtype(vocab_size)
        self.tokens_per_shard = SHARD_BYTES // self.dtype.itemsize
        self.open_shard(max(0, n_tokens - 1) // self.tokens_per_shard)

    def open_shard(self, number):
        """Continue the shard of this number after n_tokens; what follows them is cut off."""
        self.number = number
        kept = self.n_tokens - number * self.tokens_per_shard
        path = temporary(shard_path(self.folder, self.split, number))
        self.file = open_own(path, 'r+b') if kept else create(path)
        self.file.truncate(kept * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)

    def append(self, ids):
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            raise UserError(f'{self.file.name}: token id {ids[wrong]} at position '
                            f'{self.n_tokens + wrong} does not fit a vocabulary of '
                            f'{self.vocab_size}')
        while ids.size:
            room = (self.number + 1) * self.tokens_per_shard - self.n_tokens
            if not room:
                self.sync()
                self.file.close()
                self.open_shard(self.number + 1)
                room = self.tokens_per_shard
            self.file.write(ids[:room].astype(self.dtype).tobytes())
            self.n_tokens += len(ids[:room])
            ids = ids[room:]

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def paths(self):
        return [shard_path(self.folder, self.split, n) for n in range(self.number + 1)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@dataclass
class Piece:
    """A piece of text on its way into a bin."""
    split: str  # 'train' or 'val'
    text: str
    ends_document: bool = False  # `<|endoftext|>` follows, if the tokenizer has one
    state: dict | None = None  # from which the source continues after this piece, if it can
    ids: np.ndarray | None = None  # of the text, if they are known already


PROGRESS = {'made_by': str, 'pieces': int, 'sha256': str, 'bytes': dict, 'train': int, 'val': int,
            'state': dict | None}


class Progress:
    """The text written so far, and how far an interrupted prepare of the same text got."""

    def __init__(self, folder, made_by, itemsize):
        """made_by: identifies text and tokenizer."""
        self.path = folder / 'progress.json'
        self.made_by = made_by
        self.sha256 = hashlib.sha256()
        self.n_bytes = {'train': 0, 'val': 0}
        self.n_pieces = 0
        self.saved = self.read(folder, itemsize)
        self.committed = self.saved['pieces'] > 0
        if not self.committed:
            self.path.unlink(missing_ok=True)  # of another text

    def read(self, folder, itemsize):
        tokens_per_shard = SHARD_BYTES // itemsize

        def whole(split, n_tokens, first):
            size = temporary(shard_path(folder, split, first // tokens_per_shard)).stat().st_size
            return size >= min(tokens_per_shard, n_tokens - first) * itemsize

        try:
            saved = read_json(self.path)
            check_kinds(saved, PROGRESS, self.path)
            check_kinds(saved['bytes'], {split: int for split in self.n_bytes}, self.path)
            bytes.fromhex(saved['sha256'])
            shards = [whole(split, saved[split], first) for split in self.n_bytes
                      for first in range(0, saved[split], tokens_per_shard)]
            if saved['made_by'] == self.made_by and all(shards):
                print(f'{folder}: continuing after the {saved["train"] + saved["val"]:,} tokens of '
                      f'an interrupted prepare')
                return saved
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {'pieces': 0, 'train': 0, 'val': 0, 'state': None}

    def add(self, piece):
        """Count a piece; returns its bytes."""
        raw = piece.text.encode('utf-8')
        self.sha256.update(raw)
        self.n_bytes[piece.split] += len(raw)
        self.n_pieces += 1
        return len(raw)

    @property
    def size(self):
        return sum(self.n_bytes.values())

    def skip(self, pieces, source):
        """An iterator over the pieces after the saved ones. pieces: an iterable, or a function that
        makes one from a state. Raises UserError if the text has changed."""
        saved = self.saved
        if callable(pieces) and saved['state']:  # a stream is not read again
            self.sha256 = hashlib.sha256(bytes.fromhex(saved['sha256']))
            self.n_bytes, self.n_pieces = saved['bytes'], saved['pieces']
            return iter(pieces(saved['state']))
        pieces = iter(pieces(None) if callable(pieces) else pieces)
        for piece in itertools.islice(pieces, saved['pieces']):
            self.add(piece)
        if saved['pieces']:
            same = (saved['sha256'], saved['bytes']) == (self.sha256.hexdigest(), self.n_bytes)
            self.committed = same
            require(same, f'{source} has changed since its prepare was interrupted, and its '
                          f'progress was discarded: run this again')
        return pieces

    def commit(self, writers, state):
        """Save how far it is, durably."""
        for writer in writers.values():
            writer.sync()
        n_tokens = {split: writer.n_tokens for split, writer in writers.items()}
        write_text(self.path, json.dumps({
            'made_by': self.made_by, 'pieces': self.n_pieces, 'sha256': self.sha256.hexdigest(),
            'bytes': self.n_bytes, **n_tokens, 'state': state}))
        self.committed = True
        if state:  # hashlib's state cannot be saved: continue from the digest
            self.sha256 = hashlib.sha256(self.sha256.digest())


def write_dataset(folder, pieces, tokenizer, source, total_bytes=None, max_tokens=None,
                  expected_tokens=None, pairs=None, ordinary=False):
    """Tokenize pieces into folder/train.bin and val.bin, with meta.json; returns meta.

    pieces: an iterable of Piece, or a function that makes one and continues after the piece whose
    state it is given. source: names the text in meta.json. pairs: the Pairs of rows of sources and
    targets. total_bytes, expected_tokens: for the progress bar and the estimate. max_tokens: stop
    after about so many. ordinary: `<|endoftext|>` in the text is plain text.

    All files are written under temporary names and renamed at the end, val.bin last: only a whole
    data set has all three. Progress is committed every 64 MB of text: a killed prepare that is run
    again continues there. Raises UserError.
    """
    require(max_tokens is None or max_tokens > 0, f'max_tokens = {max_tokens}: give more than 0')
    folder = Path(folder)
    pairs = asdict(pairs) if pairs else None
    dtype = token_dtype(tokenizer.vocab_size)
    identity = json.dumps([source, tokenizer.to_dict(), pairs, ordinary])
    made_by = hashlib.sha256(identity.encode()).hexdigest()
    with contextlib.closing(lock(folder, str(folder))):
        progress = Progress(folder, made_by, dtype.itemsize)
        tokenized = False
        try:
            vocab_size, saved = tokenizer.vocab_size, progress.saved
            with BinWriter(folder, 'train', vocab_size, saved['train']) as train, \
                    BinWriter(folder, 'val', vocab_size, saved['val']) as val:
                writers = {'train': train, 'val': val}
                tokenize(pieces, tokenizer, writers, progress, source, total_bytes, max_tokens,
                         expected_tokens, ordinary)
                for writer in writers.values():
                    writer.sync()
            tokenized = True
            # of a stream, which is not read again: the sha256 of its last part and the one before
            hash_name = 'stream_sha256' if callable(pieces) else 'source_sha256'
            meta = {'format': FORMAT, 'source': source, hash_name: progress.sha256.hexdigest(),
                    'vocab_size': tokenizer.vocab_size, 'dtype': dtype.name,
                    **{f'{split}_tokens': writer.n_tokens for split, writer in writers.items()},
                    **{f'{split}_bytes': n for split, n in progress.n_bytes.items()},
                    'pairs': pairs, 'tokenizer': tokenizer.to_dict()}
            for split, writer in writers.items():
                require(writer.n_tokens > 1,
                        f'{source}: too little text, nothing is left for {split}.bin')
            commit_files(folder, meta, writers)
        except OSError as error:
            if error.errno not in (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
                raise  # not about writing
            raise UserError(f'{folder}: cannot write there: {error.strerror}') from None
        finally:
            if progress.committed and not tokenized:
                print('interrupted; the same command continues from here')
            else:
                for path in [*files_of(folder, '.tmp'), folder / 'progress.json']:
                    with contextlib.suppress(OSError):
                        path.unlink()
    n_tokens = meta['train_tokens'] + meta['val_tokens']
    where = min(str(folder), os.path.relpath(folder), key=len)
    print(f'{where}: {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} for '
          f'validation\n'
          f'vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}), '
          f'{progress.size / n_tokens:.2f} bytes per token')
    return meta


def tokenize(pieces, tokenizer, writers, progress, source, total_bytes, max_tokens,
             expected_tokens, ordinary):
    """Append the ids of the pieces to the writers' bins, with a progress bar."""
    with tqdm(total=total_bytes, unit='B', unit_scale=True, desc='tokenize', disable=None,
              leave=False) as bar, ThreadPoolExecutor() as pool:
        pieces = progress.skip(pieces, source)
        bar.update(progress.size)
        start_size, start_time = progress.size, time.perf_counter()
        committed_size, estimated = start_size, False
        encode = tokenizer.encode_ordinary if ordinary else tokenizer.encode_to_numpy
        for piece, ids in encode_pieces(pieces, encode, pool):
            writer = writers[piece.split]
            writer.append(ids)
            if piece.ends_document and tokenizer.eot is not None:
                writer.append([tokenizer.eot])
            bar.update(progress.add(piece))
            n_tokens = sum(writer.n_tokens for writer in writers.values())
            if max_tokens and n_tokens >= max_tokens:
                break
            size = progress.size
            if not estimated and size - start_size >= ESTIMATE_BYTES:
                estimated = True
                expected = expected_tokens
                if total_bytes:
                    expected = n_tokens * total_bytes / size
                if expected or max_tokens:
                    bar.total = min(filter(None, (expected, max_tokens))) * size / n_tokens
                    speed = (size - start_size) / (time.perf_counter() - start_time)
                    itemsize = writer.dtype.itemsize
                    bar.write(estimate(writer.folder, n_tokens, size, bar.total, speed, itemsize))
            if size - committed_size >= COMMIT_BYTES:
                progress.commit(writers, piece.state)
                committed_size = size


def encode_pieces(pieces, encode, pool, size=2**24):
    """(piece, ids) for each piece, in order; the pool gets about `size` characters at a time."""
    def ids_of(piece):
        return encode(piece.text) if piece.ids is None else piece.ids

    group, n = [], 0
    for piece in pieces:
        group.append(piece)
        n += len(piece.text)
        if n >= size:
            yield from zip(group, pool.map(ids_of, group))
            group, n = [], 0
    yield from zip(group, pool.map(ids_of, group))


def estimate(folder, n_tokens, size, total, speed, itemsize):
    """One line about the whole data set, from n_tokens in the first `size` of `total` bytes of
    text, at `speed` bytes/s. Raises UserError if the disk has too little room."""
    tokens, free = n_tokens * total / size, shutil.disk_usage(folder).free
    need = (tokens - n_tokens) * itemsize
    require(free >= need,
            f'{folder}: {need / 1e9:,.1f} GB are still needed, {free / 1e9:,.1f} GB are free: '
            f'free some room or prepare less')
    return (f'about {tokens / 1e6:,.0f} million tokens, {tokens * itemsize / 1e9:,.1f} GB on disk, '
            f'where {free / 1e9:,.1f} GB are free; {(total - size) / speed / 60:,.1f} minutes left')


def commit_files(folder, meta, writers):
    """Rename the files of a finished prepare, replacing the previous data set; what fails half-way
    is undone."""
    write_synced(temporary(folder / 'meta.json'), json.dumps(meta, ensure_ascii=False))
    if (folder / 'train.bin').exists():
        print(f'replacing the data set in {folder}')
    # val.bin first: bins without meta.json would pass for nanoGPT's
    renames = [(path, path.with_name(path.name + '.old'))
               for path in sorted(files_of(folder), reverse=True)]
    paths = [*writers['train'].paths(), *reversed(writers['val'].paths())]
    renames += [(temporary(path), path) for path in [folder / 'meta.json', *paths]]
    try:
        for source, target in renames:
            replace(source, target)
    except BaseException:  # Ctrl-C; Windows: a program has opened one
        for source, target in reversed(renames):
            if target.exists() and not source.exists():
                replace(target, source)
        raise
    for path in files_of(folder, '.old'):
        path.unlink()


def files_of(folder, suffix=''):
    """The files of the data set in a folder, with a suffix after their names."""
    names = re.compile(r'meta\.json|(train|val)(_\d{5})?\.bin')
    return [path for path in folder.glob('*' + suffix)
            if names.fullmatch(path.name.removesuffix(suffix))]
