"""Third-party weights: nanoGPT's ckpt.pt, GPT-2 in Hugging Face's layout, safetensors.

Nothing loaded can run code: torch.load with weights_only, safetensors, JSON.
"""
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from configurator import check_type, read_model_config
from lib.download import download
from lib.errors import UserError, plural, require, restate, shorten
from lib.files import check_lfs, parse_json, read_json

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
          'F64': torch.float64, 'BOOL': torch.bool, 'U8': torch.uint8, 'I8': torch.int8,
          'I16': torch.int16, 'I32': torch.int32, 'I64': torch.int64}
MASKS = ('.attn.bias', '.attn.masked_bias')  # causal masks of older files


def is_gpt2(where):
    return str(where) in GPT2_SIZES and not Path(where).exists()


def download_gpt2(name):
    """Fetch GPT-2 from Hugging Face's hub (HF_ENDPOINT: a mirror) into ~/.cache/plaingpt."""
    endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'plaingpt' / name
    for file in ('config.json', 'vocab.json', 'model.safetensors'):
        download(f'{endpoint}/openai-community/{name}/resolve/main/{file}', folder / file,
                 sha256='linked',
                 advice=f'put config.json, vocab.json and model.safetensors into {folder} by hand')
    return folder


def load_gpt2(where):
    """(fields of GPTConfig, {name: tensor}, folder) of 'gpt2', ..., 'gpt2-xl', or of a folder in
    Hugging Face's layout. Raises UserError."""
    folder = download_gpt2(str(where)) if is_gpt2(where) else Path(where)
    path = folder / 'config.json'
    with restate((OSError, ValueError, KeyError, TypeError), path):
        model_config = convert_huggingface_config(read_json(path))
    path = folder / 'model.safetensors'
    if not path.exists():
        path = folder / 'pytorch_model.bin'
        require(path.exists(), f'{folder}: there is no model.safetensors or pytorch_model.bin')
    tensors = read_safetensors(path) if path.suffix == '.safetensors' else load_torch(path)
    check_weights(tensors, path)
    weights = {}
    for name, tensor in tensors.items():
        name = name.removeprefix('transformer.')
        if name.endswith(MASKS):
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) and tensor.dim() == 2:
            tensor = tensor.t().contiguous()  # GPT-2's Conv1D keeps (in, out), Linear (out, in)
        name = name if name == 'lm_head.weight' else f'transformer.{name}'
        require(name not in weights, f'{folder}: {name} is there twice')
        weights[name] = tensor.float()
    if model_config['tie_weights'] and 'transformer.wte.weight' in weights:
        weights.setdefault('lm_head.weight', weights['transformer.wte.weight'])
    model_config['tie_weights'] &= tied(weights)
    return model_config, weights, folder


def tied(weights):
    """Whether the head is the token embedding. What a file says of it may be wrong."""
    wte, head = (weights.get(f'{name}.weight') for name in ('transformer.wte', 'lm_head'))
    if wte is None or head is None:
        return True  # load_state_dict reports what is missing
    same_memory = wte.data_ptr() == head.data_ptr() and wte.shape == head.shape
    return same_memory or torch.equal(wte, head)


# of config.json: what does not change the logits
HARMLESS = re.compile(
    'model_type|architectures|_name_or_path|torch_dtype|dtype|transformers_version|n_ctx|use_cache|'
    'initializer_range|summary_.*|task_specific_params|.*_token_id|(attn|embd|resid)_pdrop|'
    'reorder_and_upcast_attn|output_.*|return_dict.*|gradient_checkpointing|id2label|label2id|'
    'problem_type|num_labels|tokenizer_class|prefix|chunk_size_feed_forward|keys_to_ignore.*|'
    '_attn_implementation.*|(min|max)_length|do_sample|temperature|top_[kp]|num_beams|'
    'num_return_sequences|(repetition|length)_penalty|no_repeat_ngram_size|early_stopping|'
    'finetuning_task|is_decoder|tie_encoder_decoder|torchscript')


def convert_huggingface_config(config):
    """GPT-2's config.json -> fields of GPTConfig. Raises ValueError or KeyError."""
    require(isinstance(config, dict), 'not the config of a model')
    activation = config.get('activation_function', 'gelu_new')
    require(config.get('model_type') == 'gpt2',
            f'model_type = {config.get("model_type")!r} is not gpt2')
    activations = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu',
                   'relu': 'relu'}
    require(isinstance(activation, str) and activation in activations,
            f'activation_function = {activation!r} is not one of {", ".join(activations)}')
    supported = {'n_inner': (None, 4 * config['n_embd']), 'layer_norm_epsilon': (1e-5,),
                 'add_cross_attention': (False,), 'scale_attn_weights': (True,),
                 'scale_attn_by_inverse_layer_idx': (False,)}
    for key, values in supported.items():
        require(config.get(key, values[0]) in values, f'{key} = {config.get(key)} is not GPT-2\'s')
    taken = {'n_positions': 'block_size', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
             'n_head': 'n_head', 'n_embd': 'n_embd'}
    for key in config.keys() - taken.keys() - supported.keys():
        known = key in ('activation_function', 'tie_word_embeddings') or HARMLESS.fullmatch(key)
        known = known or config[key] in (None, False, '', [], {})
        require(known, f'{key} = {str(config[key])[:40]}: no such choice here; if the model works '
                       f'without it, remove it from the file')
    values = {ours: config[theirs] for theirs, ours in taken.items()}
    return read_model_config(values | {'activation': activations[activation],
                                       'tie_weights': config.get('tie_word_embeddings', True)})


