"""Models that others saved: every layout, and folders as they are found on Hugging Face's hub."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoint as ckpt
from helpers import randomize
from lib.errors import UserError
from model import GPT

GPT2 = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'n_positions': 32, 'vocab_size': 60}
LLAMA = {
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_size': 16,
    'intermediate_size': 40,
    'max_position_embeddings': 32,
    'vocab_size': 60,
}
ROPE = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}}
MODELS = {
    'gpt2': (transformers.GPT2Config, GPT2 | {'n_inner': 40, 'layer_norm_epsilon': 1e-3}),
    'distilgpt2, untied': (
        transformers.GPT2Config,
        GPT2 | {'tie_word_embeddings': False, 'activation_function': 'gelu'},
    ),
    'openai-gpt': (transformers.OpenAIGPTConfig, GPT2),
    'llama': (transformers.LlamaConfig, LLAMA | ROPE | {'tie_word_embeddings': True}),
    'llama with biases': (transformers.LlamaConfig, LLAMA | {'attention_bias': True}),
    'qwen3': (transformers.Qwen3Config, LLAMA | ROPE | {'head_dim': 6, 'sliding_window': None}),
    'qwen2': (transformers.Qwen2Config, LLAMA | {'tie_word_embeddings': True}),
    'qwen3 with biases': (transformers.Qwen3Config, LLAMA | {'attention_bias': True}),
    'apertus': (transformers.ApertusConfig, LLAMA | ROPE | {'hidden_act': 'relu2'}),
    'arcee': (transformers.ArceeConfig, LLAMA | {'mlp_bias': True}),
    'starcoder2': (transformers.Starcoder2Config, LLAMA | {'norm_epsilon': 1e-4}),
    'starcoder2 without biases': (transformers.Starcoder2Config, LLAMA | {'use_bias': False}),
}


def make(kind, head=True):
    """A model of transformers' with random weights."""
    config_class, options = MODELS[kind]
    factory = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    return randomize(factory.from_config(config_class(**options)), std=0.3)


def assert_same_logits(folder, theirs, atol=1e-4):
    ours = ckpt.load(folder).build_model().eval()
    idx = torch.randint(60, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=atol, rtol=0)
    return ours


def edit(folder, **changes):
    """Change keys of config.json; None removes one."""
    path = folder / 'config.json'
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


@pytest.mark.parametrize('kind', MODELS)
def test_every_layout_computes_what_transformers_computes(tmp_path, kind):
    theirs = make(kind)
    theirs.save_pretrained(tmp_path)
    ours = assert_same_logits(tmp_path, theirs)
    config = theirs.config
    assert ours.config.tie_weights == config.tie_word_embeddings
    assert ours.config.block_size == config.max_position_embeddings
    again = GPT.from_pretrained(tmp_path, {'dropout': 0.1})
    assert torch.equal(again.lm_head.weight, ours.lm_head.weight)
    prompt = torch.randint(1, 60, (1, 9))  # 0 is padding there
    continued = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours.generate(prompt, 20, temperature=0), continued)


# Folders as others write them ---------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_several_files_in_bf16(tmp_path, kind):
    make(kind).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size='5KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = assert_same_logits(tmp_path, theirs)
    assert ours.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'openai-gpt'])
def test_without_head_and_prefix(tmp_path, kind):
    """As GPT2Model or LlamaModel saves itself: 'h.0...', 'layers.0...'; then the head is tied."""
    theirs = make(kind, head=False)
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / 'model.safetensors')
    assert not any(name.startswith(('transformer.', 'model.', 'lm_head')) for name in names)
    whole = make(kind)
    whole.base_model.load_state_dict(theirs.state_dict())
    assert assert_same_logits(tmp_path, whole).config.tie_weights


@pytest.mark.parametrize('says', [True, False, None])
def test_the_file_decides_whether_the_head_is_tied(tmp_path, says):
    """not config.json, which may be silent or wrong"""
    theirs = make('distilgpt2, untied')
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=says)
    assert not assert_same_logits(tmp_path, theirs).config.tie_weights
    assert not GPT.from_pretrained(tmp_path).config.tie_weights


def test_buffers_of_older_versions_are_left_out(tmp_path):
    for kind, buffers in (
        ('gpt2', {'h.0.attn.bias': torch.ones(1, 1, 32, 32).tril().bool()}),
        ('gpt2', {'transformer.h.1.attn.masked_bias': torch.tensor(-1e4)}),
        ('openai-gpt', {'position_ids': torch.arange(32)}),
        ('llama', {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(2)}),
    ):
        theirs = make(kind)
        theirs.save_pretrained(tmp_path)
        path = tmp_path / 'model.safetensors'
        save_file(load_file(path) | buffers, path, {'format': 'pt'})
        assert_same_logits(tmp_path, theirs)


def test_config_json_of_transformers_4(tmp_path):
    theirs = make('llama')
    theirs.save_pretrained(tmp_path)
    edit(
        tmp_path,
        rope_parameters=None,
        rope_theta=500.0,
        dtype=None,
        torch_dtype='bfloat16',
        is_llama_config=True,
        rope_interleaved=False,
        **{'transformers.js_config': {'dtype': 'q4'}},
    )
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'rope_scaling': None}))
    assert_same_logits(tmp_path, theirs)


def test_a_sliding_window_shortens_the_context(tmp_path):
    theirs = make('starcoder2')
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, sliding_window=8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = ckpt.load(tmp_path).build_model().eval()
    idx = torch.randint(60, (1, ours.config.block_size))
    assert idx.numel() == 8
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
    make('qwen3').save_pretrained(tmp_path)
    edit(tmp_path, sliding_window=8, use_sliding_window=False)
    assert ckpt.load(tmp_path).model_config['block_size'] == 32


