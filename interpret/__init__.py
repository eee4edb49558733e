"""Look inside a GPT: traces, attribution, head scores, circuits. explain.py makes a page of them.

    model, tokenizer = checkpoint.load_model('out-quickstart')
    trace = run(model, torch.tensor([tokenizer.encode('def main(')]))
    trace.attention[0, 0, 3]  # layer 0, batch element 0, head 3: (T, T)

Sources: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), Olsson et al. 2022
(In-context Learning and Induction Heads), nostalgebraist 2020 (interpreting GPT: the logit lens).

A norm centers its input (LayerNorm only), divides it by its standard deviation or RMS, and
multiplies by a gain. Centering and gain are linear: they are folded into the next matrix. The
division is not. Functions that take a trace keep its value from that forward pass
(Trace.later_scale), so their results add up exactly. Functions of the weights alone leave it out,
as Elhage et al. do.

Pre-norm: what a layer adds to the residual stream stays there as it is, up to the final norm.
Post-norm (Vaswani et al. 2017, 3.1): each sum is normalized, so what a layer adds passes all norms
after it (`stream_norms`) on its way to a later layer or to the logits; there is no final norm.

Shapes use the letters of model.py: B batch, T tokens, C = n_embd, nh heads, nkv key/value heads,
hs = C / nh, V = vocab_size, S source tokens (keys). Also L = n_layer, F neurons in an MLP.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from interpret.changes import Attention
from lib.errors import plural, require


@dataclass
class Trace:
    """All activations of a forward pass.

    Pre-norm: sum(embeddings) + sum(attn_out) + sum(mlp_out) = residual[-1]. Post-norm: in layer l,
    middle[l] = ln_1(residual[l] + attn_out[l]) and residual[l + 1] = ln_2(middle[l] + mlp_out[l]).
    """
    idx: torch.Tensor  # (B, T)
    embeddings: dict  # 'token', 'n-grams', 'position': (B, T, C); they sum to residual[0]
    residual: torch.Tensor  # (L + 1, B, T, C) the residual stream before each block and at the end
    middle: torch.Tensor  # (L, B, T, C) the residual stream between attention and MLP
    q: torch.Tensor  # (L, B, nh, T, hs) after RoPE and QK-norm
    k: torch.Tensor  # (L, B, nkv, T, hs) after RoPE and QK-norm
    v: torch.Tensor  # (L, B, nkv, T, hs)
    mask: torch.Tensor  # (B, T, S) True where a query sees a key
    attention: torch.Tensor  # (L, B, nh, T, S) softmax(q k^T / sqrt(hs)) over mask; rows sum to 1
    head_factors: torch.Tensor  # (L, nh, 1, 1) 1, unless interpret.changes scales heads
    mixed: torch.Tensor  # (L, B, nh, T, hs) factor * attention @ v, before the output projection
    attn_out: torch.Tensor  # (L, B, T, C)
    pre: torch.Tensor  # (L, B, T, F) before the activation; for SwiGLU, the gate
    post: torch.Tensor  # (L, B, T, F) after the activation
    mlp_out: torch.Tensor  # (L, B, T, C)
    final_scale: torch.Tensor  # (B, T) 1 / the divisor of the final norm; 1 if there is none
    # (2 L + 1, B, T) 1 / the product of the divisors that a vector passes on its way to the logits:
    # written by the attention of layer l at 2 l, by its MLP at 2 l + 1, and last final_scale
    later_scale: torch.Tensor
    logits: torch.Tensor  # (B, T, V)


@torch.no_grad()
def run(model, idx):
    """The forward pass of a model in eval mode over idx (B, T), as a Trace.

    trace.logits equals model(idx, idx)[0]. Raises UserError, a ValueError, if idx has another
    shape or T exceeds block_size.
    """
    require(idx.dim() == 2 and idx.numel(),
            f'idx has shape {tuple(idx.shape)}: give token ids (B, T), as in torch.tensor([ids])')
    B, T = idx.shape
    config = model.config
    require(T <= config.block_size,
            f'{T} tokens do not fit into block_size = {config.block_size}: give a shorter text')
    position = torch.arange(T, device=idx.device)
    padding = idx.new_full((B, config.ngram - 1), -1)  # no n-gram reaches back before the text
    parts = model.embed(idx, position, torch.cat((padding, idx), dim=1))
    embeddings = {name: part.expand(B, T, -1) for name, part in parts.items()}
    rotary = model.rotary(position)
    mask = model.attention_mask(idx, position)  # (B, 1, T, S)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    mask = mask.expand(B, 1, T, T)
    x = sum(embeddings.values())
    residual = [x]
    layers = []
    scales = []
    for block in model.transformer.h:
        q, k, v = block.attn.project(x if block.post_norm else block.ln_1(x), rotary)
        attend = block.attn.attend if isinstance(block.attn.attend, Attention) else Attention()
        attention = attend.weights(q, k, mask)  # (B, nh, T, S)
        mixed = attend.mix(attention, v)  # (B, nh, T, hs)
        attn_out = block.attn.c_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        middle = x + attn_out
        if block.post_norm:
            scales.append(norm_scale(block.ln_1, middle))
            middle = block.ln_1(middle)
        # (B, T, F); for SwiGLU (B, T, 2 F), gate first
        pre = block.mlp.c_fc(middle if block.post_norm else block.ln_2(middle))
        post = block.mlp.activate(pre)  # (B, T, F)
        mlp_out = block.mlp.c_proj(post)
        x = middle + mlp_out
        if block.post_norm:
            scales.append(norm_scale(block.ln_2, x))
            x = block.ln_2(x)
        residual.append(x)
        layers.append({
            'q': q, 'k': k, 'v': v, 'attention': attention, 'mixed': mixed, 'attn_out': attn_out,
            'middle': middle, 'pre': pre[..., :post.size(-1)], 'post': post, 'mlp_out': mlp_out,
            'head_factors': attend.factors * q.new_ones(q.size(1), 1, 1),
        })
    # popped so that only one name at a time is in memory twice
    activations = {name: torch.stack([layer.pop(name) for layer in layers])
                   for name in list(layers[0])}
    final_scale = norm_scale(model.transformer.ln_f, x)
    later = [final_scale]
    for scale in reversed(scales or [torch.ones_like(final_scale)] * (2 * len(layers))):
        later.append(later[-1] * scale)
    return Trace(
        idx=idx,
        embeddings=embeddings,
        residual=torch.stack(residual),
        mask=mask[:, 0],
        **activations,
        final_scale=final_scale,
        later_scale=torch.stack(later[::-1]),
        logits=model.to_logits(model.transformer.ln_f(x)),
    )


def per_head(model, k):
    """Repeat shared keys or values for each query head: (B, nkv, T, hs) -> (B, nh, T, hs)."""
    return k.repeat_interleave(model.config.n_head // k.size(-3), dim=-3)


# Norms and weight matrices ------------------------------------------------------------------------

def norm_scale(norm, x):
    """1 / the divisor of a norm at x (..., C): the RMS, for LayerNorm after centering. (...,)"""
    if isinstance(norm, torch.nn.Identity):  # post-norm has no final norm
        return torch.ones_like(x[..., 0])
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    elif not isinstance(norm, torch.nn.RMSNorm):
        raise NotImplementedError(f'{type(norm).__name__} has no branch in norm_scale and fold')
    return (x.square().mean(dim=-1) + norm.eps).rsqrt()


def fold(norm, weight):
    """Fold a norm's centering and gain into the weight (..., C) that follows it.

    weight @ norm(x) = fold(norm, weight) @ x * norm_scale(norm, x), up to the bias of the norm.
    """
    if isinstance(norm, torch.nn.Identity):
        return weight
    weight = weight * norm.weight
    if isinstance(norm, torch.nn.LayerNorm):
        weight = weight - weight.mean(dim=-1, keepdim=True)
    return weight


def stream_norms(model):
    """The norms in the residual stream: none if pre-norm, else ln_1 and ln_2 of each block (2 L).

    The output of attention in layer l passes those from 2 l on, that of the MLP from 2 l + 1 on.
    """
    blocks = [block for block in model.transformer.h if block.post_norm]
    return [norm for block in blocks for norm in (block.ln_1, block.ln_2)]


def carry(norms, x):
    """x (..., C) after the linear part of norms in the stream: centering and gain. (..., C)"""
    for norm in norms:
        if isinstance(norm, torch.nn.LayerNorm):
            x = x - x.mean(dim=-1, keepdim=True)
        x = x * norm.weight
    return x


@torch.no_grad()
def unembedding(model):
    """(U (V, C), b (V,)), with logits = final_scale * residual[-1] @ U.T + b before any softcap."""
    norm = model.transformer.ln_f
    weight = model.lm_head.weight
    norm_bias = getattr(norm, 'bias', None)
    bias = weight.new_zeros(len(weight)) if norm_bias is None else weight @ norm_bias
    return fold(norm, weight), bias


def against_mean(model, vocab_size=None):
    """U of `unembedding` minus its mean over the vocabulary, which softmax ignores. (V, C)"""
    U = unembedding(model)[0][:vocab_size]
    return U - U.mean(dim=0)


def output_matrices(model, layer, end=None):
    """The output projection of a layer split by head, W_O, as block `end` reads it: (nh, C, hs).

    end = None: as it arrives at the end of the residual stream. This matters for post-norm only:
    what is written passes the norms in between, here without their divisors.
    """
    c_proj = model.transformer.h[layer].attn.c_proj.weight
    norms = stream_norms(model)[2 * layer:None if end is None else 2 * end]
    return carry(norms, c_proj.T).T.unflatten(1, (model.config.n_head, -1)).transpose(0, 1)


def most_and_least(effect, n):
    """The n largest values of each row of effect (..., V), then the n smallest.

    Returns (ids, values), each (..., 2 n), both ends with the most extreme first.
    """
    largest = effect.topk(n)
    smallest = effect.topk(n, largest=False)
    ids = torch.cat((largest.indices, smallest.indices), dim=-1)
    values = torch.cat((largest.values, smallest.values), dim=-1)
    return ids, values


@torch.no_grad()
def head_matrices(model):
    """Weights of every head: {'q', 'k', 'v': (L, nh, hs, C), 'o': (L, nh, C, hs)}.

    With grouped-query attention, shared keys and values are repeated. Pre-norm: the gain of ln_1 is
    folded in; post-norm: heads read the stream as it is, and 'o' is as it is written, before ln_1.
    Biases, RoPE and QK-norm are not included.
    """
    n_head = model.config.n_head
    hs = model.config.head_dim
    matrices = {'q': [], 'k': [], 'v': [], 'o': []}
    for layer, block in enumerate(model.transformer.h):
        n_kv_head = block.attn.n_kv_head
        weight = block.attn.c_attn.weight
        if not block.post_norm:
            weight = fold(block.ln_1, weight)
        q, k, v = weight.split((n_head * hs, n_kv_head * hs, n_kv_head * hs))
        matrices['q'].append(q.unflatten(0, (-1, hs)))
        matrices['k'].append(per_head(model, k.unflatten(0, (-1, hs))))
        matrices['v'].append(per_head(model, v.unflatten(0, (-1, hs))))
        matrices['o'].append(output_matrices(model, layer, layer))
    return {name: torch.stack(matrices.pop(name)) for name in list(matrices)}


# One text: direct effects on the logits -----------------------------------------------------------

@torch.no_grad()
def attribute(model, trace, tokens, b=0):
    """Direct logit attribution: the contribution of each part to the logits of some tokens.

    Elhage et al. 2021, "Logit attribution". tokens: (T, K), K token ids per position; b: the batch
    element. Returns ([(kind, layer, head), ...], contributions (parts, T, K)), which sum to the
    logits. kind is token, n-grams, position, head, mlp, bias (output projections and the norms on
    the way; other biases act inside their part) or softcap (the capped minus the uncapped logit).
    """
    U, b_U = unembedding(model)
    read = U[tokens]  # (T, K, C)
    norms = stream_norms(model)
    scale = trace.later_scale[:, b]  # (2 L + 1, T)
    names = []
    values = []

    def add(name, value):
        names.append(name)
        values.append(value)

    def effect(vector, i):
        """Of a vector (T or 1, C) in the stream before norm i: linear, divisors are frozen."""
        arrived = carry(norms[i:], vector) * scale[i][:, None]
        return torch.einsum('tkc,tc->tk', read, arrived)

    for kind, vector in trace.embeddings.items():
        add((kind, None, None), effect(vector[b], 0))
    bias = b_U[tokens]
    for layer, block in enumerate(model.transformer.h):
        attn, mlp = 2 * layer, 2 * layer + 1  # places in the stream
        read_head = torch.einsum('tkc,hcd->tkhd', read, output_matrices(model, layer))
        mixed = trace.mixed[layer, b] * scale[attn][:, None]
        for head, value in enumerate(torch.einsum('tkhd,htd->htk', read_head, mixed)):
            add(('head', layer, head), value)
        written = trace.mlp_out[layer, b]
        if block.mlp.c_proj.bias is not None:
            written = written - block.mlp.c_proj.bias
            bias = bias + effect(block.mlp.c_proj.bias[None], mlp)
            bias = bias + effect(block.attn.c_proj.bias[None], attn)
        add(('mlp', layer, None), effect(written, mlp))
    for i, norm in enumerate(norms):
        if getattr(norm, 'bias', None) is not None:
            bias = bias + effect(norm.bias[None], i + 1)
    if model.config.bias:
        add(('bias', None, None), bias)
    if model.config.logit_softcap:
        add(('softcap', None, None), trace.logits[b].gather(1, tokens) - sum(values))
    return names, torch.stack(values)


@torch.no_grad()
def effect_by_source(model, trace, tokens, b=0):
    """The contribution of each head to the logit of tokens[t] at t, split by source token.

    A head writes sum over s of attention[t, s] * W_O v[s]; each term is one source token s, and
    they sum to the head's value in `attribute`. tokens: (T,). Returns logits (L, nh, T, S).
    """
    U, _ = unembedding(model)
    effects = []
    for layer in range(model.config.n_layer):
        read = U[tokens] * trace.later_scale[2 * layer, b][:, None]  # (T, C)
        read_head = torch.einsum('tc,hcd->htd', read, output_matrices(model, layer))  # (nh, T, hs)
        v = per_head(model, trace.v[layer, b])  # (nh, S, hs)
        v = v * trace.head_factors[layer]
        effects.append(trace.attention[layer, b] * (read_head @ v.transpose(-2, -1)))
    return torch.stack(effects)


@torch.no_grad()
def promoted(model, trace, n, b=0, vocab_size=None):
    """The n tokens whose logits each head raises most, then the n it lowers most.

    Returns (ids, values), each (L, nh, T, 2 n). Values are logits relative to the mean over the
    vocabulary, which softmax ignores.
    """
    U = against_mean(model, vocab_size)
    shape = (model.config.n_layer, model.config.n_head)
    all_ids = []
    all_values = []
    for layer in range(model.config.n_layer):
        scale = trace.later_scale[2 * layer, b][:, None]
        for head, W_O in enumerate(output_matrices(model, layer)):
            mixed = trace.mixed[layer, b, head]  # (T, hs)
            if len(mixed) < W_O.size(1):  # T < hs: multiply in the cheaper order
                effect = (mixed @ W_O.T) @ U.T
            else:
                effect = mixed @ (W_O.T @ U.T)
            ids, values = most_and_least(effect * scale, n)
            all_ids.append(ids)
            all_values.append(values)
    ids = torch.stack(all_ids).unflatten(0, shape)
    values = torch.stack(all_values).unflatten(0, shape)
    return ids, values


@torch.no_grad()
def logit_lens(model, trace, b=0, vocab_size=None):
    """The final norm and output head applied to the stream before each block and at the end.

    nostalgebraist 2020. Post-norm: the output head alone, as the stream is normalized after each
    block. Yields L + 1 times the next-token probabilities (T, V).
    """
    for x in trace.residual[:, b]:
        yield model.to_logits(model.transformer.ln_f(x))[:, :vocab_size].softmax(dim=-1)


@torch.no_grad()
def strongest_neurons(model, trace, n, b=0):
    """The n neurons of each MLP that write the longest vectors: indices (L, T, n).

    Ranked by |activation| times the norm of the neuron's output weights.
    """
    norms = torch.stack([block.mlp.c_proj.weight.norm(dim=0) for block in model.transformer.h])
    written = trace.post[:, b].abs() * norms[:, None]  # (L, T, F)
    return written.topk(min(n, norms.size(1))).indices


@torch.no_grad()
def activation_curve(model, layer, x):
    """The activation function of an MLP at pre-activations x (N,), applied by the MLP itself. (N,)

    For a gated MLP (SwiGLU), x are gates and the values are 1.
    """
    mlp = model.transformer.h[layer].mlp
    pre = x[:, None, None].expand(-1, 1, mlp.c_proj.weight.size(1))  # (N, 1, F)
    if is_gated(model):
        pre = torch.cat((pre, torch.ones_like(pre)), dim=-1)
    return type(mlp).activate(mlp, pre)[:, 0, 0]  # without changes of neurons


def is_gated(model):
    """Whether the MLPs have a gate and a value per neuron, in this order (SwiGLU)."""
    mlp = model.transformer.h[0].mlp
    return mlp.c_fc.weight.size(0) == 2 * mlp.c_proj.weight.size(1)


@torch.no_grad()
def neuron_tokens(model, layer, neurons, n, vocab_size=None):
    """The n tokens each neuron raises most when its activation is positive, then the n it lowers.

    neurons: (N,) indices in the MLP of the layer. Returns token ids (N, 2 n).
    """
    U = against_mean(model, vocab_size)
    W_out = model.transformer.h[layer].mlp.c_proj.weight.T  # (F, C)
    norms = stream_norms(model)[2 * layer + 1:]
    all_ids = []
    for chunk in neurons.split(256):  # not all of (N, V) at once
        ids, _ = most_and_least(carry(norms, W_out[chunk]) @ U.T, n)
        all_ids.append(ids)
    return torch.cat(all_ids)


# Weights alone ------------------------------------------------------------------------------------

@torch.no_grad()
def nearest_tokens(model, ids, n, vocab_size=None):
    """The n tokens whose embeddings have the largest cosine similarity with those of ids (N,).

    The token itself is excluded. Returns (ids, cosines), each (N, n), or (N, V - 1) if that is
    less.
    """
    E = F.normalize(model.transformer.wte.weight[:vocab_size], dim=1)
    cosines = E[ids] @ E.T  # (N, V)
    cosines.scatter_(1, ids[:, None], float('-inf'))
    best = cosines.topk(min(n, cosines.size(1) - 1))
    return best.indices, best.values


def repeated_tokens(vocab_size, length, batch, eot=None):
    """Distinct random tokens followed by the same tokens again: (batch, 2 * length).

    Only the first half helps to predict the second (Olsson et al. 2022, "prefix matching" test).
    eot is not among them: attention would stop at it. The seed is fixed. Raises UserError, a
    ValueError, if length exceeds the number of tokens.
    """
    tokens = torch.arange(vocab_size)
    if eot is not None:
        tokens = tokens[tokens != eot]
    require(length <= len(tokens), f'length = {length} is more than {plural(len(tokens), "token")}')
    generator = torch.Generator().manual_seed(0)
    rows = [tokens[torch.randperm(len(tokens), generator=generator)[:length]]
            for _ in range(batch)]
    half = torch.stack(rows)
    return torch.cat((half, half), dim=1)


def attention_scores(attention, length):
    """Scores of each head on `repeated_tokens`, {name: (L, nh)}: mean attention, from 0 to 1.

    previous: from each token to the one before it.
    induction: from each token of the second half to the token after its first occurrence, which
        is the next token to predict (prefix matching, Olsson et al. 2022).
    duplicate: from each token of the second half to its first occurrence.

    attention: (L, B, nh, 2 length, 2 length).
    """
    all_queries = torch.arange(1, 2 * length)
    second_half = torch.arange(length, 2 * length)

    def mean_attention(queries, distance):
        return attention[..., queries, queries - distance].mean(dim=(1, 3))

    return {
        'previous': mean_attention(all_queries, 1),
        'induction': mean_attention(second_half, length - 1),
        'duplicate': mean_attention(second_half, length),
    }


@torch.no_grad()
def head_scores(model, vocab_size=None, eigenvalues=None):
    """({'previous', 'induction', 'duplicate', 'copying': (L, nh)}, losses (2 length - 1,)).

    The first three are `attention_scores`, the last is `copying_scores`; eigenvalues are those of
    `ov_eigenvalues`, if already computed. losses[i] is the mean cross-entropy, in nats, of token
    i + 1 of `repeated_tokens`: it drops from token length + 1 on if the model does induction.

    length is 50, or less if block_size / 2 or the vocabulary is. Below 3 the attention scores are
    NaN and losses is empty. With prefix_lm the tokens are no source, so attention is causal.
    """
    vocab_size = vocab_size or model.config.vocab_size
    eot = model.config.eot_token
    length = min(50, model.config.block_size // 2, vocab_size - (eot is not None))
    if eigenvalues is None:
        eigenvalues = ov_eigenvalues(model, vocab_size)
    copying = copying_scores(eigenvalues)
    if length < 3:
        nan = torch.full_like(copying, float('nan'))
        scores = {'previous': nan, 'induction': nan, 'duplicate': nan, 'copying': copying}
        return scores, torch.empty(0)
    idx = repeated_tokens(vocab_size, length, 4, eot).to(model.transformer.wte.weight.device)
    trace = run(model, idx)
    logits = trace.logits[:, :-1, :vocab_size].transpose(1, 2)  # (B, V, T - 1)
    losses = F.cross_entropy(logits, idx[:, 1:], reduction='none').mean(dim=0)
    scores = attention_scores(trace.attention, length)
    scores['copying'] = copying
    return scores, losses


@torch.no_grad()
def ov_eigenvalues(model, vocab_size=None):
    """Eigenvalues of each head's OV circuit from tokens to logits, W_U W_O W_V W_E.

    Elhage et al. 2021, "Copying". The nonzero eigenvalues of this V x V matrix are those of the
    hs x hs matrix W_V W_E W_U W_O. Post-norm: W_E passes the norms before the head, and W_O those
    after it. Returns (L, nh, hs), complex.
    """
    E = model.transformer.wte.weight[:vocab_size]
    U = unembedding(model)[0][:vocab_size]
    norms = stream_norms(model)
    circuits = []
    for layer, v in enumerate(head_matrices(model)['v']):
        E_U = carry(norms[:2 * layer], E).T @ U  # (C, C)
        circuits.append(v @ E_U @ output_matrices(model, layer))  # (nh, hs, hs)
    return torch.linalg.eigvals(torch.stack(circuits))


def copying_scores(eigenvalues):
    """Sum of the eigenvalues (L, nh, hs) of an OV circuit over the sum of their magnitudes.

    1 if all are positive, so the head raises the logits of the tokens it attends to; -1 if all are
    negative (Elhage et al. 2021, "Copying"). (L, nh)
    """
    return eigenvalues.real.sum(dim=-1) / eigenvalues.abs().sum(dim=-1).clamp(min=1e-30)


@torch.no_grad()
def composition_scores(model):
    """Q-, K- and V-composition: {'q', 'k', 'v': (L nh, L nh)}, [reader, writer].

    How much a head reads of the output of a head in an earlier layer, 0 for other pairs: Frobenius
    norms |W_QK^T W_OV|, |W_QK W_OV| and |W_OV W_OV|, each over the product of the two norms (Elhage
    et al. 2021, "Composition"). Post-norm: the writer's W_OV is as it arrives at the reader. Random
    matrices score about 1 / sqrt(C). RoPE and QK-norm are not included.
    """
    m = head_matrices(model)
    q, k, v = m['q'], m['k'], m['v']  # (L, nh, hs, C)
    # only hs x hs matrices are multiplied: |A B|^2 = trace((A^T A) (B B^T))
    gram = {name: m[name] @ m[name].transpose(-2, -1) for name in 'qkv'}  # (L, nh, hs, hs)
    gram['o'] = m['o'].transpose(-2, -1) @ m['o']
    norm_qk = norm_of_product(gram['q'], gram['k'])  # (L, nh)
    norm_ov = norm_of_product(gram['o'], gram['v'])
    readers = {'q': (gram['k'], q, norm_qk), 'k': (gram['q'], k, norm_qk),
               'v': (gram['o'], v, norm_ov)}
    L, nh = model.config.n_layer, model.config.n_head
    scores = {kind: q.new_zeros(L, nh, L, nh) for kind in readers}
    for reader in range(1, L):
        for writer in range(reader):
            o = output_matrices(model, writer, reader)  # (nh, C, hs)
            norm_writer = norm_of_product(o.transpose(1, 2) @ o, gram['v'][writer])
            for kind, (outer, inner, norm) in readers.items():
                middle = inner[reader, :, None] @ o  # (nh of the reader, nh of the writer, hs, hs)
                product = norm_of_product(outer[reader, :, None], middle @ gram['v'][writer]
                                          @ middle.transpose(-2, -1))
                norms = (norm[reader, :, None] * norm_writer).clamp(min=1e-30)
                scores[kind][reader, :, writer] = product / norms
    return {kind: score.flatten(2).flatten(0, 1) for kind, score in scores.items()}


def norm_of_product(gram_a, gram_b):
    """Frobenius norm |A B| from A^T A and B B^T, both symmetric (..., hs, hs). (...,)"""
    return (gram_a * gram_b).sum(dim=(-2, -1)).clamp(min=0).sqrt()


def silent_stream(model, ids):
    """The stream of tokens ids (N,) before each block and at the end, if no layer writes anything:
    their embeddings without positions, and the norms if post-norm. Yields L + 1 times (N, C)."""
    history = ids.new_full((len(ids), model.config.ngram), -1)
    history[:, -1] = ids
    x = model.embed(ids[:, None], ids.new_zeros(1), history)['token'][:, 0]
    yield x
    for block in model.transformer.h:
        if block.post_norm:
            x = block.ln_2(block.ln_1(x))
        yield x


@torch.no_grad()
def token_circuits(model, ids, scale=1.0, vocab_size=None):
    """QK and OV circuits of each head among the tokens ids (N,): two tensors (L, nh, N, N).

    Elhage et al. 2021, "Query-Key" and "Output-Value" circuits. QK[query, key] is the attention
    score, divided by sqrt(hs), of two tokens at the same position, from their embeddings alone.
    OV[source, out] is what attending to source adds to the logit of out, relative to the mean over
    the vocabulary, with Trace.later_scale of each layer's attention = scale, a number or (L,).

    Exact in layer 0 of a model without positions; elsewhere the part due to the embeddings.
    """
    U = against_mean(model, vocab_size)[ids]
    scales = torch.as_tensor(scale).expand(model.config.n_layer)
    qk = []
    ov = []
    for layer, (block, x) in enumerate(zip(model.transformer.h, silent_stream(model, ids))):
        q, k, v = block.attn.project((x if block.post_norm else block.ln_1(x))[None])
        q = q[0]  # (nh, N, hs)
        k = per_head(model, k)[0]
        v = per_head(model, v)[0]
        qk.append(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))  # (nh, N, N)
        ov.append(v @ output_matrices(model, layer).transpose(1, 2) @ U.T * scales[layer])
    return torch.stack(qk), torch.stack(ov)


@torch.no_grad()
def bigrams(model, ids, vocab_size=None):
    """Next-token probabilities after each single token of ids (N,): (full (N, V), direct (N, V)).

    full is a forward pass of the model, which must be in eval mode. direct is the direct path
    W_U W_E: embedding, the norms in the stream, output head, no attention and no MLP. A zero-layer
    Transformer has only that path and can only learn bigrams (Elhage et al. 2021, "Zero-Layer
    Transformers").
    """
    logits = [model(chunk[:, None])[0][:, 0, :vocab_size] for chunk in ids.split(64)]
    full = torch.cat(logits)
    *_, embedding = silent_stream(model, ids)
    direct = model.to_logits(model.transformer.ln_f(embedding))[:, :vocab_size]
    return full.softmax(dim=-1), direct.softmax(dim=-1)
