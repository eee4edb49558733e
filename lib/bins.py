"""Token bins: train.bin and val.bin, one long row of token ids each, with meta.json next to them.

A row of more than 2 GB continues in train_00001.bin, train_00002.bin, ... Files are read where they
are needed. Batches are a pure function of (seed, number of samples seen). nanoGPT's bins (uint16,
no meta.json, perhaps a meta.pkl) and llm.c's (with a header) are read too. lib/write.py writes
bins.
"""
import bisect
import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import check_fields, nearest
from lib.errors import UserError, os_errors, plural, reason_of, require, restate
from lib.files import check_kinds, check_lfs, command, find, read_json
from lib.pairs import Pairs, split_documents
from lib.tokenizer import CharTokenizer, IdTokenizer, Tokenizer, gpt2

FORMAT = 1
AGAIN = 'prepare the data set again'
DATA = Path(__file__).parents[1] / 'data'
SMALL_DATASETS = ('python_stdlib', 'shakespeare_char', 'shakespeare', 'scan', 'phrases')
LLM_C = {20240520: 'GPT-2', 20240801: 'Llama 3'}  # the first number of a header: the tokenizer
LLM_C_HEADER = 1024  # bytes


def shard_path(folder, split, number):
    return Path(folder) / (f'{split}_{number:05d}.bin' if number else f'{split}.bin')


