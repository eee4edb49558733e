"""What interpret.py says of a model, against the model itself, formulas and models built by hand."""

import math

import pytest
import torch
from helpers import ARCHITECTURES, POST, tiny, tokens
from torch.nn import functional as F

import interpret
from model import GPT, GPTConfig

SHAPES = ARCHITECTURES + [
    {'bias': False, 'tie_weights': False, 'norm': 'rmsnorm', 'position': 'rope', 'n_kv_head': 1, 'qk_norm': True, 'ngram': 3,
     'activation': 'relu2', 'logit_softcap': 15.0},
    {'position': 'sinusoidal', 'ngram': 2},
]  # fmt: skip


def awake(**options):
    """A model in which biases and gains have a say too."""
    model = tiny(**options)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0.5, std=0.3)
    return model


@pytest.mark.parametrize('options', SHAPES, ids=str)
def test_a_traced_pass_is_the_model_and_its_parts_sum_to_it(options):
    model = awake(**options)
    idx = tokens(2, 12)
    trace = interpret.run(model, idx)
    logits, _ = model(idx, idx)
    torch.testing.assert_close(trace.logits, logits, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(trace.attention.sum(dim=-1), torch.ones(2, 2, model.config.n_head, 12))
    assert not trace.attention.triu(1).any()
    written = trace.residual[0] + (trace.attn_out + trace.mlp_out).sum(dim=0)
    torch.testing.assert_close(written, trace.residual[-1], atol=1e-5, rtol=1e-6)
    *_, last = interpret.logit_lens(model, trace, b=1)
    torch.testing.assert_close(last, logits[1].softmax(dim=-1), atol=1e-6, rtol=1e-5)

    every = torch.arange(40).expand(12, 40)
    names, parts = interpret.attribute(model, trace, every, b=1)
    torch.testing.assert_close(parts.sum(dim=0), logits[1], atol=1e-4, rtol=0)
    assert len(names) == len(set(names)) == len(parts)
    targets = tokens(12, seed=3)
    by_source = interpret.effect_by_source(model, trace, targets, b=1)
    of_heads = torch.stack([part for name, part in zip(names, parts) if name[0] == 'head']).view(2, -1, 12, 40)
    expected = of_heads.gather(3, targets.expand(2, of_heads.size(1), 12)[..., None])[..., 0]
    torch.testing.assert_close(by_source.sum(dim=-1), expected, atol=1e-5, rtol=1e-5)

    ids, values = interpret.promoted(model, trace, 3, b=1)
    against_mean = of_heads - of_heads.mean(dim=-1, keepdim=True)
    best, worst = against_mean.sort(dim=-1).values[..., -3:].flip(-1), against_mean.sort(dim=-1).values[..., :3]
    torch.testing.assert_close(values, torch.cat((best, worst), dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(against_mean.gather(3, ids), values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('options', SHAPES, ids=str)
def test_a_part_that_is_taken_away_changes_the_logits_by_what_it_is_said_to_give(options):
    """With the final norm's division held still: the logits of residual[-1] without the part, worked out by hand."""
    model = awake(**options | {'logit_softcap': 0.0})
    trace = interpret.run(model, tokens(1, 9))
    names, parts = interpret.attribute(model, trace, torch.arange(40).expand(9, 40))
    norm, x = model.transformer.ln_f, trace.residual[-1][0].double()

    def read(x):
        if model.config.norm == 'layernorm':
            x = x - x.mean(dim=-1, keepdim=True)
        x = x * trace.final_scale[0][:, None] * norm.weight
        if getattr(norm, 'bias', None) is not None:
            x = x + norm.bias
        return x @ model.lm_head.weight.double().T

    torch.testing.assert_close(read(x), trace.logits[0].double(), atol=1e-4, rtol=1e-4)
    hs = 32 // model.config.n_head
    W_O = model.transformer.h[1].attn.c_proj.weight
    head = trace.mixed[1, 0, 1] @ W_O[:, hs:2 * hs].T
    said = parts[names.index(('head', 1, 1))].double()
    torch.testing.assert_close(read(x) - read(x - head), said, atol=1e-4, rtol=1e-4)


def induction_model(V=20, T=20, sharp=40.0):
    """Two layers built by hand: a head that copies the token before, and one that looks for the present token among those copies.

    The stream has room for the token, its position, and the token before: one number each is 1, so that all norms are known.
    """
    C = 2 * V + T
    config = {'bias': False, 'norm': 'rmsnorm', 'tie_weights': False, 'position': 'learned'}
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=1, n_embd=C, **config)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.zeros_(p)
    token, position, before = torch.arange(V), V + torch.arange(T), V + T + torch.arange(V)
    with torch.no_grad():
        model.transformer.wte.weight[token, token] = 1
        model.transformer.wpe.weight[position - V, position] = 1
        model.lm_head.weight[token, token] = 10
        q, k, v = (block for block in model.transformer.h[0].attn.c_attn.weight.view(3, C, C))
        q[position, position] = sharp
        k[position[1:], position[:-1]] = 1  # a key says which position comes next
        v[token, token] = 1
        model.transformer.h[0].attn.c_proj.weight[before, token] = 1
        q, k, v = (block for block in model.transformer.h[1].attn.c_attn.weight.view(3, C, C))
        q[token, token] = sharp
        k[token, before] = 1
        k[token, position[0]] = -1  # nothing stands before the first token, which has looked at itself
        v[token, token] = 1
        model.transformer.h[1].attn.c_proj.weight[token, token] = 1
    return model


def test_heads_built_by_hand_are_found():
    model = induction_model()
    scores, losses = interpret.head_scores(model)
    assert scores['previous'][0].item() == pytest.approx(1, abs=1e-3)
    assert scores['induction'][1].item() == pytest.approx(1, abs=1e-3)
    assert scores['previous'][1] < 0.5 and scores['induction'][0] < 0.5 and max(scores['duplicate']) < 0.5
    assert scores['copying'][1].item() == pytest.approx(1, abs=1e-3)  # it writes the token that it looks at
    assert losses[10:].max() < 0.1 < losses[:9].min()  # it knows what comes once a token has come before
    composition = interpret.composition_scores(model)
    assert composition['k'][1, 0] > 2 * max(composition['q'][1, 0], composition['v'][1, 0])


def test_a_head_that_looks_at_the_same_token_is_found():
    model = induction_model()
    model.transformer.h[1].attn.c_attn.weight.data.view(3, 60, 60)[1].zero_()[torch.arange(20), torch.arange(20)] = 1.0
    scores, _ = interpret.head_scores(model)
    assert scores['duplicate'][1].item() == pytest.approx(0.5, abs=1e-3)  # at the token itself too, which is as good
    assert scores['induction'][1].item() == pytest.approx(0, abs=1e-3)


def test_repeated_tokens():
    idx = interpret.repeated_tokens(100, 30, 4)
    assert idx.shape == (4, 60) and torch.equal(idx[:, :30], idx[:, 30:])
    assert all(len(set(row.tolist())) == 30 for row in idx) and len({tuple(row.tolist()) for row in idx}) == 4
    with pytest.raises(ValueError):
        interpret.repeated_tokens(20, 30, 4)


@pytest.mark.parametrize('n_head', [1, 4, 8])
def test_composition_of_random_weights_is_one_over_the_root_of_the_width(n_head):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=3, n_head=n_head, n_embd=256, bias=False, norm='rmsnorm'))
    for score in interpret.composition_scores(model).values():
        later = score[n_head:2 * n_head, :n_head]
        assert later.mean().item() == pytest.approx(1 / math.sqrt(256), rel=0.05)
        assert not score[:n_head].any() and not score[n_head:2 * n_head, n_head:].any()


@pytest.mark.parametrize('options', [{}, {'n_kv_head': 2}, {'norm': 'rmsnorm'}], ids=str)
def test_composition_and_eigenvalues_are_those_of_the_whole_matrices(options):
    model = awake(**options | {'bias': False})
    m = interpret.head_matrices(model)
    flat = {name: matrix.flatten(0, 1) for name, matrix in m.items()}
    reader, writer = 6, 1
    QK = flat['q'][reader].T @ flat['k'][reader]
    OV, OV_reader = (flat['o'][i] @ flat['v'][i] for i in (writer, reader))
    expected = {'q': QK.T @ OV, 'k': QK @ OV, 'v': OV_reader @ OV}
    for kind, score in interpret.composition_scores(model).items():
        first = OV_reader if kind == 'v' else QK
        ratio = expected[kind].norm() / (first.norm() * OV.norm())
        assert score[reader, writer].item() == pytest.approx(ratio.item(), rel=1e-4)
    E, U = model.transformer.wte.weight, interpret.unembedding(model)[0]
    whole = torch.linalg.eigvals((U @ m['o'][1, 2] @ m['v'][1, 2] @ E.T).detach().double())
    whole = whole[whole.abs().sort(descending=True).indices][:8]
    small = interpret.ov_eigenvalues(model)[1, 2]
    torch.testing.assert_close(small.abs().sort().values.double(), whole.abs().sort().values, atol=1e-2, rtol=1e-3)
    assert interpret.copying_scores(small).item() == pytest.approx((whole.real.sum() / whole.abs().sum()).item(), abs=1e-3)


@pytest.mark.parametrize('options', [{}, {'n_kv_head': 2}, {'norm': 'rmsnorm', 'n_kv_head': 1}], ids=str)
def test_head_matrices_are_what_the_heads_compute(options):
    """Without biases, positions and the division of the norm, a head writes attention times W_O W_V x."""
    model = awake(**options | {'bias': False, 'position': 'none'})
    trace, m = interpret.run(model, tokens(1, 7)), interpret.head_matrices(model)
    x = trace.residual[1, 0]  # what layer 1 reads
    scaled = x * interpret.norm_scale(model.transformer.h[1].ln_1, x)[:, None]
    written = torch.einsum('hts,hcd,hde,se->tc', trace.attention[1, 0], m['o'][1], m['v'][1], scaled)
    torch.testing.assert_close(written, trace.attn_out[1, 0], atol=1e-4, rtol=1e-4)
    scores = torch.einsum('tc,hdc,hde,se->hts', scaled, m['q'][1], m['k'][1], scaled) / math.sqrt(8)
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float('-inf'))
    torch.testing.assert_close(scores.softmax(dim=-1), trace.attention[1, 0], atol=1e-4, rtol=1e-3)


