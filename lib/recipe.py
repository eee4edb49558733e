"""train.py's keys, completed and checked: the --depth dial, and rules that involve several keys."""
import math
import os
import sys
from pathlib import Path

from configurator import TrainConfig, check_fields, configure
from lib.budget import choose_budget, tokens_per_step
from lib.errors import UserError, require
from lib.files import command, find


def read_train_config(argv=None, cls=TrainConfig):
    """(config, given) of a command line of train.py, completed and checked. Raises UserError."""
    if argv is None and not sys.argv[1:]:
        check_default_data(cls.dataset)
    argv = list(sys.argv[1:] if argv is None else argv)
    if '--batch_size' in argv[:-1]:
        i = argv.index('--batch_size')
        argv[i:i + 2] = [f'--batch_size={argv[i + 1]}']
    words = [word for word in argv if word != '--batch_size=auto']  # auto grows what it is without
    config, given = configure(cls, words)
    last = [word for word in argv if word.startswith('--batch_size=')][-1:]
    config.auto_batch_size = last == ['--batch_size=auto'] or config.batch_size == 'auto'
    if config.batch_size == 'auto':  # in a config file
        config.batch_size = cls.batch_size
    choose_budget(config, given)
    turn_dial(config, given)
    check(config)
    require(config.average_last == 1 or config.eval_only and config.init_from == 'resume',
            f'average_last = {config.average_last}: only to evaluate a run, with '
            f'--init_from=resume --eval_only')
    return config, given


def check_default_data(name):
    """Raise a UserError that says what to type, unless the data set of the defaults is there."""
    if any(find(Path(folder, name, 'train.bin')).exists() for folder in ('data', '')):
        return
    lines = [f'dataset = {name!r} is not there yet; type one of these:',
             'A first GPT, from the Python source on this machine, in minutes on a CPU',
             '  ' + command('train.py', 'config/quickstart.py'),
             'Your own text, a file or a folder',
             '  ' + command('data/text/prepare.py', input='PATH', dataset='mine'),
             '  ' + command('train.py', 'config/quickstart.py', dataset='mine', out_dir='out-mine'),
             'Shakespeare, downloaded (1 MB)',
             '  ' + command('train.py', 'config/speedrun_shakespeare_char.py'),
             f'{name}, the data of the defaults',
             '  ' + command(f'data/{name}/prepare.py')]
    saved = max(Path().glob('out*/ckpt_*.json'), key=os.path.getmtime, default=None)
    if saved:
        lines += [f'Go on with the run in {saved.parent}',
                  '  ' + command('train.py', init_from='resume', out_dir=saved.parent)]
    raise UserError('\n'.join(lines))


def check(config):
    """Validate the config. Raises UserError."""
    check_fields(config)
    low, resuming = config.min_lr, config.init_from == 'resume'  # then the rate is in a file
    if low is not None and config.decay_lr and not resuming:
        require(low <= config.learning_rate, f'min_lr = {low}: give at most learning_rate')
    if config.lora_rank:
        require(config.init_from != 'scratch', f'lora_rank = {config.lora_rank}: only to finetune '
                                               f'trained weights: name them with --init_from')
        require(config.optimizer == 'adamw', f'lora_rank = {config.lora_rank}: its updates are '
                                             f'trained with --optimizer=adamw only')
    require(config.out_dir and config.init_from and config.dataset,
            'out_dir, init_from or dataset is empty: name a folder')


def turn_dial(config, given):
    """Set the keys that --depth implies, except for those given after it.

    n_embd      64 * depth: GPT-2's proportions, 12 blocks of 768 (as in nanochat)
    n_head      heads of 64; from depth 8 on of 128, where that divides n_embd: on 0.5 million
                tokens of English prose depth 8 reached 4.505 instead of 4.536 (2 seeds)
    rates       Muon's is the same for all widths, since its steps have the same length in every
                direction (Jordan 2024): of 0.01, 0.02 and 0.04 the second was best for depths 2
                and 4 (docs/speed.md). AdamW's scale as 1/sqrt(width) (as in nanochat); the one
                of embeddings is 4 times the other, as measured at a width of 192
    tokens      20 per parameter in the blocks (Hoffmann et al. 2022), or the budget given
    batch       2.6 * sqrt(tokens) tokens per step, rounded to a power of two: fitted
                through 2,048, the best at 0.6 million

    Tried at depths 2, 3 and 4 on English prose (1, 1.5 and 2 million tokens, 3 seeds), and left out
    with these changes of the val loss: heads of 96 or 128 (0.000, -0.012, +0.003). At depths 2 and
    3, partly one seed: decay over 30% of the steps (+0.010, +0.013), cautious weight decay (+0.021,
    +0.001), half the batch at 1/sqrt(2) of the rates (-0.002, +0.009), the mean of the last 2 to 8
    checkpoints (+0.001 to +0.007). At equal FLOPs 11 tokens per parameter in matrix products, at
    depth 2, reached 3.569; 1.6, at depth 3, reached 3.614.
    """
    if 'depth' not in given or config.depth is None or config.init_from == 'resume':
        return
    require(config.init_from == 'scratch',
            f'depth = {config.depth}: only for training from scratch, not from {config.init_from}')
    keys = list(given)
    after = keys[keys.index('depth') + 1:]

    def imply(**values):
        for key, value in values.items():
            if key not in after:
                setattr(config, key, value)

    imply(n_layer=config.depth, n_embd=64 * config.depth)
    head_size = 128 if config.depth >= 8 and config.n_embd % 128 == 0 else 64
    imply(n_head=max(1, config.n_embd // head_size), position='rope', norm='rmsnorm',
          activation='relu2', qk_norm=True, zero_init=True, tie_weights=False)
    rate = 0.005 * (192 / config.n_embd) ** 0.5
    imply(optimizer='muon', muon_learning_rate=0.02, muon_momentum=0.9, learning_rate=rate,
          embedding_learning_rate=4 * rate, beta1=0.8, beta2=0.95, weight_decay=0.0, grad_clip=0.0,
          warmup_iters=0, schedule='wsd', decay_fraction=0.5, min_lr=0.0, decay_lr=True,
          lr_decay_iters=None)
    n_params = 12 * config.n_layer * config.n_embd**2  # in the blocks
    tokens = 20 * n_params
    if config.target_tokens or config.target_flops:
        tokens = max(1, int(config.target_tokens or config.target_flops / (6 * n_params)))
    sequences = max(1, 2 ** round(math.log2(2.6 * tokens**0.5)) // config.block_size)
    imply(batch_size=min(sequences, 16))
    imply(gradient_accumulation_steps=max(1, sequences // config.batch_size))
    imply(max_iters=tokens // tokens_per_step(config))
    imply(eval_interval=max(1, config.max_iters // 10))
