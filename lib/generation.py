"""Generation with a KV cache: sampling, beam search and the filters between logits and a token.

The functions take the model first; model.generate is generate. Letters in shapes as in model.py.
"""
import copy
import math

import torch
import torch.nn as nn

from lib.errors import require


class KVCache:
    """Keys and values of every layer for the tokens read so far, in buffers of a fixed size.

    Prompts of unequal length are padded on the left: the first padding[b] columns of row b are not
    part of the text. static: static shapes for torch.compile; a query sees the whole buffer through
    a mask, and `copy_from` fills the same buffers again, which a CUDA graph relies on.
    """

    def __init__(self, config, batch_size, size, device=None, dtype=None, padding=None,
                 static=False):
        shape = (batch_size, config.kv_heads, size, config.head_dim)
        # one tensor per layer: a compiled step would copy slices of a larger one; zeros, not empty:
        # 0 * NaN would leak through the mask
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.tokens = torch.full((batch_size, size), -1, device=device)  # for n-grams and documents
        self.padding = padding  # (B,) or None
        if static and padding is None:
            self.padding = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.size, self.static = size, static
        self.length = 0  # columns filled
        self.filled = torch.zeros(1, dtype=torch.long, device=device)  # same, if static

    def select(self, index, spare=None):
        """A cache of the rows index (B',), with repeats; reuses the memory of spare if given."""
        new, index = copy.copy(self), torch.as_tensor(index, device=self.tokens.device)
        if spare is None:
            new.k, new.v = [k[index] for k in self.k], [v[index] for v in self.v]
        else:
            new.k, new.v = spare.k, spare.v
            for old, copied in zip(self.k + self.v, new.k + new.v):
                copied[:, :, :self.length] = old[index, :, :self.length]
        new.tokens = self.tokens[index]
        new.padding = None if self.padding is None else self.padding[index]
        return new

    def copy_from(self, other, index):
        """Of a static cache: take the rows index of another one, which is not static."""
        n = other.length
        for mine, theirs in zip(self.k + self.v, other.k + other.v):
            mine[:, :, :n] = theirs[index, :, :n]
            mine[:, :, n:] = 0  # not NaN
        self.tokens.fill_(-1)[:, :n] = other.tokens[index, :n]
        self.padding.zero_()
        if other.padding is not None:
            self.padding.copy_(other.padding[index])
        self.filled.fill_(n)

    def mark_static_addresses(self):
        """Let a CUDA graph write into the buffers."""
        for buffer in (*self.k, *self.v, self.tokens, self.padding, self.filled):
            torch._dynamo.mark_static_address(buffer)

    def extend(self, idx):
        """Make room for the tokens idx (B, T), which the layers then append.

        Returns (all token ids (B, S), -1 for padding; columns of idx (T,); positions of idx, (T,)
        or (B, T); mask of visible columns (B or 1, 1, T, S), or None for plain causality).
        """
        T = idx.size(1)
        plain = self.padding is None and not self.static and (T == 1 or self.length == 0)
        columns = torch.arange(self.length, self.length + T, device=idx.device)
        if self.static:
            columns, end = columns + self.filled, self.size
            self.filled += T
        else:
            end = self.length = self.length + T
        position = columns
        if self.padding is not None:
            position = (columns - self.padding[:, None]).clamp(min=0)  # (B, T)
            idx = idx.where(columns >= self.padding[:, None], -1)
        self.tokens.index_copy_(1, columns, idx)
        return self.tokens[:, :end], columns, position, None if plain else self.mask(columns, end)

    def mask(self, columns, end):
        """Which of the columns up to end each query in columns (T,) sees: (B or 1, 1, T, end)"""
        column = torch.arange(end, device=self.tokens.device)
        query = columns[:, None]
        visible = column <= query  # (T, S)
        if self.padding is not None:
            visible = visible & (column >= self.padding[:, None, None])  # (B, T, S)
            # padding sees itself: softmax over nothing would be NaN
            visible = visible | (column == query)
        return visible.view(-1, 1, *visible.shape[-2:])

    def append(self, layer, k, v):
        """Store k, v (B, nkv, T, hs) of a layer; returns all so far, (B, nkv, S, hs) each."""
        T, end = k.size(2), self.length
        all_k, all_v = self.k[layer], self.v[layer]
        if self.static:
            columns = self.filled - T + torch.arange(T, device=k.device)
            all_k.index_copy_(2, columns, k.type_as(all_k))
            all_v.index_copy_(2, columns, v.type_as(all_v))
            return all_k, all_v
        all_k[:, :, end - T:end] = k
        all_v[:, :, end - T:end] = v
        return all_k[:, :, :end], all_v[:, :, :end]


