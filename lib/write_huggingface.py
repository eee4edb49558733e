"""Write a GPT in the layout of one of Hugging Face's models that computes the same.

config.json, model.safetensors, a model card: transformers, vLLM and MLX load them without any code
of ours.
"""
import contextlib
import json
import math
from dataclasses import asdict

import torch

from lib.errors import UserError, plural, require
from lib.files import create_synced, write_synced
from lib.formats import DTYPES
from lib.huggingface import LAYOUTS, OWN_KEYS, add_zero_biases, without_usual
from lib.write_tokenizer import tokenizer_files
from model import sinusoidal_embedding

NOWHERE = {'ngram': (1, 'n-gram tables'), 'logit_softcap': (0.0, 'a softcap of the logits'),
           'prefix_lm': (False, 'bidirectional attention within a source')}


def require_common(config, where):
    """Raise UserError if a GPTConfig has what is ours alone."""
    for key, (usual, what) in NOWHERE.items():
        value = getattr(config, key)
        require(value == usual, f'{key} = {value}: {where} no {what}: train with '
                                f'--{key}={usual}, or export with --format=onnx')


def choose_layout(config):
    """(model_type, Layout) that computes what a GPTConfig does. Raises UserError if none does."""
    require_common(config, 'Hugging Face\'s models have')
    if config.norm_position == 'post':
        kind = 'openai-gpt'
    elif config.position == 'learned' or config.position != 'rope' and config.norm == 'layernorm':
        kind = 'gpt2'
    elif config.norm == 'layernorm':
        kind = 'starcoder2'
    elif config.activation == 'swiglu':
        kind = 'qwen3' if config.qk_norm else 'llama'
    else:
        kind = 'apertus' if config.qk_norm else 'arcee'
    layout, found = LAYOUTS[kind], without_usual(config)
    choices = layout.choices | {'activation': tuple(layout.activations)}
    wrong = {key: values for key, values in choices.items() if found[key] not in values}
    has = ', '.join(f'{key} = {" or ".join(map(str, values))}' for key, values in wrong.items())
    require(not wrong, f'{", ".join(f"{key} = {found[key]}" for key in wrong)}: '
                       f'{layout.architecture}, which comes closest, has {has}: train with '
                       f'{" ".join(f"--{key}={values[0]}" for key, values in wrong.items())}, or '
                       f'export with --format=onnx')
    return kind, layout


def convert(config, weights):
    """({key: value} of config.json, {their name: tensor}) of a GPTConfig and the weights of its
    GPT. Raises UserError if no layout holds it."""
    kind, layout = choose_layout(config)
    weights, tied = fill(config, layout, weights), config.tie_weights
    if config.position == 'sinusoidal':  # positions as weights, the scale folded in: untied
        wte, tied = weights['transformer.wte.weight'], False
        weights['transformer.wte.weight'] = wte * math.sqrt(config.n_embd)
        position = torch.arange(config.block_size)
        weights['transformer.wpe.weight'] = sinusoidal_embedding(position, config.n_embd)
    if tied:
        del weights['lm_head.weight']
    tensors = {}
    for ours, theirs in layout.layers(config.n_layer):
        for end in ('weight', 'bias'):
            weight = weights.pop(f'{ours}.{end}', None)
            if weight is None:
                continue
            if layout.conv1d and end == 'weight' and '.c_' in ours:
                weight = weight.t()
            for name, part in split_like(theirs, config, weight):
                tensors[f'{name}.{end}'] = part.contiguous()
    return config_json(config, kind, layout, tied), tensors


def split_like(theirs, config, weight):
    """(their name, its rows of our weight), one below the other: q, k, v, or equal parts."""
    heads = [config.n_head * config.head_dim] + 2 * [config.kv_heads * config.head_dim]
    sizes = heads if len(theirs) == 3 else len(weight) // len(theirs)
    return zip(theirs, weight.split(sizes))


def fill(config, layout, weights):
    """A copy of the weights, with those that a layout always has: gains of 1, biases of 0."""
    filled = dict(weights)
    if config.qk_norm is True:
        for i in range(config.n_layer):
            for norm in ('q_norm', 'k_norm'):
                filled[f'transformer.h.{i}.attn.{norm}.weight'] = torch.ones(config.head_dim)
    if config.norm == 'layernorm':
        add_zero_biases(filled, ['.ln_'])
    if layout.conv1d:
        add_zero_biases(filled, ['.c_'])
    return filled


def config_json(config, kind, layout, tied):
    """{key: value} of config.json."""
    values = asdict(config) | {'n_kv_head': config.kv_heads, 'head_size': config.head_dim,
                               'n_hidden': config.mlp_width,
                               'activation': layout.activations[config.activation][0]}
    saved = {'architectures': [layout.architecture], 'model_type': kind}
    saved |= {theirs: values[ours] for ours, theirs in layout.keys.items()}
    if layout.conv1d:
        saved |= {key: config.dropout for key in ('attn_pdrop', 'embd_pdrop', 'resid_pdrop')}
    else:
        rope = {'rope_theta': config.rope_theta}
        # transformers 5 reads the last; in 4 Apertus scales unless the second is null
        saved |= rope | {'rope_scaling': None,
                         'rope_parameters': rope | {'rope_type': 'default'}}
        saved |= dict.fromkeys(('attention_bias', 'mlp_bias', 'use_bias'), config.bias)
    return saved | {'tie_word_embeddings': tied, 'plaingpt': {key: values[key] for key in OWN_KEYS}}


