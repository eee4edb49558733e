"""Checkpoints: a complete one is always on disk, and loading never runs code.

A run's folder holds ckpt_{step:08d}.pt with a manifest, ckpt_{step:08d}.json, which is written last
and carries the sha256: a file without its manifest is ignored. nanoGPT's ckpt.pt and models in
Hugging Face's layouts are read too.
"""
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from configurator import TrainConfig, check_type, key_types, read_model_config
from lib import bins, files, formats, huggingface, tokenizer
from lib.distributed import job, print0
from lib.errors import UserError, plural, reason_of, require, restate
from model import GPT, GPTConfig

FORMAT = 1


@dataclass
class Checkpoint:
    """The content of a checkpoint, whatever its source."""
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
    environment: dict = field(default_factory=dict)  # torch, data, ...: for bitwise resume
    lora: dict | None = None  # name -> tensor before the updates were merged into the model
    seconds: float = 0.0  # of training, without evaluations
    best_step: int | None = None  # of best_val_loss
    path: str = ''

    def __post_init__(self):
        """Fill in model_config's defaults and check types. Raises UserError."""
        files.check_kinds(vars(self), typing.get_type_hints(Checkpoint), self.path)
        with restate(UserError, self.path, 'not a valid model'):
            self.model_config = read_model_config(self.model_config)
            for key, type_ in key_types(TrainConfig).items():
                if key in self.config:
                    self.config[key] = check_type(key, self.config[key], type_)
        self.model_config['tie_weights'] &= formats.tied(self.model)

    def describe(self):
        """Where it comes from, its step and val loss, in a line."""
        val_loss = '' if self.val_loss is None else f', val loss {self.val_loss:.4f}'
        return f'{self.path}: step {self.step}{val_loss}'

    def build_model(self, **override):
        """The GPT with these weights, in fp32 whatever the file has. override: fields of GPTConfig.
        Raises UserError."""
        config = GPTConfig(**self.model_config | override)
        layers = {name.split('.')[2] for name in self.model if name.startswith('transformer.h.')}
        require(len(layers) == config.n_layer,
                f'{self.path}: the weights do not fit the model: they have '
                f'{plural(len(layers), "layer")}, n_layer = {config.n_layer}')
        with torch.device('meta'):  # no memory for weights that are replaced
            model = GPT(config)
        for name, expected in model.state_dict().items():
            shape = tuple(self.model.get(name, expected).shape)
            require(shape == expected.shape,
                    f'{self.path}: the weights do not fit the model: {name} has shape {shape}, by '
                    f'its config {tuple(expected.shape)}')
        try:
            model.load_state_dict(self.model, assign=True)
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'{self.path}: the weights do not fit the model: {reason}') from None
        if config.tie_weights:
            model.transformer.wte.weight = model.lm_head.weight
        model = model.requires_grad_().float()
        for name, p in model.named_parameters():
            require(torch.stack(p.detach().aminmax()).isfinite().all(),
                    f'{self.path}: the weights are not finite ({name}): name another checkpoint')
        return model

    def get_tokenizer(self):
        """The stored tokenizer; for nanoGPT the data folder's, for GPT-2 its own. Raises UserError
        if it has more tokens than the model."""
        vocab_size = self.model_config['vocab_size']
        if self.tokenizer is not None:
            with restate(UserError, self.path, remedy='name another checkpoint'):
                found = tokenizer.Tokenizer.from_dict(self.tokenizer)
        elif os.path.isdir(self.path):
            found = tokenizer.from_huggingface(self.path)
            require(found or vocab_size in (50257, 50304),
                    f'{self.path}: there is no tokenizer.json in it, only weights: add it')
        else:
            name = self.config.get('dataset', '')
            folder = Path(self.path).absolute().parents[1] / 'data' / name  # of nanoGPT's clone
            if not (folder / 'meta.pkl').exists():
                folder = bins.find_dataset(name)
            found = bins.open_tokenizer(folder)
            require(found or vocab_size >= 50257,
                    f'{self.path}: the model has {vocab_size} tokens, and their tokenizer is '
                    f'missing: copy the meta.pkl of its data set to data/{name}')
        found = found or tokenizer.gpt2()
        require(found.vocab_size <= vocab_size,
                f'{self.path}: the model has {vocab_size} tokens, its tokenizer '
                f'{found.vocab_size}: put its own there')
        return found


