"""Look inside a GPT: traces, attribution, head scores, circuits. explain.py makes a page of them.

    model, tokenizer = checkpoint.load_model('out-quickstart')
    trace = run(model, torch.tensor([tokenizer.encode('def main(')]))
    trace.attention[0, 0, 3]  # layer 0, batch element 0, head 3: (T, T)

Sources: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), Olsson et al. 2022
(In-context Learning and Induction Heads), nostalgebraist 2020 (interpreting GPT: the logit lens).

A norm centers its input (LayerNorm only), divides it by its standard deviation or RMS, and
multiplies by a gain. Centering and gain are linear: they are folded into the next matrix. The
division is not. Functions that take a trace keep its value from that forward pass
(Trace.final_scale), so their results add up exactly. Functions of the weights alone leave it out,
as Elhage et al. do.

Shapes use the letters of model.py: B batch, T tokens, C = n_embd, nh heads, nkv key/value heads,
hs = C / nh, V = vocab_size, S source tokens (keys). Also L = n_layer, F neurons in an MLP.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lib.errors import plural, require


@dataclass
class Trace:
    """All activations of a forward pass.

    sum(embeddings) + sum(attn_out) + sum(mlp_out) = residual[-1].
    """
    idx: torch.Tensor  # (B, T)
    embeddings: dict  # 'token', 'n-grams', 'position': (B, T, C); they sum to residual[0]
    residual: torch.Tensor  # (L + 1, B, T, C) the residual stream before each block and at the end
    q: torch.Tensor  # (L, B, nh, T, hs) after RoPE and QK-norm
    k: torch.Tensor  # (L, B, nkv, T, hs) after RoPE and QK-norm
    v: torch.Tensor  # (L, B, nkv, T, hs)
    mask: torch.Tensor  # (B, T, S) True where a query sees a key
    attention: torch.Tensor  # (L, B, nh, T, S) softmax(q k^T / sqrt(hs)) over mask; rows sum to 1
    mixed: torch.Tensor  # (L, B, nh, T, hs) attention @ v, before the output projection
    attn_out: torch.Tensor  # (L, B, T, C)
    pre: torch.Tensor  # (L, B, T, F) before the activation; for SwiGLU, the gate
    post: torch.Tensor  # (L, B, T, F) after the activation
    mlp_out: torch.Tensor  # (L, B, T, C)
    final_scale: torch.Tensor  # (B, T) 1 / the divisor of the final norm
    logits: torch.Tensor  # (B, T, V)


@torch.no_grad()
def run(model, idx):
    """The forward pass of a model in eval mode over idx (B, T), as a Trace.

    trace.logits equals model(idx, idx)[0]. Raises UserError, a ValueError, if idx has another
    shape, T exceeds block_size or the model is post-norm.
    """
    require(idx.dim() == 2 and idx.numel(),
            f'idx has shape {tuple(idx.shape)}: give token ids (B, T), as in torch.tensor([ids])')
    B, T = idx.shape
    config = model.config
    require(config.norm_position == 'pre',
            f'norm_position = {config.norm_position!r}: only pre-norm models are supported')
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
    for block in model.transformer.h:
        q, k, v = block.attn.project(block.ln_1(x), rotary)
        scores = q @ per_head(model, k).transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, S)
        attention = scores.masked_fill(~mask, float('-inf')).softmax(dim=-1)
        mixed = attention @ per_head(model, v)  # (B, nh, T, hs)
        attn_out = block.attn.c_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        x = x + attn_out
        pre = block.mlp.c_fc(block.ln_2(x))  # (B, T, F); for SwiGLU (B, T, 2 F), gate first
        post = block.mlp.activate(pre)  # (B, T, F)
        mlp_out = block.mlp.c_proj(post)
        x = x + mlp_out
        residual.append(x)
        layers.append({
            'q': q, 'k': k, 'v': v, 'attention': attention, 'mixed': mixed, 'attn_out': attn_out,
            'pre': pre[..., :post.size(-1)], 'post': post, 'mlp_out': mlp_out,
        })
    activations = {}
    for name in list(layers[0]):
        # popped so that only one name at a time is in memory twice
        activations[name] = torch.stack([layer.pop(name) for layer in layers])
    return Trace(
        idx=idx,
        embeddings=embeddings,
        residual=torch.stack(residual),
        mask=mask[:, 0],
        **activations,
        final_scale=norm_scale(model.transformer.ln_f, x),
        logits=model.to_logits(model.transformer.ln_f(x)),
    )


def per_head(model, k):
    """Repeat shared keys or values for each query head: (B, nkv, T, hs) -> (B, nh, T, hs)."""
    return k.repeat_interleave(model.config.n_head // k.size(-3), dim=-3)


# Norms and weight matrices ------------------------------------------------------------------------

def norm_scale(norm, x):
    """1 / the divisor of a norm at x (..., C): the RMS, for LayerNorm after centering. (...,)"""
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    elif not isinstance(norm, torch.nn.RMSNorm):
        raise NotImplementedError(f'{type(norm).__name__} has no branch in norm_scale and fold')
    return (x.square().mean(dim=-1) + norm.eps).rsqrt()


def fold(norm, weight):
    """Fold a norm's centering and gain into the weight (out, C) that follows it.

    weight @ norm(x) = fold(norm, weight) @ x * norm_scale(norm, x), up to the bias of the norm.
    """
    weight = weight * norm.weight
    if isinstance(norm, torch.nn.LayerNorm):
        weight = weight - weight.mean(dim=1, keepdim=True)
    return weight


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


def output_matrices(model, block):
    """The output projection of a block split by head, W_O: (nh, C, hs)."""
    return block.attn.c_proj.weight.unflatten(1, (model.config.n_head, -1)).transpose(0, 1)


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

    With grouped-query attention, shared keys and values are repeated. The gain of ln_1 is folded
    in. Biases, RoPE and QK-norm are not included.
    """
    n_head = model.config.n_head
    hs = model.config.head_dim
    matrices = {'q': [], 'k': [], 'v': [], 'o': []}
    for block in model.transformer.h:
        n_kv_head = block.attn.n_kv_head
        weight = fold(block.ln_1, block.attn.c_attn.weight)
        q, k, v = weight.split((n_head * hs, n_kv_head * hs, n_kv_head * hs))
        matrices['q'].append(q.unflatten(0, (-1, hs)))
        matrices['k'].append(per_head(model, k.unflatten(0, (-1, hs))))
        matrices['v'].append(per_head(model, v.unflatten(0, (-1, hs))))
        matrices['o'].append(output_matrices(model, block))
    return {name: torch.stack(matrices.pop(name)) for name in list(matrices)}


