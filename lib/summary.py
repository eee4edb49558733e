"""What a run prints about itself before it starts, and its last lines."""
import math
import re
import signal
from pathlib import Path

import torch

from lib.budget import describe_budget
from lib.device import dtype_name
from lib.distributed import print0, world_size
from lib.errors import plural
from lib.files import command
from lib.run import read_log
from lib.tokenizer import END_OF_TEXT
from optimizer import n_trained

# keys that other keys make idle: why, and whether they do
IGNORED = {
    'embedding_learning_rate': ('tied weights take learning_rate',
                                lambda c: c.tie_weights and c.ngram == 1),
    'muon_learning_rate': ('AdamW takes learning_rate', lambda c: c.optimizer == 'adamw'),
    'ngram_rows': ('ngram = 1 has no tables', lambda c: c.ngram == 1),
    'rope_theta': ('it is for position = rope', lambda c: c.position != 'rope'),
    'min_lr': ('the learning rate does not decay to it',
               lambda c: not c.decay_lr or c.schedule in ('constant', 'inverse_sqrt')),
    'decay_fraction': ('it is for schedule = wsd', lambda c: c.schedule != 'wsd')}


def describe(trainer, given):
    """Print the config files and flags, the size of model and step, and notes on the steps."""
    config, model, step = trainer.config, trainer.raw_model, trainer.step
    files = list(dict.fromkeys(path for path in given.values() if path))
    flags = [f'{key} = {getattr(config, key)!r}' for key, path in given.items()
             if path is None and key != 'init_from']
    own = ['the keys of the run'] if trainer.run.resuming else []
    base = ', '.join(own + files) or 'the defaults'
    print0(f'{base} with {", ".join(flags)}' if flags else base)
    tables = model.transformer.ngram.tables.weight.numel() if model.config.ngram > 1 else 0
    n_params = f'{model.get_num_params() - tables:,} parameters'
    n_params += f' and {tables:,} in n-gram tables' * (tables > 0)
    n_params += f', LoRA trains {n_trained(model):,}' * (not model.lm_head.weight.requires_grad)
    processes = '1 process' if world_size() == 1 else f'{world_size()} processes'
    tokens = trainer.samples_per_step * trainer.data.train.block_size
    print0(f'{n_params}, vocabulary {model.config.vocab_size:,}')
    print0(f'{trainer.device}, {dtype_name(trainer.dtype)}, {processes}; {tokens:,} tokens per '
           f'step')
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
    for key, (reason, ignored) in IGNORED.items():
        if key in given and given[key] is None and ignored(config):
            print0(f'note: {key} changes nothing: {reason}')
    if trainer.run.resuming and reached:
        print0(f'note: the run is at step {step}, {budget} is reached: give more to go on')


def farewell(trainer):
    """Print the last lines: the best val loss, where everything is, what to do next."""
    config, best = trainer.config, trainer.best_step
    if config.eval_only:
        print0(loss_line(trainer.log.evaluation))
        return
    after = f'after {plural(trainer.step, "step")}'
    if trainer.stop:
        print0(f'stopped by {signal.Signals(trainer.stop).name} {after}')
    elif trainer.out_of_patience():
        print0(f'stopped {after}: no lower val loss since step {best} (patience = '
               f'{config.patience})')
    flags = {'out_dir': config.out_dir}
    if trainer.best_val_loss < math.inf:
        lines = [line for line in read_log(config.out_dir)
                 if line['step'] == best and 'val_bits_per_byte' in line]
        line = {'val_loss': trainer.best_val_loss, **dict(*lines[-1:])}
        print0(f'{"" if trainer.stop else "done: "}best {loss_line(line)} (step {best})')
    if trainer.best_saved_loss < (trainer.val_loss or 0):
        print0(f'last val loss {trainer.val_loss:.4f}')
        flags['checkpoint'] = 'best'
    names = [path.name for path in sorted(Path(config.out_dir).glob('ckpt_[0-9]*.pt'))[-1:]]
    print0(f'saved in {config.out_dir}: {", ".join([*names, "log.jsonl", "config.py"])}')
    if trainer.stop:
        resume = command('train.py', init_from='resume', out_dir=config.out_dir)
        print0(f'resume:  {resume}', wrap=False)
    interactive = ' --interactive' if trainer.data.pairs else ''
    explain = command('explain.py', **flags, start=first_words(trainer.data))
    print0(f'sample:  {command("sample.py", **flags)}{interactive}\nexplain: {explain}\n'
           f'compare: {command("tools/runs.py", Path(config.out_dir).parent)}', wrap=False)


def loss_line(line):
    """The val loss of a log line in all units."""
    text = f'val loss {line["val_loss"]:.4f}, perplexity {math.exp(min(line["val_loss"], 700)):.2f}'
    bits = line.get('val_bits_per_byte')
    return f'{text}, {bits:.4f} bits per byte' if bits else text


def first_words(data):
    """Some words, at most 24 characters, from the beginning of the validation split."""
    ids = data.val.documents(0)[0][0] if data.pairs else data.val.read([0], 32)[0].tolist()
    text = data.tokenizer.decode(ids).replace(END_OF_TEXT, '\n')
    return max(re.findall(r'\w+(?: \w+){0,2}', text), key=len, default=text[:1])[:24]