SAVED = [f.name for f in fields(Checkpoint) if f.name != 'path']  # the keys of a .pt file
# and what tools/export.py writes into the header of a .safetensors file
IN_SAFETENSORS = ('model_config', 'step', 'samples_seen', 'val_loss', 'config')
ADDED_LATER = {'lora', 'seconds', 'best_step'}  # keys that files of earlier versions lack


def save(out_dir, checkpoint, keep_last=2, when_read=lambda: None):
    """Write a Checkpoint into out_dir, then delete all but the last keep_last and the best one.
    when_read() is called once its tensors are no longer needed.

    Data and manifest go to temporary names and are synced; then the data gets its name, then the
    manifest, which commits it. A whole checkpoint of the same step stays: only its val loss is
    updated. Returns its path. Raises UserError.
    """
    out_dir = Path(out_dir)
    path = out_dir / f'ckpt_{checkpoint.step:08d}.pt'
    manifest_path = path.with_suffix('.json')
    temporary, manifest_temporary = map(files.temporary, (path, manifest_path))
    try:
        existing, _ = read_manifest(manifest_path)
        if path.exists() and not manifest_path.exists():
            path.replace(path.with_name(path.name + '.unchecked'))  # not ours to overwrite
        if existing and not damage(path, existing):
            if checkpoint.val_loss is not None:
                existing |= {'val_loss': checkpoint.val_loss}
                files.write_text(manifest_path, json.dumps(existing, indent=1))
        else:
            state = {name: getattr(checkpoint, name) for name in SAVED}
            with files.create_synced(temporary) as file:
                torch.save(state | {'format': FORMAT}, file)
                when_read()
            manifest = {'format': FORMAT, 'file': path.name, 'step': checkpoint.step,
                        'samples_seen': checkpoint.samples_seen, 'val_loss': checkpoint.val_loss,
                        'bytes': temporary.stat().st_size, 'sha256': files.sha256_of(temporary),
                        **checkpoint.environment, 'config': checkpoint.config}
            files.write_synced(manifest_temporary, json.dumps(manifest, indent=1))
            files.replace(temporary, path)
            files.replace(manifest_temporary, manifest_path)
        delete_old(out_dir, checkpoint.step, keep_last)
    except (OSError, RuntimeError) as error:
        for leftover in (temporary, manifest_temporary):
            leftover.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch.save's own, after a failed write, or a bug
            if not isinstance(error.__context__, OSError):
                raise
            error = error.__context__
        last = manifests(out_dir)
        advice = 'start again'
        if last:
            advice = f'go on from step {last[0]["step"]} with --init_from=resume'
        raise UserError(f'{path}: cannot write the checkpoint: {error.strerror or error}; free '
                        f'some room or choose another --out_dir, then {advice}') from None
    return path


def delete_old(out_dir, step, keep_last):
    """Delete the checkpoints up to step, except for the last keep_last and the best by val loss."""
    found = [manifest for manifest in manifests(out_dir) if manifest['step'] <= step]
    best = by_val_loss(found)[:1]
    for old in reversed(found[keep_last:]):  # oldest first: a killed process leaves no gap
        if old not in best:
            path = out_dir / old['file']
            mark = path.with_suffix('.json.tmp')
            files.patiently(os.replace, path.with_suffix('.json'), mark)  # the manifest first
            try:
                path.unlink(missing_ok=True)
            except PermissionError:  # Windows: a program has mapped it; the next save tries again
                os.replace(mark, path.with_suffix('.json'))
                continue
            mark.unlink()


