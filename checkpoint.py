"""Checkpoints: written so that a whole one is always there, read so that nothing in them can run code.

A run's folder holds ckpt_{step:08d}.pt with a manifest, ckpt_{step:08d}.json, that is written last and carries the sha256:
without its manifest a file does not count. nanoGPT's ckpt.pt and GPT-2's weights in Hugging Face's layout are read too.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from configurator import UserError, first_line, require
from data import bins, tokenizer
from data.download import download
from files import HashingFile, lock, replace, sha256_of, write_synced, write_text
from model import GPT, GPTConfig

FORMAT = 1
GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


@dataclass
class Checkpoint:
    """What a checkpoint holds, wherever it comes from."""
    model_config: dict  # the fields of GPTConfig
    model: dict  # name -> tensor
    step: int = 0  # optimizer steps done
    samples_seen: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    config: dict = field(default_factory=dict)  # train.py's keys
    optimizer: dict | None = None
    scaler: dict | None = None
    tokenizer: dict | None = None  # Tokenizer.to_dict()
    environment: dict = field(default_factory=dict)  # torch, hardware, data, ...: what the last bit depends on
    path: str = ''

    def __post_init__(self):
        """Complete model_config and check what a file may have wrong. Raises UserError."""
        known = {f.name for f in fields(GPTConfig)}
        try:
            self.model_config = asdict(GPTConfig(**{k: v for k, v in self.model_config.items() if k in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f'{self.path}: not a model that can be: {error}') from None
        kinds = {'step': int, 'samples_seen': int, 'val_loss': float | None, 'best_val_loss': float | None, 'config': dict,
                 'optimizer': dict | None, 'scaler': dict | None, 'tokenizer': dict | None, 'environment': dict}
        for name, kind in kinds.items():
            value = getattr(self, name)
            fits = isinstance(value, kind) and not (kind is int and not 0 <= value < 2**63)
            if not fits:  # the value is put into words only now: of a large state that takes long
                raise UserError(f'{self.path}: {name} = {str(value)[:40]} is not what a checkpoint has there')

    def build_model(self, **override):
        """The GPT with these weights; override: fields of GPTConfig that may differ, such as dropout."""
        try:
            config = GPTConfig(**self.model_config | override)
            with torch.device('meta'):  # no time is spent on weights that are replaced
                model = GPT(config)
            model.load_state_dict(self.model, assign=True)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f'{self.path}: the weights do not fit the model: {" ".join(str(error).split())[:200]}') from None
        if config.tie_weights:
            model.transformer.wte.weight = model.lm_head.weight
        return model.requires_grad_()

    def get_tokenizer(self):
        """The tokenizer inside; for nanoGPT's files that of its data folder, for GPT-2 its own."""
        if self.tokenizer is not None:
            return tokenizer.Tokenizer.from_dict(self.tokenizer)
        if os.path.isdir(self.path):
            found = tokenizer.from_huggingface(self.path)
        else:
            found = bins.open_tokenizer(bins.find_dataset(self.config.get('dataset', '')))
        found = found or tokenizer.gpt2()
        require(found.vocab_size <= self.model_config['vocab_size'],
                f'{self.path} has {self.model_config["vocab_size"]} tokens but no tokenizer, and its data set is not here')
        return found


# A run's folder -------------------------------------------------------------------------------------------------------------

def claim(out_dir, say):
    """Make the folder, keep other runs out of it until the file returned is closed, and remove what a killed one left half
    written. Raises UserError.

    Whatever is written or deleted here has a .tmp beside it until it is whole or gone: nothing else is touched.
    """
    held, out_dir, removed = lock(out_dir, f'out_dir = {str(out_dir)!r}'), Path(out_dir), []
    for mark in sorted(path for name in ('ckpt_[0-9]*', 'log.jsonl', 'config.py') for path in out_dir.glob(name + '.tmp')):
        data = mark.with_name(mark.name.replace('.json.tmp', '.pt'))
        if data != mark and data.exists() and not mark.with_suffix('').exists():  # not yet, or no longer, committed
            data.unlink()
            removed.append(data.name)
        mark.unlink()
        removed.append(mark.name)
    if removed:
        say(f'{out_dir}: removed what a killed process left half written: {", ".join(removed)}')
    return held


def set_aside(out_dir, say):
    """Move the files of an earlier run into out_dir/earlier-N: nothing is overwritten."""
    out_dir = Path(out_dir)
    files = [path for pattern in ('ckpt_*', 'log.jsonl', 'config.py') for path in out_dir.glob(pattern)]
    if files:
        number = next(n for n in itertools.count(1) if not (out_dir / f'earlier-{n}').exists())
        folder = out_dir / f'earlier-{number}'
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
        say(f'{out_dir} holds an earlier run, which is kept in {folder}')


