"""Losses and speed of steps, for log.jsonl and for the screen."""
import contextlib
import math
import shutil
import sys
import time
from collections import deque

import torch
from tqdm import tqdm

from lib.budget import schedule_step
from lib.device import peak_flops, peak_memory
from lib.distributed import fail, gather, print0, world_size
from lib.errors import duration
from lib.run import read_log

N_AVERAGED = 20  # log lines over which the gradient noise scale and the pace are averaged


class StepLog(contextlib.AbstractContextManager):
    """Losses and speed of steps, for log.jsonl and for stdout: in a terminal one line that is
    redrawn, else a line at each log interval."""

    def __init__(self, config, log, model, device, dtype, data, step, val_loss=None):
        """log: a Log on the main process, else None. data: the TokenBin of the training split.
        step: the first one to come. val_loss: of the checkpoint resumed from."""
        self.config, self.log, self.device, self.data = config, log, device, data
        self.samples_per_step = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = self.samples_per_step * data.block_size
        self.flops_per_token = model.flops_per_token()
        self.peak_flops = config.peak_flops or peak_flops(device, dtype)
        self.fp16 = dtype == torch.float16
        # (step, its first sample, lr, {name: number} of measures, CPU tensor of loss, gradient
        # norm and losses, CUDA event)
        self.pending = []
        self.lag = int(device.type == 'cuda')  # steps
        self.skips = 0  # consecutive steps that were not finite
        lines = read_log(config.out_dir) if log else []  # a resumed run goes on averaging
        self.noise = deque(((line['grad_signal'], line['grad_noise'])
                            for line in lines if 'grad_noise' in line), maxlen=N_AVERAGED)
        self.pace = deque(maxlen=N_AVERAGED)  # (steps, seconds) of the last lines
        # the last evaluation's line: the log ends before the one of the checkpoint
        self.evaluation = next((line for line in reversed(lines) if line.get('val_loss')), {})
        if val_loss is not None:
            self.evaluation = self.evaluation | {'val_loss': val_loss}
        self.text = ''
        self.seconds = 0.0  # of training, all in all
        self.bar = tqdm(total=1, bar_format=f'step {step}', miniters=0, leave=False,
                        file=sys.stdout, disable=None if log else True)
        self.reset_clock(step)

    def __exit__(self, *error):
        self.bar.close()

    def reset_clock(self, step):
        self.time, self.step = time.perf_counter(), step

    def measures(self, step):
        """An empty dict for what a step measures if it is logged, None at other steps."""
        return {} if step % self.config.log_interval == 0 else None

    def add(self, step, first_sample, lr, values, measures):
        """values: a tensor of the step's loss, its gradient norm and the losses of this process's
        micro-batches. measures: {name: 0-d tensor} or None. A GPU copies them while it computes the
        next step."""
        is_cuda, copied = values.device.type == 'cuda', None
        values = values.to('cpu', non_blocking=is_cuda)
        if measures:
            numbers = torch.stack(list(measures.values())).to('cpu', non_blocking=is_cuda)
            measures = dict(zip(measures, numbers))
        if is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.pending.append((step, first_sample, lr, measures, values, copied))

    def flush_if_due(self, step, seconds=0.0):
        """flush(), every log_interval steps. A GPU is still at work on the last step: its numbers
        come next time. step: how many are done. seconds: of training, all in all."""
        self.seconds = seconds
        if (step - 1 - self.lag) % self.config.log_interval == 0:
            self.flush(self.lag)
        if self.text and not self.bar.disable:
            self.draw(step)

    def flush(self, launched=0):
        """Log all steps since the last call, but the last `launched`. Raises UserError if one was
        not finite and is not to be skipped; its update was a no-op."""
        ended = self.pending[:len(self.pending) - launched]
        if not ended:
            return
        self.pending = self.pending[len(ended):]
        last_step, *_, copied = ended[-1]
        if copied is not None:
            copied.synchronize()
        done = last_step + 1
        all_values = torch.stack([values for *_, values, _ in ended]).tolist()
        seconds = time.perf_counter() - self.time
        self.pace.append((done - self.step, seconds))
        speed = (done - self.step) * self.tokens_per_step / seconds
        for entry, (loss, grad_norm, *losses) in zip(ended, all_values):
            step, first_sample, lr, measures, *_ = entry
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            self.skips = 0 if finite else self.skips + 1
            if not finite:
                self.handle_nonfinite(step, first_sample, loss, grad_norm, losses)
            if self.log and (not finite or step % self.config.log_interval == 0):
                samples_seen = first_sample + self.samples_per_step
                line = {'step': step, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm,
                        'tokens_per_second': round(speed, 1), 'samples_seen': samples_seen,
                        'epoch': samples_seen / self.data.n_samples,
                        'peak_memory': peak_memory(self.device)}
                if finite:
                    line |= self.measured(measures, grad_norm)
                else:
                    line['skipped'] = True
                self.log.write(line)
                self.show(step, loss, speed)
                self.reset_clock(done)

    def measured(self, measures, grad_norm):
        """Update ratios and the gradient noise scale, where it is known."""
        line = {name: x.item() for name, x in measures.items()}
        first = [line.pop(name, 1) for name in ('first_sq', 'fraction', 'fraction_sq')]
        if first[1] - first[2] > 1e-6:  # not the whole step
            estimates = noise_estimates(grad_norm, self.tokens_per_step, *first)
            self.noise.append(estimates)
            signal, noise = map(math.fsum, zip(*self.noise))
            line |= zip(('grad_signal', 'grad_noise'), estimates)
            line['noise_scale'] = noise / signal if signal > 0 else math.inf
        return line

    def show(self, step, loss, speed):
        val = self.evaluation.get('val_loss')
        self.text = f'loss {loss:.4f}, ' + (f'val {val:.4f}, ' if val is not None else '')
        self.text += f'{tqdm.format_sizeof(speed)} tokens/s, '
        if self.peak_flops:
            mfu = self.flops_per_token * speed / (self.peak_flops * world_size())
            self.text += f'mfu {mfu:.1%}, '
        if self.bar.disable:
            print0(f'step {step}: {self.text}{duration(self.seconds_left(step + 1))} left')

    def draw(self, step):
        """Redraw the line of a terminal, at most every 0.1 s; the bar takes what room there is."""
        count, text = f'step {step}', f'{self.text}{duration(self.seconds_left(step))} left'
        if self.config.max_minutes is None:
            count = f'{step}/{self.config.max_iters}'
        self.bar.ncols = shutil.get_terminal_size().columns - 1  # Windows would wrap a full line
        room = self.bar.ncols - len(count + text)
        self.bar.bar_format = f'{count}{" {bar} " if room > 9 else " "}{text}'
        share = schedule_step(self.config, step, self.seconds) / self.config.max_iters
        self.bar.update(share - self.bar.n)

    def seconds_left(self, step):
        """Until the budget is used up, evaluations included, at the pace of the last lines."""
        config, (steps, seconds) = self.config, map(sum, zip(*self.pace))
        if config.max_minutes is None:
            steps_left = config.max_iters - step
            left = steps_left * seconds / steps
        else:
            left = max(0.0, 60 * config.max_minutes - self.seconds)
            steps_left = left * steps / seconds
        every, end = config.eval_interval, step + steps_left
        n_evaluations = math.ceil(end / every) - math.ceil(step / every) + 1
        return left + n_evaluations * self.evaluation.get('seconds', 0)

    def handle_nonfinite(self, step, first_sample, loss, grad_norm, losses):
        """Report the samples that made a step's loss or gradient infinite or nan.

        losses: of this process's micro-batches. Raises UserError unless such steps are skipped. An
        fp16 overflow is expected (the scaler backs off) unless it keeps happening.
        """
        config = self.config
        finite = [math.isfinite(value) for value in sum(gather(losses), [])]
        if all(finite):
            first, n = first_sample, self.samples_per_step
            reason = f'gradient norm is {grad_norm}'
        else:
            first, n = first_sample + finite.index(False) * config.batch_size, config.batch_size
            reason = f'loss is {loss}'
        fault = f'step {step}: the {reason} in samples {first} to {first + n - 1}'
        overflow = self.fp16 and math.isfinite(loss)
        if (config.nonfinite == 'skip' or overflow) and self.skips <= config.max_skips:
            print0(f'{fault}: skipped')
            return
        advice = f'raise --max_skips={config.max_skips}'
        if self.skips == 1:
            advice = 'skip such steps with --nonfinite=skip'
        fail(f'{fault}; the weights were not updated, and checkpoints in {config.out_dir} are '
             f'kept: lower --learning_rate, or {advice}')


def noise_estimates(grad_norm, n_tokens, first_sq, fraction, fraction_sq):
    """Unbiased estimates of |G|^2 and tr(Sigma): G is the true gradient, Sigma the covariance of
    that of a token (McCandlish et al. 2018, appendix A.1).

    The gradient of n tokens has a squared norm of |G|^2 + tr(Sigma) / n on average. The first
    micro-batch has the fraction f of the step's n_tokens and adds first_sq = f^2 |G|^2 + f
    tr(Sigma) / n_tokens; with one per process f, f^2 and first_sq are sums over them.
    """
    signal = (fraction * grad_norm**2 - first_sq) / (fraction - fraction_sq)
    return signal, n_tokens * (grad_norm**2 - signal)