@pytest.mark.parametrize(
    'kind, change, says',
    [
        ('llama', {'rope_parameters': {'rope_type': 'llama3'}}, 'rope_type = .llama3'),
        ('llama', {'rope_parameters': ROPE['rope_parameters'] | {'factor': 8.0}}, 'rope_scaling'),
        ('llama', {'rope_scaling': [1]}, 'rope_scaling = .1. is not a table'),
        ('apertus', {'rope_parameters': None}, 'rope_parameters is missing'),
        ('apertus', {'rope_parameters': None, 'rope_theta': 500.0}, 'rope_parameters is missing'),
        ('qwen3', {'layer_types': 'full_attention'}, 'layer_types'),
        ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'rope_scaling'),
        ('llama', {'hidden_act': 'gelu'}, 'hidden_act = .gelu'),
        ('apertus', {'hidden_act': 'xielu'}, 'hidden_act = .xielu'),
        ('starcoder2', {'hidden_act': 'silu'}, 'hidden_act = .silu'),
        ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config'),
        ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
        ('qwen3', {'model_type': 'qwen'}, 'qwen'),
        ('qwen3', {'model_type': 'llama'}, 'q_norm'),
        ('arcee', {'model_type': 'apertus'}, 'attention_layernorm.weight is missing'),
        ('llama', {'num_hidden_layers': 1}, 'layers.1'),
        ('llama', {'num_hidden_layers': 3}, 'layers.2.*missing'),
        ('llama', {'num_key_value_heads': 4}, 'do not fit'),
        ('llama', {'head_dim': 3}, 'even'),
        ('gpt2', {'n_layer': '2'}, 'n_layer'),
        ('gpt2', {'tie_word_embeddings': False}, 'lm_head.weight'),
        ('llama', {'tie_word_embeddings': None}, 'lm_head.weight is missing'),
        ('llama with biases', {'attention_bias': False}, '_proj.bias: there is no such weight'),
        ('qwen3 with biases', {'attention_bias': None}, '_proj.bias: there is no such weight'),
        ('arcee', {'mlp_bias': False}, '_proj.bias: there is no such weight'),
        ('starcoder2', {'use_bias': False}, 'bias: there is no such weight'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, kind, change, says):
    make(kind).save_pretrained(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(UserError, match=says) as caught:
        ckpt.load(tmp_path).build_model()
    assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'damage, says',
    [
        (lambda folder: next(folder.glob('*-00002-*')).unlink(), '00002'),
        (lambda folder: rename(folder, '../x.safetensors'), 'index'),
        (lambda folder: rename(folder, 7), 'index'),
        (lambda folder: (folder / 'model.safetensors.index.json').write_text('[]'), 'index'),
    ],
)
def test_damaged_folders_of_several_files_are_refused(tmp_path, damage, says):
    make('llama').save_pretrained(tmp_path, max_shard_size='5KB')
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        ckpt.load(tmp_path)


def rename(folder, name):
    """Let the index name this file."""
    path = folder / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map'][next(iter(index['weight_map']))] = name
    path.write_text(json.dumps(index))


def test_a_folder_without_a_tokenizer_is_not_taken_for_gpt2(tmp_path):
    make('llama').save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f'{tmp_path}: there is no tokenizer.json'):
        ckpt.load(tmp_path).get_tokenizer()


# The hub ------------------------------------------------------------------------------------------


def load_from_hub(name, env, monkeypatch):
    with monkeypatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        return ckpt.load(name)


@pytest.mark.parametrize('name', ['someone/tiny-llama.1', 'distilgpt2'])
def test_models_on_the_hub_by_name(tmp_path, monkeypatch, hub, name):
    folder = tmp_path / 'folder'
    theirs = make('llama')
    theirs.save_pretrained(folder, max_shard_size='5KB')
    env = hub(folder, {'distilgpt2': 'distilbert/distilgpt2'}.get(name, name))
    ours = load_from_hub(name, env, monkeypatch).model
    assert all(torch.equal(ours[key], w) for key, w in ckpt.load(folder).model.items())
    offline = env | {'HF_ENDPOINT': 'http://127.0.0.1:9'}
    assert load_from_hub(name, offline, monkeypatch).model.keys() == ours.keys()


@pytest.mark.parametrize('corrupt', ['config.json', 'model.safetensors'])
def test_files_of_the_hub_are_verified(tmp_path, monkeypatch, hub, corrupt):
    folder = tmp_path / 'folder'
    make('llama').save_pretrained(folder)
    env = hub(folder, 'someone/llama', corrupt)
    with pytest.raises(UserError, match=f'{corrupt}.*not.*deleted'):
        load_from_hub('someone/llama', env, monkeypatch)
    assert not list((tmp_path / 'cache').rglob(f'{corrupt}*'))


def test_a_name_that_is_neither_here_nor_there(tmp_path, monkeypatch, hub):
    tmp_path.joinpath('empty').mkdir()
    env = hub(tmp_path / 'empty', 'x/y')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='404.*runs/mine is no folder here'):
        load_from_hub('runs/mine', env, monkeypatch)
    tmp_path.joinpath('runs').mkdir()  # then it is a folder that is missing
    with pytest.raises(UserError, match='^runs/mine: there is no checkpoint'):
        load_from_hub('runs/mine', env, monkeypatch)
