"""Write bins of sources and targets: check, tokenize, split by source, pack into rows."""
import hashlib

import numpy as np
from tqdm import tqdm

from lib.errors import plural, require
from lib.pairs import Pairs, join_turns
from lib.write import Piece, dataset_folder, write_dataset


def split_hash(source):
    """A number from 0 to 1 that decides the split: a source keeps its split as a file grows."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8]) / 2**64


def write_pairs(documents, tokenizer, name, dataset, block_size=128, packing=True,
                mask_prompt=True, val_fraction=0.05):
    """Write the bins of data/<dataset>; the other keys are those of data/pairs/prepare.py.

    documents: [('line 3', [source, target, source, target, ...])]. tokenizer: with `<|endoftext|>`.
    name: of the documents, for messages. Raises UserError.
    """
    kept, lengths, too_long, turns = [], [], [], 0
    for where, parts in tqdm(documents, desc='tokenize', unit='pair', delay=1,
                             disable=None, leave=False):
        ids = join_turns([tokenizer.encode_ordinary(part) for part in parts], tokenizer.eot)
        lengths.append(len(ids))
        if len(ids) > block_size:
            too_long.append(where)
            continue
        kept.append((split_hash(parts[0]), ids, ''.join(parts)))
        turns = max(turns, len(parts) // 2)
    report_lengths(lengths, too_long, kept, name, block_size)
    # at least one source for validation
    boundary = max(val_fraction, min(position for position, *_ in kept))
    splits = {'train': [], 'val': []}
    for position, ids, text in kept:
        splits['train' if position > boundary else 'val'].append((ids, text))
    require(splits['train'], f'{name}: no pair is left to train on: all have the same source, '
                             f'or val_fraction = {val_fraction} takes all; give more of them')

    def pieces():
        for split, pairs in splits.items():
            for row in pack(pairs, block_size, packing):
                ids = np.full(block_size, tokenizer.eot, dtype=np.uint32)
                whole = np.concatenate([ids for ids, _ in row])
                ids[:len(whole)] = whole
                yield Piece(split, ''.join(text for _, text in row), ids=ids)

    size = sum(len(text.encode('utf-8')) for _, _, text in kept)
    layout = Pairs(block_size, turns, packing, mask_prompt)
    write_dataset(dataset_folder(dataset), pieces(), tokenizer, name, size, pairs=layout)
    print(f'{plural(len(splits["train"]), "pair")} to train on, {len(splits["val"]):,} for '
          f'validation')


def report_lengths(lengths, too_long, kept, name, block_size):
    """Print how long the pairs are, and which do not fit. Raises UserError if none does."""
    median, most, longest = (int(np.quantile(lengths, share, method='higher'))
                             for share in (0.5, 0.95, 1))
    print(f'{plural(len(lengths), "pair")}: half of them have up to {plural(median, "token")}, 95% '
          f'up to {most}, the longest has {longest}')
    if not too_long:
        return
    places = ', '.join(too_long[:10]) + (', ...' if len(too_long) > 10 else '')
    message = (f'{len(too_long):,} longer than block_size = {block_size} left out ({places}); '
               f'--block_size={longest} keeps all')
    require(kept, f'{name}: no pair is left: {message}')
    print(message)


def pack(documents, size, packing, n_open=64):
    """Rows of at most `size` ids out of documents (ids, text), yielded as lists of documents.

    Best fit: each document goes into the fullest of n_open rows that has room for it.
    """
    rows = []  # [number of ids, documents]
    for ids, text in documents:
        fitting = [row for row in rows if row[0] + len(ids) <= size] if packing else []
        row = max(fitting, key=lambda row: row[0], default=None)
        if row is None:
            row = [0, []]
            rows.append(row)
        row[0] += len(ids)
        row[1].append((ids, text))
        if len(rows) > n_open:
            fullest = max(range(len(rows)), key=lambda i: rows[i][0])
            yield rows.pop(fullest)[1]
    for _, documents in rows:
        yield documents
