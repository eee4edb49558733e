"""The model against references that we did not write: transformers, torch.nn, and formulas worked out by hand."""

import itertools
import math
from dataclasses import asdict

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
from model import (
    GPT,
    MLP,
    CausalSelfAttention,
    GPTConfig,
    Int8Linear,
    KVCache,
    NgramEmbedding,
    apply_rotary,
    attend_fused,
    attend_written_out,
    filter_logits,
    position_angles,
    sinusoidal_embedding,
)

POSITIONS = ('learned', 'sinusoidal', 'rope', 'none')


def tiny(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{'block_size': 16, 'vocab_size': 40, 'n_layer': 2, 'n_head': 4, 'n_embd': 32} | options))
    for p in model.parameters():
        if p.dim() > 1:  # larger than at initialisation: every part has a say in the logits
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def tokens(*shape, vocab_size=40, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('shape', [(1, 1, 16, 50, 8), (2, 4, 32, 100, 16), (3, 3, 48, 257, 64), (2, 12, 768, 50257, 32)])
@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_gpt2_equals_transformers(shape, suffix, tmp_path):
    n_layer, n_head, n_embd, vocab_size, n_positions = shape
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            vocab_size=vocab_size,
            n_positions=n_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    theirs.save_pretrained(tmp_path)
    if suffix == 'bin':
        (tmp_path / 'model.safetensors').unlink()
        torch.save(theirs.state_dict(), tmp_path / 'pytorch_model.bin')
    ours = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    assert ours.get_num_params(non_embedding=False) == theirs.num_parameters()
    idx, targets = tokens(2, n_positions, vocab_size=vocab_size), tokens(2, n_positions, vocab_size=vocab_size, seed=2)
    logits, loss = ours(idx, targets)
    expected = theirs(idx).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for layer in range(n_layer):
        torch.testing.assert_close(
            ours.transformer.h[layer].mlp.c_fc.weight.grad,
            theirs.transformer.h[layer].mlp.c_fc.weight.grad.t(),
            atol=1e-4,
            rtol=0,
        )
        torch.testing.assert_close(
            ours.transformer.h[layer].attn.c_attn.bias.grad, theirs.transformer.h[layer].attn.c_attn.bias.grad, atol=1e-4, rtol=0
        )
    torch.testing.assert_close(ours.lm_head.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-4, rtol=0)


def test_greedy_text_equals_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            vocab_size=60,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    theirs.eval().save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    idx = tokens(2, 5, vocab_size=60)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False, pad_token_id=0)
    assert ours.generate(idx, 50, temperature=0).tolist() == expected.tolist()


def test_sizes_of_gpt2():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808  # of OpenAI's checkpoint
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    assert model.flops_per_token() == 6 * 123_653_376 + 12 * 12 * 768 * 1024  # PaLM, appendix B: 6N + 12LHQT
    assert model.estimate_mfu(8, 2.0, peak_flops=1e12) == pytest.approx(model.flops_per_token() * 1024 * 8 / 2e12)


def test_attention_equals_torch():
    config = GPTConfig(n_head=4, n_embd=32, bias=True)
    ours = CausalSelfAttention(config, 0)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.c_attn.weight)
        theirs.in_proj_bias.copy_(ours.c_attn.bias)
        theirs.out_proj.weight.copy_(ours.c_proj.weight)
        theirs.out_proj.bias.copy_(ours.c_proj.bias)
    x = torch.randn(2, 7, 32)
    expected, _ = theirs(x, x, x, attn_mask=torch.nn.Transformer.generate_square_subsequent_mask(7), is_causal=True)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize('n_kv_head', [4, 2, 1])
