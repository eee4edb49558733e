"""Datasets on disk: round trips, validation, and batches as a pure function of the seed."""

import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import ROOT, Evil, write_nanogpt_dataset
from lib import bins, tokenizer, write
from lib.bpe import train_bpe, train_char
from lib.errors import UserError
from lib.text import hub_documents, read_pieces, split_at_end


class WideTokenizer(tokenizer.ByteTokenizer):
    """Its ids do not fit into uint16."""

    def __init__(self):
        self.token_bytes = [b'?'] * 70000
        self.set_special({})

    def encode_ordinary(self, text):
        return super().encode_ordinary(text) * 270

    def to_dict(self):
        return {'kind': 'byte'}


def write_text(folder, text, tok=None, **options):
    tok = tok or train_char([text])
    return write.write_dataset(
        folder, split_at_end([(text, False)], len(text.encode())), tok, 'a test', **options
    )


def read_all(split):
    return split.read([0], split.n_tokens)[0].tolist()


def test_bins_round_trip_text(tmp_path, text):
    text = text.encode('ascii', errors='ignore').decode()
    meta = write_text(tmp_path, text)
    data = bins.open_dataset(tmp_path, 64)
    decode = data.tokenizer.decode
    assert decode(read_all(data.train)) + decode(read_all(data.val)) == text
    assert data.train.n_tokens == int(len(text) * 0.9)  # like nanoGPT
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    assert meta['source_sha256'] == hashlib.sha256(text.encode()).hexdigest()
    assert (
        meta['dtype'],
        meta['vocab_size'],
        meta['train_tokens'],
        meta['train_bytes'],
        meta['format'],
    ) == ('uint16', len(set(text)), data.train.n_tokens, data.train.n_tokens, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        '.lock',
        'meta.json',
        'train.bin',
        'val.bin',
    ]


def test_bins_use_uint32_for_large_vocabulary(tmp_path, text):
    meta = write_text(tmp_path, text, WideTokenizer())
    assert meta['dtype'] == 'uint32'
    raw = np.fromfile(tmp_path / 'train.bin', dtype='<u4')
    assert raw.tolist() == [b * 270 for b in text.encode()[: len(raw)]] and raw.max() > 2**14


def test_bin_writer_rejects_out_of_range_ids(tmp_path):
    with write.BinWriter(tmp_path, 'train', 65536) as writer:
        writer.append([1, 2, 3])
        for wrong in ([5, 65536], [5, -1]):
            with pytest.raises(UserError, match=f'token id {wrong[1]} at position 4 '):
                writer.append(wrong)