def cut_log(out_dir, step):
    """Drop the lines of log.jsonl from `step` on: the run continues from a checkpoint before them."""
    path = Path(out_dir) / 'log.jsonl'
    if path.exists():
        write_text(path, ''.join(text + '\n' for text, line in log_lines(out_dir) if line['step'] < step))


def log_lines(out_dir):
    """The whole lines of a run's log.jsonl, if there is one: [(text, {'step': number, ...})]. The last may be cut off."""
    path, lines = Path(out_dir) / 'log.jsonl', []
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if isinstance(line['step'], (int, float)):
                lines.append((text, line))
    return lines


def write_config(out_dir, values):
    """out_dir/config.py: every key of the run, as a config file that runs it again."""
    write_text(Path(out_dir) / 'config.py', ''.join(f'{key} = {value!r}\n' for key, value in values.items()))


def write_status(out_dir, status):
    """out_dir/status, for a scheduler: running, done (max_iters is reached), stopped (by a signal: start it again) or failed."""
    with contextlib.suppress(OSError):  # what went wrong may have been the disk
        write_text(Path(out_dir) / 'status', status + '\n')


def job():
    """The name that torchrun gives a job (--rdzv_id; --standalone makes one up), the same when it starts processes again."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    return None if name == 'none' else name


def is_of_job(out_dir):
    """Whether the last checkpoint of a run's folder was written by the job to which this process belongs."""
    found = manifests(out_dir)
    return bool(found) and job() is not None and found[0].get('job') == job()


# Writing ------------------------------------------------------------------------------------------------------------------

def save(out_dir, checkpoint, keep_last=2):
    """Write a Checkpoint into out_dir, then delete earlier ones but the last keep_last and the best by val loss.

    Returns its path. The order is: data and manifest to temporary names, synced; then the data gets its name, then the
    manifest, which commits it. A checkpoint of the same step that is whole stays as it is: only its val loss is new. Raises
    UserError.
    """
    out_dir = Path(out_dir)
    path = out_dir / f'ckpt_{checkpoint.step:08d}.pt'
    manifest_path = path.with_suffix('.json')
    temporary, manifest_temporary = path.with_suffix('.pt.tmp'), path.with_suffix('.json.tmp')
    file = None
    try:
        known, _ = read_manifest(manifest_path)
        if path.exists() and not manifest_path.exists():
            path.rename(path.with_name(path.name + '.unchecked'))  # not ours to overwrite
        if known and not damage(path, known):
            if checkpoint.val_loss is not None:
                write_text(manifest_path, json.dumps(known | {'val_loss': checkpoint.val_loss}, indent=1))
        else:
            state = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name != 'path'}
            with HashingFile(temporary) as file:
                torch.save(state | {'format': FORMAT}, file)
            manifest = {'format': FORMAT, 'file': path.name, 'step': checkpoint.step, 'samples_seen': checkpoint.samples_seen,
                        'val_loss': checkpoint.val_loss, 'bytes': file.bytes, 'sha256': file.sha256.hexdigest(),
                        **checkpoint.environment, 'config': checkpoint.config}
            write_synced(manifest_temporary, json.dumps(manifest, indent=1))
            replace(temporary, path)
            replace(manifest_temporary, manifest_path)
        found = [manifest for manifest in manifests(out_dir) if manifest['step'] <= checkpoint.step]
        for old in reversed(found[keep_last:]):  # the oldest first: one that a killed process left is not left for good
            if old is not min(found, key=val_loss_of):
                delete(out_dir / old['file'])
    except (OSError, RuntimeError) as error:
        for leftover in (temporary, manifest_temporary):
            leftover.unlink(missing_ok=True)
        error = file and file.error or error
        last = manifests(out_dir)
        advice = f'go on from step {last[0]["step"]} with --init_from=resume' if last else 'start again'
        raise UserError(f'{path}: cannot write the checkpoint: {getattr(error, "strerror", None) or error}; free some room or '
                        f'choose another --out_dir, then {advice}') from None
    return path


def delete(path):
    """Delete a checkpoint: it is no longer committed before its data goes."""
    mark = path.with_suffix('.json.tmp')
    os.replace(path.with_suffix('.json'), mark)
    path.unlink(missing_ok=True)
    mark.unlink()