def context(idx, cache, block_size):
    """KVCache.extend, or the same of idx (B, T) without a cache. Raises ValueError if it does not
    fit into block_size."""
    n = idx.size(1) + (0 if cache is None else cache.length)
    if n > block_size:
        raise ValueError(f'{n} tokens do not fit into block_size = {block_size}')
    if cache is not None:
        return cache.extend(idx)
    columns = torch.arange(idx.size(1), device=idx.device)
    return idx, columns, columns, None


def next_logits(model, idx, cache):
    """The logits after idx (B, T), which the cache takes up: (B, V). Not by cuDNN's attention,
    which makes a plan for each new length."""
    backend = torch.nn.attention.SDPBackend
    kernels = [backend.FLASH_ATTENTION, backend.EFFICIENT_ATTENTION, backend.MATH]
    with torch.nn.attention.sdpa_kernel(kernels):
        return model(idx, cache=cache)[0][:, -1]


def cache_dtype(model):
    """The dtype of keys and values: autocast's, or that of the weights; on a CPU fp32, where sdpa
    takes a seventh of the time for one query."""
    weight = model.transformer.wte.weight
    if weight.device.type == 'cpu':
        return torch.float32
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def left_pad(model, prompts, room=0):
    """Pad prompts (B lists or tensors of ids) on the left to one length. Returns (B lists, ids (B,
    longest + room), columns where they start (B,)). Raises ValueError."""
    device = model.transformer.wte.weight.device
    prompts = [p.tolist() if isinstance(p, torch.Tensor) else p for p in prompts]
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError('generate needs at least one token to continue')
    ids = {id_ for prompt in prompts for id_ in prompt}
    if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        raise ValueError(f'a token id is not below vocab_size = {model.config.vocab_size}')
    longest = max(lengths)
    start = [longest - n for n in lengths]
    rows = torch.tensor([[0] * n + prompt for n, prompt in zip(start, prompts)], device=device)
    return prompts, nn.functional.pad(rows, (0, room)), torch.tensor(start, device=device)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, *, stop_tokens=(), **options):
    """Continue idx by max_new_tokens tokens; options as in generate_tokens.

    idx: (B, T) ids -> (B, T + new), or a list of B lists of unequal length -> a list of B lists.
    stop_tokens: a sequence ends with the first of these that it draws (in a tensor the rest of its
    row repeats it).
    """
    device = model.transformer.wte.weight.device
    stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
    ended = torch.zeros(len(idx), dtype=torch.bool, device=device)
    steps = []
    for next_token in generate_tokens(model, idx, max_new_tokens, temperature, top_k, **options):
        steps.append(next_token)
        if stop_tokens:
            ended |= torch.isin(next_token, stops)
            # `.all()` is a GPU sync: check every 16 steps
            if (device.type != 'cuda' or len(steps) % 16 == 0) and ended.all():
                break
    batch = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in idx]
    for b, new in enumerate(batch):
        require_drawn(new)
        stop = next((i + 1 for i, token in enumerate(new) if token in stop_tokens), None)
        batch[b] = new[:stop]
    if not isinstance(idx, torch.Tensor):
        return [list(prompt) + new for prompt, new in zip(idx, batch)]
    longest = max((len(new) for new in batch), default=0)
    new = [new + new[-1:] * (longest - len(new)) for new in batch]
    new = torch.tensor(new, dtype=idx.dtype, device=idx.device).view(len(batch), longest)
    return torch.cat((idx, new), dim=1)


