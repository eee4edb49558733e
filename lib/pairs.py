"""How sources and targets are laid out in a row of token ids: everything follows from the ids.

A document of n turns is `e source e target e ... source e target e`, e = `<|endoftext|>`, and the
rest of a row is filled with e. So two consecutive e begin a document, and its first, third, ...
part is a source. Plain text has one e before each document (turns = 0).

The functions take numpy arrays (bins) and torch tensors (the model).
"""
from dataclasses import dataclass

import numpy as np

from configurator import Count


def document_numbers(tokens, eot, turns):
    """The document of each token, counted from the left. tokens: (B, T), -1 = padding before a row
    -> (B, T)"""
    starts = (tokens == eot) | False  # a copy: the next line writes into it
    if turns:
        starts[:, 1:] &= (tokens[:, :-1] == eot) | (tokens[:, :-1] < 0)
    return starts.cumsum(1)


def source_parts(tokens, eot):
    """(True in sources, number of the part each token belongs to) of a row of pairs. (B, T) each"""
    part = (tokens == eot).cumsum(1)
    document = document_numbers(tokens, eot, turns=1)
    # part + document grows by 2 at a document's first part and by 1 at each later one
    return ((part + document) % 2 == 0) & (document > 0), part


@dataclass
class Pairs:
    """A data set of pairs: rows of block_size ids, each with whole documents."""
    block_size: Count
    turns: Count  # most turns of a document
    packing: bool  # several documents per row
    mask_prompt: bool  # only targets and the <|endoftext|> after them have a loss

    def targets(self, x, y, eot):
        """y (B, T), the tokens after x, with -1 where there is no loss."""
        if self.mask_prompt:
            no_loss = source_parts(x, eot)[0]
        else:
            no_loss = (x == eot) & (y == eot)  # padding, and the beginning of a document
        no_loss[:, -1] = True  # the next row is another text
        return np.where(no_loss, -1, y)


def split_documents(row, eot):
    """[[source ids, target ids, source ids, ...], ...], one list per document. row: (T,)"""
    documents = []
    for part in np.split(row, np.flatnonzero(row == eot))[1:]:  # each begins with an eot
        if len(part) == 1:
            documents.append([])
        else:
            documents = documents or [[]]
            documents[-1].append(part[1:].tolist())
    return [document for document in documents if document]


def join_turns(parts, eot):
    """[source ids, target ids, ...] -> the ids of a document, (n,) uint32"""
    end = np.array([eot], dtype=np.uint32)
    return np.concatenate([end, *(ids for part in parts for ids in (part, end))])