@pytest.mark.parametrize('masked', [False, True])
def test_fused_attention_equals_the_formula(n_kv_head, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, n_kv_head, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 6, 6) < 0.5 if masked else None
    if masked:
        mask = mask | torch.eye(6, dtype=torch.bool)
    fused, written = attend_fused(q, k, v, mask), attend_written_out(q, k, v, mask)
    torch.testing.assert_close(fused, written)
    weight = torch.randn_like(fused)
    for a, b in zip(
        torch.autograd.grad((fused * weight).sum(), (q, k, v)),
        torch.autograd.grad((written * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    if not masked:  # softmax(q k / sqrt(d)) v of one query and its past, by hand
        q, k, v = q.detach(), k.detach(), v.detach()
        weights = [math.exp(q[1, 3, 2] @ k[1, 3 * n_kv_head // 4, s] / math.sqrt(8)) for s in range(3)]
        by_hand = sum(w * v[1, 3 * n_kv_head // 4, s] for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(written[1, 3, 2], by_hand)


def test_sinusoidal_positions_follow_the_paper():
    table = sinusoidal_embedding(torch.arange(20), 12)
    for position in range(20):
        for i in range(6):
            angle = position / 10000 ** (2 * i / 12)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_rotary_positions_equal_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    angles = position_angles(torch.arange(9), 8)
    both = torch.cat((angles, angles), dim=-1)[None]
    expected = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    ours = [apply_rotary(x, angles.cos(), angles.sin()) for x in (q, k)]
    torch.testing.assert_close(ours, list(expected))
    # and a score depends on the distance alone: the same vectors at positions 2 and 5, and at 12 and 15
    score = [apply_rotary(q[0, 0, 0], *cos_sin(p + 3, 8)) @ apply_rotary(k[0, 0, 0], *cos_sin(p, 8)) for p in (2, 12)]
    torch.testing.assert_close(score[0], score[1])


def cos_sin(position, dim):
    angles = position_angles(torch.tensor(position), dim)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    'activation, formula',
    [
        ('gelu', lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ('gelu_tanh', lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ('relu', lambda x: x.clamp(min=0)),
        ('relu2', lambda x: x.clamp(min=0) ** 2),
        ('swiglu', lambda x: x[..., :88] * torch.sigmoid(x[..., :88]) * x[..., 88:]),
    ],
)
def test_activations_follow_their_formulas(activation, formula):
    mlp = MLP(GPTConfig(n_embd=32, n_head=4, activation=activation))
    x = torch.randn(5, 32)
    torch.testing.assert_close(mlp(x), mlp.c_proj(formula(mlp.c_fc(x))))
    plain = sum(p.numel() for p in MLP(GPTConfig(n_embd=384, n_head=4)).parameters())
    size = sum(p.numel() for p in MLP(GPTConfig(n_embd=384, n_head=4, activation=activation)).parameters())
    assert size == pytest.approx(plain, rel=0.01)  # a gated MLP is as large as a plain one


ARCHITECTURES = (
    [{'position': p} for p in POSITIONS]
    + [
        {'norm': 'rmsnorm'},
        {'qk_norm': True},
        {'n_kv_head': 2},
        {'n_kv_head': 1},
        {'bias': False},
        {'tie_weights': False},
        {'logit_softcap': 5.0},
        {'attention': 'math'},
        {'ngram': 4, 'ngram_rows': 97},
        {'document_token': 3, 'ngram': 3, 'ngram_rows': 97, 'position': 'rope'},
        {'document_token': 3, 'attention': 'math'},
        {'document_token': 3, 'turns': 2, 'ngram': 3, 'ngram_rows': 97},
    ]
    + [{'activation': a} for a in ('gelu', 'relu', 'relu2', 'swiglu')]
    + [{'position': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'n_kv_head': 2, 'qk_norm': True, 'bias': False}]
)


POST = {'norm_position': 'post', 'position': 'sinusoidal'}  # which interpret.py refuses


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST], ids=str)
def test_a_later_token_never_changes_an_earlier_logit(options):
    model = tiny(**options)
    idx = tokens(1, 16)
    logits, _ = model(idx, idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        other, _ = model(changed, changed)
        torch.testing.assert_close(other[:, :t], logits[:, :t], atol=0, rtol=0)
        assert not torch.equal(other[:, t], logits[:, t])


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST], ids=str)
def test_cached_logits_equal_uncached(options):
    model = tiny(**options)
    idx = tokens(2, 16)
    expected, _ = model(idx, idx)
    cache = KVCache(model.config, 2, 16)
    with torch.no_grad():
        got = (
            [model(idx[:, :5], cache=cache)[0]]
            + [model(idx[:, t : t + 1], cache=cache)[0] for t in range(5, 12)]
            + [model(idx[:, 12:], cache=cache)[0]]
        )  # one by one, then four at once
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, [*range(4, 12), 15]], atol=1e-5, rtol=0)


@pytest.mark.parametrize('ngram', [1, 4])
@pytest.mark.parametrize('position', POSITIONS)
def test_padded_rows_have_the_logits_of_rows_alone(position, ngram):
    model = tiny(position=position, ngram=ngram)
    long, short = tokens(10), tokens(3, seed=5)
    padded = torch.stack((long, torch.cat((torch.zeros(7, dtype=torch.long), short))))
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 7]))
    with torch.no_grad():
        together = [model(padded, cache=cache)[0], model(tokens(2, 1), cache=cache)[0]]
    for row, alone in ((0, long), (1, short)):
        for step, logits in enumerate(together):
            idx = torch.cat((alone, tokens(2, 1)[row]))[: len(alone) + step][None]
            torch.testing.assert_close(logits[row, -1], model(idx)[0][0, -1], atol=1e-5, rtol=0)


DOCUMENTS = [{'position': 'rope'}, {'position': 'none', 'ngram': 4, 'ngram_rows': 97}, {'position': 'rope', 'attention': 'math'}]


@pytest.mark.parametrize('options', DOCUMENTS, ids=str)
def test_a_document_is_read_as_if_it_stood_alone(options):
    model = tiny(document_token=3, **options)
    first, second = torch.tensor([7, 8, 9, 10, 11]), torch.tensor([3, 8, 9, 7, 9])
    alone = model(second[None], second[None])[0][0]
    together = torch.cat((first, second, second))[None]
    logits = model(together, together)[0][0]
    torch.testing.assert_close(logits[5:10], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[10:], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(tiny(**options)(together, together)[0][0, 10:], logits[10:], atol=1e-2)


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('options', [*DOCUMENTS, {}], ids=str)
def test_cached_and_padded_documents_are_read_as_if_they_stood_alone(options, static):
    model = tiny(document_token=3, **options)
    long, short = [5, 3, 8, 3, 9, 10, 3, 3, 4, 3], [4, 3, 6, 7, 8, 9]
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 4]), static=static)
    padded = torch.tensor([long[:7], [0, 0, 0, 0] + short[:3]])
    with torch.no_grad():
        got = [model(padded, cache=cache)[0]]
        cache = cache.rows([1, 0])
        got += [model(torch.tensor([[short[t - 4]], [long[t]]]), cache=cache)[0].flip(0) for t in (7, 8, 9)]
        for step, logits in enumerate(got):
            for row, text in enumerate((long, short)):
                idx = torch.tensor([text[: len(text) - 3 + step]])
                torch.testing.assert_close(logits[row, 0], model(idx)[0][0, 0], atol=1e-5, rtol=0)