# One text: direct effects on the logits -----------------------------------------------------------

@torch.no_grad()
def attribute(model, trace, tokens, b=0):
    """Direct logit attribution: the contribution of each part to the logits of some tokens.

    Elhage et al. 2021, "Logit attribution". tokens: (T, K), K token ids per position; b: the batch
    element. Returns ([(kind, layer, head), ...], contributions (parts, T, K)), which sum to the
    logits. kind is token, n-grams, position, head, mlp, bias (output projections and the final
    norm; other biases act inside their part) or softcap (the capped minus the uncapped logit).
    """
    U, b_U = unembedding(model)
    # contributions are linear: final_scale * part @ U.T
    read = U[tokens] * trace.final_scale[b][:, None, None]  # (T, K, C)
    names = []
    values = []

    def add(name, value):
        names.append(name)
        values.append(value)

    for kind, vector in trace.embeddings.items():
        add((kind, None, None), torch.einsum('tkc,tc->tk', read, vector[b]))
    bias = b_U[tokens]
    for layer, block in enumerate(model.transformer.h):
        read_head = torch.einsum('tkc,hcd->tkhd', read, output_matrices(model, block))
        per_head_values = torch.einsum('tkhd,htd->htk', read_head, trace.mixed[layer, b])
        for head, value in enumerate(per_head_values):
            add(('head', layer, head), value)
        mlp = trace.mlp_out[layer, b]
        for c_proj in (block.attn.c_proj, block.mlp.c_proj):
            if c_proj.bias is not None:
                bias = bias + read @ c_proj.bias
        if block.mlp.c_proj.bias is not None:
            mlp = mlp - block.mlp.c_proj.bias
        add(('mlp', layer, None), torch.einsum('tkc,tc->tk', read, mlp))
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
    read = U[tokens] * trace.final_scale[b][:, None]  # (T, C)
    effects = []
    for layer, block in enumerate(model.transformer.h):
        read_head = torch.einsum('tc,hcd->htd', read, output_matrices(model, block))  # (nh, T, hs)
        v = per_head(model, trace.v[layer, b])  # (nh, S, hs)
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
    for layer, block in enumerate(model.transformer.h):
        for head, W_O in enumerate(output_matrices(model, block)):
            mixed = trace.mixed[layer, b, head]  # (T, hs)
            if len(mixed) < W_O.size(1):  # T < hs: multiply in the cheaper order
                effect = (mixed @ W_O.T) @ U.T
            else:
                effect = mixed @ (W_O.T @ U.T)
            ids, values = most_and_least(effect * trace.final_scale[b][:, None], n)
            all_ids.append(ids)
            all_values.append(values)
    ids = torch.stack(all_ids).unflatten(0, shape)
    values = torch.stack(all_values).unflatten(0, shape)
    return ids, values


