"""Change parts of a model for a while: switch off heads, neurons or n-grams, set attention by hand.

    with changed(model, 'L0.H3=0,mlp1=0.5'):
        trace = interpret.run(model, idx)

All that runs the model sees the changes. They are a text, name=number,..., as in the URL of the
page of explain.py (web/changes.js does the same there); a factor from 0 (off) to 2 for

    L0.H3         a head: what it mixes from the values, before the output projection
    attn0         all heads of a layer
    L1.n57        a neuron: its activation
    mlp1          all neurons of a layer
    ngrams        the n-gram embeddings
    positions     the position embeddings; RoPE: its angles

and

    mask=0        queries see keys that come after them
    L0.H3@5.2=1   the attention of query 5 to key 2, from 0 to 1; the other weights of the query
                  keep their proportions and add up to the rest

Biases of output projections stay.
"""
import contextlib
import math
import re

import torch

from lib.errors import require

NAME = re.compile(r'L(\d+)\.(?:H(\d+)(?:@(\d+)\.(\d+))?|n(\d+))|(?:attn|mlp)(\d+)'
                  r'|ngrams|positions|mask', re.ASCII)
NUMBER = re.compile(r'\d(\.\d+)?', re.ASCII)


class Changes:
    """What a text of changes does to a model of this config. Raises UserError."""

    def __init__(self, text, config):
        L, nh, F, T = config.n_layer, config.n_head, config.mlp_width, config.block_size
        self.heads = torch.ones(L, nh)  # factors
        self.neurons = torch.ones(L, F)
        self.looks = []  # (layer, head, query, key, share)
        self.others = {'ngrams': 1.0, 'positions': 1.0, 'mask': 1.0}
        sizes = L, nh, T, T, F, L
        for name, number in dict(x.partition('=')[::2] for x in text.split(',') if x).items():
            found = NAME.fullmatch(name)
            where = [x and int(x) for x in found.groups()] if found else []
            is_there = (found and all(i is None or i < n for i, n in zip(where, sizes))
                        and (name != 'ngrams' or config.ngram > 1)
                        and (name != 'positions' or config.position != 'none'))
            require(is_there, f'changes: this model has no {name!r}')
            most = 0 if name == 'mask' else 1 if '@' in name else 2
            require(NUMBER.fullmatch(number) and float(number) <= most,
                    f'changes: {name} = {number!r}: give a number from 0 to {most}')
            self.add(name, float(number), *where)

    def add(self, name, number, layer, head, query, key, neuron, of_layer):
        if query is not None:
            self.looks.append((layer, head, query, key, number))
        elif head is not None:
            self.heads[layer, head] *= number
        elif neuron is not None:
            self.neurons[layer, neuron] *= number
        elif of_layer is not None:
            (self.heads if name.startswith('attn') else self.neurons)[of_layer] *= number
        else:
            self.others[name] = number


class Attention:
    """CausalSelfAttention.attend of one layer, written out, with changes. It needs the whole text:
    there is no KV cache."""

    def __init__(self, factors=1.0, looks=(), frozen=None):
        """factors: (nh, 1, 1) of the heads. looks: [(head, query, key, share)]. frozen: (nh, T, T),
        patterns to use at the positions that they have."""
        self.factors = factors
        self.looks = looks
        self.frozen = frozen

    def __call__(self, q, k, v, mask=None, dropout=0.0):
        return self.mix(self.weights(q, k, mask), v)

    def weights(self, q, k, mask=None):
        """The attention pattern (B, nh, T, T) of q (B, nh, T, hs) and k (B, nkv, T, hs)."""
        if q.size(2) != k.size(2):
            raise ValueError('changes need the whole text: generate with use_cache=False')
        if mask is None:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, nh, T, hs)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        attention = scores.masked_fill(~mask, float('-inf')).softmax(dim=-1)
        if self.frozen is not None:
            attention = put_rows(attention, self.frozen.to(attention))
        mask = mask.expand_as(attention)
        for head, query, key, share in self.looks:
            if max(query, key) < q.size(2):
                attention = look(attention, mask, head, query, key, share)
        return attention

    def mix(self, attention, v):
        """(B, nh, T, hs)"""
        return attention @ v.repeat_interleave(attention.size(1) // v.size(1), dim=1) * self.factors


def put_rows(matrix, rows):
    """matrix (..., T, T), with the first rows replaced by those of another one, 0 beyond their
    end."""
    n = min(matrix.size(-1), rows.size(-1))
    matrix = matrix.clone()
    matrix[..., :n, :] = 0
    matrix[..., :n, :n] = rows[..., :n, :n]
    return matrix


def look(attention, mask, head, query, key, share):
    """Give a key this share of a row of attention (B, nh, T, T). A query that does not see it, or
    no other key, keeps its row."""
    row = attention[:, head, query]
    chosen = torch.arange(row.size(-1), device=row.device) == key
    others = row.masked_fill(chosen, 0).sum(dim=-1, keepdim=True)
    changed = torch.where(chosen, share, row * (1 - share) / others.clamp(min=1e-30))
    is_seen = mask[:, head, query, key, None] & (others > 0)
    attention = attention.clone()
    attention[:, head, query] = torch.where(is_seen, changed, row)
    return attention


@contextlib.contextmanager
def replaced(module, **functions):
    """Give a module other functions for a while."""
    before = {name: module.__dict__[name] for name in functions if name in module.__dict__}
    module.__dict__.update(functions)
    try:
        yield
    finally:
        for name in functions:
            del module.__dict__[name]
        module.__dict__.update(before)


@contextlib.contextmanager
def changed(model, text='', frozen=None):
    """Change parts of a model; text: see above. frozen: the Trace of a text, of batch size 1, whose
    attention patterns are used: a query attends as the one at its position does there, queries
    beyond its end by themselves. Raises UserError, a ValueError, if the model has no such part."""
    changes = Changes(text, model.config)
    device = model.lm_head.weight.device
    embed, rotary, attention_mask = model.embed, model.rotary, model.attention_mask
    factors = {'n-grams': changes.others['ngrams'], 'position': changes.others['positions']}

    def changed_embed(*args):
        return {name: part * factors.get(name, 1) for name, part in embed(*args).items()}

    def changed_rotary(position):
        return rotary(changes.others['positions'] * position)

    def changed_mask(tokens, columns, mask=None):
        seen = torch.ones(len(columns), tokens.size(1), dtype=torch.bool, device=tokens.device)
        mask = attention_mask(tokens, columns, seen if changes.others['mask'] == 0 else seen.tril())
        return mask if frozen is None else put_rows(mask, frozen.mask[0])

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(model, embed=changed_embed, rotary=changed_rotary,
                                     attention_mask=changed_mask))
        for layer, block in enumerate(model.transformer.h):
            looks = [rest for of_layer, *rest in changes.looks if of_layer == layer]
            attend = Attention(changes.heads[layer, :, None, None].to(device), looks,
                               None if frozen is None else frozen.attention[layer, 0])
            stack.enter_context(replaced(block.attn, attend=attend, attend_in_training=attend))
            stack.enter_context(replaced(block.mlp, activate=scaled(block.mlp.activate,
                                                                    changes.neurons[layer])))
        yield changes


def scaled(f, factors):
    """x -> f(x) * factors"""
    return lambda x: f(x) * factors.to(x)