def read_safetensors(path):
    """{name: tensor}: 8 bytes with the length of a JSON header, the header, the tensors, without a
    gap (huggingface/safetensors, README, "Format"). Raises UserError."""
    wrong = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
    with restate(wrong, path, 'not a whole safetensors file'):
        check_lfs(path)
        size = path.stat().st_size
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            require(0 < length <= min(size - 8, 10**8), 'its header is cut off')
            header = parse_json(file.read(length).decode('utf-8'))
        header.pop('__metadata__', None)
        data = torch.from_numpy(np.memmap(path, np.uint8, mode='c'))[8 + length:]
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            dtype, shape, (start, stop) = entry['dtype'], entry['shape'], entry['data_offsets']
            require(dtype in DTYPES,
                    f'{name} has dtype = {shorten(dtype)}; known are {", ".join(DTYPES)}')
            require(start == end <= stop <= len(data),
                    f'{name} has data_offsets = {shorten([start, stop])} after {end} of {len(data)}'
                    f' bytes: tensors overlap, leave a gap or are cut off')
            require(len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in shape)
                    and math.prod(shape) * DTYPES[dtype].itemsize == stop - start,
                    f'{name} has shape = {shorten(shape)} but {plural(stop - start, "byte")}')
            tensors[name] = data[start:stop].clone().view(DTYPES[dtype]).view(shape)
            end = stop
        require(end == len(data), f'after the last tensor: {plural(len(data) - end, "byte")}')
        return tensors


def check_archive(path):
    """Raise UserError if a file unfolds to more than its size: torch.save does not compress."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    require(stored and sum(entry.file_size for entry in entries) <= os.stat(path).st_size,
            f'{path}: refused: its entries are compressed or overlap, as torch.save does not do')


def check_weights(weights, path):
    """Raise UserError unless this is {name: dense floating-point tensor}, none of them larger than
    its data. A causal mask may have another dtype."""
    require(isinstance(weights, dict), f'{path}: there are no weights of a GPT in it; name another')
    for name, tensor in weights.items():
        where = f'{path}: {shorten(name)}'
        require(isinstance(name, str), f'{where} is not the name of a weight')
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        require(dense and tensor.device.type == 'cpu', f'{where} is not a dense tensor')
        require(tensor.is_floating_point() or name.endswith(MASKS),
                f'{where} has dtype = {tensor.dtype}: weights are floating-point numbers')
        size = tensor.numel() * tensor.element_size()
        require(size <= tensor.untyped_storage().nbytes(), f'{where} is larger than its data')


def load_torch(path, mmap=False):
    """Tensors and plain values that torch.save wrote. Raises UserError, FileNotFoundError."""
    try:
        check_lfs(path)
        check_archive(path)
        # PyTorch maps zip files only, with names in UTF-8
        mmap = mmap and str(path).isprintable() and zipfile.is_zipfile(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # a truncated or foreign file can raise anything
        if not Path(path).exists():  # deleted while it was read
            raise FileNotFoundError(path) from None
        reason = getattr(error, 'strerror', None) or 'it is cut off, or torch.save did not write it'
        if named := re.search(r'GLOBAL (\S+)', str(error)):
            reason = (f'it would run {named[1]}; if you trust it, save its weights again: python '
                      f'-c "import torch; c = torch.load(\'{path}\', weights_only=False); '
                      f'torch.save({{k: v for k, v in c.items() if torch.is_tensor(v) or k in '
                      f'(\'model\', \'model_args\')}}, \'{path}\')"')
        raise UserError(f'{path}: refused: {reason}') from None


def convert_nanogpt(state, path):
    """nanoGPT's ckpt.pt -> the fields of a Checkpoint. Its GELU is the exact one; its first
    versions saved the causal mask as attn.bias."""
    machine = ('device', 'dtype', 'compile', 'backend')  # may be another machine's
    config = {k: v for k, v in state.get('config', {}).items() if k not in machine}
    step = check_type('iter_num', state.get('iter_num', 0), int)
    sizes = [check_type(key, config.get(key, default), int)
             for key, default in (('batch_size', 12), ('gradient_accumulation_steps', 1))]
    samples = step * sizes[0] * sizes[1]
    best = float(state.get('best_val_loss', 1e9))
    best = best if best < 1e8 else None  # 1e9 stands for none
    return {'model_config': {'bias': True} | state['model_args'] | {'activation': 'gelu'},
            'model': {k: v for k, v in state['model'].items() if not k.endswith(MASKS)},
            'step': step, 'samples_seen': samples, 'val_loss': best, 'best_val_loss': best,
            'config': config | {'init_from': str(path)}, 'optimizer': state.get('optimizer')}