@torch.no_grad()
def generate_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, *, top_p=None,
                    min_p=None, repetition_penalty=1.0, seed=None, slide=1, use_cache=True,
                    vocab_size=None, compile=False, with_logits=False):
    """Yield the next token of every sequence, (B,), max_new_tokens times; -1 where the logits are
    not finite (require_drawn). with_logits: (tokens, the model's logits (B, V)) instead.

    temperature 0 is greedy; top_k, top_p, min_p, repetition_penalty as in filter_logits. seed: of a
    generator for these draws; None: the global one. vocab_size: ids from here on (padding) are
    never drawn. compile: compile the decode step, on CUDA into a graph.

    Sequences with the same prompt share its prefill. In fp32 the greedy tokens of a sequence depend
    neither on the cache nor on its batch; in bf16 and int8 rounding may tip a close choice.

    Past block_size the window slides: the tokens that stay are re-encoded at positions 0, 1, ...,
    because the keys of deeper layers have seen tokens that left the window. slide=1 moves it by one
    token per step: each token is drawn given the last block_size ones, exactly as in nanoGPT.
    slide=n moves it by n tokens every n steps, n times faster; the context is then never below
    block_size - n + 1. The whole batch slides when its longest sequence fills the window.
    """
    block_size = model.config.block_size
    if not 1 <= slide <= block_size:
        raise ValueError(f'slide = {slide} must be from 1 to block_size = {block_size}')
    prompts, tokens, start = left_pad(model, idx, max_new_tokens)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    device = tokens.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    seen = seen_tokens(model, prompts, device) if repetition_penalty != 1.0 else None  # (B, V)

    unique = {}  # prompt -> its number
    number = [unique.setdefault(tuple(prompt), len(unique)) for prompt in prompts]
    readers = [number.index(n) for n in unique.values()]  # one row per different prompt
    was_training = model.training
    model.eval()
    step, static = compiled_decoder(model, len(tokens)) if compile else (model, None)
    cache, first = None, max(0, longest - block_size)  # the window is tokens[:, first:end]
    last = None  # the tokens just drawn, (B, 1)
    try:
        for end in range(longest, longest + max_new_tokens):
            if end - first > block_size:
                cache, first = None, end - (block_size - slide + 1)
            if cache is None or not use_cache:
                share = end == longest and len(readers) < len(prompts)
                part, rows = (readers, number) if share else (slice(None), slice(None))
                padded = first < longest - shortest
                padding = (start[part] - first).clamp(min=0) if padded else None
                size = end - first if compile else min(block_size, longest + max_new_tokens - first)
                cache = KVCache(model.config, len(tokens[part]), size, device, cache_dtype(model),
                                padding)
                logits = next_logits(model, tokens[part, first:end], cache)[rows]
                if compile:
                    static.copy_from(cache, rows)
                    cache = static
                elif share:
                    cache = cache.select(number)
            else:
                logits = next_logits(step, last, cache)
            next_token = sample_next_token(
                logits[:, :vocab_size], temperature, top_k, top_p, min_p, repetition_penalty,
                None if seen is None else seen[:, :vocab_size], generator)  # (B,)
            last = next_token.clamp(min=0)[:, None]
            tokens[:, end:end + 1] = last
            if seen is not None:
                seen.scatter_(1, last, True)
            yield (next_token, logits[:, :vocab_size]) if with_logits else next_token
    finally:
        model.train(was_training)


def compiled_decoder(model, batch_size):
    """(compiled model, static cache) of a batch size. They are made once and kept in the model: a
    new cache would need a new CUDA graph."""
    weight = model.transformer.wte.weight
    key = batch_size, weight.device, cache_dtype(model), model.config.block_size
    if key not in model.decoders:
        cache = KVCache(model.config, batch_size, model.config.block_size, weight.device,
                        cache_dtype(model), static=True)
        # both use CUDA graphs; int8 needs kernels that convert the weights they read
        mode = 'reduce-overhead' if isinstance(model.lm_head, nn.Linear) else 'max-autotune'
        step = torch.compile(model, dynamic=False, mode=mode)
        cache.mark_static_addresses()
        model.decoders[key] = step, cache
    return model.decoders[key]


def seen_tokens(model, prompts, device):
    """True for the tokens of each prompt: (B, V)"""
    shape = len(prompts), model.config.vocab_size
    seen = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts):
        row[torch.tensor(prompt, device=device)] = True
    return seen


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None,
                  repetition_penalty=1.0, seen=None):
    """Logits (B, V) after, in this order:

    repetition_penalty: logits of tokens seen (B, V bool) are divided by it if positive, else
    multiplied (Keskar 2019, CTRL); temperature: logits / temperature; top_k: only the k most likely
    tokens (ties with the k-th stay, as in nanoGPT); top_p: the fewest most likely tokens that hold
    at least top_p of the probability (Holtzman 2019, nucleus sampling); min_p: tokens at least
    min_p times as likely as the most likely one (Nguyen 2024).
    """
    if seen is not None:
        penalized = torch.where(logits > 0, logits / repetition_penalty,
                                logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    # subtract the maximum first, so that no temperature overflows
    logits = logits - logits.max(dim=-1, keepdim=True).values
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.size(-1):
        kth = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -math.inf)
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)  # the maximum is 0
    return logits


def require_drawn(tokens):
    """Raise UserError if one of the tokens, a list, is -1."""
    require(-1 not in tokens,
            'the logits are not finite: the weights have diverged, or overflow in this dtype: try '
            '--dtype=float32 or another checkpoint')


def race(probs, generator=None):
    """Draw from each row of probs (B, V) -> (B,): the first of exponential clocks with these rates
    rings. torch.multinomial without its checks, which end the process on CUDA (gpt-fast)."""
    u = torch.rand(probs.shape, generator=generator, device=probs.device)
    return (probs / -u.log()).argmax(-1)


