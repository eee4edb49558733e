"""GGUF files: what the package gguf reads, and transformers where it knows the architecture."""

import random
import sys
from dataclasses import asdict

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.activations import XIELUActivation

import checkpoint as ckpt
from helpers import awake, tokens
from lib import bpe, tokenizer
from lib.errors import UserError
from lib.write_gguf import write_gguf
from lib.write_huggingface import convert
from lib.write_tokenizer import CHAT_TEMPLATE

ROPE = {'position': 'rope', 'norm': 'rmsnorm', 'bias': False, 'n_kv_head': 2}
KINDS = {
    'gpt2': {'norm_eps': 1e-3},
    'gpt2 without biases': {'bias': False, 'tie_weights': False, 'n_hidden': 96},
    'llama': ROPE | {'activation': 'swiglu', 'head_size': 12, 'rope_theta': 500.0},
    'llama with biases': ROPE | {'activation': 'swiglu', 'bias': True, 'tie_weights': False},
    'qwen3': ROPE | {'activation': 'swiglu', 'qk_norm': 'gain', 'n_hidden': 40},
    'qwen3 without gains': ROPE | {'activation': 'swiglu', 'qk_norm': True},
    'arcee': ROPE | {'activation': 'relu2'},
    'apertus': ROPE | {'activation': 'relu2', 'qk_norm': True},
    'starcoder2': ROPE | {'norm': 'layernorm', 'activation': 'gelu_tanh'},
    'starcoder2 with biases': {'position': 'rope', 'activation': 'gelu_tanh'},
}
TEXT = 'The cat sat on the mat; the dog didn\'t. 3 naïve cafés — 42€ 🌹\n\n' * 20
LETTERS = {
    'attn_norm': 'ln_1',
    'attn_qkv': 'attn.c_attn',
    'attn_q_norm': 'attn.q_norm',
    'attn_k_norm': 'attn.k_norm',
    'attn_output': 'attn.c_proj',
    'ffn_norm': 'ln_2',
    'ffn_down': 'mlp.c_proj',
    'token_embd': 'wte',
    'position_embd': 'wpe',
    'output_norm': 'ln_f',
}


def write(folder, model, dtype='float32', tok=None):
    """(GGUFReader, llama.cpp's name of the architecture)"""
    tok = tok or tokenizer.ByteTokenizer(end_of_text=True)
    saved = ckpt.Checkpoint(asdict(model.config), model.state_dict(), tokenizer=tok.to_dict())
    kind = write_gguf(saved, model, folder / 'model.gguf', dtype, 'tiny')
    return gguf.GGUFReader(folder / 'model.gguf'), kind


def make(vocab_size=257, **options):
    return awake(vocab_size=vocab_size, block_size=32, n_embd=32, **options)


def value(reader, key):
    return reader.fields[key].contents()


def original(model, name):
    """(the part of our weights in a tensor of the file, whether its rows are for RoPE)"""
    weights, c = model.state_dict(), model.config
    layer, end = name.removeprefix('blk.').rsplit('.', 1)
    if name == 'output.weight':
        return weights['lm_head.weight'], False
    number, _, layer = layer.rpartition('.')
    prefix = f'transformer.h.{number}.' if number else 'transformer.'
    n, n_kv = c.n_head * c.head_dim, c.kv_heads * c.head_dim
    fc = slice(None)
    if c.activation == 'swiglu':
        fc = slice(c.mlp_width) if layer == 'ffn_gate' else slice(c.mlp_width, None)
    parts = {
        'attn_q': ('attn.c_attn', slice(n)),
        'attn_k': ('attn.c_attn', slice(n, n + n_kv)),
        'attn_v': ('attn.c_attn', slice(n + n_kv, None)),
        'ffn_gate': ('mlp.c_fc', fc),
        'ffn_up': ('mlp.c_fc', fc),
    }
    ours, rows = parts.get(layer) or (LETTERS[layer], slice(None))
    if f'{prefix}{ours}.{end}' in weights:
        return weights[f'{prefix}{ours}.{end}'][rows], layer in ('attn_q', 'attn_k')
    if end == 'weight':
        assert layer in ('attn_q_norm', 'attn_k_norm')
        return torch.ones(c.head_dim), False
    return torch.zeros(len(weights[f'{prefix}{ours}.weight'][rows])), False