class Saver:
    """Writes a run's checkpoints: in a background thread, from a copy in the CPU's memory, while training goes on.

    One at a time: `save` waits for the one before. With background=False it writes at once and needs no copy.
    """

    def __init__(self, out_dir, keep_last, background, say):
        self.out_dir, self.keep_last, self.say = out_dir, keep_last, say
        self.thread = ThreadPoolExecutor(1) if background else None
        self.pending = None

    def save(self, checkpoint):
        """Raises UserError if this one, or in the background the one before, cannot be written."""
        self.wait()
        if self.thread is None:
            self.write(checkpoint)
        else:
            copied = cpu_copy({'model': checkpoint.model, 'optimizer': checkpoint.optimizer})
            self.pending = self.thread.submit(self.write, dataclasses.replace(checkpoint, **copied))

    def write(self, checkpoint):
        self.say(f'saved {save(self.out_dir, checkpoint, self.keep_last)}')

    def check(self):
        """Raise what went wrong in the background."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        """Until what was given to `save` is on the disk. Raises UserError if it is not."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def cpu_copy(value, copies=None):
    """A copy of nested dicts and lists with their tensors on the CPU; tensors that share memory (tied weights) still do."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if key not in copies:
            copies[key] = value.detach().to('cpu', copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {k: cpu_copy(v, copies) for k, v in value.items()}
    return [cpu_copy(v, copies) for v in value] if isinstance(value, list) else value


# Reading ------------------------------------------------------------------------------------------------------------------

def val_loss_of(manifest):
    loss = manifest['val_loss']
    return loss if loss is not None and math.isfinite(loss) else math.inf


def manifests(out_dir, say=lambda text: None):
    """The manifests of a run's folder, newest first. One that cannot be trusted is named and left out.

    Only files that are named as `save` names them count: a copy that somebody made is not ours to list or to delete.
    """
    found = []
    for path in Path(out_dir).glob('ckpt_*.json'):
        name = re.fullmatch(r'ckpt_(\d{8,})\.json', path.name)
        manifest, wrong = read_manifest(path) if name else (None, None)
        if manifest and manifest['step'] != int(name[1]):
            manifest, wrong = None, f'step = {manifest["step"]} is not that of its name'
        if manifest:
            found.append(manifest)
        elif wrong:
            say(f'{path} is damaged and passed over: {wrong}')
    return sorted(found, key=lambda m: m['step'], reverse=True)


def read_manifest(path):
    """(the manifest with its file's name, None), or (None, what is wrong with it); (None, None) if there is none."""
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        for key, kind in {'step': int, 'bytes': int, 'sha256': str, 'val_loss': float | int | None, 'config': dict}.items():
            require(isinstance(manifest[key], kind), f'{key} = {str(manifest[key])[:40]}')
        return manifest | {'file': path.with_suffix('.pt').name}, None  # whatever it says: nothing else is read or deleted
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f'it is no manifest ({first_line(error)[:80] if isinstance(error, UserError) else type(error).__name__})'


def load(where, prefer_best=False, mmap=False, average_last=1):
    """A Checkpoint from a run's folder, a .pt file, a GPT-2 folder in Hugging Face's layout, or 'gpt2', 'gpt2-medium', ...

    Of a run's folder: the newest that is whole; with prefer_best the best by val loss, if the run kept only improvements
    (always_save_checkpoint=False). mmap: tensors are read from disk when they are used. average_last: with the mean weights of so
    many of its last checkpoints (Vaswani et al. 2017, section 6.1). Raises UserError.
    """
    where = Path(where)
    require(average_last == 1 or where.is_dir(), f'average_last = {average_last}: only for the folder of a run, not for {where}')
    if str(where) in GPT2_SIZES and not where.exists():
        where = download_gpt2(str(where))
    if where.is_file():
        manifest = where.with_suffix('.json')
        if manifest.exists():
            known, wrong = read_manifest(manifest)
            wrong = damage(where, known) if known else wrong
            require(not wrong, f'{where} is damaged: {wrong}; name another')
        return load_file(where, mmap)
    require(where.is_dir(), f'{where}: there is no checkpoint; train one first, or name a run\'s folder, a .pt file or one of '
                            f'{", ".join(GPT2_SIZES)}')
    if (where / 'config.json').exists():
        return load_huggingface(where)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):  # the run is alive, and has just deleted what was to be read
            return load_run(where, prefer_best, mmap, average_last)
    raise UserError(f'{where}: its checkpoints disappear while they are read; try again')


