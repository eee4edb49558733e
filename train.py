"""Train a GPT: config -> data -> model -> optimizer -> loop, from top to bottom.

    python train.py config/quickstart.py                        # a small GPT learns Python in two minutes, on any machine
    python train.py --init_from=resume --out_dir=out-quickstart # go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_type, configure, differences, first_line, require, user_errors


@dataclass
class Config:
    # files
    out_dir: str = 'out'  # checkpoints, log.jsonl and config.py go here
    eval_interval: int = 2000  # steps between evaluations, each with a checkpoint
    log_interval: int = 1  # steps between lines of the log
    eval_iters: int = 200  # batches per evaluation, always the same ones; -1: the whole val split
    eval_only: bool = False  # evaluate once and stop
    always_save_checkpoint: bool = True  # False: after an evaluation save only if val loss improved
    keep_last: int = 2  # checkpoints kept, beside the best one
    init_from: str = 'scratch'  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to weights
    sample_every_eval: bool = False  # print a sample at each evaluation
    seed: int = 1337  # of weights, batches and dropout
    # wandb
    wandb_log: bool = False  # log to wandb too; without a network it logs offline
    wandb_project: str = 'plaingpt'  # the project on wandb
    wandb_run_name: str = 'gpt'  # the run's name there
    # data
    dataset: str = 'openwebtext'  # a folder in data/, or a path, with train.bin and val.bin
    gradient_accumulation_steps: int = 5 * 8  # micro-batches per step, of all processes together
    batch_size: int = 12  # sequences in a micro-batch
    block_size: int = 1024  # tokens in a sequence: the context
    # model: model.py says more of each
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width: numbers per token in the residual stream
    dropout: float = 0.0  # for pretraining 0 is good, for small data or finetuning try 0.1 or more
    bias: bool = False  # in Linear and LayerNorm; GPT-2 has them, without is a bit better and faster
    position: Literal['learned', 'sinusoidal', 'rope', 'none'] = 'learned'  # how a token knows where it stands
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # the normalisation before attention, MLP and head
    activation: Literal['gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu'] = 'gelu_tanh'  # of the MLP; gelu_tanh is GPT-2's
    n_kv_head: int | None = None  # key/value heads; None: as many as n_head
    qk_norm: bool = False  # normalise queries and keys
    tie_weights: bool = True  # the output head is the token embedding
    logit_softcap: float = 0.0  # bound logits by this, smoothly; 0: off
    zero_init: bool = False  # output projections start at 0
    attention: Literal['sdpa', 'math'] = 'sdpa'  # math: the same written out, slower
    # optimizer: AdamW
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 600000  # steps
    weight_decay: float = 1e-1  # on matrices and embeddings, not on gains and biases
    beta1: float = 0.9  # AdamW's average of gradients
    beta2: float = 0.95  # AdamW's average of squared gradients
    grad_clip: float = 1.0  # the longest gradient norm; 0: no clipping
    # learning-rate schedule
    decay_lr: bool = True  # False: learning_rate all the time, without warm-up
    schedule: Literal['cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'] = 'cosine'  # optimizer.py has the formulas
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # None: learning_rate / 10
    decay_fraction: float = 0.2  # wsd: the share of the steps after warm-up that decay
    # system
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # float16 scales its gradients
    compile: bool | Literal['auto'] = 'auto'  # auto: on CUDA
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torchrun, for gradients; auto: nccl on CUDA
    peak_flops: float | None = None  # of your device, for MFU; None: from a table


def check(config):
    """What can be seen to be wrong before anything is loaded. Raises UserError."""
    for key in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval', 'keep_last'):
        require(getattr(config, key) >= 1, f'{key} = {getattr(config, key)}: give at least 1')
    for key in ('max_iters', 'warmup_iters', 'weight_decay', 'grad_clip', 'seed'):
        require(getattr(config, key) >= 0, f'{key} = {getattr(config, key)}: give 0 or more')
    for key in ('beta1', 'beta2'):
        require(0 <= getattr(config, key) < 1, f'{key} = {getattr(config, key)}: give at least 0 and less than 1')
    require(config.eval_iters >= 1 or config.eval_iters == -1, f'eval_iters = {config.eval_iters}: give at least 1, or -1')
    for key in ('lr_decay_iters', 'peak_flops'):
        value = getattr(config, key)
        require(value is None or value > 0, f'{key} = {value}: give more than 0, or None')
    low = config.min_lr
    if low is not None and config.decay_lr and config.init_from != 'resume':  # then learning_rate is not known yet
        require(0 <= low <= config.learning_rate, f'min_lr = {low}: give at least 0 and at most learning_rate')
    require(config.learning_rate > 0, f'learning_rate = {config.learning_rate}: give more than 0')
    require(0 < config.decay_fraction <= 1, f'decay_fraction = {config.decay_fraction}: give a share above 0, at most 1')
    require(config.out_dir and config.init_from, 'out_dir or init_from is empty: name a folder')


if __name__ == '__main__':  # before the slow imports: --help and a mistyped key are answered at once
    with user_errors():
        config, given = configure(Config)
        check(config)

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint as ckpt
from data import bins
from device import autocast, compile_or_not, peak_flops, pick_device, pick_dtype
from model import GPT, GPTConfig
from optimizer import adamw, learning_rate_at

SMALL_DATASETS = ('python_stdlib', 'shakespeare_char', 'shakespeare')  # prepared here if they are missing


def main(config, given):
    # processes and device ------------------------------------------------------------------------------------------------
    ddp = 'RANK' in os.environ  # started by torchrun
    rank, world_size = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if ddp else (0, 1)
    main_process = rank == 0  # it prints and writes
    say = make_say(main_process)
    if ddp:  # gloo beside nccl: what is on the CPU, such as the wish to stop, is exchanged without the GPU
        dist.init_process_group({'auto': None, 'gloo': 'gloo', 'nccl': 'cpu:gloo,cuda:nccl'}[config.backend])
    resume = config.init_from == 'resume'
    checkpoint = None
    if config.init_from != 'scratch':
        with main_process_first(rank):  # it may download
            checkpoint = ckpt.load(config.out_dir if resume else config.init_from)
    if resume:
        take_saved_config(config, given, checkpoint)
        check(config)
    name = config.device
    if ddp and (name == 'auto' and torch.cuda.is_available() or name.startswith('cuda')):
        name = f'cuda:{os.environ["LOCAL_RANK"]}'  # one GPU for each process
    device = pick_device(name)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    accumulation = config.gradient_accumulation_steps // world_size  # of this process
    require(accumulation * world_size == config.gradient_accumulation_steps,
            f'gradient_accumulation_steps = {config.gradient_accumulation_steps} is not divisible by the {world_size} '
            f'processes: try {f"{accumulation * world_size} or " * (accumulation > 0)}{(accumulation + 1) * world_size}')

    # data, model, optimizer ----------------------------------------------------------------------------------------------
    model_config = choose_model_config(config, given, checkpoint, resume)
    dtype = pick_dtype(config.dtype, device, model_config['n_embd'])
    with main_process_first(rank):
        folder = find_or_prepare(config.dataset)
    data = bins.open_dataset(folder, model_config['block_size'])
    torch.manual_seed(config.seed)
    if checkpoint is None:
        raw_model = GPT(GPTConfig(**model_config | {'vocab_size': data.tokenizer.vocab_size}))
    else:
        check_tokenizers(checkpoint, data.tokenizer, folder)
        raw_model = checkpoint.build_model(dropout=config.dropout, attention=config.attention)
        raw_model.crop_block_size(model_config['block_size'])
    for key in model_config:
        setattr(config, key, getattr(raw_model.config, key))  # what the run really has is what is saved and printed
    raw_model.to(device)
    optimizer = adamw(raw_model, config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # otherwise it does nothing
    step, samples_seen, best_val_loss = 0, 0, math.inf
    if resume:
        step, samples_seen = checkpoint.step, checkpoint.samples_seen
        best_val_loss = math.inf if checkpoint.best_val_loss is None else checkpoint.best_val_loss
        load_optimizer(optimizer, scaler, checkpoint)
    start_step, checkpoint = step, None  # free its memory
    samples_per_step = config.batch_size * config.gradient_accumulation_steps

    # files ---------------------------------------------------------------------------------------------------------------
    log = None
    if main_process and not config.eval_only:
        lock = ckpt.lock(config.out_dir)  # noqa: F841, held until the process ends
        if not resume:
            ckpt.set_aside(config.out_dir, say)
        ckpt.write_config(config.out_dir, asdict(config))
        ckpt.cut_log(config.out_dir, start_step)
    if main_process and (resume or not config.eval_only):  # a mere evaluation of other weights is no part of a run
        log = Log(config, say)
    say('\n'.join(differences(config)))
    say(f'{raw_model.get_num_params():,} parameters, vocabulary {raw_model.config.vocab_size:,}; {device}, {str(dtype)[6:]}, '
        f'{world_size} process{"es" * (world_size > 1)}; {samples_per_step * config.block_size:,} tokens a step')
    if config.decay_lr and config.warmup_iters >= config.max_iters > 0 and not config.eval_only:
        say(f'note: warmup_iters = {config.warmup_iters} is not over within max_iters = {config.max_iters}: the learning rate '
            f'stays below learning_rate; try --warmup_iters={config.max_iters // 10}')
    if resume and step >= config.max_iters and not config.eval_only:
        say(f'note: the run has done {step} steps, max_iters = {config.max_iters} is reached: give a larger --max_iters to go on')

    def loss_of(model, x, y):
        """Mean loss of a batch x, y (B, T) of token ids."""
        with autocast(device, dtype):
            return model(*to_device(x, y, device))[1]

    def first_step(model):
        scaler.scale(loss_of(model, *data.train.batch(0, config.batch_size, config.seed))).backward()
        raw_model.zero_grad(set_to_none=True)

    model = raw_model
    if ddp and not config.eval_only:  # before compiling, so that gradients are exchanged while backward still runs
        model = ddp_model = DistributedDataParallel(raw_model, device_ids=[device.index] if device.type == 'cuda' else None)
    if not config.eval_only:
        model = compile_or_not(model, config.compile, device, first_step, say)

    def save(val_loss=None):
        if main_process:
            path = ckpt.save(config.out_dir, ckpt.Checkpoint(
                asdict(raw_model.config), raw_model.state_dict(), step, samples_seen, val_loss, best_val_loss, asdict(config),
                optimizer.state_dict(), scaler.state_dict(), data.tokenizer.to_dict()), config.keep_last)
            say(f'saved {path}')

    stop = StopSignal(config.eval_only)
    peak = config.peak_flops or peak_flops(device, dtype)
    bar = tqdm(total=config.max_iters, initial=step, desc='train', unit='step', dynamic_ncols=True,
               disable=None if main_process and not config.eval_only else True)  # None: on a terminal only
    logged_at, logged_step = time.perf_counter(), step

    # the loop ------------------------------------------------------------------------------------------------------------
    while True:
        lr = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group['lr'] = lr

        done = step >= config.max_iters or config.eval_only
        if step % config.eval_interval == 0 or done:
            model.eval()
            val_loss = run_evaluation(lambda x, y: loss_of(model, x, y), raw_model, data, config, step, log, say)
            model.train()
            check_finite(val_loss, step, config.out_dir)
            improved = val_loss < best_val_loss
            best_val_loss = min(best_val_loss, val_loss)
            is_saved = config.eval_only or resume and step == start_step
            if not is_saved and (done or step > 0 and (improved or config.always_save_checkpoint)):
                save(val_loss)
            logged_at, logged_step = time.perf_counter(), step  # the time of the evaluation is not the training's
        if done:
            break

        step_loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            # micro-batches are laid out along the samples process after process: the same ones for any number of them
            number = rank * accumulation + micro_step
            x, y = data.train.batch(samples_seen + number * config.batch_size, config.batch_size, config.seed)
            if config.dropout > 0:  # masks follow from (seed, step, micro-batch), whatever was drawn before
                torch.manual_seed(bins.seed_of(config.seed, step * config.gradient_accumulation_steps + number))
            if ddp:  # gradients are summed over the processes once a step, in the last backward
                ddp_model.require_backward_grad_sync = micro_step == accumulation - 1
            loss = loss_of(model, x, y) / accumulation
            scaler.scale(loss).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        samples_seen += samples_per_step

        if step % config.log_interval == 0:
            if ddp:
                dist.all_reduce(step_loss)
            step_loss = step_loss.item() / world_size  # waits for the device
            check_finite(step_loss, step, config.out_dir)
            now = time.perf_counter()
            speed = (step + 1 - logged_step) * samples_per_step * config.block_size / (now - logged_at)
            logged_at, logged_step = now, step + 1
            if main_process:
                norm = grad_norm.item()  # infinite where float16 overflowed and the scaler left the step out: no number in JSON
                log.write({'step': step, 'loss': step_loss, 'lr': lr, 'grad_norm': norm if math.isfinite(norm) else None,
                           'tokens_per_second': round(speed, 1), 'samples_seen': samples_seen})
                mfu = f'{raw_model.flops_per_token() * speed / (peak * world_size):.1%}' if peak else 'n/a'
                text = f'loss {step_loss:.4f}, {speed:,.0f} tokens/s, mfu {mfu}'
                bar.set_postfix_str(text)
                if bar.disable:
                    say(f'step {step}: {text}, lr {lr:.2e}')
        step += 1
        bar.update()
        if stop.requested():
            break

    bar.close()
    if stop.name:
        save()
        say(f'stopped by {stop.name} after {step} steps; go on with: '
            f'python train.py --init_from=resume --out_dir={config.out_dir}')
    elif not config.eval_only:
        say(f'done; now: python sample.py --out_dir={config.out_dir}')
    if log:
        log.close()
    sys.exit(128 + stop.number if stop.number else 0)


# Before the first step ----------------------------------------------------------------------------------------------------

def make_say(main_process):
    """print for the main process, above the progress bar. A reader that has gone (train.py | head) does not stop training."""
    sys.stdout.reconfigure(line_buffering=True)

    def say(text):
        try:
            tqdm.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return say if main_process else lambda text: None


@contextlib.contextmanager
def main_process_first(rank):
    """What may download or prepare something is done by one process, then by the others, who find it done."""
    failed = torch.zeros(1)
    if dist.is_initialized() and rank > 0:
        dist.all_reduce(failed)  # waits for the main process
        if failed.item():
            sys.exit(2)  # it says why
    failed.fill_(rank == 0)
    try:
        yield
        failed.zero_()
    finally:
        if dist.is_initialized() and rank == 0:
            dist.all_reduce(failed)


def take_saved_config(config, given, checkpoint):
    """Resuming: keys that the command line does not give are as they were."""
    own = given - {'init_from'} | {'out_dir', 'eval_only'}
    for field in fields(config):
        if field.name in checkpoint.config and field.name not in own:
            setattr(config, field.name, check_type(field.name, checkpoint.config[field.name], field.type))


def choose_model_config(config, given, checkpoint, resume):
    """The fields of GPTConfig: the config's, or the checkpoint's. Raises UserError where a key given differs from it."""
    keys = [field.name for field in fields(GPTConfig) if field.name != 'vocab_size']
    chosen = {key: getattr(config, key) for key in keys}
    if checkpoint is None:
        try:
            GPTConfig(**chosen)
        except ValueError as error:
            raise UserError(str(error)) from None
        return chosen
    saved = {field.name: field.default for field in fields(GPTConfig)} | checkpoint.model_config
    for key in given & set(keys) - {'dropout', 'attention'}:
        shorter = key == 'block_size' and not resume and chosen[key] < saved[key]  # a context can be cut
        require(shorter or chosen[key] == saved[key], f'{key} = {chosen[key]} but {checkpoint.path} has {key} = {saved[key]}: '
                                                      f'leave {key} out, or train from scratch')
    block_size = min(chosen['block_size'], saved['block_size']) if 'block_size' in given else saved['block_size']
    return {key: saved[key] for key in keys} | {'block_size': block_size}


def find_or_prepare(dataset):
    """The folder of the data set's bins; a small one that is missing is prepared. Raises UserError with the command to type."""
    folder = bins.find_dataset(dataset)
    if (folder / 'train.bin').exists() or (folder / 'val.bin').exists():
        return folder
    root = Path(__file__).parent
    script = root / 'data' / dataset / 'prepare.py'
    known = ', '.join(sorted(path.parent.name for path in root.glob('data/*/prepare.py')))
    require(script.exists(), f'dataset = {dataset!r}: there is no {folder / "train.bin"} and no {dataset} among {known}; for '
                             f'your own text: python data/text/prepare.py --input=PATH --dataset={dataset}')
    command = f'python data/{dataset}/prepare.py' + (' --input=PATH' if dataset == 'text' else '')
    require(dataset in SMALL_DATASETS, f'dataset = {dataset!r}: there is no {folder / "train.bin"}; make it with: {command}'
                                       f' (or start small: python train.py config/quickstart.py)')
    print(f'{folder / "train.bin"} is missing: running {command}', flush=True)
    code = subprocess.run([sys.executable, script]).returncode
    if code:
        sys.exit(code)
    return bins.find_dataset(dataset)