def paired(rows, head_size):
    """The rows that RoPE rotates with each other side by side, as in Llama's own files."""
    order = [
        head + i + j
        for head in range(0, len(rows), head_size)
        for i in range(head_size // 2)
        for j in (0, head_size // 2)
    ]
    return rows[order]


def test_biases_that_llama_cpp_requires_are_zeros(tmp_path):
    """It does not open a StarCoder2 or GPT-2 without them."""
    for options, layer in ((KINDS['starcoder2'], 'attn_q'), ({'bias': False}, 'attn_qkv')):
        reader, _ = write(tmp_path, make(**options | {'bias': False}))
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        for name in (layer, 'attn_output', 'ffn_up', 'ffn_down'):
            assert not tensors[f'blk.0.{name}.bias'].any(), name


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', KINDS)
def test_every_tensor_reads_back(name, dtype, tmp_path):
    model = make(**KINDS[name])
    reader, kind = write(tmp_path, model, dtype)
    assert kind == name.split()[0] == value(reader, 'general.architecture')
    n_found = 0
    for tensor in reader.tensors:
        expected, is_rotated = original(model, tensor.name)
        if is_rotated and kind in ('llama', 'arcee'):
            expected = paired(expected, model.config.head_dim)
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if dtype == 'bfloat16' and expected.dim() == 2 and 'position' not in tensor.name:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
            expected = expected.bfloat16().float()
        assert torch.equal(found, expected), tensor.name
        n_found += expected.numel()
    # biases, gains and a head that llama.cpp requires come on top
    assert n_found >= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', [n for n in KINDS if not n.startswith(('arcee', 'apertus'))])
def test_transformers_computes_the_same_from_the_file(name, tmp_path):
    """Its weights; of the metadata it reads too little: no head size for qwen3, no biases."""
    model = make(**KINDS[name])
    write(tmp_path, model)
    saved, _ = convert(model.config, model.state_dict())
    config = transformers.AutoConfig.for_model(**saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file='model.gguf', config=config
    )
    idx = tokens(2, 32, vocab_size=257)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


def test_the_metadata(tmp_path):
    options = KINDS['llama'] | {'norm_eps': 1e-3, 'n_layer': 3, 'n_hidden': 40}
    reader, _ = write(tmp_path, make(**options))
    expected = {
        'general.name': 'tiny',
        'llama.context_length': 32,
        'llama.embedding_length': 32,
        'llama.block_count': 3,
        'llama.feed_forward_length': 40,
        'llama.attention.head_count': 4,
        'llama.attention.head_count_kv': 2,
        'llama.attention.key_length': 12,
        'llama.attention.value_length': 12,
        'llama.rope.dimension_count': 12,
        'llama.rope.freq_base': 500.0,
        'llama.vocab_size': 257,
        'tokenizer.ggml.eos_token_id': 256,
        'tokenizer.ggml.add_bos_token': False,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, 'llama.attention.layer_norm_rms_epsilon') == np.float32(1e-3)


def test_squared_relu_with_qk_norm_is_an_xielu(tmp_path):
    """Apertus has another activation; with these parameters, which are those of transformers and
    of llama.cpp, it is ours."""
    reader, _ = write(tmp_path, make(**KINDS['apertus']))
    found = {key: value(reader, f'xielu.{key}') for key in ('alpha_p', 'alpha_n', 'beta', 'eps')}
    assert all(len(values) == 2 for values in found.values())
    act = XIELUActivation(beta=found['beta'][0], eps=found['eps'][0], with_vector_loads=False)
    act.alpha_p.data.fill_(found['alpha_p'][0])
    act.alpha_n.data.fill_(found['alpha_n'][0])
    x = torch.linspace(-50, 50, 1001)
    torch.testing.assert_close(act(x).float(), x.relu().square(), atol=0, rtol=1e-6)


def test_q8_0_is_within_its_rounding_error(tmp_path):
    """Blocks of 32 with a scale in fp16; rows that are no multiple of 32 stay bf16."""
    model = make(**KINDS['qwen3'])  # with an MLP of width 40
    reader, _ = write(tmp_path, model, 'q8_0')
    types = {}
    for tensor in reader.tensors:
        types[tensor.name.split('.')[-2]] = tensor.tensor_type.name
        expected, _ = original(model, tensor.name)
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        error = (found - expected).abs()
        if tensor.tensor_type.name == 'Q8_0':
            largest = expected.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
            bound = largest / 127 * 0.5 + largest * 2**-10  # an int8's, and the scale's
            assert (error.unflatten(-1, (-1, 32)) <= bound).all(), tensor.name
        else:
            assert (error <= expected.abs() * (2**-8 * (expected.dim() == 2))).all(), tensor.name
    assert types['attn_q'] == types['token_embd'] == types['ffn_up'] == 'Q8_0'
    assert types['ffn_down'] == 'BF16' and types['attn_norm'] == types['attn_q_norm'] == 'F32'


REFUSED = [
    ({'ngram': 2}, 'ngram = 2', '--ngram=1'),
    ({'logit_softcap': 5.0}, 'logit_softcap = 5.0', '--logit_softcap=0.0'),
    ({'prefix_lm': True, 'turns': 1, 'eot_token': 3}, 'prefix_lm = True', '--prefix_lm=False'),
    ({'norm_position': 'post'}, 'norm_position = post', '--norm_position=pre'),
    ({'position': 'none'}, 'position = none', '--position=learned'),
    ({'activation': 'gelu'}, 'activation = gelu:', '--activation=gelu_tanh'),
    ({'activation': 'relu2'}, 'activation = relu2', '--activation=gelu_tanh'),
    ({'qk_norm': True}, 'qk_norm = True', '--qk_norm=False'),
    ({'norm': 'rmsnorm'}, 'norm = rmsnorm', '--norm=layernorm'),
    (KINDS['llama'] | {'activation': 'gelu'}, 'activation = gelu:', '--activation=relu2'),
    (KINDS['arcee'] | {'bias': True}, 'bias = True', '--bias=False'),
    (KINDS['qwen3'] | {'bias': True}, 'bias = True', '--bias=False'),
    (KINDS['starcoder2'] | {'head_size': 6}, 'head_size = 6', '--head_size=None'),
]


@pytest.mark.parametrize('options, key, remedy', REFUSED)
def test_what_llama_cpp_lacks_is_refused_by_name(options, key, remedy, tmp_path):
    with pytest.raises(UserError) as error:
        write(tmp_path, make(**options))
    assert key in str(error.value) and remedy in str(error.value)
    assert not any(tmp_path.iterdir())


# Tokens -------------------------------------------------------------------------------------------


def reference(reader):
    """A tokenizer of the package `tokenizers` from the file's tokens and merges."""
    texts, types = (value(reader, f'tokenizer.ggml.{key}') for key in ('tokens', 'token_type'))
    vocabulary = {text: i for i, text in enumerate(texts)}
    merges = [tuple(merge.split(' ')) for merge in value(reader, 'tokenizer.ggml.merges')]
    for left, right in merges:  # llama.cpp does not need the parts of a token to be tokens
        for text in (left, right, left + right):
            vocabulary.setdefault(text, len(vocabulary))
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [t for t, kind in zip(texts, types) if kind == gguf.TokenType.CONTROL]
    found.add_special_tokens(special)
    return found


TOKENIZERS = {
    'bpe': bpe.make_tokenizer('bpe', lambda: [TEXT], vocab_size=300),
    'byte': tokenizer.ByteTokenizer(),
    'char': tokenizer.CharTokenizer(''.join(sorted(set(TEXT))), end_of_text=True),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_the_file_tokenizes_as_we_do(name, tmp_path):
    tok = TOKENIZERS[name]
    reader, _ = write(tmp_path, make(vocab_size=304), tok=tok)
    theirs, rng = reference(reader), random.Random(0)
    for _ in range(300):
        start = rng.randrange(len(TEXT))
        text = TEXT[start : start + rng.randrange(40)]
        text += ''.join(rng.choices(TEXT, k=rng.randrange(10)))
        if tok.eot is not None:
            text = text[:9] + '<|endoftext|>' + text[9:]
        assert theirs.encode(text).ids == tok.encode(text), text


def test_ids_that_are_not_generated(tmp_path):
    """Padding, and an end of text for a tokenizer that has none: llama.cpp would take id 11."""
    tok = TOKENIZERS['byte']
    reader, _ = write(tmp_path, make(vocab_size=256), tok=tok)
    assert value(reader, 'tokenizer.ggml.eos_token_id') == 256
    assert value(reader, 'tokenizer.ggml.suppress_tokens') == [256]
    assert len(value(reader, 'tokenizer.ggml.tokens')) == 257
    (embedding,) = [t for t in reader.tensors if t.name == 'token_embd.weight']
    assert embedding.data.shape == (257, 32) and not embedding.data[256].any()
    reader, _ = write(tmp_path, make(vocab_size=260), tok=tokenizer.ByteTokenizer(True))
    assert value(reader, 'tokenizer.ggml.eos_token_id') == 256
    assert value(reader, 'tokenizer.ggml.suppress_tokens') == [257, 258, 259]
    unused = gguf.TokenType.UNUSED
    assert value(reader, 'tokenizer.ggml.token_type')[255:] == [1, 3, unused, unused, unused]


def test_ids_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match='tokenizer = ids.*--format=onnx'):
        write(tmp_path, make(), tok=tokenizer.IdTokenizer(['a', None]))


def test_a_tokenizer_that_llama_cpp_would_split_differently_is_refused(tmp_path):
    tok = tokenizer.BPETokenizer('bpe', tokenizer.DIGITS_PATTERN, TOKENIZERS['bpe'].tokens)
    with pytest.raises(UserError, match='splits text in another way.*--format=hf'):
        write(tmp_path, make(vocab_size=304), tok=tok)


def test_chat_data_brings_its_template(tmp_path):
    key = 'tokenizer.chat_template'
    reader, _ = write(tmp_path, make(eot_token=256, turns=4))
    assert value(reader, key) == CHAT_TEMPLATE
    assert key not in write(tmp_path, make())[0].fields


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(UserError, match='^--format=gguf needs a package: pip install gguf$'):
        write(tmp_path, make())


def test_a_full_disk_is_one_sentence(tmp_path):
    model = make()
    saved = ckpt.Checkpoint(asdict(model.config), model.state_dict())
    saved.tokenizer = TOKENIZERS['byte'].to_dict()
    with pytest.raises(UserError, match='^/dev/full: No space left on device$'):
        write_gguf(saved, model, '/dev/full', 'float32', 'tiny')