def who_sees_whom(ids, prefix_lm):
    """The rule of sources and targets, written from its words: (T, T) of who (row) may look at whom (column). 3 is the token."""
    places = []  # of each token: (document, part); a part begins with a 3; odd parts, counted from 1, are sources
    document = part = 0
    for t, token in enumerate(ids):
        if token == 3 and (t == 0 or ids[t - 1] == 3):
            document, part = document + 1, 1
        elif token == 3:
            part += 1
        places.append((document, part))
    return [
        [
            query[0] == key[0] and (j <= i or prefix_lm and query == key and query[1] % 2 == 1)
            for j, key in enumerate(places)
        ]
        for i, query in enumerate(places)
    ]


TURNS = [[3, 5, 6, 7, 3, 8, 9, 3, 3, 4, 3, 8, 8, 3, 3, 3], [3, 5, 3, 8, 3, 6, 6, 6, 3, 9, 9, 3, 3, 5, 5, 3]]


@pytest.mark.parametrize('prefix_lm', [False, True])
def test_sources_see_themselves_targets_what_is_before_them_and_nobody_another_document(prefix_lm):
    model = tiny(document_token=3, turns=2, prefix_lm=prefix_lm)
    idx = torch.tensor(TURNS)
    expected = torch.tensor([who_sees_whom(ids, prefix_lm) for ids in TURNS])[:, None]
    assert torch.equal(model.attention_mask(idx, torch.arange(16)), expected)


@pytest.mark.parametrize('options', [{}, {'attention': 'math'}, {'ngram': 3, 'ngram_rows': 97}, {'n_kv_head': 1}], ids=str)
def test_a_source_is_read_both_ways_and_never_sees_its_target(options):
    model = tiny(document_token=3, turns=1, prefix_lm=True, position='rope', **options)
    ids = torch.tensor([[3, 5, 6, 7, 3, 8, 9, 4, 3]])  # the source is 3, 5, 6, 7

    def states(ids):
        return model(ids, ids)[0][0]

    plain = states(ids)
    for place, same in ((3, []), (1, []), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 2, 3, 4, 5, 6])):
        changed = ids.clone()
        changed[0, place] = 11
        equal = [t for t in range(9) if torch.equal(states(changed)[t], plain[t])]
        assert equal == same, f'the token at {place} was changed'


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('ngram', [1, 3])
@pytest.mark.parametrize('prefix_lm', [False, True])
def test_a_target_is_written_with_the_cache_as_without(prefix_lm, ngram, static):
    model = tiny(document_token=3, turns=2, prefix_lm=prefix_lm, ngram=ngram, ngram_rows=97)
    long, short = [3, 5, 6, 7, 3, 8, 9, 10, 11], [3, 4, 3, 9, 9, 10, 11]  # one source is 3 tokens long, the other 1
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 2]), static=static)
    steps = [model(torch.tensor([long[:5], [0, 0, *short[:3]]]), cache=cache)[0]]
    steps += [model(torch.tensor([[long[t]], [short[t - 2]]]), cache=cache)[0] for t in range(5, 9)]
    for row, text in enumerate((long, short)):
        alone = model(torch.tensor([text]), torch.tensor([text]))[0][0]
        torch.testing.assert_close(torch.cat(steps, dim=1)[row], alone[-5:], atol=1e-5, rtol=0)
    prompts = [[3, *range(20, 20 + n), 3] for n in (1, 4, 9)]
    with_cache = model.generate(prompts, 4, temperature=0)
    assert with_cache == model.generate(prompts, 4, temperature=0, use_cache=False)
    assert [row for p in prompts for row in model.generate([p], 4, temperature=0)] == with_cache
    assert [found[0][0] for found in model.beam_search(prompts, 4, num_beams=1)] == [row[-4:] for row in with_cache]


