"""What a run prints about itself before it starts, and its last line."""
import os

import torch

from lib.budget import describe_budget
from lib.device import dtype_name
from lib.distributed import print0, world_size
from lib.errors import plural
from lib.files import command
from optimizer import n_trained


def describe(trainer, given):
    """Print the config files and flags, the size of model and step, and notes on the steps."""
    config, model, step = trainer.config, trainer.raw_model, trainer.step
    files = list(dict.fromkeys(path for path in given.values() if path))
    flags = [f'{key} = {getattr(config, key)!r}' for key, path in given.items()
             if path is None and key != 'init_from']
    base = ', '.join(files) or 'the defaults'
    if trainer.run.resuming:
        base = 'the keys of the run'
    print0(f'{base} with {", ".join(flags) or "no other keys"}; all keys are in '
           f'{os.path.join(config.out_dir, "config.py")}')
    tables = model.transformer.ngram.tables.weight.numel() if model.config.ngram > 1 else 0
    n_params = f'{model.get_num_params() - tables:,} parameters'
    n_params += f' and {tables:,} in n-gram tables' * (tables > 0)
    n_params += f', LoRA trains {n_trained(model):,}' * (not model.lm_head.weight.requires_grad)
    processes = '1 process' if world_size() == 1 else f'{world_size()} processes'
    tokens = trainer.samples_per_step * trainer.data.train.block_size
    print0(f'{n_params}, vocabulary {model.config.vocab_size:,}; {trainer.device}, '
           f'{dtype_name(trainer.dtype)}, {processes}; {tokens:,} tokens per step')
    if config.eval_only:
        return
    budget = describe_budget(config)
    reached = trainer.schedule_step() >= config.max_iters
    if not reached and not budget.startswith('max_iters'):
        print0(f'{budget}: {plural(config.max_iters, "step")}' if config.max_minutes is None else
               f'{budget}: the learning rate follows the time')
    if trainer.device.type == 'cuda' and not torch.are_deterministic_algorithms_enabled():
        print0('note: sums on CUDA may differ in their last bits from run to run; '
               '--deterministic repeats a run bit by bit, and costs speed')
    if config.decay_lr and config.warmup_iters >= config.max_iters > 0:
        print0(f'note: warmup_iters = {config.warmup_iters} does not end within max_iters = '
               f'{config.max_iters}: the learning rate stays below learning_rate; try '
               f'--warmup_iters={config.max_iters // 10}')
    low = 0 < (config.lr_decay_iters or 0) <= config.warmup_iters
    if low and config.decay_lr and config.schedule in ('cosine', 'linear', 'wsd'):
        print0(f'note: lr_decay_iters = {config.lr_decay_iters} is not more than warmup_iters = '
               f'{config.warmup_iters}: after warmup the learning rate drops to min_lr in one step')
    if trainer.run.resuming and reached:
        print0(f'note: the run is at step {step}, {budget} is reached: give more to go on')


def farewell(trainer):
    """The last line: losses, and what to do next."""
    config, best = trainer.config, trainer.best_saved_loss
    flags, text = {'out_dir': config.out_dir}, f'done: val loss {trainer.val_loss:.4f}'
    if trainer.out_of_patience():
        print0(f'stopped after {plural(trainer.step, "step")}: no lower val loss since step '
               f'{trainer.best_step} (patience = {config.patience})')
    if best < trainer.val_loss:
        text += f', best {best:.4f}'
        flags['checkpoint'] = 'best'
    interactive = ' --interactive' if trainer.data.pairs else ''
    return f'{text}; now: {command("sample.py", **flags)}{interactive}'