def test_rows_that_pad_the_vocabulary_count_for_nothing():
    model, padded = awake(), awake(vocab_size=64)
    state = model.state_dict()
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        state[name] = torch.cat((state[name], torch.full((24, 32), 9.0)))
    padded.load_state_dict(state)
    idx, ids = tokens(1, 9), torch.tensor([3, 5, 7])
    traces = [interpret.run(m, idx) for m in (model, padded)]
    for said in (lambda m, t: interpret.promoted(m, t, 3, vocab_size=40), lambda m, t: interpret.nearest_tokens(m, ids, 4, 40),
                 lambda m, t: list(interpret.logit_lens(m, t, vocab_size=40)), lambda m, t: interpret.ov_eigenvalues(m, 40).abs(),
                 lambda m, t: list(interpret.head_scores(m, 40)[0].values()), lambda m, t: interpret.head_scores(m, 40)[1],
                 lambda m, t: interpret.token_circuits(m, ids, 1.0, 40), lambda m, t: interpret.bigrams(m, ids, 40),
                 lambda m, t: interpret.neuron_tokens(m, 1, ids, 3, 40)):  # fmt: skip
        torch.testing.assert_close(said(padded, traces[1]), said(model, traces[0]), atol=1e-4, rtol=1e-3)


def test_token_circuits_are_the_scores_and_effects_of_a_first_layer_without_positions():
    model = awake(position='none', n_kv_head=2)
    ids = torch.tensor([3, 5, 7, 11])
    trace = interpret.run(model, ids[None])
    qk, ov = interpret.token_circuits(model, ids, scale=2.0)
    q, k = trace.q[0, 0], interpret.per_head(model, trace.k[0, 0])
    torch.testing.assert_close(qk[0], q @ k.transpose(1, 2) / math.sqrt(8), atol=1e-4, rtol=1e-4)
    U = interpret.unembedding(model)[0]
    v = interpret.per_head(model, trace.v[0, 0])[2]
    effect = 2.0 * v @ model.transformer.h[0].attn.c_proj.weight[:, 16:24].T @ U.T  # (N, V)
    torch.testing.assert_close(ov[0, 2], (effect - effect.mean(dim=1, keepdim=True))[:, ids], atol=1e-3, rtol=1e-3)