def load_run(folder, prefer_best, mmap, average_last):
    """The newest whole checkpoint of a run's folder, the best, or the mean of some; what is passed over is said."""
    found = manifests(folder, warn)
    loose = [path for path in sorted(folder.glob('ckpt_[0-9]*.pt')) if not path.with_suffix('.json').exists()]
    if not found:
        if (folder / 'ckpt.pt').exists():
            return load_file(folder / 'ckpt.pt', mmap)
        raise UserError(f'{folder}: there is no whole checkpoint in this folder; ' + (
            f'{loose[-1].name} has no manifest to check it by: trust it with --init_from={loose[-1]}' if loose else
            'train one first'))
    for path in loose:
        warn(f'{path} has no manifest to check it by and is passed over; to trust it: --init_from={path}')
    if prefer_best and average_last == 1 and not found[0]['config'].get('always_save_checkpoint', True):
        found.sort(key=val_loss_of)
    whole = []
    for manifest in found:
        path = folder / manifest['file']
        wrong = damage(path, manifest)
        if not wrong:
            whole.append(load_file(path, mmap))
            whole[-1].val_loss = manifest['val_loss']  # it may have been measured later
            if len(whole) == average_last:
                return mean_of(whole)
        else:
            warn(f'{path} is damaged and passed over: {wrong}')
    require(whole, f'{folder}: every checkpoint in it is damaged; restore one from a copy, or train anew in another --out_dir')
    raise UserError(f'average_last = {average_last}: {folder} has {len(whole)} whole checkpoint{"s" * (len(whole) > 1)}; a run '
                    f'keeps as many as its --keep_last')


def mean_of(checkpoints):
    """The first, with the mean of their weights."""
    first, *others = checkpoints
    if others:
        first.model = {name: sum((other.model[name] for other in others), weight) / len(checkpoints)
                       for name, weight in first.model.items()}
        first.val_loss, first.path = None, f'{first.path} and {len(others)} before it'
    return first


def warn(text):
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(text, file=sys.stderr)


def load_model(path_or_out_dir, device='cpu'):
    """(model in evaluation mode on device, tokenizer) from whatever `load` reads."""
    checkpoint = load(path_or_out_dir, prefer_best=True, mmap=True)
    return checkpoint.build_model(dropout=0.0).to(device).eval(), checkpoint.get_tokenizer()


def damage(path, manifest):
    """What is wrong with a checkpoint's file, by its manifest; None if it is whole."""
    if not path.exists():
        if not path.with_suffix('.json').exists():
            raise FileNotFoundError(path)  # both are gone: nothing is wrong
        return 'the file is missing'
    if path.stat().st_size != manifest['bytes']:
        return f'it has {path.stat().st_size:,} bytes instead of {manifest["bytes"]:,}'
    return None if sha256_of(path) == manifest['sha256'] else 'its sha256 is not the one in its manifest'


def load_file(path, mmap=False):
    """A .pt file of plainGPT or nanoGPT. Only tensors and plain values are read; anything that would run code is refused."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r'GLOBAL (\S+)', str(error))
        raise UserError(f'{path}: refused: ' + (f'it would run {named[1]}' if named else 'it is no checkpoint of plainGPT or '
                        'nanoGPT')) from None
    except Exception as error:  # a truncated or foreign file raises whatever its bytes lead to
        if not Path(path).exists():  # deleted while it was read
            raise FileNotFoundError(path) from None
        raise UserError(f'{path}: not a whole checkpoint of plainGPT or nanoGPT ({type(error).__name__}); name another') from None
    require(isinstance(state, dict) and isinstance(state.get('model'), dict) and
            all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state['model'].items()),
            f'{path}: not a checkpoint of plainGPT or nanoGPT; name another')
    weights = {re.sub(r'^(_orig_mod\.|module\.)+', '', k): v for k, v in state['model'].items()}
    try:
        if 'model_args' in state:  # nanoGPT
            return from_nanogpt(state, weights, path)
        require(state['format'] == FORMAT, f'{path}: format {state["format"]} is not {FORMAT}, the one this version reads')
        saved = {f.name: state[f.name] for f in fields(Checkpoint) if f.name != 'path'}
        return Checkpoint(**saved | {'model': weights, 'path': str(path)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(str(error) if isinstance(error, UserError) else f'{path}: not a whole checkpoint: {error!r}') from None


def from_nanogpt(state, weights, path):
    """nanoGPT's ckpt.pt. Its GELU is the exact one; its first versions saved the causal mask as attn.bias."""
    # its device and what hangs on it may be another machine's; to run its config again is to start from its weights
    elsewhere = ('device', 'dtype', 'compile', 'backend')
    config = {k: v for k, v in state.get('config', {}).items() if k not in elsewhere} | {'init_from': str(path)}
    model_config = {'bias': True} | state['model_args'] | {'activation': 'gelu'}
    weights = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    step = int(state.get('iter_num', 0))
    samples = step * config.get('batch_size', 12) * config.get('gradient_accumulation_steps', 1)
    best = float(state.get('best_val_loss', 1e9))
    best = best if best < 1e8 else None  # 1e9 stands for none
    return Checkpoint(model_config, weights, step, samples, best, best, config, state.get('optimizer'), path=str(path))


