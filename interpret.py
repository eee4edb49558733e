"""What a GPT does inside: for a text, and by its weights alone. Functions for a notebook; explain.py makes a page of them.

    model, tokenizer = checkpoint.load_model('out-quickstart')
    trace = run(model, torch.tensor([tokenizer.encode('def main(')]))
    trace.attention[0, 0, 3]  # layer 0, first text, head 3: (T, T)

Sources: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), Olsson et al. 2022 (In-context Learning and
Induction Heads), nostalgebraist 2020 (interpreting GPT: the logit lens).

A norm is a gain, for LayerNorm a centering before it, and a division by a number that depends on its input. Gain and centering
are folded into the matrix behind the norm. The division is kept as it was in the run (`Trace.final_scale`) wherever a text is
looked at: what is said of it adds up exactly. It is left out where weights are looked at alone, as in Elhage et al.

Letters in shapes as in model.py: B texts, T tokens, C = n_embd, nh heads, nkv key/value heads, hs = C / nh, S source tokens,
V = vocab_size; and L = n_layer, F neurons of an MLP.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Trace:
    """A forward pass, kept whole. What the parts write into the residual stream sums to residual[-1]."""
    idx: torch.Tensor  # (B, T)
    embeddings: dict  # 'token', 'n-grams', 'position': (B, T, C); their sum is residual[0]
    residual: torch.Tensor  # (L + 1, B, T, C) before the first block, ..., behind the last
    q: torch.Tensor  # (L, B, nh, T, hs) as they meet: turned and normalised, if the model does so
    k: torch.Tensor  # (L, B, nkv, T, hs)
    v: torch.Tensor  # (L, B, nkv, T, hs)
    attention: torch.Tensor  # (L, B, nh, T, S) softmax(q k^T / sqrt(hs)) under the causal mask: each row sums to 1
    mixed: torch.Tensor  # (L, B, nh, T, hs) attention times v: what a head writes, before the output projection
    attn_out: torch.Tensor  # (L, B, T, C)
    pre: torch.Tensor  # (L, B, T, F) neurons before the activation (for swiglu the gates)
    post: torch.Tensor  # (L, B, T, F) and behind it
    mlp_out: torch.Tensor  # (L, B, T, C)
    final_scale: torch.Tensor  # (B, T) 1 / the number by which the final norm divides
    logits: torch.Tensor  # (B, T, V)


@torch.no_grad()
def run(model, idx):
    """model's forward pass over idx (B, T), written out and kept: a Trace, whose logits are model(idx, idx)[0].

    Raises ValueError if idx is longer than the model's block_size, or the model's norms are behind its sums.
    """
    B, T = idx.shape
    if model.config.norm_position != 'pre':
        raise ValueError(f'norm_position = {model.config.norm_position!r}: only pre-norm models can be taken apart here')
    if T > model.config.block_size:
        raise ValueError(f'{T} tokens do not fit into block_size = {model.config.block_size}')
    position = torch.arange(T, device=idx.device)
    tokens = torch.cat((idx.new_full((B, model.config.ngram - 1), -1), idx), dim=1)  # nothing stands before the text
    embeddings = {name: part.expand(B, T, -1) for name, part in model.embeddings(idx, position, tokens).items()}
    rotary = model.rotary(position)
    mask = model.attention_mask(idx, position)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    kept = {name: [] for name in ('q', 'k', 'v', 'attention', 'mixed', 'attn_out', 'pre', 'post', 'mlp_out')}
    residual = [sum(embeddings.values())]
    for block in model.transformer.h:
        x = residual[-1]
        q, k, v = block.attn.project(block.ln_1(x), rotary)
        scores = q @ per_head(model, k).transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, S)
        attention = scores.masked_fill(~mask, float('-inf')).softmax(dim=-1)
        mixed = attention @ per_head(model, v)  # (B, nh, T, hs)
        attn_out = block.attn.c_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        x = x + attn_out
        pre = block.mlp.c_fc(block.ln_2(x))  # (B, T, F), or gates and values (B, T, 2 F)
        post = block.mlp.activate(pre)  # (B, T, F)
        mlp_out = block.mlp.c_proj(post)
        residual.append(x + mlp_out)
        for name, value in zip(kept, (q, k, v, attention, mixed, attn_out, pre[..., :post.size(-1)], post, mlp_out)):
            kept[name].append(value)
    x = residual[-1]
    logits = model.to_logits(model.transformer.ln_f(x))
    return Trace(idx, embeddings, torch.stack(residual), **{name: torch.stack(kept.pop(name)) for name in list(kept)},
                 final_scale=norm_scale(model.transformer.ln_f, x), logits=logits)


def per_head(model, k):
    """Keys or values (B, nkv, T, hs) -> (B, nh, T, hs): each group of query heads shares one."""
    return k.repeat_interleave(model.config.n_head // k.size(-3), dim=-3)


# Norms and matrices ---------------------------------------------------------------------------------------------------------

def norm_scale(norm, x):
    """1 / what the norm divides x (..., C) by: its root mean square, for LayerNorm after centering (...,)."""
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    return (x.square().mean(dim=-1) + norm.eps).rsqrt()


def fold(norm, weight):
    """weight (out, C) behind a norm -> the matrix that gives the same of x * norm_scale(norm, x), up to the norm's bias."""
    weight = weight * norm.weight
    return weight - weight.mean(dim=1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else weight


@torch.no_grad()
def unembedding(model):
    """(U (V, C), b (V,)): logits before a softcap = final_scale * residual[-1] @ U.T + b."""
    norm, weight = model.transformer.ln_f, model.lm_head.weight
    bias = getattr(norm, 'bias', None)
    return fold(norm, weight), weight @ bias if bias is not None else weight.new_zeros(len(weight))


def against_mean(model, vocab_size=None):
    """U of `unembedding` without its mean over the vocabulary, which a softmax does not see: (V, C)"""
    U = unembedding(model)[0][:vocab_size]
    return U - U.mean(dim=0)


def output_matrices(model, block):
    """What each head of a block writes through: (nh, C, hs)"""
    return block.attn.c_proj.weight.unflatten(1, (model.config.n_head, -1)).transpose(0, 1)


def most_and_least(effect, n):
    """(ids, values) of the n largest of each row (..., V), then of the n smallest: (..., 2 n) each."""
    ends = effect.topk(n), effect.topk(n, largest=False)
    return torch.cat([end.indices for end in ends], dim=-1), torch.cat([end.values for end in ends], dim=-1)


@torch.no_grad()
def head_matrices(model):
    """{'q', 'k', 'v': (L, nh, hs, C), 'o': (L, nh, C, hs)}: heads that share keys and values each have a copy. The gain of the
    norm before is folded in; biases, rotary positions and the norm of queries and keys are not in it."""
    nh, hs = model.config.n_head, model.config.n_embd // model.config.n_head
    matrices = {name: [] for name in 'qkvo'}
    for block in model.transformer.h:
        weight = fold(block.ln_1, block.attn.c_attn.weight)
        nkv = block.attn.n_kv_head
        q, k, v = (part.unflatten(0, (-1, hs)) for part in weight.split((nh * hs, nkv * hs, nkv * hs)))
        for name, value in zip(matrices, (q, per_head(model, k), per_head(model, v), output_matrices(model, block))):
            matrices[name].append(value)
    return {name: torch.stack(matrices.pop(name)) for name in list(matrices)}


# A text: which part did what -------------------------------------------------------------------------------------------------

@torch.no_grad()
def attribute(model, trace, tokens, b=0):
    """By how much each part moves the logits of some tokens (Elhage et al. 2021: direct effects on the logits).

    tokens (T, K): K of them for each position. Returns ([(kind, layer, head)], (parts, T, K)): kinds token, n-grams, position,
    head, mlp, bias (of output projections and the final norm; others act inside their part), softcap. The parts sum to the
    logits: final_scale * part @ U.T is linear in the part, and what a softcap takes away is a part of its own.
    """
    U, b_U = unembedding(model)
    read = U[tokens] * trace.final_scale[b][:, None, None]  # (T, K, C)
    names, values = [], []

    def add(name, value):
        names.append(name)
        values.append(value)

    for kind, vector in trace.embeddings.items():
        add((kind, None, None), torch.einsum('tkc,tc->tk', read, vector[b]))
    bias = b_U[tokens]
    for layer, block in enumerate(model.transformer.h):
        back = torch.einsum('tkc,hcd->tkhd', read, output_matrices(model, block))
        for head, value in enumerate(torch.einsum('tkhd,htd->htk', back, trace.mixed[layer, b])):
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
    """By how much each head moves the logit of tokens[t] at t, by the token it looks at: (L, nh, T, S).

    A head writes sum over s of attention[t, s] * W_O v[s], so that the sum over s is the head's part in `attribute`.
    """
    read = unembedding(model)[0][tokens] * trace.final_scale[b][:, None]  # (T, C)
    effects = []
    for layer, block in enumerate(model.transformer.h):
        back = torch.einsum('tc,hcd->htd', read, output_matrices(model, block))  # (nh, T, hs)
        effects.append(trace.attention[layer, b] * (back @ per_head(model, trace.v[layer, b]).transpose(-2, -1)))
    return torch.stack(effects)


@torch.no_grad()
def promoted(model, trace, n, b=0, vocab_size=None):
    """The n tokens whose logits each head raises most, then the n it lowers most, against their mean: (ids, values), each
    (L, nh, T, 2 n), values in logits. The mean over the vocabulary is taken off, since a softmax does not see it."""
    U, found = against_mean(model, vocab_size), []
    for layer, block in enumerate(model.transformer.h):
        for head, W_O in enumerate(output_matrices(model, block)):
            mixed, W = trace.mixed[layer, b, head], W_O.T  # (T, hs), (hs, C)
            effect = (mixed @ W) @ U.T if len(mixed) < len(W) else mixed @ (W @ U.T)  # (T, V), the cheaper way round
            found.append(most_and_least(effect * trace.final_scale[b][:, None], n))
    return tuple(torch.stack(x).unflatten(0, (model.config.n_layer, -1)) for x in zip(*found))


@torch.no_grad()
def logit_lens(model, trace, b=0, vocab_size=None):
    """What the model would predict if it ended behind each block (nostalgebraist 2020): yields (T, V), L + 1 times."""
    for x in trace.residual[:, b]:
        yield model.to_logits(model.transformer.ln_f(x))[:, :vocab_size].softmax(dim=-1)


@torch.no_grad()
def strongest_neurons(model, trace, n, b=0):
    """The n neurons of each MLP that write most: by |activation| times the length of the row they write. (L, T, n) indices."""
    lengths = torch.stack([block.mlp.c_proj.weight.norm(dim=0) for block in model.transformer.h])  # (L, F)
    return (trace.post[:, b].abs() * lengths[:, None]).topk(min(n, lengths.size(1))).indices


@torch.no_grad()
def neuron_tokens(model, layer, neurons, n, vocab_size=None):
    """The n tokens whose logits each of some neurons (N,) of a layer raises most when it is on, then the n it lowers: (N, 2 n)"""
    U, W_out = against_mean(model, vocab_size), model.transformer.h[layer].mlp.c_proj.weight
    return torch.cat([most_and_least(W_out[:, part].T @ U.T, n)[0] for part in neurons.split(256)])  # not all of (N, V) at once


# The weights alone -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def nearest_tokens(model, ids, n, vocab_size=None):
    """The n tokens whose embeddings have the largest cosine with those of ids (N,): (their ids, cosines), each (N, n)."""
    E = F.normalize(model.transformer.wte.weight[:vocab_size], dim=1)
    cosines = E[ids] @ E.T  # (N, V)
    cosines.scatter_(1, ids[:, None], float('-inf'))
    best = cosines.topk(min(n, cosines.size(1) - 1))
    return best.indices, best.values


def repeated_tokens(vocab_size, length, batch):
    """Random tokens, each of them once, and the same again (Olsson et al. 2022): (batch, 2 * length)

    Nothing but the first half tells what comes in the second. Raises ValueError if there are not enough tokens.
    """
    if length > vocab_size:
        raise ValueError(f'length = {length} is more than the {vocab_size} tokens')
    generator = torch.Generator().manual_seed(0)
    half = torch.stack([torch.randperm(vocab_size, generator=generator)[:length] for _ in range(batch)])
    return torch.cat((half, half), dim=1)


def attention_scores(attention, length):
    """How far each head does one of three things on `repeated_tokens`: {name: (L, nh)}, from 0 to 1, means over all that it sees.

    attention: (L, B, nh, 2 length, 2 length). previous-token: the attention that goes to the token before. duplicate-token: in
    the second half, to the same token in the first. induction: in the second half, to the token behind that one (Olsson et al.
    2022, prefix matching), which is the one that comes next.
    """
    T = 2 * length
    later = torch.arange(length, T)
    every = torch.arange(1, T)
    return {name: attention[..., query, query - back].mean(dim=(1, 3))
            for name, query, back in (('previous', every, 1), ('induction', later, length - 1), ('duplicate', later, length))}


@torch.no_grad()
def head_scores(model, vocab_size=None, eigenvalues=None):
    """({'previous', 'induction', 'duplicate', 'copying': (L, nh)}, losses (2 length - 1,)) by `repeated_tokens` and eigenvalues.

    losses[i] is the mean loss of predicting token i + 1: the model that finds repetitions has a low one from token length + 1 on.
    length is at most 50 and half of block_size; the scores from attention are nan, and losses empty, if that is less than 3.
    eigenvalues: those of `ov_eigenvalues`, where they are known already.
    """
    vocab_size = vocab_size or model.config.vocab_size
    length = min(50, model.config.block_size // 2, vocab_size)
    copying = {'copying': copying_scores(ov_eigenvalues(model, vocab_size) if eigenvalues is None else eigenvalues)}
    if length < 3:
        nan = torch.full_like(copying['copying'], float('nan'))
        return {'previous': nan, 'induction': nan, 'duplicate': nan} | copying, torch.empty(0)
    idx = repeated_tokens(vocab_size, length, batch=4).to(model.transformer.wte.weight.device)
    trace = run(model, idx)
    logits = trace.logits[:, :-1, :vocab_size].transpose(1, 2)
    return attention_scores(trace.attention, length) | copying, F.cross_entropy(logits, idx[:, 1:], reduction='none').mean(dim=0)


@torch.no_grad()
def ov_eigenvalues(model, vocab_size=None):
    """Eigenvalues of each head's OV circuit, tokens to logits, W_U W_O W_V W_E: (L, nh, hs), complex.

    Those of the V x V matrix that are not 0 are those of the hs x hs matrix W_V W_E W_U W_O (Elhage et al. 2021, "Copying").
    """
    E, U = model.transformer.wte.weight[:vocab_size], unembedding(model)[0][:vocab_size]
    m = head_matrices(model)
    return torch.linalg.eigvals(m['v'] @ (E.T @ U) @ m['o'])


def copying_scores(eigenvalues):
    """Sum of the eigenvalues (L, nh, hs) of an OV circuit over the sum of their sizes: 1 if a head only raises what it looks at,
    -1 if it only lowers it (Elhage et al. 2021). (L, nh)"""
    return eigenvalues.real.sum(dim=-1) / eigenvalues.abs().sum(dim=-1).clamp(min=1e-30)


@torch.no_grad()
def composition_scores(model):
    """How much each head reads of what an earlier one writes: {'q', 'k', 'v': (L nh, L nh)}, [reader, writer], 0 if not earlier.

    |W_QK^T W_OV|, |W_QK W_OV| and |W_OV W_OV|, each over the product of the two norms (Frobenius; Elhage et al. 2021,
    "Composition"). Random matrices have 1 / sqrt(C). Positions that are rotary and the norm of queries and keys are left out.
    """
    m = {name: matrix.flatten(0, 1) for name, matrix in head_matrices(model).items()}  # (N, hs, C) or (N, C, hs), N = L nh
    q, k, v, o = m['q'], m['k'], m['v'], m['o']
    gram_q, gram_k, gram_v = (x @ x.transpose(1, 2) for x in (q, k, v))  # (N, hs, hs)
    gram_o = o.transpose(1, 2) @ o
    size_qk = (gram_q * gram_k).sum(dim=(1, 2)).clamp(min=0).sqrt()  # |A B|^2 is the trace of (A^T A)(B B^T)
    size_ov = (gram_o * gram_v).sum(dim=(1, 2)).clamp(min=0).sqrt()
    nh, scores = model.config.n_head, {}
    for kind, outer, inner, size in (('q', gram_k, q, size_qk), ('k', gram_q, k, size_qk), ('v', gram_o, v, size_ov)):
        score = q.new_zeros(len(q), len(q))
        for reader in range(nh, len(q)):
            writers = slice(0, reader // nh * nh)  # all of earlier layers
            middle = inner[reader] @ o[writers]  # (n, hs, hs)
            squared = ((outer[reader] @ middle @ gram_v[writers]) * middle).sum(dim=(1, 2))
            score[reader, writers] = squared.clamp(min=0).sqrt() / (size[reader] * size_ov[writers]).clamp(min=1e-30)
        scores[kind] = score
    return scores


@torch.no_grad()
def token_circuits(model, ids, scale=1.0, vocab_size=None):
    """What each head does with single tokens: (QK (L, nh, N, N), OV (L, nh, N, N)) for ids (N,).

    QK[query, key] is the score, divided by sqrt(hs), of two such tokens that stand at one place, by their embeddings alone, with
    the norms and biases of the model. OV[source, out] is what looking at source adds to the logit of out, against the mean over
    all tokens, if the final norm multiplies by scale. Elhage et al. 2021, "QK and OV circuits"; exact for the first layer of a
    model without positions, else what its tokens contribute.
    """
    E = model.transformer.wte.weight[ids]  # (N, C)
    U = against_mean(model, vocab_size)[ids]
    qk, ov = [], []
    for block in model.transformer.h:
        q, k, v = (per_head(model, x)[0] if i else x[0] for i, x in enumerate(block.attn.project(block.ln_1(E)[None])))
        qk.append(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))  # (nh, N, N)
        ov.append(v @ output_matrices(model, block).transpose(1, 2) @ U.T * scale)
    return torch.stack(qk), torch.stack(ov)


@torch.no_grad()
def bigrams(model, ids, vocab_size=None):
    """What follows a single token: (by the whole model (N, V), by the direct path (N, V)), probabilities, for ids (N,). The model
    is to be in evaluation mode.

    The direct path is W_U W_E: the token's embedding, normalised, read by the head of the model with nothing in between. A
    zero-layer Transformer can only learn bigrams (Elhage et al. 2021).
    """
    whole = torch.cat([model(part[:, None])[0][:, 0, :vocab_size] for part in ids.split(64)])
    direct = model.to_logits(model.transformer.ln_f(model.transformer.wte.weight[ids]))[:, :vocab_size]
    return whole.softmax(dim=-1), direct.softmax(dim=-1)