def test_neurons_neighbours_and_bigrams():
    model = awake(activation='swiglu')
    trace = interpret.run(model, tokens(1, 6))
    best = interpret.strongest_neurons(model, trace, 3)
    writes = trace.post[1, 0, 4][:, None] * model.transformer.h[1].mlp.c_proj.weight.T  # (F, C)
    assert best[1, 4].tolist() == writes.norm(dim=1).topk(3).indices.tolist()

    ids, cosines = interpret.nearest_tokens(model, torch.tensor([0, 9]), 4)
    E = model.transformer.wte.weight
    expected = F.cosine_similarity(E[9], E, dim=1)
    assert ids[1].tolist() == expected.sort(descending=True).indices[1:5].tolist()
    torch.testing.assert_close(cosines[1], expected.sort(descending=True).values[1:5])

    whole, direct = interpret.bigrams(model, torch.arange(40))
    torch.testing.assert_close(whole[7], model(torch.tensor([[7]]))[0][0, 0].softmax(dim=-1))
    with torch.no_grad():
        for block in model.transformer.h:  # nothing in between
            block.attn.c_proj.weight.zero_(), block.mlp.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_(), block.mlp.c_proj.bias.zero_()
        model.transformer.wpe.weight.zero_()
    torch.testing.assert_close(interpret.bigrams(model, torch.arange(40))[0], direct, atol=1e-5, rtol=1e-4)


def test_a_short_context_has_no_head_scores_and_a_long_text_is_refused():
    scores, losses = interpret.head_scores(tiny(block_size=3))
    assert scores['induction'].isnan().all() and scores['copying'].isfinite().all() and not len(losses)
    with pytest.raises(ValueError):
        interpret.run(tiny(), tokens(1, 17))


def test_a_model_whose_norms_are_behind_its_sums_is_refused():
    with pytest.raises(ValueError, match="norm_position = 'post'"):
        interpret.run(tiny(**POST), tokens(1, 4))
