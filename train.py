"""Train a GPT: config -> data -> model -> optimizer -> loop -> checkpoints and log.

    python train.py config/quickstart.py                         # needs no data and no GPU
    python train.py --init_from=resume --out_dir=out-quickstart  # continue where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The keys are in configurator.py. Read from main, at the end of this file.
"""
from lib.errors import user_errors
from lib.recipe import check, read_train_config

if __name__ == '__main__':  # so that --help and typos do not wait for the slow imports
    with user_errors():
        config, given = read_train_config()

import gc
import math
import os
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

import checkpoint as ckpt
from lib import bins, budget, distributed, memory, resume
from lib import device as devices
from lib.distributed import fail, gather, main_process_first, print0, rank, world_size
from lib.evaluation import evaluate_run
from lib.files import find
from lib.lora import add_lora, load_lora, merge_lora
from lib.loss import max_logits
from lib.run import Run
from lib.step_log import StepLog
from lib.summary import describe, farewell
from model import GPT, GPTConfig
from optimizer import lr_multiplier, make_optimizer, n_trained, orthogonalize


class Trainer:
    """The state of a run, with its steps, evaluations and checkpoints. raw_model is the GPT, model
    the callable: wrapped by DDP, compiled."""

    def __init__(self, config, run, data, raw_model, device, dtype):
        self.config, self.run, self.data = config, run, data
        self.raw_model = self.model = raw_model
        self.device, self.dtype = device, dtype
        self.optimizer = None if config.eval_only else make_optimizer(raw_model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.environment = resume.environment(data, device, dtype)
        self.samples_per_step = config.batch_size * config.gradient_accumulation_steps
        self.step = self.samples_seen = self.best_step = 0
        self.seconds = 0.0  # of training, without evaluations
        self.best_val_loss = self.best_saved_loss = math.inf
        self.val_loss = None  # the last one
        self.noted_rise = False
        self.resumed = None  # (step, whether it was evaluated) of the checkpoint resumed from
        self.stop = 0  # the signal that asked to stop, or 0
        self.saves_requested = self.saves_done = 0

    def loss_of(self, model, x, y):
        """Mean loss of a micro-batch x, y (B, T) on the device."""
        with devices.autocast(self.device, self.dtype):
            return model(x, y, return_logits=False)[1]

    def micro_batches(self):
        """This process's micro-batches on the device, step after step: x, y, number of targets."""
        size, samples_seen = self.config.batch_size, self.samples_seen
        while True:
            for i in range(self.accumulation):
                # each process takes a contiguous share of the step's samples
                first = samples_seen + (rank() * self.accumulation + i) * size
                x, y = self.data.train.batch(first, size, self.config.seed)
                yield *devices.to_device(x, y, self.device), int((y >= 0).sum())
            samples_seen += self.samples_per_step

    def train_step(self):
        """One optimizer step, without a host sync."""
        config, optimizer = self.config, self.optimizer
        multiplier = lr_multiplier(self.schedule_step(), config)
        optimizer.set_lr(multiplier)
        n_targets = self.data.train.count_targets(self.samples_seen, self.samples_per_step,
                                                  config.seed)  # over all processes
        losses, measures = [], self.log.measures(self.step)
        for micro_step in range(self.accumulation):
            if config.dropout + config.lora_dropout > 0:  # masks depend on (seed, number)
                number = self.step * config.gradient_accumulation_steps
                number += rank() * self.accumulation + micro_step
                torch.manual_seed(bins.derive_seed(config.seed, number))
            self.sync.begin(last=micro_step == self.accumulation - 1)
            x, y, n = self.batch
            loss = self.loss_of(self.model, x, y)
            self.batch = next(self.batches)  # prefetch while the device computes
            # mean over all targets of the step, however it is split into micro-batches
            scaled = loss * self.sync.scale(n / n_targets)
            self.scaler.scale(scaled).backward()
            self.sync.add(scaled, measures)
            losses.append(loss.detach())
        mean_loss = self.sync.finish()
        self.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.raw_model.parameters(), config.grad_clip or math.inf,
            foreach=self.device.type == 'cuda' or None)  # by itself it takes shards one by one
        result = torch.stack((mean_loss, distributed.full(grad_norm)))
        optimizer.step_if_finite(result.isfinite().all(), measures)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.log.add(self.step, self.samples_seen, config.learning_rate * multiplier,
                     torch.cat((result, torch.stack(losses))), measures)
        self.samples_seen += self.samples_per_step
        self.step += 1

    def evaluate(self):
        """The losses as a log line, or None if a signal interrupted the evaluation."""
        self.model.eval()
        line = evaluate_run(
            lambda x, y: self.loss_of(self.model, *devices.to_device(x, y, self.device)),
            self.raw_model, self.data, self.config, self.step, self.run)
        self.model.train()
        self.log.reset_clock(self.step)  # evaluations do not count as training time
        self.log.evaluation = line or self.log.evaluation
        return line

    def evaluate_and_save(self, done):
        """Evaluate and save, if due."""
        config, step = self.config, self.step
        requested = self.stop or self.saves_requested > self.saves_done
        save = requested or bool(config.save_interval) and step % config.save_interval == 0
        evaluate = not self.stop and (done or step % config.eval_interval == 0)
        if save or evaluate:
            self.log.flush()  # raises if a step since the last flush was not finite
            save = requested or save and self.log.skips == 0
        val_loss = None
        if evaluate:
            line = self.evaluate()
            if line is None:
                self.stop = save = self.run.signals.stop
            else:
                self.val_loss = val_loss = line['val_loss']
                self.note_rise(val_loss, line['train_loss'])
                if val_loss < self.best_val_loss:
                    self.best_val_loss, self.best_step = val_loss, step
                improved = step == self.best_step
                save = (save or done or improved or self.out_of_patience()
                        or config.always_save_checkpoint)
        # nothing to save at step 0, or right after resuming at this step
        fresh = step > 0 or done or self.stop
        known = self.resumed == (step, True) or val_loss is None and self.resumed == (step, False)
        if save and fresh and not known and not config.eval_only:
            self.save(val_loss)
        self.saves_done = self.saves_requested

    def schedule_step(self):
        return budget.schedule_step(self.config, self.step, self.seconds)

    def out_of_patience(self):
        config = self.config
        waited = self.step - self.best_step
        return config.patience is not None and waited >= config.patience * config.eval_interval

    def note_rise(self, val_loss, train_loss):
        """Say once that the model overfits."""
        best = self.best_saved_loss
        if val_loss > 1.01 * best and train_loss < self.best_val_loss and not self.noted_rise:
            self.noted_rise = True
            print0(f'note: the val loss has risen from {best:.4f} to {val_loss:.4f}, '
                   f'the model overfits: more text, --dropout=0.2, fewer parameters or steps help; '
                   f'the best checkpoint is kept')

    def save(self, val_loss):
        self.best_saved_loss = min(self.best_saved_loss, val_loss or math.inf)
        weights = distributed.gather_on_main(self.raw_model.state_dict())
        state = distributed.gather_on_main(self.optimizer.state_dict())
        if self.raw_model.config.tie_weights:  # one tensor, even if FSDP gathered it twice
            weights['transformer.wte.weight'] = weights['lm_head.weight']
        if self.run.writes:
            weights, lora = merge_lora(weights, self.config.lora_alpha)
            self.run.save(ckpt.Checkpoint(
                asdict(self.raw_model.config), weights, self.step, self.samples_seen, val_loss,
                self.best_val_loss, asdict(self.config), state, self.scaler.state_dict(),
                self.data.tokenizer.to_dict(), self.environment, lora, self.seconds,
                self.best_step))

    def loop(self):
        """Train until the budget or the patience is used up, or a signal."""
        config, run = self.config, self.run
        with StepLog(config, run.log, self.raw_model, self.device, self.dtype, self.data.train,
                     self.step, self.val_loss) as self.log:
            while True:
                done = self.schedule_step() >= config.max_iters or config.eval_only
                self.evaluate_and_save(done)
                if done or self.stop or self.out_of_patience():
                    break
                start = time.perf_counter()
                self.train_step()
                self.log.flush_if_due(self.step, self.seconds)
                self.stop, self.saves_requested, self.seconds = run.signals.exchange(
                    self.seconds + time.perf_counter() - start)
                run.saver.check()
        with main_process_first():  # torchrun ends all processes when one fails: wait for the save
            run.saver.wait()

    def resume(self, checkpoint, given):
        """Continue from a checkpoint of this run. Raises UserError if it does not fit."""
        self.step, self.samples_seen = checkpoint.step, checkpoint.samples_seen
        self.seconds, self.best_step = checkpoint.seconds, self.step
        data, best = self.environment['data'], checkpoint.best_val_loss
        if best is not None and checkpoint.environment.get('data', data) == data:
            self.best_val_loss = self.best_saved_loss = best  # on other data they do not compare
            self.best_step = self.step if checkpoint.best_step is None else checkpoint.best_step
            self.val_loss = checkpoint.val_loss
        self.resumed = self.step, checkpoint.val_loss is not None
        other_data = 'dataset' in given and resume.names_other_data(self.config, checkpoint)
        resume.check_environment(checkpoint, self.environment, self.data, other_data,
                                 note=self.optimizer is not None)
        if self.optimizer:
            load_lora(self.raw_model, checkpoint)
            resume.load_optimizer(self.optimizer, self.scaler, checkpoint)

    def wrap(self, parallel, compiled):
        """Wrap in DDP, compile, find a micro-batch that fits into memory. compiled: whether
        torch.compile works; FSDP's blocks are compiled already."""
        config, raw_model = self.config, self.raw_model
        half = self.dtype != torch.float32
        sizes = memory.Sizes(raw_model.config, self.device, config.lora_rank, config.lora_dropout)
        gpu_memory = devices.total_memory(self.device)
        raw_model.max_logits = max_logits(gpu_memory)
        parts = memory.step_bytes(sizes, config, half, parallel, world_size(), gpu_memory)
        print0(memory.describe_memory(parts, self.device))
        if self.device.type == 'cpu':  # on a GPU the micro-batch is cut until it fits
            memory.require_memory(sum(parts.values()), self.device, 'a step', 'lower --batch_size '
                                  'and raise --gradient_accumulation_steps by as much')
        ddp = parallel == 'ddp' and not config.deterministic_sum
        if ddp:  # before compiling, so that reduction overlaps with backward
            self.model = distributed.wrap_ddp(raw_model, self.device, compiled)
        self.sync = distributed.GradientSync(self.model, self.scaler)

        def dry_run(model, last=False):
            """A step that changes nothing but takes the memory of one."""
            # the second micro-batch adds to existing gradients
            n = min(distributed.micro_batches_per_process(config), 2)
            try:
                for micro_step in range(n):
                    self.sync.begin(last and micro_step == n - 1)
                    x, y = self.data.train.batch(0, config.batch_size, config.seed)
                    loss = self.loss_of(model, *devices.to_device(x, y, self.device))
                    self.scaler.scale(loss).backward()
                if last or parallel != 'ddp':  # else one out of memory would leave others waiting
                    finite = torch.zeros((), dtype=torch.bool, device=self.device)
                    self.optimizer.step_if_finite(finite)
            finally:
                raw_model.zero_grad(set_to_none=True)
                if parallel == 'fsdp':  # after an error it would take the next step for this one
                    raw_model.reset_iter_state()

        if config.dropout == 0 and not torch.are_deterministic_algorithms_enabled():
            devices.use_flash_attention_3(self.device)
        if config.auto_batch_size:
            devices.grow_batch(self.model, config, self.device, dry_run)
        if compiled and parallel != 'fsdp':
            self.model = torch.compile(self.model, dynamic=False)
            if self.device.type == 'cuda':
                self.optimizer.orthogonalize = torch.compile(orthogonalize, dynamic=False)
        devices.shrink_batch(self.model, config, self.device, dry_run, compiled)
        self.accumulation = distributed.micro_batches_per_process(config)
        if ddp:
            # DDP rebuilds its buckets after the first reduction: now, so that a resumed run sums
            # in the same order
            dry_run(self.model, last=True)
        elif config.deterministic_sum:
            self.sync = distributed.TreeSum(raw_model, self.scaler, self.accumulation)
            self.optimizer.shares_muon = False  # batches of other sizes may round differently
        self.batches = self.micro_batches()
        self.batch = next(self.batches)
        gc.collect()
        gc.freeze()  # what exists now stays: garbage collection need not look at it again


