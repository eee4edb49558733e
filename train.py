"""Train a GPT: config -> data -> model -> optimizer -> loop, from top to bottom.

    python train.py config/quickstart.py                        # a small GPT learns Python in two minutes, on any machine
    python train.py --init_from=resume --out_dir=out-quickstart # go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
import math
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_type, configure, differences, first_line, require, user_errors


@dataclass
class Config:
    # one dial
    depth: int | None = None  # blocks; sets model, rates, batch and steps by measured rules, but for keys given behind it
    # files
    out_dir: str = 'out'  # checkpoints, log.jsonl and config.py go here
    eval_interval: int = 2000  # steps between evaluations, each with a checkpoint
    log_interval: int = 1  # steps between lines of the log
    eval_iters: int = 200  # batches per evaluation, always the same ones; -1: the whole val split
    eval_only: bool = False  # evaluate once and stop
    average_last: int = 1  # with eval_only: evaluate the mean weights of so many of the run's last checkpoints (2017: 5)
    always_save_checkpoint: bool = True  # False: after an evaluation save only if val loss improved
    save_interval: int | None = None  # steps between checkpoints, beside those of the evaluations; None: only those
    keep_last: int = 2  # checkpoints kept, beside the best one
    async_save: bool = True  # checkpoints are written while training goes on, from a copy in the CPU's memory
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
    doc_mask: bool = False  # attention and n-grams do not cross <|endoftext|>, which stands between documents
    prefix_lm: bool = False  # of data/pairs: a source is read both ways, as by an encoder; its target sees all of it
    # model: model.py says more of each
    ngram: int = 1  # embeddings of the last 2, ..., ngram tokens beside that of the token; 1: none
    ngram_rows: int = 16384  # of the table for each of these lengths
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width: numbers per token in the residual stream
    label_smoothing: float = 0.0  # the share of a target that all tokens have in equal parts; evaluations are without
    dropout: float = 0.0  # for pretraining 0 is good, for small data or finetuning try 0.1 or more
    bias: bool = False  # in Linear and LayerNorm; GPT-2 has them, without is a bit better and faster
    position: Literal['learned', 'sinusoidal', 'rope', 'none'] = 'learned'  # how a token knows where it stands
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # the normalisation
    norm_position: Literal['pre', 'post'] = 'pre'  # before attention, MLP and head, or behind each sum (2017)
    activation: Literal['gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu'] = 'gelu_tanh'  # of the MLP; gelu_tanh is GPT-2's
    n_kv_head: int | None = None  # key/value heads; None: as many as n_head
    qk_norm: bool = False  # normalise queries and keys
    tie_weights: bool = True  # the output head is the token embedding
    logit_softcap: float = 0.0  # bound logits by this, smoothly; 0: off
    zero_init: bool = False  # output projections start at 0
    attention: Literal['sdpa', 'math'] = 'sdpa'  # math: the same written out, slower
    activation_checkpointing: bool = False  # less memory for more time: backward computes each block again
    # optimizer
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for the matrices inside the blocks, beside AdamW for all else
    learning_rate: float = 6e-4  # of AdamW, the highest
    muon_learning_rate: float = 0.02  # of Muon, the highest; the schedule is the same
    muon_momentum: float = 0.95  # of Muon
    embedding_learning_rate: float | None = None  # of n-gram tables and an untied token embedding; None: learning_rate
    max_iters: int = 600000  # steps
    weight_decay: float = 1e-1  # on matrices and embeddings, not on gains and biases
    beta1: float = 0.9  # AdamW's average of gradients
    beta2: float = 0.95  # AdamW's average of squared gradients
    adam_eps: float = 1e-8  # added to their root
    grad_clip: float = 1.0  # the longest gradient norm; 0: no clipping
    nonfinite: Literal['stop', 'skip'] = 'stop'  # a step whose loss or gradient is infinite or nan: end the run, or leave it out
    max_skips: int = 10  # steps left out in a row before the run ends all the same
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
    deterministic: bool = True  # the same bits every time; False: kernels that add in any order, faster on some GPUs
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torchrun, for gradients; auto: nccl on CUDA
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # of torchrun: copies of the model or shards; auto: copies if they fit
    deterministic_sum: bool = False  # sum gradients in one order for 1, 2, 4, ... processes: the same bits, without overlap
    peak_flops: float | None = None  # of your device, for MFU; None: from a table


def turn_dial(config, given):
    """Set what --depth implies, unless it was given behind it.

    n_embd      64 * depth: GPT-2's 12 blocks of 768, kept in proportion (as in nanochat); heads of 64
    rates       Muon's is the same for all widths, since its steps have the same length in all directions (Jordan 2024): of 0.01,
                0.02 and 0.04 the second was the best for depths 2 and 4 (README). AdamW's fall with the root of the width (as in
                nanochat); the one of embeddings is 4 times the other, as measured at a width of 192
    tokens      20 for each parameter in the blocks (Hoffmann et al. 2022)
    batch       2.6 * sqrt(tokens) tokens a step, to the nearest power of two: through the 2,048 that were best for 0.6 million
    """
    if 'depth' not in given or config.depth is None or config.init_from == 'resume':
        return
    require(config.init_from == 'scratch', f'depth = {config.depth}: only for training from scratch, not from {config.init_from}')
    keys = list(given)
    behind = keys[keys.index('depth') + 1:]

    def imply(**values):
        for key, value in values.items():
            if key not in behind:
                setattr(config, key, value)

    require(config.depth >= 1, f'depth = {config.depth}: give at least 1')
    imply(n_layer=config.depth, n_embd=64 * config.depth)
    for key in ('n_layer', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps'):
        require(getattr(config, key) >= 1, f'{key} = {getattr(config, key)}: give at least 1')
    imply(n_head=max(1, config.n_embd // 64), position='rope', norm='rmsnorm', activation='relu2', qk_norm=True, zero_init=True,
          tie_weights=False)
    rate = 0.005 * (192 / config.n_embd) ** 0.5
    imply(optimizer='muon', muon_learning_rate=0.02, muon_momentum=0.9, learning_rate=rate, embedding_learning_rate=4 * rate,
          beta1=0.8, beta2=0.95, weight_decay=0.0, grad_clip=0.0, warmup_iters=0, schedule='wsd', decay_fraction=0.5, min_lr=0.0,
          decay_lr=True, lr_decay_iters=None)
    tokens = 20 * 12 * config.n_layer * config.n_embd**2
    sequences = max(1, 2 ** round(math.log2(2.6 * tokens**0.5)) // config.block_size)
    imply(batch_size=min(sequences, 16))
    imply(gradient_accumulation_steps=max(1, sequences // config.batch_size))
    imply(max_iters=tokens // (config.gradient_accumulation_steps * config.batch_size * config.block_size))
    imply(eval_interval=max(1, config.max_iters // 10))


def read_command(argv=None):
    """(config, the keys given) of a command line: read, completed and checked. Raises UserError."""
    config, given = configure(Config, argv)
    turn_dial(config, given)
    check(config)
    require(config.average_last == 1 or config.eval_only and config.init_from == 'resume',
            f'average_last = {config.average_last}: only to evaluate a run, with --init_from=resume --eval_only')
    return config, given


def check(config):
    """What can be seen to be wrong before anything is loaded. Raises UserError."""
    for key in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval', 'keep_last',
                'max_skips', 'average_last'):
        require(getattr(config, key) >= 1, f'{key} = {getattr(config, key)}: give at least 1')
    for key in ('max_iters', 'warmup_iters', 'weight_decay', 'grad_clip', 'seed'):
        require(getattr(config, key) >= 0, f'{key} = {getattr(config, key)}: give 0 or more')
    for key in ('beta1', 'beta2', 'muon_momentum'):
        require(0 <= getattr(config, key) < 1, f'{key} = {getattr(config, key)}: give at least 0 and less than 1')
    require(config.eval_iters >= 1 or config.eval_iters == -1, f'eval_iters = {config.eval_iters}: give at least 1, or -1')
    for key in ('lr_decay_iters', 'peak_flops', 'save_interval', 'adam_eps'):
        value = getattr(config, key)
        require(value is None or value > 0, f'{key} = {value}: give more than 0, or None')
    low = config.min_lr
    if low is not None and config.decay_lr and config.init_from != 'resume':  # then learning_rate is not known yet
        require(0 <= low <= config.learning_rate, f'min_lr = {low}: give at least 0 and at most learning_rate')
    for key in ('learning_rate', 'muon_learning_rate', 'embedding_learning_rate'):
        require(getattr(config, key) is None or getattr(config, key) > 0, f'{key} = {getattr(config, key)}: give more than 0')
    require(0 < config.decay_fraction <= 1, f'decay_fraction = {config.decay_fraction}: give a share above 0, at most 1')
    require(config.out_dir and config.init_from, 'out_dir or init_from is empty: name a folder')


if __name__ == '__main__':  # before the slow imports: --help and a mistyped key are answered at once
    with user_errors():
        config, given = read_command()

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint as ckpt
import memory
import parallel
from data import bins
from data.tokenizer import END_OF_TEXT
from device import autocast, compile_or_not, describe, make_deterministic, peak_flops, pick_device, pick_dtype, total_memory
from model import GPT, GPTConfig
from optimizer import learning_rate_at, load_state, make_optimizer, state_bytes, step_if
from processes import (
    Signals,
    any_process,
    exchange,
    fail,
    gather,
    leave,
    main_process_first,
    make_say,
    mean_of_processes,
    start_group,
)

# of GPTConfig: may differ from those of the weights
FREE_KEYS = ('dropout', 'label_smoothing', 'attention', 'activation_checkpointing')
DATA_KEYS = ('vocab_size', 'document_token', 'turns', 'prefix_lm')  # of GPTConfig: follow from the data
SMALL_DATASETS = ('python_stdlib', 'shakespeare_char', 'shakespeare', 'scan')  # prepared here if they are missing


def main(config, given, at_exit):
    """Returns the exit code. at_exit: an ExitStack for what must be closed on every way out."""
    # processes and device ------------------------------------------------------------------------------------------------
    rank, world_size = start_group(config.backend)
    ddp = dist.is_initialized()  # started by torchrun
    main_process = rank == 0  # it prints
    writes = main_process and not config.eval_only  # checkpoints and the log
    say = make_say(main_process)
    if gather(ckpt.is_of_job(config.out_dir))[0]:
        say(f'{config.out_dir}: torchrun has started the processes again, the run goes on')
        config.init_from = 'resume'
    resume = config.init_from == 'resume'
    checkpoint = None
    if config.init_from != 'scratch':
        with main_process_first(rank):  # it may download
            if resume and writes and os.path.isdir(config.out_dir):
                at_exit.enter_context(ckpt.claim(config.out_dir, say))
            checkpoint = ckpt.load(config.out_dir if resume else config.init_from, mmap=ddp, average_last=config.average_last)
    if len(set(gather((checkpoint.step, checkpoint.samples_seen) if checkpoint else None))) > 1:
        fail(f'{config.out_dir} is not the same folder for all processes: name one that all machines see')
    if resume:
        take_saved_config(config, given, checkpoint)
        check(config)
    name = config.device
    if ddp and (name == 'auto' and torch.cuda.is_available() or name.startswith('cuda')):
        name = f'cuda:{os.environ["LOCAL_RANK"]}'  # one GPU for each process
    device = pick_device(name)
    make_deterministic(config.deterministic, device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    accumulation = micro_batches(config, world_size)  # of this process

    # data, model, optimizer ----------------------------------------------------------------------------------------------
    model_config = choose_model_config(config, given, checkpoint, resume)
    dtype = pick_dtype(config.dtype, device, model_config['n_embd'])
    with main_process_first(rank):
        folder = find_or_prepare(config.dataset)
    data = bins.open_dataset(folder, model_config['block_size'])
    T = data.train.block_size  # of sources and targets the length of a row, to which weights with a longer context are finetuned
    environment = {'torch': str(torch.__version__), 'threads': torch.get_num_threads(), 'world_size': world_size,
                   'device': describe(device), 'dtype': str(dtype)[6:], 'data': data.fingerprint(), 'job': ckpt.job()}
    from_data = choose_from_data(config, given, checkpoint, resume, data, folder)
    if checkpoint is None:
        with torch.device('meta'):  # without memory as yet
            raw_model = GPT(GPTConfig(**model_config, **from_data, vocab_size=data.tokenizer.vocab_size))
    else:
        check_tokenizers(checkpoint, data.tokenizer, folder)
        raw_model = checkpoint.build_model(**{key: getattr(config, key) for key in FREE_KEYS}, **from_data)
        raw_model.crop_block_size(model_config['block_size'])
    for key in model_config:
        setattr(config, key, getattr(raw_model.config, key))  # what the run really has is what is saved and printed
    how = parallel.choose(config.parallel, raw_model, total_memory(device)) if ddp and not config.eval_only else None
    if how == 'fsdp':
        if config.deterministic_sum:
            fail('deterministic_sum = True: only for copies of the model; give --parallel=ddp')
        if config.sample_every_eval:
            say('note: no process has the whole model, so sample_every_eval prints no samples; sample.py does')
        parallel.shard(raw_model, device, dtype)
    torch.manual_seed(config.seed)
    if checkpoint is None:
        parallel.draw(raw_model, device)
    raw_model.to(device)
    if config.deterministic_sum and world_size & (world_size - 1):
        fail(f'deterministic_sum = True: give 1, 2, 4, 8, ... processes, not {world_size}')
    optimizer = None if config.eval_only else make_optimizer(raw_model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # otherwise it does nothing
    step, samples_seen, best_val_loss, saved_step, evaluated = 0, 0, math.inf, None, False
    if resume:
        check_environment(checkpoint, environment, folder, config.eval_only or 'dataset' in given, say)
        step, samples_seen = checkpoint.step, checkpoint.samples_seen
        best_val_loss = math.inf if checkpoint.best_val_loss is None else checkpoint.best_val_loss
        saved_step, evaluated = step, checkpoint.val_loss is not None
        if optimizer:
            load_optimizer(optimizer, scaler, checkpoint)
    start_step, checkpoint = step, None  # free its memory
    samples_per_step = config.batch_size * config.gradient_accumulation_steps
    say('\n'.join(differences(config)))
    tables = raw_model.transformer.ngram.tables.weight.numel() if raw_model.config.ngram > 1 else 0
    say(f'{raw_model.get_num_params() - tables:,} parameters{f" and {tables:,} in n-gram tables" if tables else ""}, vocabulary '
        f'{raw_model.config.vocab_size:,}; {device}, {str(dtype)[6:]}, {world_size} process{"es" * (world_size > 1)}; '
        f'{samples_per_step * T:,} tokens a step')

    # the folder of the run -----------------------------------------------------------------------------------------------
    with main_process_first(rank):
        if writes and not resume:
            at_exit.enter_context(ckpt.claim(config.out_dir, say))
        if writes:
            check_disk(config, 4 * raw_model.get_num_params(False) + state_bytes(raw_model, config), resume)

    # the model on its way: DDP, compiled, in micro-batches that fit into the memory ----------------------------------------
    def loss_of(model, x, y):
        """Mean loss of a batch x, y (B, T) of token ids on the device."""
        with autocast(device, dtype):
            return model(x, y, return_logits=False)[1]

    def try_out(model, sync=False):
        """Micro-batches as in a step."""
        if exchanging:
            parallel.sync_in_backward(exchanging, sync or how == 'fsdp')  # which would keep what it has not exchanged
        for _ in range(min(micro_batches(config, world_size), 2)):  # the second finds gradients
            x, y = to_device(*data.train.batch(0, config.batch_size, config.seed), device)
            scaler.scale(loss_of(model, x, y)).backward()
        optimizer.zero_grad(set_to_none=True)

    model, exchanging, tree = raw_model, None, None  # exchanging: what exchanges gradients in backward
    if not config.eval_only:
        say(memory.estimate(memory.parts(raw_model, config, dtype != torch.float32, how, world_size), device))
        if how and not config.deterministic_sum:  # before compiling, so that gradients are exchanged while backward still runs
            model = exchanging = raw_model if how == 'fsdp' else parallel.copies(raw_model, device)
        model = compile_and_fit(model, try_out, config, device, say)
        accumulation = micro_batches(config, world_size)  # more, if they had to be cut
        if config.deterministic_sum:
            tree = parallel.TreeSum(raw_model, accumulation)
        # DDP sorts its gradients after the first exchange: now, so that a resumed run sums them in the same order
        if how == 'ddp' and exchanging:
            try_out(model, sync=True)

    # files and signals ---------------------------------------------------------------------------------------------------
    log = None
    if writes:
        if not resume:
            ckpt.set_aside(config.out_dir, say)
        ckpt.write_config(config.out_dir, asdict(config))
        ckpt.write_status(config.out_dir, 'running')
        at_exit.push(lambda kind, *rest: ckpt.write_status(config.out_dir, 'failed') if kind else None)
        ckpt.cut_log(config.out_dir, start_step)
        saver = ckpt.Saver(config.out_dir, config.keep_last, config.async_save, say)
        at_exit.callback(saver.wait)
        log = at_exit.enter_context(contextlib.closing(Log(config, say)))
    if config.decay_lr and config.warmup_iters >= config.max_iters > 0 and not config.eval_only:
        say(f'note: warmup_iters = {config.warmup_iters} is not over within max_iters = {config.max_iters}: the learning rate '
            f'stays below learning_rate; try --warmup_iters={config.max_iters // 10}')
    if resume and step >= config.max_iters and not config.eval_only:
        say(f'note: the run has done {step} steps, max_iters = {config.max_iters} is reached: give a larger --max_iters to go on')

    def save(val_loss=None):
        if config.eval_only:
            return
        weights, state = parallel.whole_on_main(raw_model.state_dict()), parallel.whole_on_main(optimizer.state_dict())
        if raw_model.config.tie_weights:
            weights['transformer.wte.weight'] = weights['lm_head.weight']  # gathered twice, but one tensor
        if writes:
            log.sync()
            saver.save(ckpt.Checkpoint(
                asdict(raw_model.config), weights, step, samples_seen, val_loss, best_val_loss, asdict(config), state,
                scaler.state_dict(), data.tokenizer.to_dict(), environment))

    signals = Signals(catch=not config.eval_only)  # an evaluation has nothing to save: it stops at once
    stop, saves, saves_done, skips = 0, 0, 0, 0
    pending = []  # the steps whose losses are still on the device
    peak = config.peak_flops or peak_flops(device, dtype)
    bar = tqdm(total=config.max_iters, initial=step, desc='train', unit='step', dynamic_ncols=True,
               disable=None if writes else True)  # None: on a terminal only
    at_exit.callback(bar.close)
    logged_at, logged_step = time.perf_counter(), step

    def micro_batch(number):
        """The number-th of this process, counted from the step's first, on its way to the device: x, y, how many targets."""
        steps_ahead, number = divmod(number, accumulation)
        # micro-batches are laid out along the samples process after process: the same ones for any number of them
        first = samples_seen + steps_ahead * samples_per_step + (rank * accumulation + number) * config.batch_size
        x, y = data.train.batch(first, config.batch_size, config.seed)
        return *to_device(x, y, device), int((y >= 0).sum())

    def settle():
        """Read what the steps since the last time gave, and log it: only here, in evaluations and saves the loop waits for the
        device. Raises UserError where a step's loss or gradient was not finite: it was not taken."""
        nonlocal skips, logged_at, logged_step
        if not pending:
            return
        values = torch.stack([tensor for *_, tensor in pending]).tolist()
        now = time.perf_counter()
        speed = (step - logged_step) * samples_per_step * T / (now - logged_at)
        for (number, first_sample, lr, _), (loss, grad_norm, *losses) in zip(pending, values):
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            skips = 0 if finite else skips + 1
            if not finite:
                leave_out(loss, grad_norm, losses, number, first_sample, skips, scaler, config, say)
            if main_process and (number % config.log_interval == 0 or not finite):
                log.write({'step': number, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm, 'tokens_per_second': round(speed, 1),
                           'samples_seen': first_sample + samples_per_step} | ({} if finite else {'skipped': True}))
                mfu = f'{raw_model.flops_per_token() * speed / (peak * world_size):.1%}' if peak else 'n/a'
                text = f'loss {loss:.4f}, {speed:,.0f} tokens/s, mfu {mfu}'
                bar.set_postfix_str(text)
                if bar.disable:
                    say(f'step {number}: {text}, lr {lr:.2e}')
                logged_at, logged_step = now, step
        pending.clear()

    # the loop ------------------------------------------------------------------------------------------------------------
    batch = None if config.eval_only else micro_batch(0)
    while True:
        done = step >= config.max_iters or config.eval_only
        evaluates = not stop and (done or step % config.eval_interval == 0)
        due = stop or saves > saves_done or bool(config.save_interval) and step % config.save_interval == 0
        if due or evaluates:
            settle()  # so that nothing is saved after a fault
            due = due and (stop or saves > saves_done or skips == 0)
        val_loss = None
        if evaluates:
            model.eval()
            val_loss = run_evaluation(lambda x, y: loss_of(model, *to_device(x, y, device)), raw_model, data, config, step, log,
                                      say, signals)
            model.train()
            if val_loss is None:  # a signal broke it off
                stop = due = signals.stop
            else:
                due = due or done or val_loss < best_val_loss or config.always_save_checkpoint
                best_val_loss = min(best_val_loss, val_loss)
            logged_at, logged_step = time.perf_counter(), step  # the time of the evaluation is not the training's
        known = step == saved_step and (evaluated or val_loss is None)  # resumed, perhaps in an evaluation that broke off
        if due and (step > 0 or done or stop) and not known:
            save(val_loss)
        saves_done = saves
        if done or stop:
            break

        n_targets = data.train.count_targets(samples_seen, samples_per_step, config.seed)  # of all processes
        lr = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group['lr'] = lr * (group['peak_lr'] / config.learning_rate)
        losses, shares = [], []
        for micro_step in range(accumulation):
            if config.dropout > 0:  # masks follow from (seed, step, micro-batch), whatever was drawn before
                number = step * config.gradient_accumulation_steps + rank * accumulation + micro_step
                torch.manual_seed(bins.seed_of(config.seed, number))
            if exchanging:  # gradients are summed over the processes once a step, in the last backward
                parallel.sync_in_backward(exchanging, micro_step == accumulation - 1)
            x, y, n = batch
            loss = loss_of(model, x, y)
            batch = micro_batch(micro_step + 1)  # drawn and sent while the device computes
            # of the mean over all targets of the step; the tree adds what the processes have, other ways take the mean of it
            share = loss * (n / n_targets * (1 if tree else world_size))
            scaler.scale(share).backward()
            losses.append(loss.detach())
            shares.append(share.detach())
            if tree:
                tree.add(shares[-1])
        losses = torch.stack(losses)
        mean_loss = tree.finish() if tree else mean_of_processes(torch.stack(shares).sum())
        scaler.unscale_(optimizer)
        grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf))
        result = torch.stack((mean_loss, grad_norm))
        step_if(result.isfinite().all(), optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        stop, saves = exchange(signals)
        pending.append((step, samples_seen, lr, torch.cat((result, losses))))
        samples_seen += samples_per_step
        step += 1
        if (step - 1) % config.log_interval == 0:
            settle()
        bar.update()
        if writes:
            saver.check()

    bar.close()
    with main_process_first(rank):  # torchrun ends all processes as soon as one has failed: they wait for the last save
        if writes:
            saver.wait()
    if writes:
        ckpt.write_status(config.out_dir, 'stopped' if stop else 'done')
    if stop:
        say(f'stopped by {signal.Signals(stop).name} after {step} steps; go on with: '
            f'python train.py --init_from=resume --out_dir={config.out_dir}')
        return 128 + stop
    if not config.eval_only:
        say(f'done; now: python sample.py --out_dir={config.out_dir}{" --interactive" * bool(data.pairs)}')
    return 0


# Before the first step ----------------------------------------------------------------------------------------------------

def micro_batches(config, world_size):
    """How many of a step each process takes. Raises UserError if that is not a whole number."""
    each, rest = divmod(config.gradient_accumulation_steps, world_size)
    if rest:
        fail(f'gradient_accumulation_steps = {config.gradient_accumulation_steps} is not divisible by the {world_size} '
             f'processes: try {f"{each * world_size} or " * (each > 0)}{(each + 1) * world_size}')
    return each


def take_saved_config(config, given, checkpoint):
    """Resuming: keys that the command line does not give are as they were."""
    own = given - {'init_from'} | {'out_dir', 'eval_only'}
    require('depth' not in given or config.depth == checkpoint.config.get('depth'),
            f'depth = {config.depth} but {checkpoint.path} has depth = {checkpoint.config.get("depth")}: leave it out')
    for field in fields(config):
        if field.name in checkpoint.config and field.name not in own:
            try:
                setattr(config, field.name, check_type(field.name, checkpoint.config[field.name], field.type))
            except UserError as error:
                raise UserError(f'{checkpoint.path}: {error}') from None


def choose_model_config(config, given, checkpoint, resume):
    """The fields of GPTConfig: the config's, or the checkpoint's. Raises UserError where a key given differs from it."""
    keys = [field.name for field in fields(GPTConfig) if field.name not in DATA_KEYS]
    chosen = {key: getattr(config, key) for key in keys}
    if checkpoint is None:
        try:
            GPTConfig(**chosen)
        except ValueError as error:
            raise UserError(str(error)) from None
        return chosen
    saved = {field.name: field.default for field in fields(GPTConfig)} | checkpoint.model_config
    for key in given & set(keys) - set(FREE_KEYS):
        shorter = key == 'block_size' and not resume and chosen[key] < saved[key]  # a context can be cut
        require(shorter or chosen[key] == saved[key], f'{key} = {chosen[key]} but {checkpoint.path} has {key} = {saved[key]}: '
                                                      f'leave {key} out, or train from scratch')
    block_size = min(chosen['block_size'], saved['block_size']) if 'block_size' in given else saved['block_size']
    return {key: saved[key] for key in keys} | {'block_size': block_size}


def choose_from_data(config, given, checkpoint, resume, data, folder):
    """The fields of GPTConfig that say how documents are read, but for vocab_size; config.doc_mask and prefix_lm become what they
    are, and are those of the weights where nothing else is given. Raises UserError where they do not fit the data.
    """
    T = data.train.block_size
    if checkpoint is None and T < config.block_size:
        fail(f'block_size = {config.block_size}: the rows of {folder} have {T} tokens: give --block_size={T}, or prepare it with '
             f'--block_size={config.block_size}')
    if checkpoint is not None and not resume:
        saved = {'doc_mask': checkpoint.model_config.get('document_token') is not None,
                 'prefix_lm': checkpoint.model_config.get('prefix_lm', False)}
        for key in saved.keys() - given:
            setattr(config, key, saved[key])
    if resume and config.prefix_lm != checkpoint.model_config.get('prefix_lm', False):
        fail(f'prefix_lm = {config.prefix_lm} but {checkpoint.path} was trained without that: leave it out, or begin another '
             f'run with --init_from={checkpoint.path}')
    if config.prefix_lm and not data.pairs:
        fail(f'prefix_lm = True: {folder} has no sources and targets: give --prefix_lm=False, or prepare some with '
             f'data/pairs/prepare.py')
    if data.pairs and (data.pairs.packing or config.prefix_lm):
        if 'doc_mask' in given and not config.doc_mask:
            fail(f'doc_mask = False: the pairs of a row must not see one another: leave it out, or prepare {folder} with '
                 f'--packing=False and give --prefix_lm=False')
        config.doc_mask = True
    document_token = data.tokenizer.eot if config.doc_mask else None
    if config.doc_mask and document_token is None:
        fail(f'doc_mask = True: {folder} has no <|endoftext|> between documents ({data.tokenizer.kind}): leave it out')
    return {'document_token': document_token, 'turns': data.pairs.turns if data.pairs else 0, 'prefix_lm': config.prefix_lm}


def find_or_prepare(dataset):
    """The folder of the data set's bins; a small one that is missing is prepared. Raises UserError with the command to type."""
    folder = bins.find_dataset(dataset)
    if (folder / 'train.bin').exists() or (folder / 'val.bin').exists():
        return folder
    root = Path(__file__).parent
    script = root / 'data' / dataset / 'prepare.py'
    known = ', '.join(sorted(path.parent.name for path in root.glob('data/*/prepare.py')))
    require(script.exists(), f'dataset = {dataset!r}: there is no {folder / "train.bin"} and no {dataset} among {known}; for '
                             f'your own text: python data/text/prepare.py --input=PATH --dataset={dataset}, for sources and '
                             f'targets data/pairs/prepare.py; if it was moved: --dataset=PATH')
    command = f'python data/{dataset}/prepare.py' + ' --input=PATH' * (dataset in ('text', 'pairs'))
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


def check_environment(checkpoint, environment, folder, other_data, say):
    """Resuming: say what keeps the run from being the same to the last bit. Raises UserError if its data are not the same."""
    saved = environment | checkpoint.environment
    require(other_data or saved['data'] == environment['data'],
            f'{folder} is not what {checkpoint.path} was trained on: the bins have changed; put the old ones back, or say that '
            f'other data are meant with --dataset={folder}')
    names = {'world_size': 'processes'}
    changed = [f'{names.get(key, key)} {saved[key]} then, {environment[key]} now' for key in environment
               if key not in ('data', 'job') and saved[key] != environment[key]]
    changed += ['other data'] * (saved['data'] != environment['data'])
    if changed:
        say(f'note: the run will not be the same to the last bit ({"; ".join(changed)})')


def load_optimizer(optimizer, scaler, checkpoint):
    """Restore the state; weight decay and betas stay the config's. Raises UserError if it does not fit."""
    require(checkpoint.optimizer is not None, f'{checkpoint.path} has no optimizer state: use --init_from={checkpoint.path}')
    try:
        load_state(optimizer, checkpoint.optimizer)
        if checkpoint.scaler:
            scaler.load_state_dict(checkpoint.scaler)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f'{checkpoint.path}: its optimizer state does not fit: {first_line(error)}; start another run from these '
                        f'weights with --init_from={checkpoint.path}') from None


