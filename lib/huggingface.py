"""Models in Hugging Face's layouts: which GPT each is, and how config.json and weights are read.

gpt2        learned positions, LayerNorm (Radford et al. 2019)
openai-gpt  the same with post-norm (Radford et al. 2018)
llama       RoPE, RMSNorm, SwiGLU (Touvron et al. 2023); qwen2: with some biases
qwen3       the same with QK-norm
apertus     RoPE, RMSNorm, an activation without gates, QK-norm
arcee       the same without QK-norm
starcoder2  RoPE, LayerNorm (Lozhkov et al. 2024)

lib/write_huggingface.py writes them. Checked against transformers' modeling_*.py.
"""
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from configurator import GPTConfig, read_model_config
from lib.download import download
from lib.errors import UserError, require, restate, shorten
from lib.files import cache_folder, find, read_json
from lib.formats import BUFFERS, check_weights, load_torch, read_safetensors, tied

HUB = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
       'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl',
       'distilgpt2': 'distilbert/distilgpt2'}  # short names; others are owner/name
INDEX = 'model.safetensors.index.json'  # of weights in several files

GPT_KEYS = {'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_head': 'n_head',
            'n_embd': 'n_embd', 'norm_eps': 'layer_norm_epsilon', 'vocab_size': 'vocab_size'}
LLAMA_KEYS = {'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads',
              'head_size': 'head_dim', 'n_embd': 'hidden_size', 'n_hidden': 'intermediate_size',
              'norm_eps': 'rms_norm_eps', 'activation': 'hidden_act', 'vocab_size': 'vocab_size'}
GPT_NAMES = {name: [name] for name in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc',
                                       'mlp.c_proj')}
LLAMA_NAMES = {'ln_1': ['input_layernorm'], 'ln_2': ['post_attention_layernorm'],
               'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
               'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm'],
               'attn.c_proj': ['self_attn.o_proj'],
               'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj']}
UNGATED = {'relu2': ['relu2'], 'gelu_tanh': ['gelu_pytorch_tanh', 'gelu_new'], 'gelu': ['gelu'],
           'relu': ['relu']}
SWIGLU = {'swiglu': ['silu']}
LLAMA_DEFAULTS = {'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False,
                  'attention_bias': False, 'mlp_bias': False}
APERTUS_DEFAULTS = LLAMA_DEFAULTS | {'rms_norm_eps': 1e-5}
BIASES = {'attention_bias': '.attn.c_', 'mlp_bias': '.mlp.c_', 'use_bias': '.c_'}


@dataclass
class Layout:
    """architecture: the class in transformers. keys: {our key: theirs in config.json}. defaults:
    {their key: value} of what config.json may leave out. choices: {our key: its values}, what a
    model of this layout can have; the first is what it has unless config.json says otherwise.
    activations: {ours: theirs}, of which the first is written. names: {our layer: theirs} in a
    block, several where ours stacks the rows of theirs; outside: the same for the rest. conv1d:
    their matrices are (in, out). no_bias: parts of our names where config.json rules biases out.
    """
    architecture: str
    choices: dict
    activations: dict
    keys: dict = field(default_factory=lambda: LLAMA_KEYS)
    defaults: dict = field(default_factory=lambda: LLAMA_DEFAULTS)
    names: dict = field(default_factory=lambda: LLAMA_NAMES)
    outside: dict = field(default_factory=lambda: {'transformer.wte': 'model.embed_tokens',
                                                   'transformer.ln_f': 'model.norm'})
    blocks: str = 'model.layers'
    conv1d: bool = False
    no_bias: tuple = ()

    def our_activation(self, theirs):
        names = {name: ours for ours, names in self.activations.items() for name in names}
        require(isinstance(theirs, str) and theirs in names,
                f'{self.keys["activation"]} = {shorten(theirs)} is not one of {", ".join(names)}')
        return names[theirs]

    def needs(self, ours, config):
        """Whether a model cannot do without our layer of that name."""
        if ours == 'lm_head':
            return not config['tie_weights']
        return bool(config['qk_norm']) or not ours.endswith(('.q_norm', '.k_norm'))

    def layers(self, n_layer):
        """(our layer, [theirs]) of all with weights."""
        for ours, theirs in self.outside.items():
            yield ours, [theirs]
        for i in range(n_layer):
            for ours, theirs in self.names.items():
                yield f'transformer.h.{i}.{ours}', [f'{self.blocks}.{i}.{name}' for name in theirs]
        yield 'lm_head', ['lm_head']


def ungated(names, **others):
    return names | {'mlp.c_fc': ['mlp.up_proj']} | others