class Saver:
    """Writes a run's checkpoints in a background thread. One at a time: `save` waits for the
    previous one. copy: from a copy in CPU memory; otherwise `save` returns once the file has all
    tensors, before it is hashed and synced. background=False: all at once."""

    def __init__(self, out_dir, keep_last=2, background=True, copy=True):
        self.out_dir, self.keep_last, self.copy = out_dir, keep_last, copy
        self.thread = ThreadPoolExecutor(1) if background else None
        self.pending = None

    def save(self, checkpoint):
        """Raises UserError if this one, or the previous one in the background, fails."""
        self.wait()
        if self.thread is None:
            self.write(checkpoint)
            return
        if self.copy:
            copied = cpu_copy({'model': checkpoint.model, 'optimizer': checkpoint.optimizer,
                               'lora': checkpoint.lora})
            checkpoint = dataclasses.replace(checkpoint, **copied)
        read = threading.Event()
        self.pending = self.thread.submit(self.write, checkpoint, read.set)
        while not (self.copy or self.pending.done() or read.wait(0.1)):
            pass

    def write(self, checkpoint, when_read=lambda: None):
        print0(f'saved {save(self.out_dir, checkpoint, self.keep_last, when_read)}')

    def check(self):
        """Raise the error of a background write that has ended."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        """Until the last checkpoint is on the disk. Raises UserError if it cannot be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def cpu_copy(value, copies=None):
    """Copy nested dicts and lists, tensors to the CPU; tensors that share memory still do."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if key not in copies:
            copies[key] = value.detach().to('cpu', copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {k: cpu_copy(v, copies) for k, v in value.items()}
    return [cpu_copy(v, copies) for v in value] if isinstance(value, list) else value


def by_val_loss(found):
    """Manifests, newest first, in the order of their val losses. Those on other data than the
    newest one's do not compare, and come last."""
    def key(manifest):
        loss = manifest['val_loss']
        other_data = manifest.get('data') != found[0].get('data')
        return other_data, math.inf if loss is None or not math.isfinite(loss) else loss

    return sorted(found, key=key)


def manifests(out_dir, report=lambda text: None):
    """The manifests of a run's folder, newest first. A damaged one is reported and left out. Only
    names that `save` produces count: copies are neither listed nor deleted."""
    found = []
    for path in Path(out_dir).glob('ckpt_*.json'):
        name = re.fullmatch(r'ckpt_(\d{8,})\.json', path.name)
        manifest, wrong = read_manifest(path) if name else (None, None)
        if manifest and manifest['step'] != int(name[1]):
            manifest, wrong = None, f'step = {manifest["step"]} does not match its name'
        if manifest:
            found.append(manifest)
        elif wrong:
            report(f'{path} is damaged and skipped: {wrong}')
    return sorted(found, key=lambda m: m['step'], reverse=True)


MANIFEST = {'step': int, 'bytes': int, 'sha256': str, 'val_loss': float | int | None,
            'config': dict}


def read_manifest(path):
    """(manifest, None), or (None, error), or (None, None) if there is none."""
    try:
        manifest = files.read_json(path)
        files.check_kinds(manifest, MANIFEST, path)
        # never trust a path in the manifest
        return manifest | {'file': path.with_suffix('.pt').name}, None
    except FileNotFoundError:
        return None, None
    except UserError as error:
        return None, f'not a manifest ({reason_of(error, path)[:80]})'


def written_by_this_job(out_dir):
    """Whether torchrun has restarted the job that wrote the last checkpoint of out_dir."""
    found = manifests(out_dir)
    return bool(found) and job() is not None and found[0].get('job') == job()