@torch.no_grad()
def logit_lens(model, trace, b=0, vocab_size=None):
    """The final norm and output head applied to the stream before each block and at the end.

    nostalgebraist 2020. Yields L + 1 times the next-token probabilities (T, V).
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
    return mlp.activate(pre)[:, 0, 0]


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
    W_out = model.transformer.h[layer].mlp.c_proj.weight  # (C, F)
    all_ids = []
    for chunk in neurons.split(256):  # not all of (N, V) at once
        ids, _ = most_and_least(W_out[:, chunk].T @ U.T, n)
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
    hs x hs matrix W_V W_E W_U W_O. Returns (L, nh, hs), complex.
    """
    E = model.transformer.wte.weight[:vocab_size]
    U = unembedding(model)[0][:vocab_size]
    m = head_matrices(model)
    return torch.linalg.eigvals(m['v'] @ (E.T @ U) @ m['o'])


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
    et al. 2021, "Composition"). Random matrices score about 1 / sqrt(C). RoPE and QK-norm are not
    included.
    """
    # N = L nh heads: q, k, v (N, hs, C); o (N, C, hs)
    m = {name: matrix.flatten(0, 1) for name, matrix in head_matrices(model).items()}
    q, k, v, o = m['q'], m['k'], m['v'], m['o']
    # only hs x hs matrices are multiplied: |A B|^2 = trace((A^T A) (B B^T))
    gram_q = q @ q.transpose(1, 2)  # (N, hs, hs)
    gram_k = k @ k.transpose(1, 2)
    gram_v = v @ v.transpose(1, 2)
    gram_o = o.transpose(1, 2) @ o
    norm_qk = (gram_q * gram_k).sum(dim=(1, 2)).clamp(min=0).sqrt()  # (N,)
    norm_ov = (gram_o * gram_v).sum(dim=(1, 2)).clamp(min=0).sqrt()
    n_head = model.config.n_head

    def scores(outer, inner, norm):
        result = q.new_zeros(len(q), len(q))
        for reader in range(n_head, len(q)):
            writers = slice(0, reader // n_head * n_head)  # all heads of earlier layers
            middle = inner[reader] @ o[writers]  # (n, hs, hs)
            squared = ((outer[reader] @ middle @ gram_v[writers]) * middle).sum(dim=(1, 2))
            norms = (norm[reader] * norm_ov[writers]).clamp(min=1e-30)
            result[reader, writers] = squared.clamp(min=0).sqrt() / norms
        return result

    return {
        'q': scores(gram_k, q, norm_qk),
        'k': scores(gram_q, k, norm_qk),
        'v': scores(gram_o, v, norm_ov),
    }


@torch.no_grad()
def token_circuits(model, ids, scale=1.0, vocab_size=None):
    """QK and OV circuits of each head among the tokens ids (N,): two tensors (L, nh, N, N).

    Elhage et al. 2021, "Query-Key" and "Output-Value" circuits. QK[query, key] is the attention
    score, divided by sqrt(hs), of two tokens at the same position, from their embeddings alone.
    OV[source, out] is what attending to source adds to the logit of out, relative to the mean over
    the vocabulary, with final_scale = scale.

    Exact in layer 0 of a model without positions; elsewhere the part due to the embeddings.
    """
    E = model.transformer.wte.weight[ids]  # (N, C)
    U = against_mean(model, vocab_size)[ids]
    qk = []
    ov = []
    for block in model.transformer.h:
        q, k, v = block.attn.project(block.ln_1(E)[None])
        q = q[0]  # (nh, N, hs)
        k = per_head(model, k)[0]
        v = per_head(model, v)[0]
        qk.append(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))  # (nh, N, N)
        ov.append(v @ output_matrices(model, block).transpose(1, 2) @ U.T * scale)
    return torch.stack(qk), torch.stack(ov)


@torch.no_grad()
def bigrams(model, ids, vocab_size=None):
    """Next-token probabilities after each single token of ids (N,): (full (N, V), direct (N, V)).

    full is a forward pass of the model, which must be in eval mode. direct is the direct path
    W_U W_E: embedding, final norm, output head, no blocks. A zero-layer Transformer has only that
    path and can only learn bigrams (Elhage et al. 2021, "Zero-Layer Transformers").
    """
    logits = [model(chunk[:, None])[0][:, 0, :vocab_size] for chunk in ids.split(64)]
    full = torch.cat(logits)
    embedding = model.transformer.wte.weight[ids]
    direct = model.to_logits(model.transformer.ln_f(embedding))[:, :vocab_size]
    return full.softmax(dim=-1), direct.softmax(dim=-1)