def write_folder(checkpoint, model, folder, dtype, where):
    """Write config.json, weights, tokenizer and model card of a Checkpoint and its GPT into a
    folder, which will be called `where`, the weights in dtype. Returns the name of the class.
    Raises UserError before it writes."""
    saved, tensors = convert(model.config, model.state_dict())
    tokenizer, turns = checkpoint.get_tokenizer(), model.config.turns
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    special = {} if tokenizer.eot is None else {
        key: tokenizer.eot for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    # both names: transformers 5 and 4
    saved |= special | dict.fromkeys(('dtype', 'torch_dtype'), str(dtype).removeprefix('torch.'))
    sampling = special | {'do_sample': True, 'temperature': 0.8, 'top_k': 200}  # as in sample.py
    files = tokenizer_files(tokenizer, model.config.block_size, turns)
    files |= {'config.json': saved, 'generation_config.json': sampling}
    write_safetensors(folder / 'model.safetensors', tensors)
    write_json(folder, files)
    write_synced(folder / 'README.md', model_card(checkpoint, tokenizer, model, saved, where))
    return saved['architectures'][0]


def write_json(folder, files):
    """Write {name: content}."""
    for name, content in files.items():
        write_synced(folder / name, json.dumps(content, indent=2, ensure_ascii=False))


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} (huggingface/safetensors, README, "Format"). metadata: {text: text}"""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {'__metadata__': {'format': 'pt'} | (metadata or {})}, 0
    for name, tensor in tensors.items():
        header[name] = {'dtype': names[tensor.dtype], 'shape': list(tensor.shape),
                        'data_offsets': [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with create_synced(path) as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- plaingpt
---

# {where}

A GPT with {parameters:,} parameters{origin}, in the layout of {architecture}.

{table}

```python
{code}
```
{note}"""
EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({where!r})
model = AutoModelForCausalLM.from_pretrained({where!r})
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={n_new})[0]))"""
TEXT_INPUTS = 'tokenizer({start!r}, return_tensors="pt")'
CHAT_INPUTS = """tokenizer.apply_chat_template(
    [{{"role": "user", "content": {start!r}}}], return_tensors="pt", return_dict=True)"""
IDS_EXAMPLE = """import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({where!r})
print(model.generate(torch.tensor([[0]]), max_new_tokens={n_new}))"""
NOTE = """
In training attention did not cross `<|endoftext|>` between documents. Here it would: give the model
one document at a time.
"""


def example(tokenizer, config, where):
    """Python code that generates text with transformers."""
    n_new = min(50, config.block_size // 2)
    if tokenizer.kind == 'ids':  # there are no texts
        return IDS_EXAMPLE.format(where=where, n_new=n_new)
    inputs = CHAT_INPUTS if config.turns else TEXT_INPUTS
    return EXAMPLE.format(where=where, n_new=n_new,
                          inputs=inputs.format(start=example_text(tokenizer)))


def example_text(tokenizer):
    """A short text that it can encode."""
    tokens = (tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size))
    for text in ('The', *filter(str.isalnum, tokens)):
        with contextlib.suppress(UserError):
            tokenizer.encode(text)
            return text
    return tokenizer.decode([0])


def model_card(checkpoint, tokenizer, model, saved, where):
    """The README.md of a folder `where`: how the model was trained, and how it is used."""
    config, trained = model.config, checkpoint.config
    rows = {'context': f'{config.block_size:,} tokens', 'vocabulary': f'{config.vocab_size:,}'}
    if checkpoint.step:
        tokens = checkpoint.samples_seen * trained.get('block_size', config.block_size)
        rows['training'] = f'{plural(checkpoint.step, "step")}, {plural(tokens, "token")}'
    muon = ['muon_learning_rate'] if trained.get('optimizer') == 'muon' else []
    for key in ('dataset', 'init_from', 'optimizer', 'learning_rate', *muon, 'seed'):
        if key in trained:
            rows[key] = trained[key]
    if checkpoint.val_loss is not None:
        rows['val loss'] = f'{checkpoint.val_loss:.4f} nats per token'
    lines = ['| | |', '| --- | --- |', *(f'| {key} | {value} |' for key, value in rows.items())]
    origin = ', trained with plainGPT' if checkpoint.step else ''
    return CARD.format(where=where, origin=origin, parameters=model.get_num_params(False),
                       architecture=saved['architectures'][0], table='\n'.join(lines),
                       code=example(tokenizer, config, where),
                       note=NOTE * (config.eot_token is not None))
