"""Train a GPT: config -> data -> model -> optimizer -> loop, from top to bottom.

    python train.py config/quickstart.py                        # a small GPT learns Python in two minutes, on any machine
    python train.py --init_from=resume --out_dir=out-quickstart # go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
from dataclasses import dataclass
from typing import Literal

from configurator import check_type, configure, differences, require, user_errors


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
    schedule: Literal['cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'] = 'cosine'  # how it falls; optimizer.py has the formulas
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # None: learning_rate / 10
    decay_fraction: float = 0.2  # wsd: the share of the steps that decay
    # system
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # float16 scales its gradients
    compile: bool | Literal['auto'] = 'auto'  # auto: on CUDA
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torchrun; auto: nccl on CUDA
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
    require(config.learning_rate > 0, f'learning_rate = {config.learning_rate}: give more than 0')
    require(0 < config.decay_fraction <= 1, f'decay_fraction = {config.decay_fraction}: give a share above 0, at most 1')
    require(config.out_dir, 'out_dir is empty: name a folder')


if __name__ == '__main__':  # before the slow imports: --help and a mistyped key are answered at once
    with user_errors():
        config, given = configure(Config)
        check(config)

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

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
# what a resumed run takes from its command line only; everything else not given there is as it was
NOT_RESUMED = ('init_from', 'out_dir', 'eval_only')


def main(config, given):
    # processes and device ------------------------------------------------------------------------------------------------
    ddp = 'RANK' in os.environ  # started by torchrun
    rank, world_size = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if ddp else (0, 1)
    first = rank == 0  # this process prints and writes
    checkpoint = None
    if config.init_from == 'resume':
        checkpoint = ckpt.load(config.out_dir)
        take_saved_config(config, given, checkpoint)
    elif config.init_from != 'scratch':
        checkpoint = ckpt.load(config.init_from)
    device = pick_device(f'cuda:{os.environ["LOCAL_RANK"]}' if ddp and config.device in ('auto', 'cuda') and
                         torch.cuda.is_available() else config.device)
    dtype = pick_dtype(config.dtype, device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    if ddp:
        dist.init_process_group(config.backend if config.backend != 'auto' else 'nccl' if device.type == 'cuda' else 'gloo')
    sys.stdout.reconfigure(line_buffering=True)
    say = tqdm.write if first else lambda text: None

    accumulation = config.gradient_accumulation_steps // world_size  # of this process
    require(accumulation * world_size == config.gradient_accumulation_steps,
            f'gradient_accumulation_steps = {config.gradient_accumulation_steps} is not divisible by the {world_size} processes: '
            f'try {accumulation * world_size or world_size} or {(accumulation + 1) * world_size}')
    samples_per_step = config.batch_size * config.gradient_accumulation_steps
    config.lr_decay_iters = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    config.min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr

    # data and model ------------------------------------------------------------------------------------------------------
    model_config = choose_model_config(config, given, checkpoint)
    folder = find_or_prepare(config.dataset, first)
    data = bins.open_dataset(folder, model_config['block_size'])
    token_bytes = torch.tensor([len(b) for b in data.tokenizer.token_bytes])
    if data.tokenizer.eot is not None:
        token_bytes[data.tokenizer.eot] = 0  # it is not in the text
    torch.manual_seed(config.seed)
    step = samples_seen = 0
    best_val_loss = math.inf
    if checkpoint is None:
        raw_model = GPT(GPTConfig(**model_config | {'vocab_size': data.tokenizer.vocab_size}))
    else:
        check_tokenizers(checkpoint, data.tokenizer, folder)
        raw_model = checkpoint.build_model(dropout=config.dropout, attention=config.attention)
        raw_model.crop_block_size(model_config['block_size'])
    for key in model_config:
        setattr(config, key, getattr(raw_model.config, key))  # what the run really has is what is saved and printed
    raw_model.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = adamw(raw_model, config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type)
    if config.init_from == 'resume':
        step, samples_seen = checkpoint.step, checkpoint.samples_seen
        best_val_loss = math.inf if checkpoint.best_val_loss is None else checkpoint.best_val_loss
        load_optimizer(optimizer, checkpoint)
        if checkpoint.scaler:
            scaler.load_state_dict(checkpoint.scaler)
    start_step, checkpoint = step, None  # free the memory

    # files ---------------------------------------------------------------------------------------------------------------
    log = None
    if first:
        lock = ckpt.lock(config.out_dir)  # noqa: F841, held until the process ends
        if not config.eval_only:
            if config.init_from != 'resume':
                ckpt.set_aside(config.out_dir, say)
            ckpt.write_text(Path(config.out_dir) / 'config.py', '\n'.join(f'{k} = {v!r}' for k, v in asdict(config).items()) + '\n')
            ckpt.cut_log(config.out_dir, start_step)
        log = Log(config, say)
    say('\n'.join(differences(config)))
    say(f'{raw_model.get_num_params():,} parameters, vocabulary {raw_model.config.vocab_size:,}; {device}, {str(dtype)[6:]}, '
        f'{world_size} process{"es" * (world_size > 1)}; {samples_per_step * config.block_size:,} tokens a step')
    if config.decay_lr and config.warmup_iters >= config.max_iters > 0 and not config.eval_only:
        say(f'note: warmup_iters = {config.warmup_iters} is not over within max_iters = {config.max_iters}: the learning rate '
            f'stays below learning_rate; try --warmup_iters={config.max_iters // 10}')

    def batch(micro_step):
        """This process's micro-batch: micro-batches are laid out along the samples, process after process."""
        start = samples_seen + (rank * accumulation + micro_step) * config.batch_size
        return to_device(*data.train.batch(start, config.batch_size, config.seed), device)

    def seed_dropout(micro_step):
        if config.dropout > 0:  # masks are a function of (seed, step, micro-batch), whatever was drawn before
            number = (step * config.gradient_accumulation_steps + rank * accumulation + micro_step) * 2 + 1
            torch.manual_seed(int(bins.mix(bins.mix(config.seed) + bins.np.uint64(number))) % 2**63)

    def first_step(model):
        with autocast(device, dtype):
            scaler.scale(model(*batch(0))[1]).backward()
        raw_model.zero_grad(set_to_none=True)

    model = compile_or_not(raw_model, config.compile, device, first_step, say) if not config.eval_only else raw_model
    if ddp:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)

    def save(val_loss=None):
        if first:
            model_config, weights = ckpt.model_state(raw_model)
            path = ckpt.save(config.out_dir, ckpt.Checkpoint(
                model_config, weights, step, samples_seen, val_loss, min(best_val_loss, val_loss or math.inf), asdict(config),
                optimizer.state_dict(), scaler.state_dict(), data.tokenizer.to_dict()), config.keep_last)
            say(f'saved {path}')

    stop = StopSignal()
    peak = config.peak_flops or peak_flops(device, dtype)
    bar = tqdm(total=config.max_iters, initial=step, desc='train', unit='step', dynamic_ncols=True,
               disable=None if first and not config.eval_only else True)  # None: shown on a terminal only
    logged_at, logged_step = time.perf_counter(), step

    # the loop ------------------------------------------------------------------------------------------------------------
    while True:
        lr = learning_rate_at(step, config) if config.decay_lr else config.learning_rate
        for group in optimizer.param_groups:
            group['lr'] = lr

        if step % config.eval_interval == 0 or step >= config.max_iters or config.eval_only:
            val_loss = run_evaluation(model, raw_model, data, config, device, dtype, token_bytes, rank, world_size, step, log, say)
            improved = val_loss < best_val_loss
            last = step >= config.max_iters
            if not config.eval_only and step > start_step and (improved or config.always_save_checkpoint or last):
                save(val_loss)
            best_val_loss = min(best_val_loss, val_loss)
            logged_at, logged_step = time.perf_counter(), step  # the time of the evaluation is not the training's
        if step >= config.max_iters or config.eval_only:
            break

        loss_sum = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            x, y = batch(micro_step)
            seed_dropout(micro_step)
            if ddp:  # gradients are summed over the processes once a step, in the last backward
                model.require_backward_grad_sync = micro_step == accumulation - 1
            with autocast(device, dtype):
                _, loss = model(x, y)
            scaler.scale(loss / accumulation).backward()
            loss_sum += loss.detach() / accumulation
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        samples_seen += samples_per_step

        if step % config.log_interval == 0:
            if ddp:
                dist.all_reduce(loss_sum, dist.ReduceOp.SUM)
            loss = loss_sum.item() / world_size  # waits for the device
            now = time.perf_counter()
            speed = (step + 1 - logged_step) * samples_per_step * config.block_size / (now - logged_at)
            logged_at, logged_step = now, step + 1
            mfu = f'{raw_model.flops_per_token() * speed / (peak * world_size):.1%}' if peak else 'n/a'
            if first:
                log.write({'step': step, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm.item(), 'tokens_per_second': round(speed, 1),
                           'samples_seen': samples_seen})
                text = f'loss {loss:.4f}, {speed:,.0f} tokens/s, mfu {mfu}'
                bar.set_postfix_str(text)
                if bar.disable:
                    say(f'step {step}: {text}, lr {lr:.2e}')
        step += 1
        bar.update()
        if stop.requested(device, ddp):
            bar.close()
            save()
            say(f'stopped by {signal.Signals(stop.number).name if stop.number else "another process"} after {step} steps; go on '
                f'with: python train.py --init_from=resume --out_dir={config.out_dir}')
            break

    bar.close()
    if log:
        log.close()
    if ddp:
        dist.destroy_process_group()
    if stop.number:
        sys.exit(128 + stop.number)
    if not config.eval_only:
        say(f'done; now: python sample.py --out_dir={config.out_dir}')