# GPT-2's weights ------------------------------------------------------------------------------------------------------------

def download_gpt2(name):
    """Fetch GPT-2 from Hugging Face's hub (HF_ENDPOINT: a mirror) into ~/.cache/plaingpt; returns the folder."""
    endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    for file in ('config.json', 'vocab.json', 'model.safetensors'):
        path = cache / 'plaingpt' / name / file
        download(f'{endpoint}/openai-community/{name}/resolve/main/{file}', path, sha256='linked',
                 advice=f'put config.json, vocab.json and model.safetensors into {path.parent} by hand')
    return path.parent


def load_huggingface(folder):
    """GPT-2 in Hugging Face's layout: config.json with model.safetensors or pytorch_model.bin. Raises UserError."""
    folder = Path(folder)
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        require(isinstance(config, dict), 'not the config of a model')
        require(config.get('model_type') == 'gpt2', f'model_type = {config.get("model_type")!r} is not gpt2')
        activations = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu'}
        activation = config.get('activation_function', 'gelu_new')
        require(activation in activations, f'activation_function = {activation!r} is not one of {", ".join(activations)}')
        for key, plain in {'n_inner': (None, 4 * config['n_embd']), 'layer_norm_epsilon': (1e-5,),
                           'add_cross_attention': (False,), 'scale_attn_weights': (True,),
                           'scale_attn_by_inverse_layer_idx': (False,)}.items():
            require(config.get(key, plain[0]) in plain, f'{key} = {config.get(key)} is not GPT-2\'s')
        model_config = {'block_size': config['n_positions'], 'vocab_size': config['vocab_size'], 'n_layer': config['n_layer'],
                        'n_head': config['n_head'], 'n_embd': config['n_embd'], 'activation': activations[activation],
                        'tie_weights': config.get('tie_word_embeddings', True)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder / "config.json"}: {error}') from None
    if (folder / 'model.safetensors').exists():
        tensors = read_safetensors(folder / 'model.safetensors')
    else:
        path = folder / 'pytorch_model.bin'
        require(path.exists(), f'{folder}: there is neither model.safetensors nor pytorch_model.bin')
        tensors = load_file_of_tensors(path)
    weights = {}
    for name, tensor in tensors.items():
        name = name.removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias')) or name == 'lm_head.weight' and model_config['tie_weights']:
            continue
        if name.endswith(('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')):
            tensor = tensor.t().contiguous()  # GPT-2's Conv1D keeps (in, out), Linear (out, in)
        weights[name if name == 'lm_head.weight' else f'transformer.{name}'] = tensor.float()
    if model_config['tie_weights'] and 'transformer.wte.weight' in weights:
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    return Checkpoint(model_config, weights, path=str(folder))


def load_file_of_tensors(path):
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True)
        require(all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()), 'not only tensors')
        return tensors
    except Exception as error:
        raise UserError(f'{path}: refused, it does not hold plain tensors only: {first_line(error)[:120]}') from None


def read_safetensors(path):
    """{name: tensor}. The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes
    (huggingface/safetensors, README, "Format")."""
    dtypes = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'F64': torch.float64, 'BOOL': torch.bool,
              'U8': torch.uint8, 'I8': torch.int8, 'I16': torch.int16, 'I32': torch.int32, 'I64': torch.int64}
    try:
        size = path.stat().st_size
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            require(0 < length <= size - 8, 'its header is cut off')
            header = json.loads(file.read(length))
            require(isinstance(header, dict), 'its header is not a table')
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
        tensors = {}
        for name, entry in header.items():
            if name != '__metadata__':
                start, end = entry['data_offsets']
                require(0 <= start <= end <= len(data), f'{name} lies beyond the end of the file')
                tensors[name] = data[start:end].clone().view(dtypes[entry['dtype']]).view(entry['shape'])
        return tensors
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f'{path}: not a whole safetensors file: {error}') from None