def sample_next_token(logits, temperature=1.0, top_k=None, top_p=None, min_p=None,
                      repetition_penalty=1.0, seen=None, generator=None):
    """Draw one token per row of logits (B, V) -> (B,), -1 if they are not finite; temperature 0 is
    greedy. No host sync."""
    finite = logits.amax(-1).isfinite()
    if temperature == 0:
        logits = filter_logits(logits, repetition_penalty=repetition_penalty, seen=seen)
        return logits.argmax(-1).where(finite, -1)
    logits = filter_logits(logits, temperature, top_k, top_p, min_p, repetition_penalty, seen)
    probs = logits.softmax(dim=-1)
    if logits.device.type != 'cpu':
        return race(probs, generator).where(finite, -1)
    # race takes a random number per vocabulary entry, which on a CPU costs as much as a layer.
    # Draw one per row instead and invert the cumulative distribution.
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)  # (B, V)
    u = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(1).where(finite, -1)


@torch.no_grad()
def beam_search(model, idx, max_new_tokens, num_beams=4, length_penalty=0.6, *, stop_tokens=(),
                vocab_size=None):
    """The most likely continuations of B prompts, num_beams candidates kept per step.

    idx: B prompts, which may differ in length; prompt and max_new_tokens must fit into block_size.
    A continuation that ends with one of stop_tokens moves from the beam to the results, and its
    place stays empty (Sutskever et al. 2014, 3.2); one beam is greedy. Returns per prompt up to
    num_beams (new tokens, score), best first: score = log p / ((5 + length) / 6)^length_penalty
    (Wu et al. 2016, equation 14). Raises ValueError if the text does not fit.
    """
    prompts, tokens, start = left_pad(model, idx)
    B, longest, K = len(prompts), tokens.size(1), num_beams
    V = vocab_size or model.config.vocab_size
    device = tokens.device
    if longest + max_new_tokens > model.config.block_size:
        raise ValueError(f'{longest} tokens and max_new_tokens = {max_new_tokens} do not fit into '
                         f'block_size = {model.config.block_size}')
    stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
    beams = torch.arange(K, device=device)
    was_training = model.training
    model.eval()
    try:
        padding = start if len(set(map(len, prompts))) > 1 else None
        cache = KVCache(model.config, B, longest + max_new_tokens, device, cache_dtype(model),
                        padding)
        logits = next_logits(model, tokens, cache)[:, :V].repeat_interleave(K, 0)  # (B K, V)
        cache = cache.select(torch.arange(B, device=device).repeat_interleave(K))
        spare = None
        scores = logits.new_full((B, K), -math.inf)  # log p of each beam
        scores[:, 0] = 0.0  # all beams are the prompt: let one of them count
        n_found = torch.zeros(B, 1, dtype=torch.long, device=device)
        written = [[[]] * K for _ in prompts]  # ids of each beam
        results = [[] for _ in prompts]
        for length in range(1, max_new_tokens + 1):
            finite = logits.amax(-1).isfinite().view(B, K).all(1, keepdim=True)
            logp = logits.log_softmax(-1).view(B, K, V)
            scores, best = (scores[..., None] + logp).flatten(1).topk(K)  # (B, K)
            beam, token = best // V, (best % V).where(finite, -1)
            scores = scores.masked_fill(beams >= K - n_found, -math.inf)
            ended = torch.isin(token, stops) | (length == max_new_tokens)
            found, goes_on = ended & scores.isfinite(), ~ended & scores.isfinite()
            n_found = n_found + found.sum(1, keepdim=True)
            columns = (beam, token, scores, found, goes_on)
            step = torch.stack([x.float() for x in columns], dim=-1).tolist()  # the only host sync
            penalty = ((5 + length) / 6) ** length_penalty
            for b, rows in enumerate(step):
                require_drawn([new for _, new, *_ in rows])
                written[b] = [[*written[b][int(parent)], int(new)] for parent, new, *_ in rows]
                results[b] += [(ids, score / penalty) for ids, (_, _, score, is_found, _)
                               in zip(written[b], rows) if is_found]
            if not any(row[-1] for rows in step for row in rows):
                break
            scores = scores.masked_fill(ended, -math.inf)
            index = (torch.arange(B, device=device)[:, None] * K + beam).flatten()
            # two caches take turns: allocating a new one per step costs page faults
            cache, spare = cache.select(index, spare), cache
            logits = next_logits(model, token.view(-1, 1), cache)[:, :V]
    finally:
        model.train(was_training)
    return [sorted(result, key=lambda found: -found[1]) for result in results]