# Before the first step ----------------------------------------------------------------------------------------------------

def take_saved_config(config, given, checkpoint):
    """Resuming: keys that the command line does not give are as they were."""
    nanogpt = 'position' not in checkpoint.config  # its device, dtype, compile and backend may be another machine's
    skip = NOT_RESUMED + (('device', 'dtype', 'compile', 'backend') if nanogpt else ())
    for field in fields(config):
        if field.name in checkpoint.config and field.name not in given and field.name not in skip:
            setattr(config, field.name, check_type(field.name, checkpoint.config[field.name], field.type))


def find_or_prepare(dataset, first):
    """The folder of the data set's bins; a small one that is missing is prepared. Raises UserError with the command to type."""
    folder = bins.find_dataset(dataset)
    if (folder / 'train.bin').exists() or (folder / 'val.bin').exists():
        return folder
    script = Path(__file__).parent / 'data' / dataset / 'prepare.py'
    known = ', '.join(sorted(path.parent.name for path in (Path(__file__).parent / 'data').glob('*/prepare.py')))
    require(script.exists(), f'dataset = {dataset!r}: there is no {folder / "train.bin"} and no {dataset} among {known}; for '
                             f'your own text: python data/text/prepare.py --input=PATH --dataset={dataset}')
    command = f'python data/{dataset}/prepare.py' + (' --input=PATH' if dataset == 'text' else '')
    require(dataset in SMALL_DATASETS, f'dataset = {dataset!r}: there is no {folder / "train.bin"}; make it with: {command}'
                                       f' (or start small: python train.py config/quickstart.py)')
    if first:
        print(f'{folder / "train.bin"} is missing: running {command}', flush=True)
        code = subprocess.run([sys.executable, script]).returncode
        if code:
            sys.exit(code)
    if dist.is_initialized():
        dist.barrier()
    return bins.find_dataset(dataset)