ROPE = {'norm_position': ('pre',), 'position': ('rope',), 'norm': ('rmsnorm',), 'qk_norm': (False,)}
LEARNED = ROPE | {'position': ('learned',), 'norm': ('layernorm',), 'n_kv_head': (None,),
                  'head_size': (None,)}
QK_NORM = ROPE | {'qk_norm': (True, 'gain'), 'bias': (False,)}
LAYOUTS = {
    'gpt2': Layout(
        'GPT2LMHeadModel', LEARNED | {'position': ('learned', 'sinusoidal')},
        {'gelu_tanh': ['gelu_new', 'gelu_pytorch_tanh'], 'gelu': ['gelu'], 'relu': ['relu'],
         'relu2': ['relu2']},
        GPT_KEYS | {'n_hidden': 'n_inner', 'activation': 'activation_function'},
        {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5}, GPT_NAMES,
        {name: name for name in ('transformer.wte', 'transformer.wpe', 'transformer.ln_f')},
        'transformer.h', conv1d=True),
    'openai-gpt': Layout(
        'OpenAIGPTLMHeadModel',
        LEARNED | {'norm_position': ('post',), 'position': ('learned', 'sinusoidal'),
                   'n_hidden': (None,)},
        {'relu': ['relu'], 'gelu_tanh': ['gelu']}, GPT_KEYS | {'activation': 'afn'},
        {'afn': 'gelu', 'layer_norm_epsilon': 1e-5}, GPT_NAMES,
        {'transformer.wte': 'transformer.tokens_embed',
         'transformer.wpe': 'transformer.positions_embed'}, 'transformer.h', conv1d=True),
    'llama': Layout('LlamaForCausalLM', ROPE, SWIGLU),
    'qwen2': Layout('Qwen2ForCausalLM', ROPE, SWIGLU,
                    defaults=LLAMA_DEFAULTS | {'attention_bias': True}),  # always
    'qwen3': Layout('Qwen3ForCausalLM', QK_NORM, SWIGLU),
    'apertus': Layout(
        'ApertusForCausalLM', QK_NORM, UNGATED, defaults=APERTUS_DEFAULTS,
        names=ungated(LLAMA_NAMES, ln_1=['attention_layernorm'], ln_2=['feedforward_layernorm'])),
    'arcee': Layout('ArceeForCausalLM', ROPE, UNGATED, names=ungated(LLAMA_NAMES),
                    defaults=APERTUS_DEFAULTS | {'hidden_act': 'relu2'}),
    'starcoder2': Layout(
        'Starcoder2ForCausalLM', ROPE | {'norm': ('layernorm',)}, UNGATED,
        LLAMA_KEYS | {'norm_eps': 'norm_epsilon'},
        {'hidden_act': 'gelu_pytorch_tanh', 'norm_epsilon': 1e-5},
        LLAMA_NAMES | {'mlp.c_fc': ['mlp.c_fc'], 'mlp.c_proj': ['mlp.c_proj']}),
}
OPTIONAL = ('n_kv_head', 'head_size', 'n_hidden')  # config.json may leave them out
# what our config.json says in addition, for what their layout leaves open
OWN_KEYS = ('bias', 'qk_norm', 'eot_token', 'turns')
# of config.json: what does not change the logits, or what the weights tell
HARMLESS = re.compile(
    'model_type|architectures|_name_or_path|torch_dtype|dtype|transformers_version|n_ctx|use_cache|'
    'initializer_range|summary_.*|task_specific_params|.*_token_id|(attn|embd|resid)_pdrop|'
    r'(attention|embedding|residual)_dropout|(attention|mlp|use)_bias|pretraining_tp|'
    r'max_window_layers|is_llama_config|transformers\.js_config|'
    'reorder_and_upcast_attn|output_.*|return_dict.*|gradient_checkpointing|id2label|label2id|'
    'problem_type|num_labels|tokenizer_class|prefix|chunk_size_feed_forward|keys_to_ignore.*|'
    '_attn_implementation.*|(min|max)_length|do_sample|temperature|top_[kp]|num_beams|'
    'num_return_sequences|(repetition|length)_penalty|no_repeat_ngram_size|early_stopping|'
    'finetuning_task|is_decoder|tie_encoder_decoder|torchscript')
# and what can have one value only
REQUIRED = {'add_cross_attention': (False,), 'scale_attn_weights': (True,),
            'scale_attn_by_inverse_layer_idx': (False,), 'partial_rotary_factor': (1,),
            'rope_interleaved': (False,), 'norm_type': ('layer_norm',), 'mlp_type': ('default',),
            'qk_norm': (True,)}  # of Apertus