def load_checkpoint(run, config, given):
    """The Checkpoint to start from, or None; resuming sets the keys that are not given."""
    found = find(config.out_dir)
    if gather(ckpt.written_by_this_job(config.out_dir))[0]:
        print0(f'{config.out_dir}: torchrun has restarted the processes, the run continues')
        config.init_from = 'resume'
    if config.init_from == 'scratch':
        return None
    run.resuming = config.init_from == 'resume'
    if run.resuming:
        config.out_dir = str(found)
    where = config.out_dir if run.resuming else config.init_from
    with main_process_first():  # it may download
        if run.resuming and os.path.isdir(where):
            run.claim()
        checkpoint = ckpt.load(where, mmap=dist.is_initialized(), average_last=config.average_last)
    resume.check_same_checkpoint(checkpoint, where)
    print0(checkpoint.describe())
    if run.resuming:
        resume.take_saved_config(config, given, checkpoint)
        check(config)
    return checkpoint


def open_data(run, config, given, checkpoint):
    """(Dataset, fields of GPTConfig). Raises UserError if data, keys and checkpoint do not fit."""
    model_config = resume.choose_model_config(config, given, checkpoint, run.resuming)
    with main_process_first():  # it may prepare a small data set
        folder = bins.find_or_prepare(config.dataset)
    data = bins.open_dataset(folder, model_config['block_size'])
    resume.check_same_data(data, config.dataset)
    model_config |= resume.choose_data_config(config, given, checkpoint, data, run.resuming)
    if checkpoint:
        resume.check_same_tokenizer(checkpoint, data)
    return data, model_config


