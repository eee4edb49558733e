"""interpret against the model itself, formulas from the papers, and handmade weights."""

import math

import pytest
import torch
from torch.nn import functional as F

import interpret
from helpers import ARCHITECTURES, POST, awake, tiny, tokens
from lib.errors import UserError
from model import GPT, GPTConfig

POST_RMS = {'norm_position': 'post', 'norm': 'rmsnorm', 'bias': False, 'position': 'rope'}

SHAPES = ARCHITECTURES + [
    POST,
    POST_RMS,
    {
        'norm_position': 'post',
        'eot_token': 3,
        'turns': 1,
        'prefix_lm': True,
        'ngram': 2,
        'n_kv_head': 2,
        'activation': 'swiglu',
        'logit_softcap': 15.0,
    },
    {'position': 'sinusoidal', 'ngram': 2},
    {
        'position': 'rope',
        'ngram': 3,
        'norm': 'rmsnorm',
        'bias': False,
        'activation': 'relu2',
        'n_kv_head': 1,
        'qk_norm': True,
        'tie_weights': False,
        'logit_softcap': 15.0,
    },
    {'eot_token': 3, 'turns': 1, 'prefix_lm': True, 'ngram': 2},
]


def text(model, *shape):
    """Random token ids; every fourth, from the first on, ends a document, a source or a target."""
    idx = tokens(*shape)
    if model.config.eot_token is not None:
        idx[:, ::4] = model.config.eot_token
    return idx


# Traces and attribution ---------------------------------------------------------------------------

