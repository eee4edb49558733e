"""Take a model elsewhere: Hugging Face, llama.cpp, ONNX, or plain safetensors.

    python tools/export.py --out_dir=out-x                   # out-x/hf, for transformers, vLLM, MLX
    python tools/export.py --out_dir=out-x --format=gguf     # out-x/gguf/model.gguf, for llama.cpp
    python tools/export.py --init_from=gpt2 --format=onnx --export_dir=gpt2-onnx
    python tools/export.py --out_dir=out-lora --format=peft  # the updates of --lora_rank alone

hf and gguf have no n-gram tables: train with --ngram=1 for them. onnx holds every model.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from configurator import Count, FilePath, Which, configure
from lib.errors import os_errors, require, user_errors
from lib.files import find, printable, weights_of


@dataclass
class Config:
    # model
    init_from: FilePath = 'resume'  # resume (out_dir), gpt2, gpt2-medium, ..., gpt2-xl or a path
    out_dir: FilePath = 'out'  # the folder of a run
    checkpoint: Which = 'auto'  # last, best (by val loss) or a step; auto: docs/sampling.md
    average_last: Count = 1  # average the weights of the last N checkpoints
    # export
    format: Literal['hf', 'gguf', 'onnx', 'safetensors', 'peft'] = 'hf'  # see above
    export_dir: FilePath | None = None  # a new folder; None: out_dir/format
    dtype: Literal['float32', 'bfloat16', 'q8_0'] = 'float32'  # of the weights; q8_0: gguf


if __name__ == '__main__':  # so that --help and typos do not wait for the slow imports
    with user_errors():
        config, _ = configure(Config)

import contextlib
import json
import os
import shutil

import torch

import checkpoint as ckpt
from lib.write_gguf import write_gguf
from lib.write_huggingface import write_folder, write_json, write_safetensors
from lib.write_onnx import write_onnx
from lib.write_peft import write_adapter
from lib.write_tokenizer import tokenizer_files

DTYPES = {'gguf': ('float32', 'bfloat16', 'q8_0'), 'onnx': ('float32',)}


@contextlib.contextmanager
def new_folder(path):
    """A folder to write into, which gets its name when it is whole. Raises UserError if it cannot
    be written."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    with os_errors(f'export_dir = {path}: cannot write there', 'free some room or name another'):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.is_dir():  # an empty one, which Windows does not replace
                path.rmdir()
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write(checkpoint, model, folder, config, where):
    """Write the files of a format into a folder. where: what its name will be. Returns what they
    are. Raises UserError."""
    dtype = getattr(torch, config.dtype, None)
    if config.format == 'hf':
        return f'{write_folder(checkpoint, model, folder, dtype, where)} of transformers'
    if config.format == 'peft':
        return f'an adapter for PEFT, on top of {write_adapter(checkpoint, folder, dtype)}'
    if config.format == 'gguf':
        kind = write_gguf(checkpoint, model, folder / 'model.gguf', config.dtype, where)
        return f'{kind} of llama.cpp'
    if config.format == 'onnx':
        write_onnx(model, folder / 'model.onnx')
        write_json(folder, tokenizer_files(checkpoint.get_tokenizer(), model.config.block_size,
                                           model.config.turns))
        return 'input_ids (B, T) -> logits (B, T, V)'
    write_own(checkpoint, model, folder / 'model.safetensors', dtype)
    return 'sample.py and train.py read model.safetensors with --init_from'


def write_own(checkpoint, model, path, dtype):
    """Our names in one file of safetensors, with what checkpoint.load_safetensors needs."""
    weights = {key: weight.to(dtype) for key, weight in model.state_dict().items()}
    if model.config.tie_weights:
        del weights['transformer.wte.weight']  # the format has no shared tensors
    saved = {key: getattr(checkpoint, key) for key in ckpt.IN_SAFETENSORS}
    saved |= {'tokenizer': checkpoint.get_tokenizer().to_dict()}
    write_safetensors(path, weights, {'plaingpt': json.dumps(saved)})


def main(config):
    require(config.export_dir or config.init_from == 'resume',
            f'export_dir is missing: name a new folder for {weights_of(config)}')
    dtypes = DTYPES.get(config.format, ('float32', 'bfloat16'))
    require(config.dtype in dtypes,
            f'dtype = {config.dtype}: {config.format} files have {" or ".join(dtypes)} here')
    folder = Path(config.export_dir or find(config.out_dir) / config.format)
    with os_errors(folder):
        require(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
                f'export_dir = {folder}: there is something already: move it or name another')
    checkpoint = ckpt.load_for(config)
    model = checkpoint.build_model(dropout=0.0)
    with new_folder(folder) as temporary:
        what = write(checkpoint, model, temporary, config, printable(folder))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f'{checkpoint.path} written to {printable(folder)} ({size / 1e6:,.1f} MB): {what}')
    if model.config.eot_token is not None and config.format in ('hf', 'gguf'):
        print('note: here attention does not cross <|endoftext|>, there it does: give it one '
              'document at a time')


if __name__ == '__main__':
    with user_errors():
        main(config)