def choose_model_config(config, given, checkpoint):
    """The fields of GPTConfig: the config's, or the checkpoint's. Raises UserError where a key given differs from it."""
    keys = [field.name for field in fields(GPTConfig) if field.name != 'vocab_size']
    if checkpoint is None:
        chosen = {key: getattr(config, key) for key in keys}
        try:
            GPTConfig(**chosen)
        except ValueError as error:
            require(False, str(error))
        return chosen
    saved = {field.name: field.default for field in fields(GPTConfig)} | checkpoint.model_config
    for key in keys:
        if key in given and key not in ('dropout', 'attention'):
            shorter = key == 'block_size' and config.init_from != 'resume' and config.block_size < saved['block_size']
            require(shorter or getattr(config, key) == saved[key], f'{key} = {getattr(config, key)} but {checkpoint.path} has '
                                                                   f'{key} = {saved[key]}: leave {key} out, or train from scratch')
    block_size = min(config.block_size, saved['block_size']) if 'block_size' in given else saved['block_size']
    return {key: saved[key] for key in keys} | {'block_size': block_size}


def check_tokenizers(checkpoint, tokenizer, folder):
    """Weights are worth nothing with other tokens than their own. Raises UserError."""
    vocab_size = checkpoint.model_config['vocab_size']
    same = tokenizer.vocab_size == vocab_size or (tokenizer.vocab_size, vocab_size) == (50257, 50304)  # nanoGPT rounds up
    if checkpoint.tokenizer is not None:
        same = checkpoint.tokenizer == tokenizer.to_dict()
    require(same, f'{folder} was made with another tokenizer ({tokenizer.kind}, {tokenizer.vocab_size} tokens) than '
                  f'{checkpoint.path} ({vocab_size} tokens): prepare the data set with the tokenizer of the weights')


