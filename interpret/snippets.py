"""Where neurons are most active and where heads look most strongly, in the run's validation data.

Top activating snippets (Bills et al. 2023, Language models can explain neurons; Neuronpedia) come
from text that the model was not trained on. One forward pass over a sample of it serves all of
them, and gives the means for interpret.causal.ablate.
"""
import torch

import interpret
from lib import bins
from lib.errors import UserError
from lib.page import to_half

N_BEST = 5  # snippets of a neuron or head
WINDOW = 256  # tokens at most: longer windows would leave too few of them
MIN_KEYS = 16  # that a query sees
MIN_TOKENS, MAX_TOKENS = 4096, 8192
BATCH_TOKENS = 1024
COST = 5e10  # tokens times parameters: a few seconds on two CPU cores


def validation_windows(checkpoint, model, tokenizer):
    """(token ids (n, T), path of the val.bin) of random windows, always the same ones.

    Raises UserError, whose text says why there are none: no data set, or another tokenizer.
    """
    name = checkpoint.config.get('dataset')
    if not name:
        raise UserError('this checkpoint names no data set')
    folder = bins.find_dataset(name)
    if not (folder / 'val.bin').exists():
        raise UserError(f'there is no {folder / "val.bin"}')
    dataset = bins.open_dataset(folder, model.config.block_size)
    if dataset.tokenizer.to_dict() != tokenizer.to_dict():
        raise UserError(f'{folder} has another tokenizer than this checkpoint')
    val = dataset.val
    T = val.block_size if val.pairs else min(val.block_size, WINDOW)
    n_tokens = min(max(int(COST / model.num_matmul_params()), MIN_TOKENS), MAX_TOKENS)
    index = val.evaluation_windows(-(-n_tokens // T))
    index = index[(index + 1) * val.block_size <= val.n_tokens]  # the last may be shorter
    x, _ = val.windows(index)
    return torch.from_numpy(x[:, :T]), str(val.path)


@torch.no_grad()
def search(model, windows):
    """The strongest place in each window for every neuron and head, and the N_BEST of them.

    windows: (n, T). Left out for neurons: the first token of a window, which has no context. Left
    out for heads: queries that see fewer than MIN_KEYS keys (or half a window), as little attention
    elsewhere makes any look strong; the query itself; and the first key that it sees, where heads
    look that find nothing (Xiao et al. 2023, attention sinks).

    Returns {'neurons': (values, places (..., 2)), 'heads': (values, places (..., 3))} with values
    (L, F, k) and (L, nh, k), largest first, and places (window, position) or (window, query, key);
    and the means (mixed (L, nh, hs), post (L, F)) over all tokens.
    """
    T = windows.size(1)
    neurons = []
    heads = []
    mixed = post = 0
    for batch in windows.split(max(1, BATCH_TOKENS // T)):
        trace = interpret.run(model, batch)
        neurons.append(trace.post[:, :, 1:].max(dim=2))  # (L, B, F)
        allowed = usable_pairs(trace.mask)[:, None]  # (B, 1, T, S)
        heads.append((trace.attention * allowed).flatten(3).max(dim=3))  # (L, B, nh)
        mixed = mixed + trace.mixed.mean(dim=3).sum(dim=1) / len(windows)
        post = post + trace.post.mean(dim=2).sum(dim=1) / len(windows)
    values, (number, place) = strongest(neurons)
    best = {'neurons': (values, torch.stack((number, place + 1), dim=-1))}
    values, (number, place) = strongest(heads)
    best['heads'] = (values, torch.stack((number, place // T, place % T), dim=-1))
    return best, (mixed, post)


def usable_pairs(mask):
    """Which (query, key) pairs `search` ranks, of those that the mask shows: (B, T, S)."""
    T = mask.size(-1)
    keys = torch.arange(T, device=mask.device)
    first_seen = mask.byte().argmax(dim=-1, keepdim=True)  # (B, T, 1)
    enough = mask.sum(dim=-1, keepdim=True) >= min(MIN_KEYS, T // 2)
    return mask & enough & (keys != keys[:, None]) & (keys != first_seen)


def strongest(maxima):
    """The N_BEST of [(values, indices)], each (L, B, k), over all windows: values (L, k, N_BEST)
    and (window, index)."""
    values, indices = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*maxima))
    top = values.topk(min(N_BEST, values.size(-1)), dim=-1)
    return top.values, (top.indices, indices.gather(-1, top.indices))


def collect_snippets(checkpoint, model, tokenizer):
    """(facts, arrays, means) for web/snippets.js, and for interpret.causal.ablate.

    facts: snippets, {'path', 'tokens'} of the sample, or {'missing': why there is none}. arrays:
    snippet_ids (n, T), the windows; neuron_best (L, F, k) activations and neuron_places
    (L, F, k, 2): window, position; head_best (L, nh, k) attention and head_places (L, nh, k, 3):
    window, query, key.
    """
    try:
        windows, path = validation_windows(checkpoint, model, tokenizer)
    except UserError as error:
        return {'snippets': {'missing': str(error)}}, {}, None
    best, means = search(model, windows)
    facts = {'snippets': {'path': path, 'tokens': windows.numel()}}
    arrays = {'snippet_ids': windows}
    for name, (values, places) in best.items():
        arrays[name[:-1] + '_best'] = to_half(values)
        arrays[name[:-1] + '_places'] = places
    return facts, arrays, means