def build_model(config, checkpoint, data, model_config, device, dtype, compiled):
    """(model on the device, 'ddp', 'fsdp' or None): new, or with the checkpoint's weights.
    compiled: compile the blocks of FSDP."""
    torch.manual_seed(config.seed)
    if checkpoint is None:
        gpt_config = GPTConfig(**model_config, vocab_size=data.tokenizer.vocab_size)
        memory.require_model_fits(gpt_config, device, world_size(), training=not config.eval_only)
        with torch.device('meta'):  # no memory yet
            model = GPT(gpt_config)
    else:
        free = {key: getattr(config, key) for key in resume.FREE_KEYS}
        from_data = {key: model_config[key] for key in resume.DATA_KEYS}
        model = checkpoint.build_model(**free, **from_data)
        model.crop_block_size(model_config['block_size'])
        if config.lora_rank and not config.eval_only:
            add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    for key in resume.MODEL_KEYS:
        setattr(config, key, getattr(model.config, key))  # save and print what the run uses
    if devices.math_attention_is_faster(device, dtype, model.config.block_size):
        model.train_with_math_attention()
    parallel = None
    if dist.is_initialized() and not config.eval_only:
        size = 4 * model.get_num_params(False) + 12 * n_trained(model)  # bytes, with AdamW's state
        parallel = distributed.choose_parallel(config.parallel, size, devices.total_memory(device))
    if parallel == 'fsdp':
        if config.deterministic_sum:
            fail('deterministic_sum = True: needs --parallel=ddp')
        if config.sample_every_eval:
            print0('note: no process has the whole model, so sample_every_eval prints no samples; '
                   'sample.py does')
        distributed.wrap_fsdp(model, device, dtype, compiled)
    if config.deterministic_sum and world_size() & (world_size() - 1):
        fail(f'deterministic_sum = True: give 1, 2, 4, 8, ... processes, not {world_size()}')
    if checkpoint is None:
        distributed.init_weights(model, device)
    return model.to(device), parallel


