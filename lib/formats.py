"""Third-party files of weights: safetensors, torch.save, nanoGPT's ckpt.pt.

Nothing loaded can run code: torch.load with weights_only, safetensors, JSON.
"""
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from configurator import check_type
from lib.errors import UserError, plural, require, restate, shorten
from lib.files import check_lfs, parse_json

DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
          'F64': torch.float64, 'BOOL': torch.bool, 'U8': torch.uint8, 'I8': torch.int8,
          'I16': torch.int16, 'I32': torch.int32, 'I64': torch.int64}
# causal masks and positions of older files
BUFFERS = ('.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq', 'position_ids')


def tied(weights):
    """Whether the head is the token embedding. What a file says of it may be wrong."""
    wte, head = (weights.get(f'{name}.weight') for name in ('transformer.wte', 'lm_head'))
    if wte is None or head is None:
        return True  # load_state_dict reports what is missing
    same_memory = wte.data_ptr() == head.data_ptr() and wte.shape == head.shape
    return same_memory or torch.equal(wte, head)


def read_safetensors(path, metadata=None):
    """{name: tensor}: 8 bytes with the length of a JSON header, the header, the tensors, without a
    gap (huggingface/safetensors, README, "Format"). metadata: a dict to put its {text: text} into.
    Raises UserError."""
    wrong = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
    with restate(wrong, path, 'not a whole safetensors file'):
        check_lfs(path)
        size = path.stat().st_size
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            require(0 < length <= min(size - 8, 10**8), 'its header is cut off')
            header = parse_json(file.read(length).decode('utf-8'))
        more = header.pop('__metadata__', None)
        if metadata is not None:
            metadata.update(more or {})
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
    its data. A buffer may have another dtype."""
    require(isinstance(weights, dict), f'{path}: there are no weights of a GPT in it; name another')
    for name, tensor in weights.items():
        where = f'{path}: {shorten(name)}'
        require(isinstance(name, str), f'{where} is not the name of a weight')
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        require(dense and tensor.device.type == 'cpu', f'{where} is not a dense tensor')
        require(tensor.is_floating_point() or name.endswith(BUFFERS),
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
            'model': {k: v for k, v in state['model'].items() if not k.endswith(BUFFERS)},
            'step': step, 'samples_seen': samples, 'val_loss': best, 'best_val_loss': best,
            'config': config | {'init_from': str(path)}, 'optimizer': state.get('optimizer')}