def load(where, which='last', mmap=False, average_last=1):
    """A Checkpoint from a run's folder, a .pt file, a folder in Hugging Face's layout or a name on
    its hub, such as gpt2 or owner/name.

    which: of a run's folder: 'last' (the newest whole one), 'best' (by val loss), a step, or
    'auto': the best if the run kept improvements only (always_save_checkpoint=False), else the
    last. mmap: read tensors from disk when they are used. average_last: with the mean weights
    of the last N checkpoints (Vaswani et al. 2017, 6.1). Raises UserError.
    """
    on_hub = huggingface.on_hub(where)
    where = Path(where) if on_hub else files.find(where)
    in_their_layout = on_hub or (where / 'config.json').exists()
    for name in ('ckpt.pt', 'model.safetensors'):  # nanoGPT's, or an export's
        if not in_their_layout and (where / name).exists() and not manifests(where):
            where = where / name
    is_run = where.is_dir() and not in_their_layout
    require(is_run or average_last == 1 and which in ('last', 'auto'),
            f'average_last = {average_last}, checkpoint = {which}: only for the folder of a run, '
            f'not for {where}: leave them out')
    if in_their_layout:
        config, weights, folder = huggingface.load(where)
        return Checkpoint(config, weights, path=str(folder))
    if where.suffix == '.safetensors' and where.is_file():
        return load_safetensors(where)
    require(not (where / 'adapter_config.json').exists() and where.suffix not in ('.gguf', '.onnx'),
            f'{where}: only whole models in safetensors or .pt files are read: name the run')
    require(where.suffix != '.json', f'{where} is a manifest: name the .pt file next to it')
    if where.is_file():
        manifest, wrong = read_manifest(where.with_suffix('.json'))
        wrong = damage(where, manifest) if manifest else wrong
        require(not wrong, f'{where} is damaged: {wrong}; name another')
        return load_file(where, mmap)
    require(where.is_dir(), f'{where}: there is no checkpoint; train one first, or name a run\'s '
                            f'folder, a .pt file, {", ".join(huggingface.HUB)} or owner/name')
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):  # a live run has just deleted it
            return load_run(where, which, mmap, average_last)
        time.sleep(0.1)
    return load_run(where, which, mmap, average_last)


def load_run(folder, which, mmap, average_last):
    """The checkpoint of a run's folder that `which` names, or a mean; reports what it skips."""
    found, paths = manifests(folder, warn), sorted(folder.glob('ckpt_[0-9]*.pt'))
    loose = [path for path in paths if not path.with_suffix('.json').exists()]
    if not found:
        remedy = 'train one first'
        if loose:
            remedy = (f'{loose[-1].name} has no manifest to verify it; to load it anyway: '
                      f'{init_from(loose[-1])}')
        elif paths:
            json_path = paths[-1].with_suffix('.json')
            remedy = (f'restore {json_path.name}, or delete it and load the weights unverified: '
                      f'{init_from(paths[-1])}')
        elif (folder / 'config.py').exists():
            remedy = ('the run ended before it saved one: start it again without '
                      '--init_from=resume, perhaps with a smaller --save_interval')
        raise UserError(f'{folder}: there is no whole checkpoint in this folder; {remedy}')
    for path in loose:
        warn(f'{path} has no manifest to verify it and is skipped; to load it: {init_from(path)}')
    improvements_only = not found[0]['config'].get('always_save_checkpoint', True)
    if which == 'best' or which == 'auto' and average_last == 1 and improvements_only:
        found = by_val_loss(found)
    elif isinstance(which, int):
        steps = ', '.join(str(manifest['step']) for manifest in reversed(found))
        found = [manifest for manifest in found if manifest['step'] == which]
        require(found, f'checkpoint = {which}: {folder} has those of the steps {steps}')
    whole = []
    for manifest in found:
        path = folder / manifest['file']
        wrong = damage(path, manifest)
        if wrong:
            warn(f'{path} is damaged and skipped: {wrong}')
            continue
        whole.append(load_file(path, mmap))
        whole[-1].val_loss = manifest['val_loss']  # perhaps measured after the save
        if len(whole) == average_last:
            return mean_of(whole)
    require(whole, f'{folder}: every checkpoint in it is damaged; restore one from a copy, or '
                   f'start over in another --out_dir')
    n = plural(len(whole), 'whole checkpoint')
    raise UserError(f'average_last = {average_last}: {folder} has {n}: --keep_last keeps more')