def load_optimizer(optimizer, checkpoint):
    require(checkpoint.optimizer is not None, f'{checkpoint.path} has no optimizer state: use --init_from={checkpoint.path}')
    settings = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint.optimizer)
    except (ValueError, KeyError, TypeError) as error:
        require(False, f'{checkpoint.path}: its optimizer state does not fit: {error}')
    for group, wanted in zip(optimizer.param_groups, settings):
        group.update(wanted)  # weight decay and betas are the config's, not the file's


# Inside the loop ----------------------------------------------------------------------------------------------------------

def to_device(x, y, device):
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device.type == 'cuda':  # pinned memory lets the copy run beside the computation
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


@torch.no_grad()
def evaluate(model, split, n_windows, config, device, dtype, token_bytes, rank, world_size):
    """(loss in nats per token, bits per byte) over windows of a split that are the same at every evaluation; -1: all.

    Bits per byte = total nats / (ln 2 * bytes of the targets' text) compares models with different tokenizers.
    """
    index = split.evaluation_windows(n_windows)[rank::world_size]
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for at in range(0, len(index), config.batch_size):
        x, y = split.windows(index[at:at + config.batch_size])
        targets = torch.from_numpy(y[y >= 0])
        missing = config.batch_size - len(x)  # the last batch is filled up: one shape is compiled once
        x, y = (bins.np.pad(a, ((0, missing), (0, 0)), constant_values=fill) for a, fill in ((x, 0), (y, -1)))
        with autocast(device, dtype):
            _, loss = model(*to_device(x, y, device))
        totals += torch.tensor([loss.item() * len(targets), len(targets), token_bytes[targets].sum()], dtype=torch.float64)
    if world_size > 1:
        shared = totals.to(device)
        dist.all_reduce(shared)
        totals = shared.cpu()
    nats, n_tokens, n_bytes = totals.tolist()
    return nats / n_tokens, nats / math.log(2) / n_bytes


def run_evaluation(model, raw_model, data, config, device, dtype, token_bytes, rank, world_size, step, log, say):
    """Evaluate both splits, print and log the result, and a sample if asked for; returns the val loss."""
    start = time.perf_counter()
    model.eval()
    n_windows = config.eval_iters * config.batch_size if config.eval_iters > 0 else -1
    rest = (config, device, dtype, token_bytes, rank, world_size)
    val_loss, bits = evaluate(model, data.val, n_windows, *rest)
    train_loss, _ = evaluate(model, data.train, n_windows if n_windows > 0 else data.val.n_windows, *rest)
    model.train()
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
        if config.wandb_log:
            try:
                import wandb
                if not wandb.api.api_key and os.environ.get('WANDB_MODE') not in ('offline', 'disabled'):
                    say('wandb: not logged in, so it logs offline; wandb sync uploads it later')
                    os.environ['WANDB_MODE'] = 'offline'
                self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config),
                                        dir=config.out_dir)
            except Exception as error:
                say(f'wandb does not work, going on without it: {type(error).__name__}: {str(error).splitlines()[0]}')

    def write(self, line):
        self.file.write(json.dumps(line) + '\n')
        if self.wandb:
            try:
                self.wandb.log(line, step=line['step'])
            except Exception as error:
                self.say(f'wandb does not work any more, going on without it: {type(error).__name__}: {error}')
                self.wandb = None

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class StopSignal:
    """SIGINT (Ctrl-C) and SIGTERM ask for a stop after the step that is running; a second one stops at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def requested(self, device, ddp):
        """Whether any process was asked to stop: all of them stop after the same step."""
        if not ddp:
            return bool(self.number)
        flag = torch.tensor(self.number, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


if __name__ == '__main__':
    with user_errors():
        main(config, given)
