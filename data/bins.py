"""Token bins: train.bin and val.bin, one long row of token ids each, with meta.json beside them. A row of more than 2 GB goes on
in train_00001.bin, train_00002.bin, ...

Sources and targets (data/pairs) are rows of equal length; from the ids in a row follows which of them are targets.

Writing never leaves half a data set and never wraps an id. Reading maps the files and draws batches as a pure function of
(seed, number of samples seen). nanoGPT's bins (uint16, no meta.json, perhaps a meta.pkl) are read too.
"""
import bisect
import codecs
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import pickle
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, first_line, require
from data.tokenizer import CharTokenizer, Tokenizer, gpt2
from files import lock, replace, temporary, write_synced, write_text

FORMAT = 1
COMMIT_BYTES = 2**26  # of text, after which a prepare saves how far it is
ESTIMATE_BYTES = 2**24  # of text, after which it says how long it will take
SHARD_BYTES = 2 * 10**9  # of tokens in a file, at most
PIECE_BYTES = 2**20  # a text file is read in pieces of at most this size, each tokenized by one thread


# Writing ------------------------------------------------------------------------------------------------------------------

def shard_path(folder, split, number):
    return folder / (f'{split}_{number:05d}.bin' if number else f'{split}.bin')


class BinWriter:
    """Appends token ids to the files of a split, uint16, or uint32 where the vocabulary needs it; they have a .tmp behind their
    names. Raises UserError on an id beyond the vocabulary.

    To be used in a with statement, which closes the file; what is written is on the disk after `sync`.
    """

    def __init__(self, folder, split, vocab_size, n_tokens=0):
        """n_tokens: so many of an earlier process are kept."""
        self.folder, self.split, self.vocab_size, self.n_tokens = Path(folder), split, vocab_size, n_tokens
        self.dtype = np.dtype('<u2' if vocab_size <= 2**16 else '<u4')
        self.per_shard = SHARD_BYTES // self.dtype.itemsize
        self.open(max(0, n_tokens - 1) // self.per_shard)

    def open(self, number):
        """Go on with the shard of this number; what an earlier process wrote into it beyond n_tokens goes."""
        self.number, kept = number, self.n_tokens - number * self.per_shard
        self.file = open(temporary(shard_path(self.folder, self.split, number)), 'r+b' if kept else 'wb')
        self.file.truncate(kept * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)

    def append(self, ids):
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            raise UserError(f'{self.file.name}: token id {ids[wrong]} at position {self.n_tokens + wrong} does not fit '
                            f'a vocabulary of {self.vocab_size}')
        while ids.size:
            room = (self.number + 1) * self.per_shard - self.n_tokens
            if not room:
                self.sync()
                self.file.close()
                self.open(self.number + 1)
                room = self.per_shard
            self.file.write(ids[:room].astype(self.dtype).tobytes())
            self.n_tokens += len(ids[:room])
            ids = ids[room:]

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def paths(self):
        return [shard_path(self.folder, self.split, number) for number in range(self.number + 1)]

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
    state: dict | None = None  # with which the source goes on behind this piece, if it can
    ids: np.ndarray | None = None  # of the text, where they are known already


def write_dataset(folder, pieces, tokenizer, source, total_bytes=None, max_tokens=None, expected_tokens=None, pairs=None):
    """Tokenize pieces into folder/train.bin and val.bin, with meta.json; returns meta. Memory stays bounded.

    pieces: an iterable, or a function that makes one and goes on behind the piece whose state it is given. source: what the text
    is, for meta.json. pairs: of pieces that are rows of sources and targets, see `Pairs`. total_bytes or expected_tokens: for the
    progress bar and the estimate. max_tokens: stop after so many. Everything is written under temporary names and renamed at the
    end, val.bin last: only a whole data set has all three. Every 64 MB of text what is there so far is committed: killed or
    interrupted and called again, it goes on from there.
    """
    require(max_tokens is None or max_tokens > 0, f'max_tokens = {max_tokens}: give more than 0')
    folder = Path(folder)
    held = lock(folder, str(folder))
    keep = False
    try:
        made_by = hashlib.sha256(json.dumps([source, tokenizer.to_dict(), pairs and asdict(pairs)]).encode()).hexdigest()
        done = read_progress(folder, made_by, np.dtype('u2' if tokenizer.vocab_size <= 2**16 else 'u4').itemsize)
        keep = done['pieces'] > 0  # what was committed outlives whatever stops this process
        if not keep:
            (folder / 'progress.json').unlink(missing_ok=True)  # of another text
        sha256, n_bytes, n_pieces = hashlib.sha256(), {'train': 0, 'val': 0}, 0
        with BinWriter(folder, 'train', tokenizer.vocab_size, done['train']) as train, \
                BinWriter(folder, 'val', tokenizer.vocab_size, done['val']) as val, \
                tqdm(total=total_bytes, unit='B', unit_scale=True, desc='tokenize') as bar, ThreadPoolExecutor() as pool:
            writers = {'train': train, 'val': val}

            def count(piece):
                nonlocal n_pieces
                raw = piece.text.encode('utf-8')
                sha256.update(raw)
                n_bytes[piece.split] += len(raw)
                n_pieces += 1
                bar.update(len(raw))

            streamed = callable(pieces)
            pieces = iter(pieces(done['state']) if streamed else pieces)
            if done['state']:  # what is in the bins already is not even read
                sha256, n_bytes, n_pieces = hashlib.sha256(bytes.fromhex(done['sha256'])), done['bytes'], done['pieces']
                bar.update(sum(n_bytes.values()))
            else:
                for piece in itertools.islice(pieces, done['pieces']):
                    count(piece)
                keep = keep and (done['sha256'], done['bytes']) == (sha256.hexdigest(), n_bytes)
                require(keep or not done['pieces'],
                        f'{source} has changed since a prepare of it was interrupted, which is forgotten now: run this again')
            committed = sum(n_bytes.values())
            told, start, n_before = False, time.perf_counter(), committed
            for piece, ids in encoded(pieces, tokenizer, pool):
                writers[piece.split].append(ids)
                if piece.ends_document and tokenizer.eot is not None:
                    writers[piece.split].append([tokenizer.eot])
                count(piece)
                n_tokens, size = train.n_tokens + val.n_tokens, sum(n_bytes.values())
                if max_tokens and n_tokens >= max_tokens:
                    break
                if not told and size - n_before >= ESTIMATE_BYTES:
                    told, speed = True, (size - n_before) / (time.perf_counter() - start)
                    expected = n_tokens * total_bytes / size if total_bytes else expected_tokens
                    if expected or max_tokens:
                        bar.total = min(filter(None, (expected, max_tokens))) * size / n_tokens
                        bar.write(check_room(folder, n_tokens, size, bar.total, speed, train.dtype.itemsize))
                if size - committed >= COMMIT_BYTES:
                    train.sync()
                    val.sync()
                    write_text(folder / 'progress.json', json.dumps({
                        'made_by': made_by, 'pieces': n_pieces, 'sha256': sha256.hexdigest(), 'bytes': n_bytes,
                        'train': train.n_tokens, 'val': val.n_tokens, 'state': piece.state}))
                    committed, keep = size, True
                    if piece.state:
                        sha256 = hashlib.sha256(sha256.digest())  # goes on from what was saved
            train.sync()
            val.sync()
        keep = False
        # of a stream, which is not read again, it is the sha256 of the last part and of the sha256 before
        meta = {'format': FORMAT, 'source': source, ('stream_sha256' if streamed else 'source_sha256'): sha256.hexdigest(),
                'vocab_size': tokenizer.vocab_size, 'dtype': writers['train'].dtype.name,
                **{f'{split}_tokens': writer.n_tokens for split, writer in writers.items()},
                **{f'{split}_bytes': n_bytes[split] for split in writers}, 'pairs': pairs and asdict(pairs),
                'tokenizer': tokenizer.to_dict()}
        for split, writer in writers.items():
            require(writer.n_tokens > 1, f'{source}: too little text, nothing is left for {split}.bin')
        write_synced(temporary(folder / 'meta.json'), json.dumps(meta, ensure_ascii=False))
        if (folder / 'train.bin').exists():
            print(f'replacing the data set that was in {folder}')
        for path in sorted(files_of(folder), reverse=True):  # val.bin first: bins without meta.json would be taken for nanoGPT's
            path.unlink()
        for path in [folder / 'meta.json', *train.paths(), *reversed(val.paths())]:
            replace(temporary(path), path)
    except OSError as error:
        raise UserError(f'{folder}: cannot write there: {error.strerror or error}') from None
    finally:
        if keep:
            print('interrupted; the same command goes on from here')
        for path in [] if keep else [*files_of(folder, '.tmp'), folder / 'progress.json']:
            with contextlib.suppress(OSError):
                path.unlink()
        held.close()
    bytes_per_token = sum(n_bytes.values()) / (meta['train_tokens'] + meta['val_tokens'])
    print(f'{folder}: train.bin {meta["train_tokens"]:,} tokens, val.bin {meta["val_tokens"]:,} tokens, '
          f'vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}), {bytes_per_token:.2f} bytes/token')
    return meta


def files_of(folder, suffix=''):
    """The files of a folder that a data set consists of, with a suffix behind their names."""
    names = re.compile(r'meta\.json|(train|val)(_\d{5})?\.bin')
    return [path for path in folder.glob('*' + suffix) if names.fullmatch(path.name.removesuffix(suffix))]


def check_room(folder, n_tokens, size, total, speed, itemsize):
    """One line: how much there is to come behind the n_tokens in the first `size` of `total` bytes of text, at `speed` bytes/s.
    Raises UserError if the disk has too little room for it.
    """
    tokens, free = n_tokens * total / size, shutil.disk_usage(folder).free
    need = (tokens - n_tokens) * itemsize
    require(free >= need, f'{folder}: {need / 1e9:,.1f} GB are still to come, {free / 1e9:,.1f} GB are free: free some room or '
                          f'prepare less')
    return (f'about {tokens / 1e6:,.0f} million tokens, {tokens * itemsize / 1e9:,.1f} GB on the disk, where {free / 1e9:,.1f} '
            f'GB are free; {(total - size) / speed / 60:,.1f} minutes to go')


def read_progress(folder, made_by, itemsize):
    """What a prepare of the same text by the same tokenizer committed before it was interrupted; nothing, if there was none."""
    per_shard = SHARD_BYTES // itemsize
    try:
        progress = json.loads((folder / 'progress.json').read_text(encoding='utf-8'))
        whole = all(temporary(shard_path(folder, split, first // per_shard)).stat().st_size
                    >= min(per_shard, progress[split] - first) * itemsize
                    for split in ('train', 'val') for first in range(0, progress[split], per_shard))
        if progress['made_by'] == made_by and whole and 'state' in progress:
            print(f'{folder}: going on behind the {progress["train"] + progress["val"]:,} tokens of an interrupted prepare')
            return progress
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {'pieces': 0, 'train': 0, 'val': 0, 'state': None}


def encoded(pieces, tokenizer, pool, size=2**24):
    """(piece, its ids) for each piece, in order; the threads of pool work on about `size` characters at a time."""
    group, n = [], 0
    for piece in itertools.chain(pieces, [None]):
        if piece is not None:
            group.append(piece)
            n += len(piece.text)
        if piece is None or n >= size:
            yield from zip(group, pool.map(lambda p: tokenizer.encode_to_numpy(p.text) if p.ids is None else p.ids, group))
            group, n = [], 0


def hub_documents(path, name, val_every):
    """(documents, what they are called) of a data set of Hugging Face's hub, or of a local folder of parquet or JSON lines, for
    `write_dataset`: streamed shard by shard, every val_every-th document for the val split. The name of a local folder says which
    files it has, since with others it is another data set. Raises UserError where the optional `datasets` is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError('streaming from the hub needs the optional package datasets: pip install datasets') from None

    def pieces(state):
        try:
            documents, first = load_dataset(path, name, split='train', streaming=True), 0
            if state:
                documents.load_state_dict(state['documents'])
                first = state['number']
            for i, document in enumerate(documents, first):
                yield Piece('train' if i % val_every else 'val', document['text'] or '', ends_document=True,
                            state={'documents': documents.state_dict(), 'number': i + 1})
        except Exception as error:  # no network, no such data set, no column of text: datasets raises whatever lies below it
            raise UserError(f'{path}: cannot be read: {type(error).__name__}: {first_line(error)}; check the network and the name'
                            ) from None

    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(path).rglob('*')) if p.is_file()]
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    return pieces, path + f', {name}' * (name is not None) + f', files {digest}' * bool(files)


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

@dataclass
class Pairs:
    """How bins hold documents of sources and targets: in rows of block_size ids, each with whole documents.

    A document of n turns is `e source e target e ... source e target e`, e = `<|endoftext|>`, and the rest of a row is filled
    with e. So two of them begin a document, and what stands behind the first, third, ... of a document is a source.
    """
    block_size: int
    turns: int  # the most of a document
    packing: bool  # several documents in a row
    mask_prompt: bool  # only what belongs to a target, and the end of it, has a loss

    def targets(self, x, y, eot):
        """y (B, T), the ids that follow x, with -1 where there is no loss."""
        ends = x == eot
        begins = ends.copy()
        begins[:, 1:] &= ends[:, :-1]
        source = (ends.cumsum(1) + begins.cumsum(1)) % 2 == 0  # as in GPT.attention_mask
        no_loss = source if self.mask_prompt else ends & (y == eot)  # what fills a row, and begins a document, is not learnt
        no_loss[:, -1] = True  # the next row is another text
        return np.where(no_loss, -1, y)


class TokenBin:
    """The n_tokens ids of a split, cut into windows of block_size. The files are mapped: however large they are, that takes no
    time and no memory. Raises UserError if they cannot be used.
    """

    def __init__(self, folder, split, dtype, vocab_size, block_size, n_tokens=None, pairs=None, eot=None):
        """n_tokens: how many there should be, in one or more files; None: as many as there are in one, as with nanoGPT's bins.
        pairs: of bins with sources and targets, which eot divides.
        """
        folder = Path(folder)
        self.pairs, self.eot = pairs, eot
        self.path, self.dtype, self.vocab_size, self.block_size = shard_path(folder, split, 0), dtype, vocab_size, block_size
        self.shards, self.ends = [], []  # of each file: its ids, and how many there are up to its end
        while not self.shards or n_tokens is not None and self.n_tokens < n_tokens:
            path = shard_path(folder, split, len(self.shards))
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                require(self.shards, f'{path}: {error.strerror}; prepare the data set again')
                break
            try:
                n_bytes = os.fstat(file).st_size
                if n_bytes == 0 or n_bytes % dtype.itemsize:
                    raise UserError(f'{path}: its size, {n_bytes} bytes, is no multiple of {dtype.itemsize}, or 0: it is cut '
                                    f'off; prepare the data set again')
                mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(file)
            self.shards.append(np.frombuffer(mapped, dtype))
            self.ends.append(self.n_tokens + len(self.shards[-1]))
        files = f' in {len(self.shards)} files' * (len(self.shards) > 1)
        require(n_tokens in (None, self.n_tokens), f'{self.path} has {self.n_tokens} tokens{files} where meta.json says '
                                                   f'{n_tokens}; prepare the data set again')
        if pairs:
            whole = self.n_tokens % block_size == 0
            require(whole, f'{self.path} has {self.n_tokens} tokens, no multiple of the {block_size} of a row; prepare it again')
            self.n_windows = self.n_tokens // block_size
            return
        require(self.n_tokens > block_size, f'{self.path} has {self.n_tokens} tokens: block_size = {block_size} needs at least '
                                            f'{block_size + 1}; lower --block_size or prepare more text')
        self.n_windows = -(-(self.n_tokens - 1) // block_size)  # of the whole split, the last one perhaps shorter

    @property
    def n_tokens(self):
        return self.ends[-1] if self.ends else 0

    def read(self, starts, count):
        """The ids from each of these positions on, 0 past the end. -> (len(starts), count) int64. Raises UserError if one is
        beyond the vocabulary.
        """
        rows = np.zeros((len(starts), count), self.dtype)
        for row, start in zip(rows, starts):
            number, done = bisect.bisect_right(self.ends, start), 0
            while done < count and number < len(self.shards):  # a row may cross into the next file
                first = start + done - (self.ends[number] - len(self.shards[number]))
                part = self.shards[number][first:first + count - done]
                row[done:done + len(part)] = part
                number, done = number + 1, done + len(part)
        if rows.max(initial=0) >= self.vocab_size:
            i, j = np.argwhere(rows >= self.vocab_size)[0].tolist()
            raise UserError(f'{self.path}: token id {rows[i, j]} at position {starts[i] + j} is not below vocab_size = '
                            f'{self.vocab_size}; it was made with another tokenizer: prepare the data set again')
        return rows.astype(np.int64)

    def samples(self):
        """The ids by which a split is known again, part by part: all up to 2**25, else 64 parts of 2**15, evenly spread."""
        small = self.n_tokens <= 2**25
        starts = range(0, self.n_tokens, 2**22) if small else np.linspace(0, self.n_tokens - 2**15, 64, dtype=np.int64).tolist()
        for start in starts:
            yield self.read([start], min(2**22, self.n_tokens - start) if small else 2**15)[0]

    def batch(self, first_sample, count, seed):
        """Samples first_sample .. first_sample + count - 1 of the endless, shuffled row of training samples.

        Each epoch visits every block of block_size tokens once, in an order and with an offset that follow from (seed, epoch)
        alone: no state, so that any batch can be drawn again. The blocks of sources and targets are their rows, without an
        offset. -> x, y (count, block_size) int64, y the tokens that follow x, -1 where there is no loss.
        """
        T = self.block_size
        n_blocks = self.n_windows if self.pairs else max(1, (self.n_tokens - 1 - T) // T)
        sample = np.arange(first_sample, first_sample + count, dtype=np.uint64)
        epoch, place = np.divmod(sample, np.uint64(n_blocks))
        block, offset = np.empty_like(place), np.empty_like(place)
        for e in np.unique(epoch):
            key = mix(mix(seed) ^ mix(e))
            here = epoch == e
            block[here] = permute(place[here], n_blocks, key)
            offset[here] = 0 if self.pairs else mix(key) % np.uint64(min(T, self.n_tokens - n_blocks * T))
        return self.inputs_and_targets((block * np.uint64(T) + offset).tolist())

    def inputs_and_targets(self, starts):
        """x, y (len(starts), block_size) from each of these positions on."""
        window = self.read(starts, self.block_size + 1)  # (len(starts), T + 1)
        x, y = window[:, :-1], window[:, 1:]
        return x, self.pairs.targets(x, y, self.eot) if self.pairs else y

    def count_targets(self, first_sample, count, seed):
        """How many ids of these samples have a loss."""
        if not self.pairs:
            return count * self.block_size
        return int((self.batch(first_sample, count, seed)[1] >= 0).sum())

    def documents(self, number):
        """Of sources and targets: the documents of a row, each [ids of a source, of its target, ...]."""
        row, documents = self.read([number * self.block_size], self.block_size)[0], []
        for part in np.split(row, np.flatnonzero(row == self.eot))[1:]:  # each begins with an end of text
            if len(part) == 1:
                documents.append([])
            else:
                documents = documents or [[]]
                documents[-1].append(part[1:].tolist())
        return [document for document in documents if document]

    def windows(self, index):
        """Windows of the split laid end to end, by number. -> x, y (len(index), block_size) int64; y is -1 past the end."""
        T = self.block_size
        starts = np.asarray(index, dtype=np.int64) * T
        x, y = self.inputs_and_targets(starts.tolist())
        following = starts[:, None] + np.arange(1, T + 1)
        return x, np.where(following < self.n_tokens, y, -1)

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
    token_bytes: np.ndarray  # (vocab_size,) Tokenizer.text_bytes
    pairs: Pairs | None  # of sources and targets

    def fingerprint(self):
        """A sha256 by which a resumed run knows its data again: of the number of ids, and of each split's samples. Raises
        UserError if one of these is beyond the vocabulary; all others are checked when they are read.
        """
        sha256 = hashlib.sha256()
        for split in (self.train, self.val):
            sha256.update(f'{split.dtype.str} {split.n_tokens * split.dtype.itemsize} '.encode())
            for ids in split.samples():
                sha256.update(ids.astype(split.dtype))
        return sha256.hexdigest()


def own_folder(dataset):
    """data/<dataset>, into which a prepare script writes what the user calls so. Raises UserError."""
    require(re.fullmatch(r'\w[\w.-]*', dataset), f'dataset = {dataset!r}: give the name of a folder in data/')
    return Path(__file__).parent / dataset


def find_dataset(name):
    """The folder of a data set: data/<name> here or beside this file, or a path."""
    for folder in (Path('data') / name, Path(__file__).parent / name, Path(name)):
        if (folder / 'train.bin').exists() or (folder / 'val.bin').exists():
            return folder
    return Path('data') / name


def open_dataset(folder, block_size):
    """Map both bins of a folder and read their tokenizer. Raises UserError, which names the file, if anything is wrong.

    block_size: tokens of a batch; of sources and targets the whole row, which may be shorter.
    Without meta.json the bins are nanoGPT's: uint16, with the characters of meta.pkl, else GPT-2's vocabulary.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    tokenizer = open_tokenizer(folder) or gpt2()
    dtype = np.dtype(meta['dtype'] if meta else 'uint16').newbyteorder('<')
    pairs = Pairs(**meta['pairs']) if meta and meta.get('pairs') else None
    if pairs:
        T = pairs.block_size
        require(T <= block_size, f'block_size = {block_size}: the rows of {folder} have {T} tokens: prepare it with '
                                 f'--block_size={block_size}, or train a model with --block_size={T}')
        block_size = pairs.block_size
    train, val = (TokenBin(folder, split, dtype, tokenizer.vocab_size, block_size, meta and meta[f'{split}_tokens'], pairs,
                           tokenizer.eot) for split in ('train', 'val'))
    return Dataset(train, val, tokenizer, tokenizer.text_bytes(), pairs)


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
        require(not meta.get('pairs') or set(meta['pairs']) == {field.name for field in fields(Pairs)}, 'pairs are not described')
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