def init_from(path):
    return files.quote([f'--init_from={path}'])


def mean_of(checkpoints):
    """The newest, with the mean of all weights."""
    first, *others = checkpoints
    if others:
        for name, weight in first.model.items():
            weights = (other.model[name].float() for other in others)
            first.model[name] = sum(weights, weight.float()) / len(checkpoints)
        first.val_loss = first.lora = None
        first.path = f'{first.path} and {len(others)} before it'
    return first


def warn(text):
    with contextlib.suppress(OSError):  # stderr may be closed
        print(text, file=sys.stderr)


def load_for(config):
    """The Checkpoint to evaluate, by the keys init_from, out_dir, checkpoint and average_last."""
    return load(files.weights_of(config), config.checkpoint, mmap=True,
                average_last=config.average_last)


def load_model(path_or_out_dir, device='cpu'):
    """(model in evaluation mode on device, tokenizer) from whatever `load` reads."""
    checkpoint = load(path_or_out_dir, 'auto', mmap=True)
    return checkpoint.build_model(dropout=0.0).to(device).eval(), checkpoint.get_tokenizer()


def damage(path, manifest):
    """How a checkpoint's file differs from its manifest; None if it is intact."""
    if not path.exists():
        if not path.with_suffix('.json').exists():
            raise FileNotFoundError(path)  # both are gone: deleted, not damaged
        return 'the file is missing'
    try:
        files.check_lfs(path)
        size = path.stat().st_size
        if size != manifest['bytes']:
            return f'it has {plural(size, "byte")} instead of {manifest["bytes"]:,}'
        return None if files.sha256_of(path) == manifest['sha256'] else 'its sha256 does not match'
    except (PermissionError, UserError) as error:
        return reason_of(error, path)


def load_safetensors(path):
    """What tools/export.py --format=safetensors wrote. Raises UserError."""
    metadata = {}
    weights = formats.read_safetensors(path, metadata)
    formats.check_weights(weights, path)
    require('plaingpt' in metadata, f'{path}: it does not say of which model these weights are: '
                                    f'name its folder, with a config.json')
    with restate((ValueError, TypeError, AttributeError), path, 'not a whole checkpoint'):
        saved = files.parse_json(metadata['plaingpt'])
        saved = {key: saved[key] for key in (*IN_SAFETENSORS, 'tokenizer') if key in saved}
        if 'transformer.wte.weight' not in weights and 'lm_head.weight' in weights:
            weights['transformer.wte.weight'] = weights['lm_head.weight']
        return Checkpoint(model=weights, path=str(path), **saved)


def load_file(path, mmap=False):
    """A .pt file of plainGPT or nanoGPT. Raises UserError."""
    state = formats.load_torch(path, mmap)
    weights = state.get('model') if isinstance(state, dict) else None
    formats.check_weights(weights, path)
    prefixes = r'^(_orig_mod\.|module\.)+'  # of torch.compile and DDP
    state['model'] = {re.sub(prefixes, '', name): weight for name, weight in weights.items()}
    if 'model_args' in state:
        with restate((TypeError, ValueError, AttributeError, RuntimeError, OverflowError), path,
                     'not a whole checkpoint'):
            values = formats.convert_nanogpt(state, path)
        return Checkpoint(**values, path=str(path))
    formats.check_weights(state.get('lora') or {}, path)
    missing = {'format', *SAVED} - ADDED_LATER - state.keys()
    require(not missing, f'{path}: not a whole checkpoint: {", ".join(sorted(missing))} is missing')
    require(state['format'] == FORMAT,
            f'{path}: format {state["format"]} is not {FORMAT}, the one this version reads')
    return Checkpoint(**{name: state[name] for name in SAVED if name in state}, path=str(path))