def convert_config(saved):
    """(layout, fields of GPTConfig) of config.json. Raises UserError, KeyError, TypeError."""
    require(isinstance(saved, dict), 'not the config of a model')
    kind = saved.get('model_type')
    require(isinstance(kind, str) and kind in LAYOUTS,
            f'model_type = {shorten(kind)} is not one of {", ".join(LAYOUTS)}')
    layout = LAYOUTS[kind]
    saved = layout.defaults | {key: v for key, v in saved.items() if v not in (None, '', [], {})}
    values = {key: choices[0] for key, choices in layout.choices.items()}
    for ours, theirs in layout.keys.items():
        values[ours] = saved.pop(theirs) if ours not in OPTIONAL else saved.pop(theirs, None)
    values['activation'] = layout.our_activation(values['activation'])
    if values['position'] == 'rope':
        require(kind != 'apertus' or 'rope_parameters' in saved,
                'rope_parameters is missing: without it versions of transformers differ; write '
                '{"rope_type": "default", "rope_theta": ...} if RoPE is not scaled')
        values['rope_theta'] = pop_rope_theta(saved)
    window, slides = saved.pop('sliding_window', None), saved.pop('use_sliding_window', True)
    if window and slides:  # a context that fits into it
        values['block_size'] = min(values['block_size'], window)
    kinds = saved.pop('layer_types', [])
    require(isinstance(kinds, list) and {*kinds} <= {'full_attention', 'sliding_attention'},
            f'layer_types = {shorten(kinds)}: no such choice here')
    values['tie_weights'] = saved.pop('tie_word_embeddings', True)
    own = saved.pop('plaingpt', {})
    values |= {key: own[key] for key in OWN_KEYS if key in own}
    for key, value in saved.items():
        known = value in REQUIRED.get(key, (False,)) or HARMLESS.fullmatch(key)
        require(known, f'{key} = {shorten(value)}: no such choice here; if the model works without '
                       f'it, remove it from the file')
    no_bias = tuple(part for key, part in BIASES.items() if saved.get(key) is False)
    return replace(layout, no_bias=no_bias), without_usual(GPTConfig(**read_model_config(values)))


def without_usual(config):
    """The fields of a GPTConfig, with None for sizes that it would have anyway."""
    found = asdict(config)
    usual = {'n_kv_head': config.n_head, 'head_size': config.n_embd / config.n_head,
             'n_hidden': replace(config, n_hidden=None).mlp_width}
    return found | {key: None for key, value in usual.items() if found[key] == value}


def pop_rope_theta(saved):
    """The base of RoPE's wavelengths. Raises UserError if they are scaled."""
    rope, theta = {}, saved.pop('rope_theta', 10000.0)
    for key in ('rope_parameters', 'rope_scaling'):
        value = saved.pop(key, {})
        require(isinstance(value, dict), f'{key} = {shorten(value)} is not a table')
        rope |= value
    kind = rope.get('rope_type', rope.get('type', 'default'))
    scaled = [*(rope.keys() - {'rope_theta', 'rope_type', 'type'})]
    require(not scaled and kind == 'default',
            f'rope_scaling with rope_type = {shorten(kind)}: RoPE is not scaled here')
    return rope.get('rope_theta', theta)


def convert_weights(layout, config, tensors):
    """{our name: tensor in fp32} of {their name: tensor}, which is emptied. Raises UserError."""
    prefix = layout.blocks.partition('.')[0] + '.'
    for name in list(tensors):
        if name.endswith(BUFFERS):
            del tensors[name]
        elif not name.startswith((prefix, 'lm_head.')):  # saved without the head
            require(prefix + name not in tensors, f'{name} is there twice')
            tensors[prefix + name] = tensors.pop(name)
    weights = {}
    for ours, theirs in layout.layers(config['n_layer']):
        has_bias = not any(part in ours for part in layout.no_bias)
        for kind in ('weight', 'bias')[:1 + has_bias]:
            names = [f'{name}.{kind}' for name in theirs]
            parts = [tensors.pop(name).float() for name in names if name in tensors]
            require(len(parts) in (0, len(names)), f'one of {", ".join(names)} is missing')
            if layout.conv1d and kind == 'weight' and '.c_' in ours:
                parts = [part.t().contiguous() for part in parts]
            if parts:
                weights[f'{ours}.{kind}'] = torch.cat(parts) if len(parts) > 1 else parts[0]
            elif kind == 'weight' and layout.needs(ours, config):
                raise UserError(f'{names[0]} is missing: the weights do not fit config.json')
    require(not tensors, f'{next(iter(tensors), "")}: there is no such weight in a '
                         f'{layout.architecture} of this config.json')
    return weights


