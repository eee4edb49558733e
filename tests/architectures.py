"""Every choice of an architecture, taken from the fields of GPTConfig."""

import dataclasses
from typing import Literal, get_args, get_origin

from configurator import GPTConfig, key_types

SIZES = {
    'block_size': 16,
    'vocab_size': 40,
    'n_layer': 1,
    'n_head': 4,
    'n_embd': 32,
    'ngram_rows': 97,
}
VALUES = {  # of fields that are neither a Literal nor a bool; a new field needs an entry
    'dropout': [0.1],
    'ngram': [3],
    'n_kv_head': [2, 1],
    'head_size': [6],
    'n_hidden': [40],
    'rope_theta': [500.0],
    'norm_eps': [1e-3],
    'qk_norm': [True, 'gain'],
    'logit_softcap': [5.0],
    'label_smoothing': [0.1],
    'eot_token': [3],
    'turns': [2],
}
NEEDS = {
    'turns': {'eot_token': 3},
    'prefix_lm': {'eot_token': 3, 'turns': 2},
}


def choices():
    """{field: its values, the default first}"""
    found, types = {}, key_types(GPTConfig)
    for field in dataclasses.fields(GPTConfig):
        if field.name in SIZES:
            continue
        type_ = types[field.name]
        if get_origin(type_) is Literal:
            values = get_args(type_)
        elif type_ is bool:
            values = [False, True]
        else:
            values = VALUES[field.name]
        others = [value for value in values if value != field.default]
        found[field.name] = [field.default, *others]
    return found


def one_by_one():
    """The default architecture, and each choice as the only change to it."""
    return [{}] + [
        NEEDS.get(name, {}) | {name: value}
        for name, values in choices().items()
        for value in values[1:]
    ]


def combined():
    """As few architectures as have every value of every field, half of them changed at once."""
    fields, found = choices(), []
    for i in range(max(map(len, fields.values()))):
        architecture, needs = {}, {}
        for number, (name, values) in enumerate(fields.items()):
            architecture[name] = value = values[(i + number) % len(values)]
            if value != values[0]:
                needs |= NEEDS.get(name, {})
        found.append(architecture | needs)
    return found


def gpt_config(architecture):
    return GPTConfig(**SIZES | architecture)


def describe(architecture):
    return ' '.join(f'{name}={value}' for name, value in architecture.items()) or 'default'
