"""The processes of a run and what they tell one another: who goes first, whether to stop, the loss of a step.

One process is a run too: then nothing is sent.
"""
import contextlib
import os
import signal
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError


def start_group(backend):
    """Join the other processes if torchrun started this one -> (rank, number of processes). backend: auto, nccl or gloo."""
    if 'RANK' not in os.environ:
        return 0, 1
    # gloo beside nccl: what is on the CPU, such as the wish to stop, is exchanged without the GPU
    dist.init_process_group({'auto': None, 'gloo': 'gloo', 'nccl': 'cpu:gloo,cuda:nccl'}[backend])
    return dist.get_rank(), dist.get_world_size()


def leave(code):
    """End this process. One of several skips the interpreter's own end, in which gloo's threads, which DDP keeps alive, now and
    then abort a process that has done its work.
    """
    if dist.is_initialized():
        dist.destroy_process_group()  # only here: after an error of one process it would wait for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def make_say(main_process):
    """print for the main process, above the progress bar. A reader that has gone (train.py | head) does not stop training."""
    sys.stdout.reconfigure(line_buffering=True)

    def say(text):
        try:
            tqdm.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return say if main_process else lambda text: None


def any_process(flag):
    """Whether any process says yes."""
    flag = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def fail(message):
    """End all processes, which have all come here: the main process raises UserError, the others leave it to say why."""
    if dist.is_initialized() and dist.get_rank() > 0:
        sys.exit(2)
    raise UserError(message)


@contextlib.contextmanager
def main_process_first(rank):
    """What may write, download or prepare something is done by one process, then by the others, who find it done."""
    if rank > 0 and any_process(False):  # waits for the main process
        sys.exit(2)  # it says why
    failed = rank == 0
    try:
        yield
        failed = False
    finally:
        if rank == 0:
            any_process(failed)


class Signals:
    """SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) ask to save and stop after the step that is running, or in the
    midst of an evaluation; Ctrl-C again stops at once. SIGUSR1 asks to save and go on.
    """

    def __init__(self, catch=True):
        self.stop = 0  # the signal's number
        self.saves = 0  # asked for so far
        if not catch:
            return
        for name, receive in (('SIGINT', self.ask_stop), ('SIGTERM', self.ask_stop), ('SIGHUP', self.ask_stop),
                              ('SIGUSR1', self.ask_save)):
            number = getattr(signal, name, None)  # Windows has not all of them; nohup ignores SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, receive)

    def ask_stop(self, number, frame):
        self.stop = number
        again = b''
        if number == signal.SIGINT:  # the others may well come twice: from a scheduler, and again from torchrun
            signal.signal(number, signal.SIG_DFL)
            again = b'; Ctrl-C again stops at once, without saving'
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, b'\nstopping after this step' + again + b'\n')

    def ask_save(self, number, frame):
        self.saves += 1


def exchange(signals):
    """One small exchange a step, of the CPUs alone -> (signal to stop by or 0, saves asked for so far), for all processes."""
    stops, saves = [signals.stop], [signals.saves]
    if dist.is_initialized():
        own = torch.tensor([signals.stop, signals.saves])
        shares = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, own)
        stops, saves = zip(*(share.tolist() for share in shares))
    return max(stops), sum(saves)


def mean_of_processes(value):
    """The mean of a tensor over the processes; on a GPU nothing waits for it."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def gather(value):
    """The values of all processes, in a list by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
