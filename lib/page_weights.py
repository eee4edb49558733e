"""A model's weights inside a page, for web/engine.js."""
import copy
import json

import torch

from lib.page import compress, join_streams

MAX_BYTES = 23_500_000  # of the weights in base64: the whole page stays below 25 MB
MAX_FP16_BYTES = 10_000_000  # larger ones are stored in int8
MAX_FP32_BYTES = 2_000_000
KEYS = ('block_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'ngram', 'ngram_rows', 'position',
        'norm', 'norm_position', 'activation', 'n_kv_head', 'head_size', 'rope_theta', 'norm_eps',
        'qk_norm', 'logit_softcap', 'prefix_lm', 'vocab_size', 'eot_token', 'turns')


def round_weight(weight, format):
    """The arrays that stand for a weight in a page, and the weight that they give, fp32.

    format: 'float32', 'float16', or 'int8': per row of a matrix, 127 steps up to its largest
    magnitude, stored as uint8 around 128. Vectors stay fp32.
    """
    if format == 'float32' or weight.dim() < 2:
        return {'': weight}, weight
    if format == 'float16':
        half = weight.clamp(-65504, 65504).half()
        return {'': half}, half.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127  # (rows, 1)
    steps = (weight / scale.clamp(min=1e-30)).round()
    return {'': (steps + 128).byte(), ':scale': scale.flatten()}, steps * scale


def pack_weights(model, tokenizer, format):
    """(facts, bytes, a copy of the model with the rounded weights). The bytes are deflate streams;
    facts has the config, the format and where each array is. The tokenizer is among them, as JSON.
    """
    rounded = copy.deepcopy(model)
    saved = json.dumps(tokenizer.to_dict()).encode()
    streams = {'tokenizer': compress(torch.tensor(list(saved), dtype=torch.uint8))}
    named = dict(model.named_parameters())  # a tied head once, as transformer.wte.weight
    for name, parameter in rounded.named_parameters():
        arrays, parameter.data = round_weight(named[name].data.float().cpu(), format)
        for suffix, array in arrays.items():
            streams[name + suffix] = compress(array)
    index, data = join_streams(streams)
    config = {key: getattr(model.config, key) for key in KEYS}
    return {'format': format, 'config': config, 'arrays': index}, data, rounded


def weights_for_page(model, tokenizer):
    """pack_weights in the most precise format that fits; None if the model is too large."""
    n = model.get_num_params(False)
    for format, limit, bytes_each in (
        ('float32', MAX_FP32_BYTES, 4), ('float16', MAX_FP16_BYTES, 2), ('int8', MAX_BYTES, 1)
    ):
        if n * bytes_each * 0.8 * 4 / 3 > limit:  # deflate saves less than a fifth of it
            continue
        facts, data, rounded = pack_weights(model, tokenizer, format)
        if len(data) * 4 / 3 <= limit:
            return facts, data, rounded
    return None


@torch.no_grad()
def logit_difference(model, rounded, idx):
    """The largest difference of the logits over idx (B, T) that rounding the weights makes."""
    return (model(idx, idx)[0] - rounded(idx, idx)[0]).abs().max().item()