def check_disk(config, size, resume):
    """Room for the checkpoints to be kept and the one that is being written; resuming, for that one. Raises UserError."""
    need = size * (1 if resume else config.keep_last + 2)
    free = shutil.disk_usage(config.out_dir).free
    require(free >= need, f'out_dir = {config.out_dir!r}: checkpoints need {need / 1e6:,.1f} MB there, {free / 1e6:,.1f} MB are '
                          f'free: free some room, lower --keep_last or choose another --out_dir')


def compile_and_fit(model, try_out, config, device, say):
    """The model, compiled where asked for, after a micro-batch on trial. While that is too large for the memory of any
    process it is cut, and there are more of them: a step keeps its samples. Raises UserError when one sequence is too much.
    (In shards all processes run out together, or those that have not would wait for the one that has.)
    """
    while True:
        try:
            fitting = compile_or_not(model, config.compile, device, try_out, say)
        except torch.OutOfMemoryError:
            fitting = None
        if not any_process(fitting is None):
            return fitting
        size = config.batch_size
        if size == 1:
            fail('out of memory with a single sequence: lower --block_size or the size of the model, or give '
                 '--activation_checkpointing')
        parts = next(n for n in range(2, size + 1) if size % n == 0)
        config.batch_size //= parts
        config.gradient_accumulation_steps *= parts
        config.eval_iters *= parts if config.eval_iters > 0 else 1
        say(f'out of memory with batch_size = {size}: going on with {config.batch_size}, and {parts} times as many '
            f'gradient_accumulation_steps; the samples of a step stay the same (--activation_checkpointing saves memory too)')
        torch.compiler.reset()  # what was compiled for the larger shape counts no more
        if device.type == 'cuda':
            torch.cuda.empty_cache()