@pytest.mark.parametrize('options', SHAPES, ids=str)
def test_interpret_trace_matches_model(options):
    model = awake(**options)
    idx = text(model, 2, 12)
    trace = interpret.run(model, idx)
    logits, _ = model(idx, idx)
    torch.testing.assert_close(trace.logits, logits, atol=1e-5, rtol=1e-6)
    n_head = model.config.n_head
    torch.testing.assert_close(trace.attention.sum(dim=-1), torch.ones(2, 2, n_head, 12))
    assert not trace.attention.masked_fill(trace.mask[:, None], 0).any()
    if not model.config.prefix_lm:
        assert not trace.mask.triu(1).any()
    assert_stream_is_a_sum(model, trace)
    *_, last = interpret.logit_lens(model, trace, b=1)
    torch.testing.assert_close(last, logits[1].softmax(dim=-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('options', SHAPES, ids=str)
def test_attribute_and_its_refinements_sum_to_logits(options):
    model = awake(**options)
    idx = text(model, 2, 12)
    trace = interpret.run(model, idx)
    logits, _ = model(idx, idx)
    all_tokens = torch.arange(40).expand(12, 40)
    names, parts = interpret.attribute(model, trace, all_tokens, b=1)
    torch.testing.assert_close(parts.sum(dim=0), logits[1], atol=1e-4, rtol=0)
    assert len(names) == len(set(names)) == len(parts)

    n_head = model.config.n_head
    head_parts = [part for (kind, _, _), part in zip(names, parts) if kind == 'head']
    heads = torch.stack(head_parts).view(2, n_head, 12, 40)
    targets = tokens(12, seed=3)
    by_source = interpret.effect_by_source(model, trace, targets, b=1)
    expected = heads[:, :, torch.arange(12), targets]
    torch.testing.assert_close(by_source.sum(dim=-1), expected, atol=1e-5, rtol=1e-5)

    ids, values = interpret.promoted(model, trace, 3, b=1)
    against_mean = heads - heads.mean(dim=-1, keepdim=True)
    ascending = against_mean.sort(dim=-1).values
    extremes = torch.cat((ascending[..., -3:].flip(-1), ascending[..., :3]), dim=-1)
    torch.testing.assert_close(values, extremes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(against_mean.gather(3, ids), values, atol=1e-4, rtol=1e-4)


def assert_stream_is_a_sum(model, trace):
    """Of what the layers write; post-norm: after each layer the sum is normalized."""
    x = trace.residual[0]
    for layer, block in enumerate(model.transformer.h):
        x = x + trace.attn_out[layer]
        if model.config.norm_position == 'post':
            x = block.ln_1(x)
        torch.testing.assert_close(x, trace.middle[layer], atol=1e-5, rtol=1e-5)
        x = x + trace.mlp_out[layer]
        if model.config.norm_position == 'post':
            x = block.ln_2(x)
        torch.testing.assert_close(x, trace.residual[layer + 1], atol=1e-5, rtol=1e-5)


class FrozenNorm(torch.nn.Module):
    """A norm whose divisor is what it was for x, in float64."""

    def __init__(self, norm, x):
        super().__init__()
        self.norm = norm
        self.center = isinstance(norm, torch.nn.LayerNorm)
        self.divisor = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        if self.center:
            self.divisor = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.center else x
        x = x / self.divisor * self.norm.weight
        return x if getattr(self.norm, 'bias', None) is None else x + self.norm.bias


@pytest.mark.parametrize('options', SHAPES, ids=str)
def test_attribute_equals_ablation_with_frozen_norms(options):
    """Head 0.1 and MLP 0 are taken off by hooks, while the outputs of all other parts and the
    divisors of the norms in the stream stay as they were."""
    model = awake(**options | {'logit_softcap': 0.0}).double()
    trace = interpret.run(model, text(model, 1, 9))
    names, parts = interpret.attribute(model, trace, torch.arange(40).expand(9, 40))
    inputs, outputs = {}, {}

    def record(name):
        def hook(module, args, output):
            inputs[name], outputs[name] = args[0], output
        return hook

    in_stream = ('ln_1', 'ln_2') if model.config.norm_position == 'post' else ('ln_f',)
    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()
             if name.endswith((*in_stream, '.attn', '.mlp'))]
    expected = model(trace.idx, trace.idx)[0]
    for hook in hooks:
        hook.remove()
    for name, x in inputs.items():
        if name.endswith(in_stream):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, FrozenNorm(model.get_submodule(name), x))
    hs = model.config.head_dim
    c_proj = model.transformer.h[0].attn.c_proj
    head = trace.mixed[0, 0, 1] @ c_proj.weight[:, hs:2 * hs].T
    bias = model.transformer.h[0].mlp.c_proj.bias
    mlp = trace.mlp_out[0, 0] - (0 if bias is None else bias)
    for part, removed, name in (('head', head, 'attn'), ('mlp', mlp, 'mlp')):
        off = {f'transformer.h.0.{name}': removed}
        hooks = []
        for key, output in outputs.items():
            if key.endswith(('.attn', '.mlp')):
                changed = output - off.get(key, 0)
                hook = lambda *_, changed=changed: changed  # noqa: E731
                hooks.append(model.get_submodule(key).register_forward_hook(hook))
        logits = model(trace.idx, trace.idx)[0]
        for hook in hooks:
            hook.remove()
        effect = parts[names.index((part, 0, 1 if part == 'head' else None))]
        torch.testing.assert_close((expected - logits)[0].double(), effect.double(),
                                   atol=2e-4, rtol=1e-4)


def test_interpret_trace_attends_both_ways_within_a_source():
    model = awake(eot_token=3, turns=1, prefix_lm=True)
    idx = torch.tensor([[3, 5, 9, 7, 3, 8, 6, 3]])  # source 5 9 7, target 8 6
    outputs = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(idx, idx)
    trace = interpret.run(model, idx)
    torch.testing.assert_close(trace.attn_out, torch.stack(outputs), atol=1e-5, rtol=1e-5)
    sees = torch.ones(8, 8, dtype=torch.bool).tril()
    sees[:4, :4] = True
    assert torch.equal(trace.mask[0], sees)
    assert (trace.attention[:, 0, :, sees] > 0).all()
    assert not trace.attention[:, 0, :, ~sees].any()
    torch.testing.assert_close(trace.attention.sum(dim=-1), torch.ones(2, 1, 4, 8))


def test_interpret_run_rejects_unknown_norm():
    model = tiny()
    model.transformer.ln_f = torch.nn.Dropout()
    with pytest.raises(NotImplementedError, match='Dropout'):
        interpret.run(model, tokens(1, 4))


def test_interpret_run_rejects_long_text():
    with pytest.raises(ValueError, match='block_size = 16'):
        interpret.run(tiny(), tokens(1, 17))


@pytest.mark.parametrize('shape', [(4,), (1, 0), (1, 1, 4)])
def test_interpret_run_rejects_other_shapes(shape):
    with pytest.raises(UserError, match='give token ids'):
        interpret.run(tiny(), tokens(*shape))


@pytest.mark.parametrize('function', [
    lambda model, trace, ids: interpret.promoted(model, trace, 3, vocab_size=40),
    lambda model, trace, ids: list(interpret.logit_lens(model, trace, vocab_size=40)),
    lambda model, trace, ids: interpret.neuron_tokens(model, 1, ids, 3, 40),
    lambda model, trace, ids: interpret.nearest_tokens(model, ids, 4, 40),
    lambda model, trace, ids: list(interpret.head_scores(model, 40)[0].values()),
    lambda model, trace, ids: interpret.head_scores(model, 40)[1],
    lambda model, trace, ids: interpret.ov_eigenvalues(model, 40).abs(),
    lambda model, trace, ids: interpret.token_circuits(model, ids, 1.0, 40),
    lambda model, trace, ids: interpret.bigrams(model, ids, 40),
], ids=['promoted', 'logit_lens', 'neuron_tokens', 'nearest_tokens', 'head_scores', 'losses',
        'ov_eigenvalues', 'token_circuits', 'bigrams'])
@pytest.mark.parametrize('options', [{}, POST], ids=str)
def test_interpret_ignores_vocabulary_padding(function, options):
    model = awake(**options)
    padded = awake(vocab_size=64, **options)
    state = model.state_dict()
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        state[name] = torch.cat((state[name], torch.full((24, 32), 9.0)))
    padded.load_state_dict(state)
    idx = tokens(1, 9)
    ids = torch.tensor([3, 5, 7])
    result, expected = (function(m, interpret.run(m, idx), ids) for m in (padded, model))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)


