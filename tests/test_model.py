"""The model, against references that we did not write: transformers, torch.nn, and formulas."""

import math
from dataclasses import asdict

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import checkpoint as ckpt
from helpers import ARCHITECTURES, POST, tiny, tokens
from lib.linear import Int8Linear, Linear, PackedLinear, pack, quantize
from lib.ngram import NgramEmbedding
from model import (
    GPT,
    MLP,
    CausalSelfAttention,
    GPTConfig,
    apply_rotary,
    math_attention,
    position_angles,
    sdpa,
    sinusoidal_embedding,
)


@pytest.mark.parametrize(
    'shape, suffix',
    [
        ((1, 1, 16, 50, 8), 'bin'),
        ((2, 4, 32, 100, 16), 'safetensors'),
        ((3, 3, 48, 257, 64), 'bin'),
        pytest.param((2, 12, 768, 50257, 32), 'safetensors', marks=pytest.mark.slow),
    ],
)
def test_gpt2_matches_transformers(shape, suffix, tmp_path):
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
    idx, targets = (
        tokens(2, n_positions, vocab_size=vocab_size),
        tokens(2, n_positions, vocab_size=vocab_size, seed=2),
    )
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
            ours.transformer.h[layer].attn.c_attn.bias.grad,
            theirs.transformer.h[layer].attn.c_attn.bias.grad,
            atol=1e-4,
            rtol=0,
        )
    torch.testing.assert_close(
        ours.lm_head.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-4, rtol=0
    )


def test_gpt2_parameter_and_flop_counts():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808  # OpenAI's checkpoint
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    # PaLM, appendix B: 6N + 12LHQT
    assert model.flops_per_token() == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    assert model.estimate_mfu(8, 2.0, peak_flops=1e12) == pytest.approx(
        model.flops_per_token() * 1024 * 8 / 2e12
    )