def test_what_is_not_yet_divided_and_what_has_no_beginning():
    model = tiny(document_token=3, turns=1, prefix_lm=True)
    ids = torch.tensor([[3, 5, 6, 7]])  # a source of which the end is not there: the rest of a buffer is not part of it
    expected = model(ids, ids)[0][:, -1:]
    got = model(ids, cache=KVCache(model.config, 1, 16, static=True))[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    ids = torch.tensor([[5, 6, 7, 8]])  # no source: it is read from left to right
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert torch.equal(model.attention_mask(ids, torch.arange(4)), causal)


def test_documents_of_a_row_are_read_as_if_each_stood_alone():
    model = tiny(document_token=3, turns=2, prefix_lm=True, position='none', ngram=3, ngram_rows=97)
    first, second = [3, 5, 6, 3, 7, 3], [3, 8, 9, 3, 10, 3, 11, 3, 12, 3]
    row = torch.tensor([first + second])
    logits = model(row, row)[0][0]
    for ids, part in ((first, logits[:6]), (second, logits[6:])):
        torch.testing.assert_close(part, model(torch.tensor([ids]), torch.tensor([ids]))[0][0], atol=1e-5, rtol=0)



@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_a_block_is_the_layer_of_pytorchs_transformer(norm_position):
    model = tiny(norm_position=norm_position, activation='relu', bias=True)
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, batch_first=True, norm_first=norm_position == 'pre').eval()
    ours = model.transformer.h[0]
    for norm in (ours.ln_1, ours.ln_2):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    pairs = {
        'self_attn.in_proj_': ours.attn.c_attn,
        'self_attn.out_proj.': ours.attn.c_proj,
        'linear1.': ours.mlp.c_fc,
        'linear2.': ours.mlp.c_proj,
        'norm1.': ours.ln_1,
        'norm2.': ours.ln_2,
    }
    theirs.load_state_dict({name + part: getattr(ours_, part) for name, ours_ in pairs.items() for part in ('weight', 'bias')})
    x = torch.randn(2, 16, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    torch.testing.assert_close(ours(x), theirs(x, mask, is_causal=True), atol=1e-5, rtol=0)


def nanogpt_greedy(model, ids, n):
    """The loop of nanoGPT: the whole context, at most block_size tokens of it, once for each new token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids[-model.config.block_size :]]))[0][0, -1].argmax().item())
    return ids


@pytest.mark.parametrize(
    'options', [{'position': p} for p in POSITIONS] + [{'n_kv_head': 2, 'attention': 'math', 'position': 'rope'}]
)
def test_generation_equals_the_plain_loop_far_past_block_size(options):
    model = tiny(**options)
    prompts = [[1, 2, 3, 4, 5], [7], list(range(20))]
    expected = [nanogpt_greedy(model, prompt, 40) for prompt in prompts]
    assert model.generate(prompts, 40, temperature=0) == expected
    assert model.generate(prompts, 40, temperature=0, use_cache=False) == expected
    for slide in (3, 16):
        cached = model.generate(prompts, 40, temperature=0, slide=slide)
        assert cached == model.generate(prompts, 40, temperature=0, slide=slide, use_cache=False) != expected
    with pytest.raises(ValueError, match='vocab_size = 40'):
        model.generate([[1, 40]], 1)
    assert model.generate(torch.tensor(prompts[:1]), 40, temperature=0)[0].tolist() == expected[0]


@pytest.mark.parametrize('position', ['learned', 'rope'])
def test_a_window_that_slides_by_several_tokens_sees_what_is_promised(position):
    model, slide, block_size = tiny(position=position), 5, 16
    ids, seen = [3, 1, 2], 3
    for _ in range(40):  # by hand: when the window is full, it starts again with its last block_size - slide + 1 tokens
        ids.append(model(torch.tensor([ids[-seen:]]))[0][0, -1].argmax().item())
        seen = seen + 1 if seen < block_size else block_size - slide + 1
    assert model.generate([[3, 1, 2]], 40, temperature=0, slide=slide) == [ids]


def test_sampling_is_reproducible_and_leaves_the_training_stream_alone():
    model = tiny().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate(tokens(3, 4), 12, temperature=1.0, top_k=10, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(first, model.generate(tokens(3, 4), 12, temperature=1.0, top_k=10, seed=7))
    assert not torch.equal(first, model.generate(tokens(3, 4), 12, temperature=1.0, top_k=10, seed=8))
    assert len({tuple(row.tolist()) for row in model.generate(tokens(1, 4).repeat(5, 1), 12, seed=1)}) > 1
    assert model.generate(tokens(1, 4), 200, temperature=5.0, seed=1, vocab_size=7)[0, 4:].max() < 7
    assert torch.equal(model.generate(tokens(1, 4), 9, temperature=1e-50), model.generate(tokens(1, 4), 9, temperature=0))


def test_draws_follow_the_probabilities():
    model = tiny()
    probs = (model(tokens(1, 4))[0][0, -1] / 2).softmax(0)
    drawn = model.generate(tokens(1, 4).repeat(20000, 1), 1, temperature=2.0, seed=3)[:, -1]
    frequency = torch.bincount(drawn, minlength=40) / 20000
    assert (frequency - probs).abs().max() < 5 * math.sqrt(0.25 / 20000)  # five standard deviations


def test_a_stop_token_ends_its_row():
    model = tiny()
    plain = model.generate([[1, 2], [3, 4]], 20, temperature=0)
    stop = plain[0][6]
    stopped = model.generate([[1, 2], [3, 4]], 20, temperature=0, stop_tokens=(stop,))
    assert stopped[0] == plain[0][: plain[0].index(stop, 2) + 1]
    assert stopped[1] == (plain[1][: plain[1].index(stop, 2) + 1] if stop in plain[1][2:] else plain[1])


def test_filters_equal_transformers():
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits, ids = torch.randn(6, 50) * 3, torch.randint(50, (6, 9))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, ids, True)
    for ours, theirs in (
        ({'temperature': 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({'top_k': 5}, [TopKLogitsWarper(5)]),
        ({'top_p': 0.8}, [TopPLogitsWarper(0.8)]),
        ({'top_p': 0.01}, [TopPLogitsWarper(0.01)]),
        ({'min_p': 0.1}, [MinPLogitsWarper(0.1)]),
        ({'repetition_penalty': 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        (
            {'repetition_penalty': 1.3, 'temperature': 0.7, 'top_k': 20, 'top_p': 0.9, 'min_p': 0.05},
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                TemperatureLogitsWarper(0.7),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ):
        expected = logits
        for step in theirs:
            expected = step(ids, expected)
        torch.testing.assert_close(filter_logits(logits, seen=seen, **ours).softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST, {'zero_init': True}, {'dropout': 0.1}], ids=str)
def test_every_architecture_learns_and_survives_a_checkpoint(options, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{'block_size': 8, 'vocab_size': 20, 'n_layer': 2, 'n_head': 4, 'n_embd': 32} | options))
    idx, targets = tokens(4, 8, vocab_size=20), tokens(4, 8, vocab_size=20, seed=2)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    first = model(idx, targets)[1].item()
    assert first == pytest.approx(math.log(20), abs=0.3)  # it begins by knowing nothing
    for _ in range(30):
        loss = model(idx, targets)[1]
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.7 * first
    path = checkpoint.save(tmp_path, checkpoint.Checkpoint(asdict(model.config), model.state_dict(), step=30))
    loaded = checkpoint.load(path).build_model()
    assert loaded.config == model.config
    assert torch.equal(loaded.eval()(idx, targets)[0], model.eval()(idx, targets)[0])


def test_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=4, n_embd=64))
    idx, targets = tokens(4, 32, vocab_size=65), tokens(4, 32, vocab_size=65, seed=2)
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), 'cpu')
    for _ in range(300):
        loss = model(idx, targets)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01


def test_ngrams_look_up_what_stands_before_a_token_and_nothing_else():
    model = tiny(ngram=3, ngram_rows=10**6, n_layer=1)
    ngram = model.transformer.ngram
    text = torch.tensor([[-1, -1, 5, 6, 7, 5, 6, 5, 6, 7]])  # nothing stands before the first token
    rows = ngram.row_numbers(text)  # (1, 8, 2)
    assert rows.shape == (1, 8, 2) and rows.min() >= 0 and rows[..., 0].max() < 10**6 <= rows[..., 1].min()
    bigram, trigram = rows[0].T.tolist()
    assert bigram[1] == bigram[4] == bigram[6] and bigram[2] == bigram[7]  # 5 6, 6 7
    assert trigram[2] == trigram[7] != trigram[6]  # 5 6 7 twice, and 6 5 6
    assert len(set(bigram)) == 5 and len(set(trigram)) == 7
    embedded = ngram(text)
    by_hand = ngram.tables.weight[rows].sum(dim=2)
    torch.testing.assert_close(embedded, by_hand)


def test_ngrams_are_spread_over_a_small_table():
    ngram = NgramEmbedding(GPTConfig(vocab_size=65, ngram=5, ngram_rows=1024, n_embd=12))
    rows = ngram.row_numbers(tokens(1, 20000, vocab_size=65))
    for i in range(4):
        counts = torch.bincount(rows[0, :, i] - i * 1024, minlength=1024).float()
        # 65^2 and more n-grams, in 1024 rows: about 19.5 each, and a variance not far above that of chance
        assert counts.sum() == 19996 and counts.var() < 2 * counts.mean() + counts.mean() ** 2 / 4.1


@pytest.mark.parametrize('multiple', [1, 64])
def test_the_loss_in_chunks_is_the_loss_and_so_are_its_gradients(monkeypatch, multiple):
    idx, targets = tokens(3, 16), tokens(3, 16, seed=2)
    targets[0, :7] = -1
    for options in ({}, {'tie_weights': False, 'logit_softcap': 3.0}, {'label_smoothing': 0.2}):
        model = tiny(**options).train('label_smoothing' in options)
        with torch.no_grad():
            model.lm_head.weight.mul_(30)  # logits that differ
        results = []
        monkeypatch.setattr('model.VOCABULARY_MULTIPLE', {'cpu': multiple})
        for at_once, flags in ((2**25, {}), (7 * 40, {'return_logits': False})):
            monkeypatch.setattr('model.LOGITS_AT_ONCE', at_once)
            loss = model(idx, targets, **flags)[1]
            model.zero_grad()
            (3 * loss).backward()
            results.append((loss, [p.grad.clone() for p in model.parameters()]))
        (plain, gradients), (chunked, same_gradients) = results
        if 'label_smoothing' in options:
            assert abs(plain - model.eval()(idx, targets)[1]) > 0.1  # in training only
            model.train()
        torch.testing.assert_close(chunked, plain, atol=0, rtol=1e-6)
        for a, b in zip(same_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6 * b.abs().max().item(), rtol=0)
        monkeypatch.setattr('torch.zeros_like', None)  # of the gradients: an evaluation makes none
        with torch.no_grad():
            assert torch.equal(model(idx, targets, return_logits=False)[1], chunked)
        monkeypatch.undo()


def test_the_loss_in_chunks_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr('model.LOGITS_AT_ONCE', 2**16)
    model = tiny(vocab_size=1000)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if torch.is_tensor(tensor) and 1000 in tensor.shape:
                    largest = max(largest, tensor.numel())
            return result

    idx = tokens(64, 16, vocab_size=1000)  # a million logits
    with Largest():
        model(idx, idx, return_logits=False)[1].backward()
    assert 2**15 < largest <= 2**16 * 1.01


def test_int8_weights_are_within_half_a_step_and_write_nearly_the_same():
    model = tiny(n_embd=64)
    linear = model.transformer.h[0].mlp.c_fc
    int8 = Int8Linear(linear)
    weight, _ = torch.ops.quantized.linear_unpack(int8.packed)
    step = linear.weight.abs().amax(dim=1) / 127
    assert ((weight.dequantize() - linear.weight).abs() <= 0.501 * step[:, None]).all()
    for rows in (1, 40):  # the inputs are rounded to 255 steps of their range too: each is off by at most half of one
        x = torch.randn(rows, 64)
        expected = x @ weight.dequantize().T + linear.bias
        worst = (x.max() - x.min()) / 255 / 2 * weight.dequantize().abs().sum(dim=1).max()
        assert (int8(x) - expected).abs().max() < 1.01 * worst
    idx = tokens(2, 12)
    before = model(idx)[0].softmax(-1)
    after = model.quantize()(idx)[0].softmax(-1)
    # a processor without VNNI leaves the inputs 7 bits instead of 8
    assert 0 < (before - after).abs().max() < (0.15 if int8.reduce_range else 0.05)
    assert model.generate(idx, 5, temperature=0).shape == (2, 17)


def test_rows_with_one_prompt_share_its_reading():
    model = tiny(ngram=3)
    read = []
    model.transformer.wte.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2, 3]]
    together = model.generate(prompts, 6, temperature=0)
    assert read == [(2, 3)] + [(4, 1)] * 5
    assert together == [model.generate([prompt], 6, temperature=0)[0] for prompt in prompts]


def test_a_compiled_step_writes_the_same():
    model = tiny(ngram=3, position='rope', n_layer=1)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 3]]
    assert model.generate(prompts, 30, temperature=0, compile=True) == model.generate(prompts, 30, temperature=0)


def test_targets_of_minus_one_have_no_loss():
    model = tiny()
    idx, targets = tokens(2, 8), tokens(2, 8, seed=2)
    targets[:, ::2] = -1
    logits, loss = model(idx, targets)
    expected = -logits.log_softmax(-1)[:, 1::2].gather(2, targets[:, 1::2, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_normalisations_and_softcap_follow_their_formulas():
    plain, capped = tiny()(tokens(2, 8))[0], tiny(logit_softcap=2.0)(tokens(2, 8))[0]
    torch.testing.assert_close(capped, 2.0 * torch.tanh(plain / 2.0))
    x = torch.randn(3, 32)
    norm = tiny(norm='rmsnorm').transformer.ln_f
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    norm = tiny().transformer.ln_f
    torch.testing.assert_close(norm(x), (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt())
    # queries and keys of length sqrt(hs): a score is sqrt(hs) times their cosine
    attention = CausalSelfAttention(GPTConfig(n_head=1, n_embd=8, qk_norm=True, bias=False), 0)
    x = torch.randn(1, 2, 8) * 10
    q, k, v = attention.c_attn(x).split(8, dim=2)
    scores = math.sqrt(8) * F.cosine_similarity(q[0, 1], k[0], dim=-1)
    torch.testing.assert_close(attention(x)[0, 1], attention.c_proj(scores.softmax(0) @ v[0]), atol=1e-4, rtol=1e-4)


def test_the_residual_stream_starts_with_a_size_that_does_not_grow_with_depth():
    torch.manual_seed(0)
    block = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=8, n_head=2, n_embd=128)).transformer.h[3]
    for weight, std in ((block.attn.c_attn.weight, 0.02), (block.mlp.c_fc.weight, 0.02), (block.attn.c_proj.weight, 0.02 / 4),
                        (block.mlp.c_proj.weight, 0.02 / 4)):  # 1 / sqrt(2 * 8 layers)
        assert weight.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize('attention', ['sdpa', 'math'])
@pytest.mark.parametrize('where', ['drop', 'attention', 'resid_dropout', 'mlp'])
def test_dropout_acts_everywhere_in_training_and_nowhere_else(where, attention):
    model = tiny(dropout=0.5, n_layer=1, attention=attention)
    parts = {'drop': model.transformer.drop, 'resid_dropout': model.transformer.h[0].attn.resid_dropout,
             'mlp': model.transformer.h[0].mlp.dropout}
    model.config.dropout = 0.5 if where == 'attention' else 0.0
    for name, part in parts.items():
        part.p = 0.5 if name == where else 0.0
    idx = tokens(1, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])


def test_choices_do_what_they_say():
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=4, n_embd=32, zero_init=True))
    embedded = model.transformer.wte(tokens(1, 8, vocab_size=20)) + model.transformer.wpe.weight
    torch.testing.assert_close(model(tokens(1, 8, vocab_size=20))[0], model.lm_head(model.transformer.ln_f(embedded))[:, [-1]])
    tied, untied = tiny(), tiny(tie_weights=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.get_num_params() == tied.get_num_params() + 40 * 32
    assert not any('bias' in name for name, _ in tiny(bias=False).named_parameters())


def test_crop_block_size_keeps_the_logits_of_short_contexts():
    model = tiny()
    expected, _ = model(tokens(2, 6))
    model.crop_block_size(6)
    torch.testing.assert_close(model(tokens(2, 6))[0], expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match='block_size'):
        model(tokens(2, 7))
    with pytest.raises(ValueError, match='block_size'):
        model.crop_block_size(12)


@pytest.mark.parametrize(
    'options, words',
    [
        ({'n_embd': 30}, 'n_embd = 30 is not divisible by n_head = 4'),
        ({'n_kv_head': 3}, 'n_kv_head = 3'),
        ({'n_layer': 0}, 'n_layer = 0'),
        ({'position': 'rope', 'n_embd': 36}, 'rope'),
        ({'dropout': 1.0}, 'dropout = 1.0'),
        ({'logit_softcap': -1.0}, 'logit_softcap'),
        ({'prefix_lm': True}, 'prefix_lm = True needs sources and targets'),
    ],
)
def test_an_architecture_that_cannot_be_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{'n_head': 4, 'n_embd': 32} | options)


# Memory -------------------------------------------------------------------------------------------------------------------


def forward_keeps(model, idx, half=False):
    """Bytes that autograd keeps after a forward pass, but for the weights: every storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast('cpu', enabled=half):
        loss = model(idx, idx)[1]
    return loss, sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('options', [{}, {'bias': False, 'n_layer': 5}, {'n_kv_head': 1}, {'activation': 'swiglu'},
                                     {'activation': 'relu'}, {'position': 'rope'}, {'tie_weights': False},
                                     {'block_size': 512}, {'position': 'rope', 'qk_norm': True, 'n_kv_head': 2},
                                     {'ngram': 4, 'ngram_rows': 50}], ids=str)
def test_the_estimate_of_activations_is_what_autograd_keeps(options, half):
    model = GPT(GPTConfig(**{'n_layer': 3, 'n_head': 4, 'n_embd': 128, 'vocab_size': 200, 'block_size': 128} | options))
    _, kept = forward_keeps(model, torch.randint(200, (4, model.config.block_size)), half)
    logits = 4 * model.config.block_size * 200 * 4  # their log-softmax
    assert model.activation_bytes(4, half) == pytest.approx(kept - logits, rel=0.06)


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    options = {'n_layer': 4, 'n_head': 4, 'n_embd': 64, 'vocab_size': 50, 'block_size': 64, 'dropout': 0.1}
    results = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**options, activation_checkpointing=wanted))
        idx = torch.randint(50, (4, 64))
        loss, kept = forward_keeps(model, idx)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()], kept))
    (loss, gradients, all_kept), (same_loss, same_gradients, less) = results
    assert torch.equal(loss, same_loss) and all(map(torch.equal, gradients, same_gradients))
    assert less < all_kept / 5