# Head scores --------------------------------------------------------------------------------------

def induction_model(V=20, T=20, sharpness=40.0):
    """Two layers with handmade weights: a previous-token head, then an induction head.

    The stream holds the one-hot token, position and previous token, so all norms are known.
    """
    C = 2 * V + T
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=1, n_embd=C, bias=False,
                          norm='rmsnorm', position='learned', tie_weights=False)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.zeros_(p)
    token = torch.arange(V)
    position = V + torch.arange(T)
    previous = V + T + torch.arange(V)
    first, second = (block.attn for block in model.transformer.h)
    with torch.no_grad():
        model.transformer.wte.weight[token, token] = 1
        model.transformer.wpe.weight[position - V, position] = 1
        model.lm_head.weight[token, token] = 10

        q, k, v = first.c_attn.weight.view(3, C, C)
        q[position, position] = sharpness
        k[position[1:], position[:-1]] = 1  # a key matches the query of the next position
        v[token, token] = 1
        first.c_proj.weight[previous, token] = 1

        q, k, v = second.c_attn.weight.view(3, C, C)
        q[token, token] = sharpness
        k[token, previous] = 1
        k[token, position[0]] = -1  # position 0 has attended to itself: cancel its "previous"
        v[token, token] = 1
        second.c_proj.weight[token, token] = 1
    return model


def test_head_scores_find_handmade_induction_circuit():
    model = induction_model()
    scores, losses = interpret.head_scores(model)
    assert scores['previous'][0].item() == pytest.approx(1, abs=1e-3)
    assert scores['induction'][1].item() == pytest.approx(1, abs=1e-3)
    assert scores['copying'][1].item() == pytest.approx(1, abs=1e-3)
    assert scores['previous'][1] < 0.5
    assert scores['induction'][0] < 0.5
    assert max(scores['duplicate']) < 0.5
    assert losses[10:].max() < 0.1 < losses[:9].min()  # only the repeat is predictable
    composition = interpret.composition_scores(model)
    others = max(composition['q'][1, 0], composition['v'][1, 0])
    assert composition['k'][1, 0] > 2 * others


def test_head_scores_find_duplicate_token_head():
    model = induction_model()
    token = torch.arange(20)
    _, k, _ = model.transformer.h[1].attn.c_attn.weight.data.view(3, 60, 60)
    k.zero_()[token, token] = 1.0
    scores, _ = interpret.head_scores(model)
    # the token itself matches as well, so it gets the other half
    assert scores['duplicate'][1].item() == pytest.approx(0.5, abs=1e-3)
    assert scores['induction'][1].item() == pytest.approx(0, abs=1e-3)


def test_head_scores_short_context_gives_nan():
    scores, losses = interpret.head_scores(tiny(block_size=3))
    assert scores['induction'].isnan().all()
    assert scores['copying'].isfinite().all()
    assert not len(losses)


def test_repeated_tokens_are_distinct_and_repeated():
    idx = interpret.repeated_tokens(100, 30, 4)
    assert idx.shape == (4, 60)
    assert torch.equal(idx[:, :30], idx[:, 30:])
    assert all(len(set(row.tolist())) == 30 for row in idx)
    assert len({tuple(row.tolist()) for row in idx}) == 4
    with pytest.raises(ValueError):
        interpret.repeated_tokens(20, 30, 4)