class TokenBin:
    """The token ids of a split, cut into windows of block_size."""

    def __init__(self, folder, split, dtype, vocab_size, block_size, n_tokens=None, pairs=None,
                 eot=None):
        """n_tokens: expected number of ids, in one or more files; None: what one file has, as with
        nanoGPT's bins. pairs: of sources and targets, which eot separates. Raises UserError."""
        self.path = shard_path(folder, split, 0)
        self.dtype, self.vocab_size, self.block_size = dtype, vocab_size, block_size
        self.pairs, self.eot = pairs, eot
        self.shards, self.ends, self.n_tokens = [], [], 0  # ids per file; cumulative counts
        while not self.shards or n_tokens is not None and self.n_tokens < n_tokens:
            path = shard_path(folder, split, len(self.shards))
            if self.shards and not path.exists():
                break
            self.shards.append(Shard(path, dtype, may_have_header=n_tokens is None))
            self.n_tokens += self.shards[-1].n_tokens
            self.ends.append(self.n_tokens)
        files = f' in {len(self.shards)} files' if len(self.shards) > 1 else ''
        require(n_tokens in (None, self.n_tokens), f'{self.path} has {self.n_tokens} tokens{files} '
                                                   f'where meta.json says {n_tokens}; {AGAIN}')
        if pairs:
            require(self.n_tokens % block_size == 0,
                    f'{self.path}: rows of {block_size} do not add up to {self.n_tokens}; {AGAIN}')
            self.n_windows = self.n_samples = self.n_tokens // block_size
        else:
            require(self.n_tokens > block_size,
                    f'{self.path} has {plural(self.n_tokens, "token")}: block_size = {block_size} '
                    f'needs at least {block_size + 1}; lower --block_size or prepare more text')
            self.n_windows = -(-(self.n_tokens - 1) // block_size)  # the last may be shorter
            self.n_samples = max(1, (self.n_tokens - 1 - block_size) // block_size)  # per epoch

    def read(self, starts, count):
        """count ids from each position in starts, 0 past the end. -> (len(starts), count) int64.
        Raises UserError if an id is beyond the vocabulary."""
        batch = np.zeros((len(starts), count), self.dtype)
        for row, start in zip(batch, starts):
            number, done = bisect.bisect_right(self.ends, start), 0
            while done < count and number < len(self.shards):  # a row may cross into the next file
                first = start + done - (self.ends[number] - self.shards[number].n_tokens)
                part = self.shards[number].read(first, count - done)
                row[done:done + len(part)] = part
                number, done = number + 1, done + len(part)
        if batch.max(initial=0) >= self.vocab_size:
            i, j = np.argwhere(batch >= self.vocab_size)[0].tolist()
            raise UserError(f'{self.path}: token id {batch[i, j]} at position {starts[i] + j} is '
                            f'not below its tokenizer\'s vocab_size = {self.vocab_size}; {AGAIN}')
        return batch.astype(np.int64)

    def batch(self, first_sample, count, seed):
        """Samples first_sample, ..., first_sample + count - 1 of the endless shuffled stream.

        Each epoch visits every block of block_size tokens once, in an order and with an offset that
        follow from (seed, epoch) alone. Rows of pairs have no offset. -> x, y (count, block_size)
        int64; y: the tokens after x, -1 where there is no loss.
        """
        T = self.block_size
        n_blocks = self.n_samples
        sample = np.arange(first_sample, first_sample + count, dtype=np.uint64)
        epoch, place = np.divmod(sample, np.uint64(n_blocks))
        block, offset = np.empty_like(place), np.zeros_like(place)
        for e in np.unique(epoch):
            key = mix(mix(seed) ^ mix(e))
            here = epoch == e
            block[here] = permute(place[here], n_blocks, key)
            if not self.pairs:
                offset[here] = mix(key) % np.uint64(min(T, self.n_tokens - n_blocks * T))
        return self.inputs_and_targets((block * np.uint64(T) + offset).tolist())

    def inputs_and_targets(self, starts):
        """x, y (len(starts), block_size) from each position on."""
        window = self.read(starts, self.block_size + 1)  # (len(starts), T + 1)
        x, y = window[:, :-1], window[:, 1:]
        return x, self.pairs.targets(x, y, self.eot) if self.pairs else y

    def count_targets(self, first_sample, count, seed):
        """The number of tokens with a loss in these samples."""
        if not self.pairs:
            return count * self.block_size
        return int((self.batch(first_sample, count, seed)[1] >= 0).sum())

    def documents(self, number):
        """Of pairs: the documents of a row, each [source ids, target ids, ...]."""
        return split_documents(self.read([number * self.block_size], self.block_size)[0], self.eot)

    def windows(self, index):
        """Windows of the split laid end to end, by number. -> x, y (len(index), block_size) int64;
        y is -1 past the end."""
        T = self.block_size
        starts = np.asarray(index, dtype=np.int64) * T
        x, y = self.inputs_and_targets(starts.tolist())
        position = starts[:, None] + np.arange(1, T + 1)
        return x, np.where(position < self.n_tokens, y, -1)

    def evaluation_windows(self, count):
        """Indices of count random windows of the split, always the same ones; -1: all."""
        if count < 0 or count >= self.n_windows:
            return np.arange(self.n_windows)
        chosen = permute(np.arange(count, dtype=np.uint64), self.n_windows, np.uint64(0))
        return np.sort(chosen).astype(np.int64)

    def fingerprint_parts(self):
        """The ids that identify a split: all up to 2**25, else 64 parts of 2**15, evenly spread."""
        starts, count = range(0, self.n_tokens, 2**22), 2**22
        if self.n_tokens > 2**25:
            count = 2**15
            starts = np.linspace(0, self.n_tokens - count, 64, dtype=np.int64).tolist()
        for start in starts:
            yield self.read([start], min(count, self.n_tokens - start))[0]


class Shard:
    """The ids in a file. They are read, not mapped: mapped pages would count as memory of this
    process, and a file that is cut off under a run would end it without a word."""

    def __init__(self, path, dtype, may_have_header=False):
        """may_have_header: of llm.c. Raises UserError if the file is missing or cut off."""
        self.path, self.dtype, self.offset = path, dtype, 0
        with os_errors(path, AGAIN):
            check_lfs(path)
            self.fd = os.open(path, os.O_RDONLY | getattr(os, 'O_BINARY', 0)
                              | getattr(os, 'O_NONBLOCK', 0))  # a pipe would wait
            size = os.fstat(self.fd).st_size
            magic, *_ = np.frombuffer(self.read_bytes(0, 4).ljust(4), '<i4').tolist()
        if may_have_header and magic in LLM_C and size >= LLM_C_HEADER:
            require(LLM_C[magic] == 'GPT-2', f'{path}: llm.c made it with the tokenizer of '
                                             f'{LLM_C[magic]}, which is not supported; {AGAIN}')
            self.offset = LLM_C_HEADER
            version, n_tokens = np.frombuffer(self.read_bytes(4, 8), '<i4').tolist()
            require(version == 1 and n_tokens * 2 == size - LLM_C_HEADER,
                    f'{path}: its header (version {version}) says {n_tokens} tokens, it has '
                    f'{(size - LLM_C_HEADER) / 2:g}; {AGAIN}')
        elif may_have_header:
            ids = np.frombuffer(self.read_bytes(0, min(size, 2**13) // 4 * 4), '<u2')
            require(len(ids) < 32 or ids[1::2].max() >= 4 or ids[::2].max() < 4,
                    f'{path}: its ids look like uint32, every second uint16 is below 4; without '
                    f'meta.json they are read as uint16: {AGAIN}, or save them as np.uint16')
        n_bytes = size - self.offset
        require(n_bytes > 0 and n_bytes % dtype.itemsize == 0,
                f'{path}: its size, {plural(size, "byte")}, is not a multiple of {dtype.itemsize}, '
                f'or is 0: it is cut off; {AGAIN}')
        self.n_tokens = n_bytes // dtype.itemsize

    def read(self, first, count):
        """The ids from first on, at most count, (n,). Raises UserError if the file has shrunk."""
        count = min(count, self.n_tokens - first)
        size = self.dtype.itemsize
        data = self.read_bytes(self.offset + first * size, count * size)
        require(len(data) == count * size, f'{self.path} has become shorter since it was opened: '
                                           f'restore it, then go on with --init_from=resume')
        return np.frombuffer(data, self.dtype)

    def read_bytes(self, position, n):
        with os_errors(f'{self.path}: cannot be read'):
            if hasattr(os, 'pread'):
                return os.pread(self.fd, n, position)
            os.lseek(self.fd, position, os.SEEK_SET)  # Windows
            return os.read(self.fd, n)

    def __del__(self, close=os.close):  # at exit, `os` is gone
        if hasattr(self, 'fd'):
            close(self.fd)


@dataclass
class Dataset:
    folder: Path
    train: TokenBin
    val: TokenBin
    tokenizer: Tokenizer
    pairs: Pairs | None  # of sources and targets

    def __post_init__(self):
        self.token_bytes = self.tokenizer.text_bytes()  # (V,)
        self.sha256 = None

    def fingerprint(self):
        """A sha256 by which a resumed run recognizes its data: sizes and the parts above. They are
        read once."""
        if self.sha256 is None:
            sha256 = hashlib.sha256()
            for split in (self.train, self.val):
                size = split.n_tokens * split.dtype.itemsize
                sha256.update(f'{split.dtype.str} {size} '.encode())
                for ids in split.fingerprint_parts():
                    sha256.update(ids.astype(split.dtype))
            self.sha256 = sha256.hexdigest()
        return self.sha256


def find_dataset(name):
    """The folder of a data set: data/<name> here or in the repository, or a path."""
    for folder in (find(Path('data', name)), find(name)):
        if (folder / 'train.bin').exists() or (folder / 'val.bin').exists():
            return folder
    return Path('data') / name


def find_or_prepare(name):
    """find_dataset; prepares a small one that is missing. Raises UserError with the command."""
    folder = find_dataset(name)
    absent = [split for split in ('train', 'val') if not (folder / f'{split}.bin').exists()]
    if not absent:
        return folder
    if len(absent) == 1:
        raise UserError(f'dataset = {name!r}: there is no {absent[0]}.bin in {folder}, only the '
                        f'other split: copy it too, or {AGAIN}')
    require(not find(name).is_file(), f'dataset = {name!r} is a file: make a data set of it with: '
                                      f'{command("data/text/prepare.py", input=name)}')
    script = DATA / name / 'prepare.py'
    scripts = sorted(path.parent.name for path in DATA.glob('*/prepare.py'))
    folders = {path.parent.name for path in DATA.glob('*/train.bin')}
    missing = f'dataset = {name!r}: there is no {folder / "train.bin"}'
    hint = nearest(name, [*scripts, *folders], otherwise='')
    prepare_own = command('data/text/prepare.py', input='PATH', dataset=name)
    require(script.exists(), f'{missing} and no {name} among {", ".join(scripts)}{hint}; for your '
                             f'own text: {prepare_own}, for sources and targets '
                             f'data/pairs/prepare.py; if it was moved: --dataset=PATH')
    own = {'input': 'PATH'} if name in ('text', 'pairs') else {}
    prepare = command(f'data/{name}/prepare.py', **own)
    require(name in SMALL_DATASETS, f'{missing}; make it with: {prepare} (or start small: python '
                                    'train.py config/quickstart.py)')
    print(f'{folder / "train.bin"} is missing: running {prepare}', flush=True)
    code = subprocess.run([sys.executable, script]).returncode
    if code:
        sys.exit(code)
    return find_dataset(name)


def open_dataset(folder, block_size):
    """Open both bins of a folder and read their tokenizer. Raises UserError that names the file.

    block_size: tokens of a sample; rows of pairs are taken whole and may be shorter. Without
    meta.json the bins are nanoGPT's: uint16, with the characters of meta.pkl or GPT-2's vocabulary.
    """
    folder = Path(folder)
    meta = read_meta(folder) or NANOGPT_META
    tokenizer = open_tokenizer(folder) or gpt2()
    dtype = np.dtype(meta['dtype']).newbyteorder('<')
    pairs = meta['pairs']
    if pairs:
        T = pairs.block_size
        require(T <= block_size,
                f'block_size = {block_size}: the rows of {folder} have {T} tokens: prepare it with '
                f'--block_size={block_size}, or train a model with --block_size={T}')
        block_size = T
    splits = [TokenBin(folder, split, dtype, tokenizer.vocab_size, block_size,
                       meta[f'{split}_tokens'], pairs, tokenizer.eot) for split in ('train', 'val')]
    return Dataset(folder, *splits, tokenizer, pairs)


NANOGPT_META = {'dtype': 'uint16', 'train_tokens': None, 'val_tokens': None, 'pairs': None}
META = {'dtype': str, 'tokenizer': dict, 'train_tokens': int, 'val_tokens': int}


def read_meta(folder):
    """folder/meta.json with its Pairs, or None if there is none. Raises UserError if it is not
    ours."""
    path = Path(folder) / 'meta.json'
    if not path.exists():
        return None
    with restate((UserError, TypeError), path, remedy=AGAIN):
        meta = read_json(path)
        check_kinds(meta, {'format': int}, path)
        require(meta['format'] == FORMAT,
                f'format {meta["format"]} is not {FORMAT}, the one this version reads')
        check_kinds(meta, META, path)
        require(meta['dtype'] in ('uint16', 'uint32'),
                f'dtype = {meta["dtype"][:40]!r} is neither uint16 nor uint32')
        if meta.setdefault('pairs', None) is not None:
            meta['pairs'] = Pairs(**meta['pairs'])
            check_fields(meta['pairs'])
        return meta


def open_tokenizer(folder):
    """The tokenizer of a data folder: from meta.json, else from nanoGPT's meta.pkl, else None."""
    folder = Path(folder)
    meta = read_meta(folder)
    if meta:
        with restate(UserError, folder / 'meta.json', remedy=AGAIN):
            return Tokenizer.from_dict(meta['tokenizer'])
    path = folder / 'meta.pkl'
    return read_nanogpt_meta(path) if path.exists() else None


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; a pickle that names code is refused."""

    def find_class(self, module, name):
        raise UserError(f'refused: this pickle would run {module}.{name}')


RESAVE_META = """if you trust it, save it again as plain values: \
python -c "import pickle; m = pickle.load(open('{path}', 'rb')); \
pickle.dump({{'vocab_size': int(m['vocab_size']), 'itos': {{int(i): str(s) for i, s in \
m.get('itos', {{}}).items()}}, 'stoi': {{str(s): int(i) for s, i in m.get('stoi', \
{{}}).items()}}}}, open('{path}', 'wb'))\""""


def read_nanogpt_meta(path):
    """nanoGPT's meta.pkl -> CharTokenizer; IdTokenizer if not every id has one character. Raises
    UserError."""
    check_lfs(path)
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
        vocab_size, stoi = meta['vocab_size'], meta.get('stoi') or {}
        names = meta.get('itos') or {i: name for name, i in stoi.items()}
        names = names if isinstance(names, dict) else dict(enumerate(names))
        names = {int(i): name for i, name in names.items()}
        require(type(vocab_size) is int and 0 < vocab_size <= 2**24,
                f'vocab_size = {str(vocab_size)[:40]}')
        for name, i in stoi.items():
            require(names.get(i) == name, f'stoi has {name!r}: {i}, itos {i}: {names.get(i)!r}')
        names = [names.get(i) for i in range(vocab_size)]
        if all(isinstance(name, str) and len(name) == 1 for name in names):
            return CharTokenizer(''.join(names))
        return IdTokenizer(names)
    except Exception as error:  # unpickling garbage raises anything
        remedy = RESAVE_META.format(path=path) if 'would run' in str(error) else AGAIN
        raise UserError(f'{path}: {reason_of(error)}; {remedy}') from None


def mix(x):
    """splitmix64's finalizer (Steele et al. 2014) on uint64; numpy's generators may change."""
    with np.errstate(over='ignore'):
        x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def derive_seed(seed, number):
    """A seed for torch.manual_seed that follows from a run's seed and a counter."""
    return int(mix(mix(seed) ^ mix(~np.uint64(number)))) % 2**63


def permute(index, n, key):
    """A permutation of 0, ..., n - 1, chosen by key, applied to index (uint64 array).

    A Feistel network of 6 rounds (Luby & Rackoff 1988) permutes the next power of 4; values at n or
    above go through again (cycle walking: Black & Rogaway 2002).
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
