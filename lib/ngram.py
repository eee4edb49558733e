"""Hashed n-gram embeddings (Huang et al. 2025, Over-Tokenized Transformer)."""
import torch
import torch.nn as nn
from torch.nn import functional as F

from lib.linear import make_embedding
from lib.pairs import document_numbers

PRIME = 2**31 - 1  # token ids stay below it: no product overflows 64 bits


class NgramEmbedding(nn.Module):
    """Sum of the embeddings of the last 2, ..., ngram tokens at each position. -> (B, T, C)

    Each length has a hash table of ngram_rows rows. The model looks up what its first layers would
    otherwise have to learn: which few tokens came last.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lengths = range(2, config.ngram + 1)
        self.tables = make_embedding(len(self.lengths) * config.ngram_rows, config.n_embd)

    def hash(self, tokens):
        """Hash table rows. tokens: (B, ngram - 1 + T), -1 = nothing -> (B, T, ngram - 1)"""
        c = self.config
        before = len(self.lengths)
        T = tokens.size(1) - before
        base = c.vocab_size + 1
        if c.eot_token is not None:
            document = document_numbers(tokens, c.eot_token, c.turns)
        number = tokens[:, before:].clamp(min=0)  # an n-gram as digits, its last token the lowest
        rows = []
        for i, n in enumerate(self.lengths):
            window = slice(before - n + 1, before - n + 1 + T)
            token = tokens[:, window]
            if c.eot_token is not None:  # tokens of another document count as nothing
                token = token.where(document[:, window] == document[:, before:], -1)
            number = (number + (token + 1) * pow(base, n - 1, PRIME)) % PRIME
            if base**n <= c.ngram_rows:  # few n-grams: a row each
                row = number
            else:  # universal hashing: Carter & Wegman 1979
                row = number * 1181783497 % PRIME % c.ngram_rows
            rows.append(row + i * c.ngram_rows)
        return torch.stack(rows, dim=-1)

    def forward(self, tokens):
        rows = self.hash(tokens)  # (B, T, ngram - 1)
        x = F.embedding_bag(rows.flatten(0, 1), self.tables.weight, mode='sum')
        return x.view(*rows.shape[:2], -1)