def test_head_scores_leave_out_end_of_text():
    assert not (interpret.repeated_tokens(20, 19, 4, eot=5) == 5).any()
    with pytest.raises(ValueError, match='19 tokens'):
        interpret.repeated_tokens(20, 20, 4, eot=5)
    plain = tiny()
    for options in ({}, {'turns': 1}, {'turns': 1, 'prefix_lm': True}):
        model = tiny(eot_token=39, **options)  # a document boundary would cut attention off
        scores, losses = interpret.head_scores(model)
        expected, expected_losses = interpret.head_scores(plain, 39)
        for name in ('previous', 'induction', 'duplicate'):
            torch.testing.assert_close(scores[name], expected[name])
        assert len(losses) == len(expected_losses)


# Weights ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_head', [1, 4, 8])
def test_composition_scores_of_random_weights(n_head):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=3, n_head=n_head, n_embd=256,
                          bias=False, norm='rmsnorm'))
    for score in interpret.composition_scores(model).values():
        first_layer = score[:n_head]
        second_layer = score[n_head:2 * n_head]
        mean = second_layer[:, :n_head].mean().item()
        assert mean == pytest.approx(1 / math.sqrt(256), rel=0.05)
        assert not first_layer.any()
        assert not second_layer[:, n_head:].any()  # only earlier layers are read


def passed(model, x, norms):
    """x (C, n) after the linear part of norms (layer, name): columns are vectors of the stream."""
    for layer, name in norms:
        norm = model.transformer.h[layer].get_submodule(name)
        if model.config.norm == 'layernorm':
            x = x - x.mean(dim=0)
        x = torch.diag(norm.weight) @ x
    return x


WEIGHTS = [{}, {'n_kv_head': 2}, {'norm': 'rmsnorm'}, POST, POST_RMS]


@pytest.mark.parametrize('options', WEIGHTS, ids=str)
def test_composition_scores_match_full_matrices(options):
    model = awake(**options | {'bias': False})
    m = {name: x.flatten(0, 1) for name, x in interpret.head_matrices(model).items()}
    reader, writer = 6, 1
    QK = m['q'][reader].T @ m['k'][reader]
    OV = m['o'][writer] @ m['v'][writer]
    if model.config.norm_position == 'post':  # between the two
        OV = passed(model, OV, [(0, 'ln_1'), (0, 'ln_2')])
    OV_reader = m['o'][reader] @ m['v'][reader]
    expected = {
        'q': (QK.T @ OV).norm() / (QK.norm() * OV.norm()),
        'k': (QK @ OV).norm() / (QK.norm() * OV.norm()),
        'v': (OV_reader @ OV).norm() / (OV_reader.norm() * OV.norm()),
    }
    for kind, score in interpret.composition_scores(model).items():
        assert score[reader, writer].item() == pytest.approx(expected[kind].item(), rel=1e-4)


@pytest.mark.parametrize('options', WEIGHTS, ids=str)
def test_ov_eigenvalues_match_full_matrix(options):
    model = awake(**options | {'bias': False})
    m = interpret.head_matrices(model)
    read = model.transformer.wte.weight.T  # (C, V)
    U, _ = interpret.unembedding(model)
    o = m['o'][1, 2]
    if model.config.norm_position == 'post':
        read = passed(model, read, [(0, 'ln_1'), (0, 'ln_2')])
        o = passed(model, o, [(1, 'ln_1'), (1, 'ln_2')])
    circuit = U @ o @ m['v'][1, 2] @ read  # (V, V)
    full = torch.linalg.eigvals(circuit.detach().double())
    full = full[full.abs().argsort(descending=True)][:8]  # the others are 0
    small = interpret.ov_eigenvalues(model)[1, 2]
    torch.testing.assert_close(small.abs().sort().values.double(), full.abs().sort().values,
                               atol=1e-2, rtol=1e-3)
    copying = full.real.sum() / full.abs().sum()
    assert interpret.copying_scores(small).item() == pytest.approx(copying.item(), abs=1e-3)


@pytest.mark.parametrize('options', [{}, {'n_kv_head': 2}, {'norm': 'rmsnorm', 'n_kv_head': 1},
                                     {'norm_position': 'post'}], ids=str)