def test_write_dataset_keeps_old_dataset_on_failure(tmp_path, text):
    write_text(tmp_path, text)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match='not one of'):
        write_text(tmp_path, text + '🙂', train_char([text]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_split_at_end_cuts_between_characters(tmp_path):
    documents = [('é' * 50, True), ('日本' * 30, True)]
    size = sum(len(t.encode()) for t, _ in documents)
    pieces = list(split_at_end(documents, size, 0.3))
    assert ''.join(p.text for p in pieces) == 'é' * 50 + '日本' * 30
    assert [(p.split, p.ends_document) for p in pieces] == [
        ('train', True),
        ('train', False),
        ('val', True),
    ]
    tok = train_bpe([t for t, _ in documents], 260)
    write.write_dataset(tmp_path, pieces, tok, 'two documents')
    data = bins.open_dataset(tmp_path, 4)
    train, val = read_all(data.train), read_all(data.val)
    assert train.count(tok.eot) == 1 and val[-1] == tok.eot
    assert data.token_bytes[train + val].sum() == size  # eot has no bytes


@pytest.mark.parametrize(
    'content', ['日本語 ' * 1000, 'x' * 3000, '🙂' * 800, 'ab\n' * 900, 'short', '']
)
def test_read_pieces_bounds_piece_size(tmp_path, content):
    (tmp_path / 'x.txt').write_bytes(content.encode())
    for size in (16, 101, 4096):
        pieces = list(read_pieces(tmp_path / 'x.txt', size, cuts_anywhere=True))
        assert ''.join(pieces) == content
        assert all(0 < len(p) <= 2 * size for p in pieces)
    (tmp_path / 'x.txt').write_bytes(b'fine ' * 10 + b'\xff\xfe' + b' fine' * 10)
    with pytest.raises(UserError, match='byte 50 is not UTF-8'):
        list(read_pieces(tmp_path / 'x.txt', 16))


def make_bin(tmp_path, n_tokens, block_size, lengths=None):
    """A split that counts upwards from 0, in files of these lengths."""
    ends = np.cumsum(lengths or [n_tokens])
    for number, ids in enumerate(np.split(np.arange(n_tokens, dtype='<u2'), ends[:-1])):
        ids.tofile(tmp_path / (f'train_{number:05d}.bin' if number else 'train.bin'))
    return bins.TokenBin(tmp_path, 'train', np.dtype('<u2'), 65536, block_size, n_tokens)


def test_batch_depends_only_on_seed_and_samples_seen(tmp_path):
    data = make_bin(tmp_path, 1000, 16)
    x, y = data.batch(0, 200, seed=1)
    assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (200, 16)
    np.testing.assert_array_equal(y, x + 1)  # the split counts upwards
    for first, count in ((0, 1), (7, 50), (190, 10), (60, 9)):
        again_x, again_y = data.batch(first, count, seed=1)
        np.testing.assert_array_equal(again_x, x[first : first + count])
        np.testing.assert_array_equal(again_y, y[first : first + count])
    assert not np.array_equal(data.batch(0, 200, seed=2)[0], x)


@pytest.mark.parametrize('lengths', [[999, 1], [1, 999], [300, 300, 300, 100], [10] * 100])
def test_batch_is_independent_of_sharding(tmp_path, lengths):
    (tmp_path / 'one').mkdir()
    one, many = make_bin(tmp_path / 'one', 1000, 16), make_bin(tmp_path, 1000, 16, lengths)
    assert len(many.shards) == len(lengths)
    for a, b in zip(
        one.batch(0, 200, seed=1) + one.windows(range(63)),
        many.batch(0, 200, seed=1) + many.windows(range(63)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    'n_tokens, block_size',
    [(1000, 16), (50, 16), (33, 16), (32, 16), (18, 16), (17, 16), (5, 1), (2, 1)],
)
def test_batch_visits_every_block_once_per_epoch(tmp_path, n_tokens, block_size):
    data = make_bin(tmp_path, n_tokens, block_size)
    n_blocks = max(1, (n_tokens - 1 - block_size) // block_size)
    starts = data.batch(0, 5 * n_blocks, seed=3)[0][:, 0].reshape(5, n_blocks)
    orders = set()
    if n_blocks > 5:
        assert len(set((starts % block_size)[:, 0])) > 1  # every epoch has its own offset
    for epoch in starts:
        assert len(set(epoch % block_size)) == 1 or n_blocks == 1  # shared by all its blocks
        offset = epoch.min()
        assert sorted((epoch - offset).tolist()) == [i * block_size for i in range(n_blocks)]
        orders.add(tuple(epoch.tolist()))
    if n_blocks > 5:
        assert len(orders) == 5


@pytest.mark.parametrize('n', [1, 2, 3, 10, 64, 65, 1000])
def test_permute_is_bijective_for_every_key(n):
    results = [
        bins.permute(np.arange(n, dtype=np.uint64), n, np.uint64(key)).tolist() for key in range(20)
    ]
    assert all(sorted(result) == list(range(n)) for result in results)
    if n >= 64:
        assert len(set(map(tuple, results))) == 20
        mean_first = np.mean([result[0] for result in results]) / n
        assert 0.2 < mean_first < 0.8


def test_mix_matches_splitmix64():
    # the first outputs of Vigna's splitmix64.c for seed 1234567
    gamma, state, out = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        out.append(int(bins.mix(np.uint64(state))))
        state = (state + gamma) % 2**64
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize('n_tokens', [100, 97, 96, 81, 17])
def test_windows_cover_split_exactly_once(tmp_path, n_tokens):
    data = make_bin(tmp_path, n_tokens, 16)
    x, y = data.windows(data.evaluation_windows(-1))
    # every token except the first is predicted exactly once
    assert y[y >= 0].tolist() == list(range(1, n_tokens))
    np.testing.assert_array_equal(x[y >= 0] + 1, y[y >= 0])
    some = data.evaluation_windows(3)
    assert len(set(some.tolist())) == min(3, data.n_windows)
    np.testing.assert_array_equal(some, data.evaluation_windows(3))


def break_folder(folder, damage, monkeypatch):
    if damage == 'missing':
        (folder / 'val.bin').unlink()
    elif damage == 'empty':
        (folder / 'train.bin').write_bytes(b'')
    elif damage == 'odd':
        (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-1])
    elif damage == 'short':
        (folder / 'val.bin').write_bytes((folder / 'val.bin').read_bytes()[:20])
    elif damage == 'beyond':
        tokens = np.fromfile(folder / 'train.bin', dtype='<u2')
        tokens[123] = 40000
        tokens.tofile(folder / 'train.bin')
    elif damage == 'other':
        (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-200])
    elif damage == 'meta':
        (folder / 'meta.json').write_text('{"format": 1}')
    elif damage == 'format':
        (folder / 'meta.json').write_text('{"format": 99}')
    elif damage in ('train.bin', 'meta.json'):  # a pipe in its place
        (folder / damage).unlink()
        os.mkfifo(folder / damage)
    elif damage == 'folder':
        (folder / 'val.bin').unlink()
        (folder / 'val.bin').mkdir()
    elif damage == 'disk':
        real = os.pread

        def failing(fd, n, position):
            if position:
                raise OSError(errno.EIO, 'Input/output error')
            return real(fd, n, position)

        monkeypatch.setattr(os, 'pread', failing)


BROKEN = {
    'missing': 'val.bin',
    'empty': 'train.bin: its size, 0 bytes',
    'odd': 'bytes, is not a multiple of 2',
    'short': 'val.bin has 10 tokens where meta.json says',
    'beyond': 'train.bin: token id 40000 at position 123',
    'other': 'tokens where meta.json says',
    'meta': 'meta.json',
    'format': 'format 99',
    'train.bin': 'train.bin: cannot be read',
    'meta.json': 'meta.json: not JSON: it is a folder or a pipe',
    'folder': 'val.bin: cannot be read: Is a directory',
    'disk': 'train.bin: cannot be read: Input/output error',
}


@pytest.mark.parametrize('damage, message', BROKEN.items())
def test_open_dataset_reports_broken_files(tmp_path, text, damage, message, monkeypatch):
    write_text(tmp_path, text)
    break_folder(tmp_path, damage, monkeypatch)
    with pytest.raises(UserError, match=re.escape(message)):
        data = bins.open_dataset(tmp_path, 64)
        data.fingerprint()
        data.train.batch(100, 4, 0)


def test_bins_report_split_shorter_than_block_size(tmp_path):
    with pytest.raises(
        UserError, match='train.bin has 16 tokens: block_size = 16 needs at least 17'
    ):
        make_bin(tmp_path, 16, 16)


def test_batch_rejects_ids_beyond_vocabulary(tmp_path):
    np.full(1000, 11, dtype='<u2').tofile(tmp_path / 'train.bin')
    data = bins.TokenBin(tmp_path, 'train', np.dtype('<u2'), 10, 16)
    with pytest.raises(UserError, match='token id 11 at position'):
        data.batch(0, 1, seed=0)


def test_open_dataset_reads_nanogpt_bins(tmp_path, text):
    write_nanogpt_dataset(tmp_path, text)
    data = bins.open_dataset(tmp_path, 64)
    decode = data.tokenizer.decode
    assert decode(read_all(data.train)) + decode(read_all(data.val)) == text


@pytest.mark.parametrize('payload', ['evil', 'garbage', 'list', 'null bytes'])
def test_open_dataset_never_runs_pickled_code(tmp_path, text, payload):
    write_nanogpt_dataset(tmp_path, text)
    content = {
        'evil': pickle.dumps({'vocab_size': 2, 'itos': Evil(str(tmp_path / 'ran'))}),
        'garbage': b'\x80\x04hello',
        'list': pickle.dumps([1, 2]),
        'null bytes': bytes(99),
    }[payload]
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match='meta.pkl'):
        bins.open_dataset(tmp_path, 64)
    assert not (tmp_path / 'ran').exists()


def test_a_meta_pkl_that_contradicts_itself_is_refused(tmp_path):
    write_nanogpt_dataset(tmp_path, 'abcdefgh' * 400)
    path = tmp_path / 'meta.pkl'
    meta = pickle.loads(path.read_bytes())
    swapped = meta['stoi'] | {'a': 1, 'b': 0}
    path.write_bytes(pickle.dumps(meta | {'stoi': swapped}))
    with pytest.raises(UserError, match="meta.pkl: stoi has 'a': 1, itos 1: 'b'; prepare"):
        bins.open_dataset(tmp_path, 16)
    for change in ({'stoi': meta['stoi'] | {'z': 8}}, {'itos': ['b', 'a', *'cdefgh']}):
        path.write_bytes(pickle.dumps(meta | change))
        with pytest.raises(UserError, match='meta.pkl: stoi has'):
            bins.open_dataset(tmp_path, 16)
    for change in ({'itos': list('abcdefgh')}, {'itos': {}}, {'stoi': {}}):  # one of them will do
        path.write_bytes(pickle.dumps(meta | change))
        assert bins.open_dataset(tmp_path, 16).tokenizer.characters == 'abcdefgh'
    size = {'vocab_size': 8}
    for value in ({'itos': {}}, 3, size | {'itos': 3}, size | {'stoi': {'a': []}}):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match='meta.pkl: .*prepare') as error:
            bins.open_dataset(tmp_path, 16)
        assert not re.search('Error|object|type:', str(error.value))