def test_attention_matches_torch_multihead_attention():
    config = GPTConfig(n_head=4, n_embd=32, bias=True)
    ours = CausalSelfAttention(config, 0)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.c_attn.weight)
        theirs.in_proj_bias.copy_(ours.c_attn.bias)
        theirs.out_proj.weight.copy_(ours.c_proj.weight)
        theirs.out_proj.bias.copy_(ours.c_proj.bias)
    x = torch.randn(2, 7, 32)
    expected, _ = theirs(
        x, x, x, attn_mask=torch.nn.Transformer.generate_square_subsequent_mask(7), is_causal=True
    )
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize('n_kv_head', [4, 2, 1])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_fused_matches_formula(n_kv_head, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, n_kv_head, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    mask = torch.rand(2, 1, 6, 6) < 0.5 if masked else None
    if masked:
        mask = mask | torch.eye(6, dtype=torch.bool)
    fused, written = sdpa(q, k, v, mask), math_attention(q, k, v, mask)
    torch.testing.assert_close(fused, written)
    weight = torch.randn_like(fused)
    for a, b in zip(
        torch.autograd.grad((fused * weight).sum(), (q, k, v)),
        torch.autograd.grad((written * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    if not masked:  # softmax(q k / sqrt(d)) v of one query, by hand
        q, k, v = q.detach(), k.detach(), v.detach()
        weights = [
            math.exp(q[1, 3, 2] @ k[1, 3 * n_kv_head // 4, s] / math.sqrt(8)) for s in range(3)
        ]
        by_hand = sum(w * v[1, 3 * n_kv_head // 4, s] for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(written[1, 3, 2], by_hand)


def test_sinusoidal_embedding_matches_paper():
    table = sinusoidal_embedding(torch.arange(20), 12)
    for position in range(20):
        for i in range(6):
            angle = position / 10000 ** (2 * i / 12)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_rotary_embedding_matches_transformers():
    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    angles = position_angles(torch.arange(9), 8)
    both = torch.cat((angles, angles), dim=-1)[None]
    expected = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    ours = [apply_rotary(x, angles.cos(), angles.sin()) for x in (q, k)]
    torch.testing.assert_close(ours, list(expected))
    # scores depend only on the distance: positions (2, 5) and (12, 15)
    score = [
        apply_rotary(q[0, 0, 0], *cos_sin(p + 3, 8)) @ apply_rotary(k[0, 0, 0], *cos_sin(p, 8))
        for p in (2, 12)
    ]
    torch.testing.assert_close(score[0], score[1])


def cos_sin(position, dim):
    angles = position_angles(torch.tensor(position), dim)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    'activation, formula',
    [
        ('gelu', lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        (
            'gelu_tanh',
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ('relu', lambda x: x.clamp(min=0)),
        ('relu2', lambda x: x.clamp(min=0) ** 2),
        ('swiglu', lambda x: x[..., :88] * torch.sigmoid(x[..., :88]) * x[..., 88:]),
    ],
)
def test_mlp_activations_match_formulas(activation, formula):
    mlp = MLP(GPTConfig(n_embd=32, n_head=4, activation=activation))
    x = torch.randn(5, 32)
    torch.testing.assert_close(mlp(x), mlp.c_proj(formula(mlp.c_fc(x))))
    plain = sum(p.numel() for p in MLP(GPTConfig(n_embd=384, n_head=4)).parameters())
    size = sum(
        p.numel() for p in MLP(GPTConfig(n_embd=384, n_head=4, activation=activation)).parameters()
    )
    assert size == pytest.approx(
        plain, rel=0.01
    )  # a gated MLP has as many parameters as a plain one


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST], ids=str)
def test_model_is_causal(options):
    model = tiny(**options)
    idx = tokens(1, 16)
    logits, _ = model(idx, idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        other, _ = model(changed, changed)
        torch.testing.assert_close(other[:, :t], logits[:, :t], atol=0, rtol=0)
        assert not torch.equal(other[:, t], logits[:, t])


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_block_matches_torch_transformer_layer(norm_position):
    model = tiny(norm_position=norm_position, activation='relu', bias=True)
    theirs = torch.nn.TransformerEncoderLayer(
        32, 4, 128, 0.0, batch_first=True, norm_first=norm_position == 'pre'
    ).eval()
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
    theirs.load_state_dict(
        {
            name + part: getattr(ours_, part)
            for name, ours_ in pairs.items()
            for part in ('weight', 'bias')
        }
    )
    x = torch.randn(2, 16, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    torch.testing.assert_close(ours(x), theirs(x, mask, is_causal=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    'options', [*ARCHITECTURES, POST, {'zero_init': True}, {'dropout': 0.1}], ids=str
)
def test_model_learns_and_survives_checkpoint(options, tmp_path):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            **{'block_size': 8, 'vocab_size': 20, 'n_layer': 2, 'n_head': 4, 'n_embd': 32} | options
        )
    )
    idx, targets = tokens(4, 8, vocab_size=20), tokens(4, 8, vocab_size=20, seed=2)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    first = model(idx, targets)[1].item()
    assert first == pytest.approx(math.log(20), abs=0.3)  # uniform at initialization
    for _ in range(30):
        loss = model(idx, targets)[1]
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.7 * first
    path = ckpt.save(tmp_path, ckpt.Checkpoint(asdict(model.config), model.state_dict(), step=30))
    loaded = ckpt.load(path).build_model()
    assert loaded.config == model.config
    assert torch.equal(loaded.eval()(idx, targets)[0], model.eval()(idx, targets)[0])


def test_model_overfits_one_batch():
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


def test_ngram_embedding_depends_only_on_preceding_tokens():
    model = tiny(ngram=3, ngram_rows=10**6, n_layer=1)
    ngram = model.transformer.ngram
    text = torch.tensor([[-1, -1, 5, 6, 7, 5, 6, 5, 6, 7]])  # no token before the first
    rows = ngram.hash(text)  # (1, 8, 2)
    assert rows.shape == (1, 8, 2)
    assert rows.min() >= 0
    assert rows[..., 0].max() < 10**6 <= rows[..., 1].min()
    bigram, trigram = rows[0].T.tolist()
    assert bigram[1] == bigram[4] == bigram[6] and bigram[2] == bigram[7]  # 5 6, 6 7
    assert trigram[2] == trigram[7] != trigram[6]  # 5 6 7 twice, and 6 5 6
    assert len(set(bigram)) == 5 and len(set(trigram)) == 7
    embedded = ngram(text)
    by_hand = ngram.tables.weight[rows].sum(dim=2)
    torch.testing.assert_close(embedded, by_hand)


def test_ngram_embedding_hashes_uniformly():
    ngram = NgramEmbedding(GPTConfig(vocab_size=65, ngram=5, ngram_rows=1024, n_embd=12))
    rows = ngram.hash(tokens(1, 20000, vocab_size=65))
    for i in range(4):
        counts = torch.bincount(rows[0, :, i] - i * 1024, minlength=1024).float()
        # over 65^2 n-grams in 1024 rows: about 19.5 each, with a variance near that of chance
        assert counts.sum() == 19996 and counts.var() < 2 * counts.mean() + counts.mean() ** 2 / 4.1


def test_int8_quantization_error_is_bounded():
    model = tiny(n_embd=64)
    linear = model.transformer.h[0].mlp.c_fc
    int8 = Int8Linear(linear)
    weight, _ = torch.ops.quantized.linear_unpack(int8.packed)
    step = linear.weight.abs().amax(dim=1) / 127
    assert ((weight.dequantize() - linear.weight).abs() <= 0.501 * step[:, None]).all()
    # inputs are quantized to 255 steps of their range too, so each is off by at most half a step
    for batch_size in (1, 40):
        x = torch.randn(batch_size, 64)
        expected = x @ weight.dequantize().T + linear.bias
        worst = (x.max() - x.min()) / 255 / 2 * weight.dequantize().abs().sum(dim=1).max()
        assert (int8(x) - expected).abs().max() < 1.01 * worst
    idx = tokens(2, 12)
    before = model(idx)[0].softmax(-1)
    after = quantize(model)(idx)[0].softmax(-1)
    # without VNNI the inputs have 7 bits instead of 8
    assert 0 < (before - after).abs().max() < (0.15 if int8.reduce_range else 0.05)
    assert model.generate(idx, 5, temperature=0).shape == (2, 17)


@pytest.mark.parametrize('options', [{}, {'bias': False, 'activation': 'swiglu'}], ids=str)
def test_packed_weights_compute_the_same(options):
    model = tiny(n_embd=64, **options).bfloat16().eval()
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            p.data.uniform_(-1, 1)
    idx = tokens(3, 12)
    prompts = [row.tolist() for row in idx]
    with torch.no_grad():
        expected = [model(idx[:b, :t])[0] for b, t in ((1, 1), (3, 1), (3, 12))]
        continued = model.generate(prompts, 4, temperature=0)
        weight = model.lm_head.weight.clone()
        pack(model)
        for logits, (b, t) in zip(expected, ((1, 1), (3, 1), (3, 12))):
            torch.testing.assert_close(model(idx[:b, :t])[0], logits, rtol=2**-7, atol=2**-9)
        assert model.generate(prompts, 4, temperature=0) == continued
        assert torch.equal(model.lm_head.weight, weight)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(model.lm_head, PackedLinear) == supported


def test_norms_and_softcap_match_formulas():
    plain, capped = tiny()(tokens(2, 8))[0], tiny(logit_softcap=2.0)(tokens(2, 8))[0]
    torch.testing.assert_close(capped, 2.0 * torch.tanh(plain / 2.0))
    x = torch.randn(3, 32)
    norm = tiny(norm='rmsnorm').transformer.ln_f
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    norm = tiny().transformer.ln_f
    torch.testing.assert_close(
        norm(x),
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
    )
    # queries and keys have norm sqrt(hs): a score is sqrt(hs) times their cosine
    attention = CausalSelfAttention(GPTConfig(n_head=1, n_embd=8, qk_norm=True, bias=False), 0)
    x = torch.randn(1, 2, 8) * 10
    q, k, v = attention.c_attn(x).split(8, dim=2)
    scores = math.sqrt(8) * F.cosine_similarity(q[0, 1], k[0], dim=-1)
    torch.testing.assert_close(
        attention(x)[0, 1], attention.c_proj(scores.softmax(0) @ v[0]), atol=1e-4, rtol=1e-4
    )


def test_init_scales_residual_projections_with_depth():
    torch.manual_seed(0)
    block = GPT(
        GPTConfig(block_size=8, vocab_size=20, n_layer=8, n_head=2, n_embd=128)
    ).transformer.h[3]
    # 1 / sqrt(2 * 8 layers)
    for weight, std in (
        (block.attn.c_attn.weight, 0.02),
        (block.mlp.c_fc.weight, 0.02),
        (block.attn.c_proj.weight, 0.02 / 4),
        (block.mlp.c_proj.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize('attention', ['sdpa', 'math'])
@pytest.mark.parametrize('where', ['drop', 'attention', 'resid_dropout', 'mlp'])
def test_dropout_is_active_only_in_training(where, attention):
    model = tiny(dropout=0.5, n_layer=1, attention=attention)
    parts = {
        'drop': model.transformer.drop,
        'resid_dropout': model.transformer.h[0].attn.resid_dropout,
        'mlp': model.transformer.h[0].mlp.dropout,
    }
    model.config.dropout = 0.5 if where == 'attention' else 0.0
    for name, part in parts.items():
        part.p = 0.5 if name == where else 0.0
    idx = tokens(1, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])


def test_model_options_have_documented_effect():
    model = GPT(
        GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=4, n_embd=32, zero_init=True)
    )
    embedded = model.transformer.wte(tokens(1, 8, vocab_size=20)) + model.transformer.wpe.weight
    torch.testing.assert_close(
        model(tokens(1, 8, vocab_size=20))[0],
        model.lm_head(model.transformer.ln_f(embedded))[:, [-1]],
    )
    tied, untied = tiny(), tiny(tie_weights=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.get_num_params() == tied.get_num_params() + 40 * 32
    assert not any('bias' in name for name, _ in tiny(bias=False).named_parameters())


def test_crop_block_size_preserves_logits_of_short_contexts():
    model = tiny()
    expected, _ = model(tokens(2, 6))
    model.crop_block_size(6)
    torch.testing.assert_close(model(tokens(2, 6))[0], expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match='block_size'):
        model(tokens(2, 7))
    with pytest.raises(ValueError, match='block_size'):
        model.crop_block_size(12)


@pytest.mark.parametrize(
    'options, message',
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
def test_gpt_config_rejects_invalid_architecture(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{'n_head': 4, 'n_embd': 32} | options)


def test_linear_equals_torch_linear_under_autocast():
    """Also in what autograd.Function does not do by itself: one dimension, fp64, functorch."""
    ours, theirs = Linear(6, 5), torch.nn.Linear(6, 5)
    theirs.load_state_dict(ours.state_dict())
    fp32, fp64 = torch.float32, torch.float64
    for shape, dtype in (((4, 3, 6), fp32), ((6,), fp32), ((3, 6), fp64)):
        results = []
        for layer in (ours.to(dtype), theirs.to(dtype)):
            x = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape).requires_grad_()
            with torch.autocast('cpu', torch.bfloat16):
                y = layer(x * 1.0)
            layer.zero_grad()
            y.float().square().sum().backward()
            results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results))
    with torch.autocast('cpu', torch.bfloat16):
        _, tangent = torch.func.jvp(ours.float(), (torch.ones(2, 6),), (torch.ones(2, 6),))
    assert tangent.shape == (2, 5)