def test_head_matrices_reproduce_attention(options):
    model = awake(**options | {'bias': False, 'position': 'none'})
    trace = interpret.run(model, tokens(1, 7))
    matrices = interpret.head_matrices(model)
    W_Q, W_K, W_V, W_O = (matrices[name][1] for name in 'qkvo')
    x = trace.residual[1, 0]  # the input of layer 1
    if model.config.norm_position == 'pre':
        x = x * interpret.norm_scale(model.transformer.h[1].ln_1, x)[:, None]
    out = torch.einsum('hts,hcd,hde,se->tc', trace.attention[1, 0], W_O, W_V, x)
    torch.testing.assert_close(out, trace.attn_out[1, 0], atol=1e-4, rtol=1e-4)
    scores = torch.einsum('tc,hdc,hde,se->hts', x, W_Q, W_K, x) / math.sqrt(8)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    attention = scores.masked_fill(~mask, float('-inf')).softmax(dim=-1)
    torch.testing.assert_close(attention, trace.attention[1, 0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_token_circuits_match_first_layer_without_positions(norm_position):
    model = awake(position='none', n_kv_head=2, norm_position=norm_position)
    ids = torch.tensor([3, 5, 7, 11])
    trace = interpret.run(model, ids[None])
    qk, ov = interpret.token_circuits(model, ids, scale=2.0)
    q = trace.q[0, 0]
    k = interpret.per_head(model, trace.k[0, 0])
    torch.testing.assert_close(qk[0], q @ k.transpose(1, 2) / math.sqrt(8), atol=1e-4, rtol=1e-4)
    U, _ = interpret.unembedding(model)
    v = interpret.per_head(model, trace.v[0, 0])[2]
    W_O = model.transformer.h[0].attn.c_proj.weight[:, 16:24]  # head 2
    if norm_position == 'post':
        norms = [(layer, name) for layer in range(2) for name in ('ln_1', 'ln_2')]
        W_O = passed(model, W_O, norms)
    effect = 2.0 * v @ W_O.T @ U.T  # (N, V)
    against_mean = effect - effect.mean(dim=1, keepdim=True)
    torch.testing.assert_close(ov[0, 2], against_mean[:, ids], atol=1e-3, rtol=1e-3)


def test_strongest_neurons_rank_by_output_norm():
    model = awake(activation='swiglu')
    trace = interpret.run(model, tokens(1, 6))
    strongest = interpret.strongest_neurons(model, trace, 3)
    output = trace.post[1, 0, 4][:, None] * model.transformer.h[1].mlp.c_proj.weight.T  # (F, C)
    assert strongest[1, 4].tolist() == output.norm(dim=1).topk(3).indices.tolist()


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_neuron_tokens_are_those_of_its_output_weights(norm_position):
    model = awake(norm_position=norm_position)
    W_out = model.transformer.h[0].mlp.c_proj.weight[:, [7]]  # neuron 7
    if norm_position == 'post':  # what the MLP writes does not pass ln_1 of its own layer
        W_out = passed(model, W_out, [(0, 'ln_2'), (1, 'ln_1'), (1, 'ln_2')])
    U, _ = interpret.unembedding(model)
    order = (U @ W_out)[:, 0].argsort(descending=True).tolist()
    ids = interpret.neuron_tokens(model, 0, torch.tensor([3, 7]), 4)
    assert ids[1].tolist() == order[:4] + order[:-5:-1]


def test_nearest_tokens_match_cosine_similarity():
    model = awake(activation='swiglu')
    ids, cosines = interpret.nearest_tokens(model, torch.tensor([0, 9]), 4)
    E = model.transformer.wte.weight
    expected = F.cosine_similarity(E[9], E, dim=1).sort(descending=True)
    assert ids[1].tolist() == expected.indices[1:5].tolist()  # the first is the token itself
    torch.testing.assert_close(cosines[1], expected.values[1:5])


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_bigrams_match_model_and_direct_path(norm_position):
    model = awake(activation='swiglu', norm_position=norm_position)
    full, direct = interpret.bigrams(model, torch.arange(40))
    logits, _ = model(torch.tensor([[7]]))
    torch.testing.assert_close(full[7], logits[0, 0].softmax(dim=-1))
    with torch.no_grad():  # silence everything but the direct path
        model.transformer.wpe.weight.zero_()
        for block in model.transformer.h:
            for c_proj in (block.attn.c_proj, block.mlp.c_proj):
                c_proj.weight.zero_()
                c_proj.bias.zero_()
    full, _ = interpret.bigrams(model, torch.arange(40))
    torch.testing.assert_close(full, direct, atol=1e-5, rtol=1e-4)