@pytest.mark.parametrize('dtype', ['<u4', '<i8'])
def test_wide_ids_without_meta_json_are_refused(tmp_path, dtype):
    """nanoGPT's bins are uint16: of wider ones every second number is an upper half, and small."""
    write_nanogpt_dataset(tmp_path, 'to be or not to be, that is ' * 40)
    ids = np.fromfile(tmp_path / 'train.bin', '<u2')
    for wide in (ids.astype(dtype), ids.astype(dtype) + 2**17):
        wide.tofile(tmp_path / 'train.bin')
        with pytest.raises(UserError, match='train.bin: its ids look like uint32.*np.uint16'):
            bins.open_dataset(tmp_path, 16)
    for narrow in (ids, ids % 4, ids[:20], np.zeros(900), np.arange(900) % 4, np.full(900, 7)):
        narrow.astype('<u2').tofile(tmp_path / 'train.bin')  # 4 characters: DNA
        assert bins.open_dataset(tmp_path, 16).train.n_tokens == len(narrow)


def test_bins_are_sharded_above_size_limit(tmp_path, text, monkeypatch):
    monkeypatch.setattr(write, 'SHARD_BYTES', 2 * 1001)
    text = text[:9999]
    meta = write_text(tmp_path, text)
    names = [
        'train.bin',
        *(f'train_{n:05d}.bin' for n in range(1, -(-meta['train_tokens'] // 1001))),
        'val.bin',
    ]
    assert sorted(path.name for path in tmp_path.glob('*.bin')) == names
    assert all((tmp_path / name).stat().st_size == 2002 for name in names[:-2])
    data = bins.open_dataset(tmp_path, 64)
    assert data.tokenizer.decode(read_all(data.train) + read_all(data.val)) == text
    before = data.fingerprint()
    ids = np.fromfile(tmp_path / names[3], '<u2')
    ids[:2] = ids[1] + 1, 1
    ids.tofile(tmp_path / names[3])
    assert bins.open_dataset(tmp_path, 64).fingerprint() != before

    (tmp_path / names[3]).rename(tmp_path / 'elsewhere')
    with pytest.raises(
        UserError, match=f'has 3003 tokens in 3 files where meta.json says {meta["train_tokens"]}'
    ):
        bins.open_dataset(tmp_path, 64)
    write_text(tmp_path, text[:999])  # no stale shards remain
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        '.lock',
        'elsewhere',
        'meta.json',
        'train.bin',
        'val.bin',
    ]


def test_write_dataset_stops_at_max_tokens(tmp_path):
    pieces = [
        write.Piece('val' if i % 5 == 4 else 'train', 'some words of a document ', True)
        for i in range(1000)
    ]
    meta = write.write_dataset(
        tmp_path, iter(pieces), tokenizer.ByteTokenizer(), 'test', max_tokens=2000
    )
    assert 2000 <= meta['train_tokens'] + meta['val_tokens'] < 2000 + 25


def test_write_dataset_detects_small_disk_early(tmp_path, text, monkeypatch):
    monkeypatch.setattr(write, 'ESTIMATE_BYTES', 1000)
    monkeypatch.setattr(write.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=len(text)))
    pieces = [
        write.Piece('val' if i % 9 == 8 else 'train', text[at : at + 500])
        for i, at in enumerate(range(0, len(text), 500))
    ]
    with pytest.raises(UserError, match='0.0 GB are still needed, 0.0 GB are free'):
        write.write_dataset(
            tmp_path, pieces, train_char([text]), 'test', len(text.encode())
        )
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_fingerprint_samples_the_whole_split(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(2 * 2**26)  # zeros, without using the disk
    split = bins.TokenBin(tmp_path, 'train', np.dtype('<u2'), 65536, 16, 2**26)
    before = [ids.sum() for ids in split.fingerprint_parts()]
    assert len(before) == 64 and not any(before)
    ids = np.memmap(tmp_path / 'train.bin', '<u2', mode='r+')
    ids[2**25 :] = 1  # the second half
    ids.flush()
    assert sum(ids.any() for ids in split.fingerprint_parts()) == 32


def test_hub_documents_name_identifies_config_and_files(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}')

    def name_of(path, name):
        return hub_documents(str(path), name, val_every=2)[1]

    names = [
        name_of('someone/something', None),
        name_of('someone/something', 'x'),
        name_of(tmp_path, None),
    ]
    assert names[:2] == ['someone/something', 'someone/something, x']
    assert name_of(tmp_path, None) == names[2]
    (tmp_path / 'a.jsonl').write_text('{"text": "b", "more": 1}')
    assert name_of(tmp_path, None) not in names


def test_bin_writer_writes_nothing_on_out_of_range_id(tmp_path):
    code = f"""
from lib.write import BinWriter
writer = BinWriter({str(tmp_path)!r}, "train", 65536)
writer.append([65535, 65536])
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert 'token id 65536 at position 1' in result.stderr
    assert (tmp_path / 'train.bin.tmp').stat().st_size == 0