def add_zero_biases(weights, parts):
    """Add biases of 0 to our layers whose names have one of these parts, where they have none."""
    for name, weight in list(weights.items()):
        if name.endswith('.weight') and any(part in name for part in parts):
            bias = name.removesuffix('weight') + 'bias'
            weights.setdefault(bias, weight.new_zeros(len(weight)))


def pop_all(weights, endings):
    """Remove the weights whose names end so, and return them."""
    return {name: weights.pop(name) for name in list(weights) if name.endswith(endings)}


def settle(config, weights):
    """Set bias, qk_norm and tie_weights to what the weights are, and give these the form that our
    model has: no biases of 0 or gains of 1 that it does without, zeros where it has a bias."""
    biases = pop_all(weights, '.bias')
    config['bias'] = bool(biases) and (config['bias'] or any(w.any() for w in biases.values()))
    if config['bias']:
        weights |= biases
        add_zero_biases(weights, ['.c_', '.ln_'] if config['norm'] == 'layernorm' else ['.c_'])
    if config['qk_norm']:
        gains = pop_all(weights, ('q_norm.weight', 'k_norm.weight'))
        if config['qk_norm'] == 'gain' or any((w != 1).any() for w in gains.values()):
            config['qk_norm'] = 'gain'
            weights |= gains
    if config['tie_weights'] and 'transformer.wte.weight' in weights:
        weights.setdefault('lm_head.weight', weights['transformer.wte.weight'])
    config['tie_weights'] = tied(weights)


def read_weights(folder):
    """{their name: tensor} of model.safetensors, pytorch_model.bin or several files. UserError."""
    for name in ('model.safetensors', INDEX, 'pytorch_model.bin', 'pytorch_model.bin.index.json'):
        if (folder / name).exists():
            break
    else:
        raise UserError(f'{folder}: there is no model.safetensors or pytorch_model.bin')
    tensors = {}
    for path in shards(folder / name) if name.endswith('.json') else [folder / name]:
        require(path.exists(), f'{path} is missing: {name} names it; copy it there')
        found = read_safetensors(path) if path.suffix == '.safetensors' else load_torch(path)
        check_weights(found, path)
        for name in found.keys() & tensors.keys():
            raise UserError(f'{path}: {name} is there twice')
        tensors |= found
    return tensors


def shards(index):
    """The files that an index names. Raises UserError."""
    with restate((OSError, ValueError, KeyError, AttributeError, TypeError), index,
                 'not an index of weights'):
        names = dict.fromkeys(read_json(index)['weight_map'].values())
        require(names and all(re.fullmatch(r'[\w-][\w.-]*', name) for name in names),
                'it names other folders')
    return [index.parent / name for name in names]


def load(where):
    """(fields of GPTConfig, {name: tensor}, folder) of a folder or a name on the hub. Raises
    UserError."""
    folder = fetch(str(where)) if on_hub(where) else Path(where)
    path = folder / 'config.json'
    with restate((OSError, ValueError, KeyError, TypeError, AttributeError), path):
        layout, config = convert_config(read_json(path))
    tensors = read_weights(folder)
    with restate(ValueError, folder):
        weights = convert_weights(layout, config, tensors)
    settle(config, weights)
    return config, weights, folder


def on_hub(where):
    """Whether it names a model on the hub, such as gpt2 or owner/name, and nothing here."""
    name = str(where)
    owner = re.fullmatch(r'(\w[\w.-]*)/\w[\w.-]*', name)
    if name not in HUB and (not owner or name.endswith(('.pt', '.json'))):
        return False
    return not find(name).exists() and not (owner and find(owner[1]).exists())


def fetch(name):
    """Fetch a model from the hub (HF_ENDPOINT: a mirror) into ~/.cache/plaingpt. -> its folder"""
    endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    folder = cache_folder() / name

    def get(file, optional=False):
        return download(f'{endpoint}/{HUB.get(name, name)}/resolve/main/{file}', folder / file,
                        sha256='linked', optional=optional,
                        advice=f'{name} is no folder here; put config.json, the tokenizer and the '
                               f'weights into {folder} by hand')

    weights = [folder / 'model.safetensors', folder / 'pytorch_model.bin']
    if (folder / INDEX).exists():
        weights = shards(folder / INDEX)[-1:]
    if any(path.exists() for path in weights):  # they come last
        return folder
    get('config.json')
    if not get('tokenizer.json', optional=True) and get('vocab.json', optional=True):
        get('merges.txt', optional=True)
    if not get('model.safetensors', optional=True):
        index = get(INDEX, optional=True)
        for path in shards(index) if index else [folder / 'pytorch_model.bin']:
            get(path.name)
    return folder