def main(config, given):
    """Returns the exit code."""
    distributed.init_processes(config.backend)
    resume.check_same_config(config, given)
    with Run(config) as run:
        checkpoint = load_checkpoint(run, config, given)
        device = devices.start_device(config.device, config.deterministic)
        if config.auto_batch_size and device.type != 'cuda':
            fail(f'batch_size = auto: finds out what fits a GPU; on {device} give a number')
        distributed.micro_batches_per_process(config)  # raises if it is not an int
        memory.require_batch_fits(config)
        data, model_config = open_data(run, config, given, checkpoint)
        dtype = devices.pick_dtype(config.dtype, device, model_config['n_embd'])
        distributed.require_same({'device': device.type, 'dtype': devices.dtype_name(dtype)})
        compiled = not config.eval_only and devices.can_compile(config.compile, device)
        model, parallel = build_model(config, checkpoint, data, model_config, device, dtype,
                                      compiled)
        trainer = Trainer(config, run, data, model, device, dtype)
        if run.resuming:
            trainer.resume(checkpoint, given)
        if not config.eval_only:
            budget.set_max_iters(config, model.flops_per_token(), data.train.block_size,
                                 trainer.step, trainer.samples_seen)
        if run.resuming:
            resume.extend(config, checkpoint)
        checkpoint = None  # free its memory
        describe(trainer, given)
        with main_process_first():
            run.claim()
            resume.check_disk(run, model)
        if not config.eval_only:
            trainer.wrap(parallel, compiled)
        saver = ckpt.Saver(config.out_dir, config.keep_last, config.async_save,
                           copy=device.type != 'cpu')
        run.start(trainer.step, saver, trainer.schedule_step() < config.max_iters)
        trainer.loop()
        run.finish(trainer.stop)
        farewell(trainer)
        return 128 + trainer.stop if trainer.stop else 0


if __name__ == '__main__':
    try:
        with user_errors():
            code = main(config, given)
    except SystemExit as error:
        distributed.exit_process(error.code, failed=True)
    distributed.exit_process(code)