# Inside the loop ----------------------------------------------------------------------------------------------------------

def to_device(x, y, device):
    x, y = torch.from_numpy(x).contiguous(), torch.from_numpy(y).contiguous()
    if device.type == 'cuda':  # pinned memory lets the copy run beside the computation
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


@torch.no_grad()
def evaluate(loss_of, split, windows, batch_size, token_bytes, signals):
    """(loss in nats per token, bits per byte, how many tokens) over windows of a split, given by their numbers.

    (None, None, None) where a signal to any process asks for a stop: it is then in the signals of every process.

    Bits per byte = total nats / (ln 2 * bytes of the targets' text) compares models with different tokenizers.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    index, longest = windows[rank::world_size], len(windows[::world_size])
    losses, n_tokens, n_bytes = [], 0, 0
    for at in range(0, longest, batch_size):  # equally often in every process: FSDP's compute together
        if any_process(signals.stop):
            break
        x, y = split.windows(index[at:at + batch_size])
        targets = y[y >= 0]
        missing = ((0, batch_size - len(x)), (0, 0))  # the last batch is filled up: a compiled model sees one shape
        loss = loss_of(np.pad(x, missing), np.pad(y, missing, constant_values=-1))
        if len(targets):
            losses.append(loss * len(targets))  # stays on the device: nothing waits
        n_tokens += len(targets)
        n_bytes += int(token_bytes[targets].sum())
    nats = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    *shares, stops = zip(*gather((nats, n_tokens, n_bytes, signals.stop)))
    if any(stops):
        signals.stop = max(stops)
        return None, None, None
    nats, n_tokens, n_bytes = map(sum, shares)
    return nats / n_tokens, nats / math.log(2) / n_bytes, n_tokens


def run_evaluation(loss_of, raw_model, data, config, step, log, say, signals):
    """Evaluate both splits, print and log the result, and a sample if asked for; returns the val loss, None if interrupted.

    Raises UserError if it is not finite.
    """
    start = time.perf_counter()
    n_windows = config.eval_iters * config.batch_size if config.eval_iters > 0 else data.val.n_windows
    sharded = parallel.is_shard(raw_model.lm_head.weight)  # asked now: a forward pass leaves the head gathered
    (val_loss, bits, _), (train_loss, *_) = (
        evaluate(loss_of, split, split.evaluation_windows(n_windows), config.batch_size, data.token_bytes, signals)
        for split in (data.val, data.train))  # windows that are the same at every evaluation
    if val_loss is None or train_loss is None:
        return None
    if not math.isfinite(val_loss):
        fail(f'step {step}: the val loss is {val_loss}: lower --learning_rate or set --grad_clip; what was saved in '
             f'{config.out_dir} before is kept')
    seconds = time.perf_counter() - start
    say(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 700)):.2f}, '
        f'{bits:.4f} bits per byte ({seconds:.1f} s)')
    if log:
        log.write({'step': step, 'train_loss': train_loss, 'val_loss': val_loss, 'val_bits_per_byte': bits,
                   'seconds': round(seconds, 3)})
        if config.sample_every_eval and not sharded:
            say('\n'.join('  | ' + line for line in sample(raw_model, data, config.seed).splitlines()))
    return val_loss


def sample(model, data, seed):
    """A text as the model writes it; of sources and targets a source of the val split and what the model answers."""
    eot, block_size = data.tokenizer.eot, model.config.block_size
    options = {'seed': seed, 'vocab_size': data.tokenizer.vocab_size}
    if data.pairs:
        source = [eot, *data.val.documents(0)[0][0], eot]
        tokens = model.generate([source], min(100, block_size - len(source)), temperature=0, stop_tokens=[eot], **options)[0]
        return data.tokenizer.decode(tokens[1:]).replace(END_OF_TEXT, '\n')
    prompt = [eot] if eot is not None else data.val.read([0], 1)[0].tolist()
    tokens = model.generate([prompt], 100, temperature=0.8, slide=max(1, block_size // 8), **options)[0]
    return data.tokenizer.decode(tokens[1:])


def leave_out(loss, grad_norm, losses, step, samples_seen, skips, scaler, config, say):
    """Say which samples made a step's loss or gradient infinite or nan. Raises UserError unless such steps are to be left out.

    In float16 a gradient that overflows is no fault: the scaler lowers its scale, unless that happens again and again.
    losses: of this process's micro-batches. The first that is bad is named; if only the gradient is, the whole step is.
    """
    finite = [math.isfinite(value) for value in sum(gather(losses), [])]
    if all(finite):
        first, count, what = samples_seen, len(finite) * config.batch_size, f'gradient norm is {grad_norm}'
    else:
        first, count, what = samples_seen + finite.index(False) * config.batch_size, config.batch_size, f'loss is {loss}'
    fault = f'step {step}: the {what} in samples {first} to {first + count - 1}'
    overflow = scaler.is_enabled() and math.isfinite(loss)
    if (config.nonfinite == 'skip' or overflow) and skips <= config.max_skips:
        say(f'{fault}: left out')
        return
    advice = 'leave such steps out with --nonfinite=skip' if skips == 1 else f'raise --max_skips={config.max_skips}'
    fail(f'{fault}; this step was not taken, and what was saved in {config.out_dir} is kept: lower --learning_rate, or {advice}')


class Log:
    """out_dir/log.jsonl, one JSON object a line, and wandb if asked for: a wandb that fails never stops training."""

    def __init__(self, config, say):
        self.say, self.wandb = say, None
        self.path = Path(config.out_dir) / 'log.jsonl'
        self.file = open(self.path, 'ab', buffering=0)  # a line is in the file when it is written, or never
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
        """line: a dict of numbers; what is not finite becomes null, since JSON has no word for it. Raises UserError."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self.file.write(json.dumps(line).encode() + b'\n')
        except OSError as error:
            raise UserError(f'{self.path}: cannot write: {error.strerror}; free some room, then go on with --init_from=resume'
                            ) from None
        if self.wandb:
            try:
                self.wandb.log(line, step=line['step'])
            except Exception as error:
                self.say(f'wandb does not work any more, going on without it: {type(error).__name__}: {first_line(error)}')
                self.wandb = None

    def sync(self):
        """Lines of before a checkpoint are on the disk before it is."""
        with contextlib.suppress(OSError):  # not everything can be synced: /dev/null
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


if __name__ == '__main__':
    with user_errors(), contextlib.ExitStack() as at_exit:
        code = main(config, given, at_exit)
    leave(code)