# Beam search --------------------------------------------------------------------------------------------------------------------


def every_continuation(model, prompt, n, stop):
    """{tokens: log p} of all continuations that end with stop, or have n tokens: by enumeration, without a cache."""
    found = {}
    for tokens_ in itertools.product(range(model.config.vocab_size), repeat=n):
        end = tokens_.index(stop) + 1 if stop in tokens_ else n
        if tokens_[:end] not in found:
            text = torch.tensor([prompt + list(tokens_[:end])])
            logp = model(text, text)[0][0].log_softmax(-1)
            found[tokens_[:end]] = sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens_[:end]))
    return found


@pytest.mark.parametrize('length_penalty', [0.0, 0.6, 2.0])
def test_a_beam_as_wide_as_all_continuations_finds_the_best_of_them(length_penalty):
    model = tiny(vocab_size=4, position='rope')
    prompts = [[1, 2, 3], [2]]
    results = model.beam_search(prompts, 4, num_beams=4**4, length_penalty=length_penalty, stop_tokens=[0])
    for prompt, result in zip(prompts, results):
        expected = every_continuation(model, prompt, 4, stop=0)
        scored = {text: logp / ((5 + len(text)) / 6) ** length_penalty for text, logp in expected.items()}
        assert len(result) == len(scored) and tuple(result[0][0]) == max(scored, key=scored.get)
        for text, score in result:
            assert score == pytest.approx(scored[tuple(text)], abs=1e-4)
        assert [score for _, score in result] == sorted((score for _, score in result), reverse=True)