def check_tokenizers(checkpoint, tokenizer, folder):
    """Weights are worth nothing with other tokens than their own. Raises UserError."""
    vocab_size = checkpoint.model_config['vocab_size']
    same = tokenizer.vocab_size == vocab_size or (tokenizer.vocab_size, vocab_size) == (50257, 50304)  # nanoGPT rounds up
    if checkpoint.tokenizer is not None:
        same = checkpoint.tokenizer == tokenizer.to_dict()
    require(same, f'{folder} was made with another tokenizer ({tokenizer.kind}, {tokenizer.vocab_size} tokens) than '
                  f'{checkpoint.path} ({vocab_size} tokens): prepare the data set with the tokenizer of the weights')


def load_optimizer(optimizer, scaler, checkpoint):
    """Restore the state; weight decay and betas stay the config's. Raises UserError if it does not fit."""
    require(checkpoint.optimizer is not None, f'{checkpoint.path} has no optimizer state: use --init_from={checkpoint.path}')
    try:
        for saved, group in zip(checkpoint.optimizer['param_groups'], optimizer.param_groups):
            saved.update({k: v for k, v in group.items() if k != 'params'})
        optimizer.load_state_dict(checkpoint.optimizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{checkpoint.path}: its optimizer state does not fit: {error}') from None
    if checkpoint.scaler:
        scaler.load_state_dict(checkpoint.scaler)


# Inside the loop ----------------------------------------------------------------------------------------------------------

def to_device(x, y, device):
    x, y = torch.from_numpy(x).contiguous(), torch.from_numpy(y).contiguous()
    if device.type == 'cuda':  # pinned memory lets the copy run beside the computation
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


@torch.no_grad()
def evaluate(loss_of, split, n_windows, batch_size, token_bytes):
    """(loss in nats per token, bits per byte) over windows of a split that are the same at every evaluation; -1: all.

    Bits per byte = total nats / (ln 2 * bytes of the targets' text) compares models with different tokenizers.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    index = split.evaluation_windows(n_windows)[rank::world_size]
    losses, n_tokens, n_bytes = [], 0, 0
    for at in range(0, len(index), batch_size):
        x, y = split.windows(index[at:at + batch_size])
        targets = y[y >= 0]
        missing = ((0, batch_size - len(x)), (0, 0))  # the last batch is filled up: a compiled model sees one shape
        loss = loss_of(np.pad(x, missing), np.pad(y, missing, constant_values=-1))
        losses.append(loss * len(targets))  # stays on the device: nothing waits
        n_tokens += len(targets)
        n_bytes += int(token_bytes[targets].sum())
    nats = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, (nats, n_tokens, n_bytes))
        nats, n_tokens, n_bytes = map(sum, zip(*shares))
    return nats / n_tokens, nats / math.log(2) / n_bytes


def run_evaluation(loss_of, raw_model, data, config, step, log, say):
    """Evaluate both splits, print and log the result, and a sample if asked for; returns the val loss."""
    start = time.perf_counter()
    n_windows = config.eval_iters * config.batch_size if config.eval_iters > 0 else data.val.n_windows
    val_loss, bits = evaluate(loss_of, data.val, n_windows, config.batch_size, data.token_bytes)
    train_loss, _ = evaluate(loss_of, data.train, n_windows, config.batch_size, data.token_bytes)
    seconds = time.perf_counter() - start
    say(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 700)):.2f}, '
        f'{bits:.4f} bits per byte ({seconds:.1f} s)')
    if log:
        log.write({'step': step, 'train_loss': train_loss, 'val_loss': val_loss, 'val_bits_per_byte': bits,
                   'seconds': round(seconds, 3)})
        if config.sample_every_eval:
            prompt = [data.tokenizer.eot] if data.tokenizer.eot is not None else data.val.tokens[:1].tolist()
            tokens = raw_model.generate([prompt], 100, temperature=0.8, seed=config.seed, slide=max(1, config.block_size // 8),
                                        vocab_size=data.tokenizer.vocab_size)[0]
            say('\n'.join('  | ' + line for line in data.tokenizer.decode(tokens[1:]).splitlines()))
    return val_loss


class Log:
    """out_dir/log.jsonl, one JSON object a line, and wandb if asked for: a wandb that fails never stops training."""

    def __init__(self, config, say):
        self.say, self.wandb = say, None
        self.file = open(Path(config.out_dir) / 'log.jsonl', 'a', encoding='utf-8', buffering=1)
        if not config.wandb_log:
            return
        try:
            import wandb
            mode = os.environ.get('WANDB_MODE')
            if mode is None and not wandb.login(prompt=False, verify=False):
                say('wandb: not logged in, so it logs offline; wandb sync uploads it later')
                mode = 'offline'
            self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config),
                                    dir=config.out_dir, mode=mode, settings=wandb.Settings(init_timeout=30))
        except Exception as error:
            say(f'wandb does not work, going on without it: {type(error).__name__}: {first_line(error)}')

    def write(self, line):
        self.file.write(json.dumps(line) + '\n')
        if self.wandb:
            try:
                self.wandb.log(line, step=line['step'])
            except Exception as error:
                self.say(f'wandb does not work any more, going on without it: {type(error).__name__}: {first_line(error)}')
                self.wandb = None

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def check_finite(loss, step, out_dir):
    require(math.isfinite(loss), f'step {step}: the loss is {loss}: lower --learning_rate or set --grad_clip; what was saved in '
                                 f'{out_dir} before is kept')


class StopSignal:
    """Ctrl-C, SIGTERM and a closed terminal ask for a stop after the step that is running; a second one stops at once."""

    def __init__(self, eval_only):
        self.number, self.name = 0, ''
        if not eval_only:  # an evaluation has nothing to save: it stops at once
            for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
                number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup ignores it
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, b'\nstopping after this step; the same signal again stops at once, without saving\n')

    def requested(self):
        """Whether any process was asked to stop: all of them stop after the same step."""
        number = self.number
        if dist.is_initialized():
            flag = torch.tensor(number)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            number = flag.item()
        self.name = signal.Signals(number).name if number else ''
        return bool(number)


if __name__ == '__main__':
    with user_errors():
        try:
            main(config, given)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