@pytest.mark.parametrize('options', [{}, {'document_token': 3}, {'ngram': 3, 'position': 'rope', 'n_kv_head': 1}], ids=str)
def test_one_beam_is_greedy_and_prompts_do_not_disturb_each_other(options):
    model = tiny(**options)
    prompts = [[5, 6, 7, 8], [9], [3, 4]]
    greedy = model.generate(prompts, 10, temperature=0, stop_tokens=[1])
    found = model.beam_search(prompts, 10, num_beams=1, stop_tokens=[1])
    assert [prompt + result[0][0] for prompt, result in zip(prompts, found)] == greedy
    together = model.beam_search(prompts, 6, num_beams=3)
    for prompt, result in zip(prompts, together):
        alone = model.beam_search([prompt], 6, num_beams=3)[0]
        assert [text for text, _ in alone] == [text for text, _ in result] and len(result) == 3
        assert [score for _, score in result] == pytest.approx([score for _, score in alone], abs=1e-4)
        assert result[0][1] >= model.beam_search([prompt], 6, num_beams=1)[0][0][1] - 1e-4  # of texts of one length


@pytest.mark.parametrize('n_beams', [2, 5])
def test_what_has_ended_leaves_its_place_empty(n_beams):
    model, stop = tiny(vocab_size=8, position='rope'), 3
    for prompt in ([1, 2], [5], [7, 0, 6]):
        beams, expected = [((), 0.0)], []
        for length in range(1, 7):  # written out: all continuations, the best of them, those that end put aside
            longer = []
            for text, score in beams:
                ids = torch.tensor([prompt + list(text)])
                logp = model(ids, ids)[0][0, -1].log_softmax(-1).tolist()
                longer += [((*text, token), score + logp[token]) for token in range(8)]
            best = sorted(longer, key=lambda beam: -beam[1])[: n_beams - len(expected)]
            ends = [beam for beam in best if beam[0][-1] == stop or length == 6]
            expected += [(text, score / ((5 + length) / 6) ** 0.6) for text, score in ends]
            beams = [beam for beam in best if beam not in ends]
        found = model.beam_search([prompt], 6, num_beams=n_beams, stop_tokens=[stop])[0]
        expected.sort(key=lambda beam: -beam[1])
        assert [tuple(text) for text, _ in found] == [text for text, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)
        assert any(text[-1] == stop for text, _ in expected) or n_beams == 2


def test_beam_search_equals_that_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=32, initializer_range=0.3, bos_token_id=0, eos_token_id=49
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    prompt = tokens(1, 5, vocab_size=49)
    options = {'max_new_tokens': 8, 'do_sample': False, 'num_beams': 4, 'num_return_sequences': 4, 'length_penalty': 0.0}
    options |= {'eos_token_id': None, 'pad_token_id': 0, 'output_scores': True, 'return_dict_in_generate': True}
    expected = theirs.generate(prompt, **options)
    result = ours.beam_search(prompt, 8, num_beams=4, length_penalty=0.0)[0]
    assert [prompt[0].tolist() + text for text, _ in result] == expected.sequences.tolist()
    assert [score for _, score in result] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
