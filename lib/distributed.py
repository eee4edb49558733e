"""Several processes: who goes first, DDP and FSDP2, sums of gradients. A single process works too.

torchrun starts the processes. FSDP is imported lazily: that takes a second.
"""
import contextlib
import os
import re
import shutil
import sys
import textwrap
import time
import uuid
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.errors import UserError, first_line, require, shorten

VARIABLES = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


def init_processes(backend):
    """Join the other processes if torchrun started this one. backend: auto, nccl or gloo. Raises
    UserError."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        if len(missing) < len(VARIABLES):
            print0(f'note: one process: torchrun, which starts several, would also set '
                   f'{", ".join(missing)}')
        return
    n = env_int('WORLD_SIZE', 1, 10**6, 'torchrun sets it')
    number = env_int('RANK', 0, n - 1, f'WORLD_SIZE = {n} processes are counted from 0')
    host, port = os.environ['MASTER_ADDR'], env_int('MASTER_PORT', 1, 65535, 'give a free port')
    # gloo in addition to nccl: CPU values, such as signals, are exchanged without the GPU
    backends = {'auto': None, 'gloo': 'gloo', 'nccl': 'cpu:gloo,cuda:nccl'}
    store = None  # rank 0 starts one
    try:
        if n == 1:  # nobody to meet
            store = dist.HashStore()
        elif os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            store = agent_store(host, port, number, n)
        dist.init_process_group(backends[backend], store=store, rank=number, world_size=n)
    except (RuntimeError, ValueError) as error:
        require(isinstance(error, dist.DistNetworkError),
                f'backend = {backend!r}: {first_line(error)}; give another --backend')
        raise UserError(f'MASTER_ADDR = {host!r}, MASTER_PORT = {port}: {first_line(error)}; give '
                        f'a free port of a host that all processes reach') from None


def env_int(name, low, high, remedy):
    """An environment variable that holds an int from low to high. Raises UserError."""
    text = os.environ.get(name, '')
    require(re.fullmatch('[0-9]{1,9}', text) and low <= int(text) <= high,
            f'{name} = {shorten(text)} is not a number from {low} to {high}: {remedy}')
    return int(text)


def agent_store(host, port, rank, world_size):
    """torchrun's store, under a prefix that only the processes of this attempt know.

    The store outlives a restart and still has the addresses of dead processes (pytorch issue
    135712); TORCHELASTIC_RESTART_COUNT differs between hosts. So rank 0 draws a token and
    answers the others: nobody answers those who have read the token of an earlier attempt.
    """
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=30))
    if rank == 0:
        token = uuid.uuid4().hex
        store.set('plaingpt/token', token)
        for other in range(1, world_size):
            nonce = store.get(f'{token}/{other}').decode()  # waits
            store.set(f'{token}/{nonce}', 'welcome')
        return dist.PrefixStore(token, store)
    nonce, welcome = uuid.uuid4().hex, False
    while not welcome:
        token = store.get('plaingpt/token').decode()
        store.set(f'{token}/{rank}', nonce)
        time.sleep(0.1)
        welcome = store.check([f'{token}/{nonce}'])
    return dist.PrefixStore(token, store)


def exit_process(code, failed=False):
    """Exit. One of several processes skips the interpreter's shutdown, in which gloo's threads
    sometimes abort."""
    if not dist.is_initialized():
        sys.exit(code)
    if not failed:  # it would wait for the other processes
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text, wrap=True, indent='  '):
    """Print on the main process, above its progress bar. wrap: break no word in a terminal, and
    continue a line after indent."""
    if rank() > 0:
        return
    if wrap and sys.stdout.isatty():
        fold = partial(textwrap.fill, width=shutil.get_terminal_size().columns,
                       subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        text = '\n'.join(map(fold, text.split('\n')))
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:  # a closed pipe (train.py | head) does not stop training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message):
    """End all processes, which all call this: the main process raises UserError(message)."""
    if rank() > 0:
        sys.exit(2)
    raise UserError(message)


def any_process(flag):
    """Whether flag is true in any process. All processes call it."""
    flag = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


@contextlib.contextmanager
def main_process_first():
    """The main process runs the block, which may write or download; then the others run it."""
    if rank() > 0 and any_process(False):  # waits for the main process
        sys.exit(2)  # which has reported its error
    failed = rank() == 0
    try:
        yield
        failed = False
    finally:
        if rank() == 0:
            any_process(failed)


def gather(value):
    """The values of all processes, by rank. All processes call it."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def require_same(values):
    """End all processes, which all call this, unless they have the same values, {name: text}."""
    everywhere = gather(values)
    for name, text in everywhere[0].items():
        for number, others in enumerate(everywhere):
            if others.get(name) != text:
                fail(f'{name} = {text} on rank 0 but {others.get(name)} on rank {number}: start '
                     f'all processes with the same keys, code and kind of device')


def all_reduce(x):
    """x, summed in place over the processes, which all call this."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_ints(*values):
    """[values] of all processes, by rank, of ints in one small exchange between the CPUs. All
    processes call it."""
    if not dist.is_initialized():
        return [values]
    gathered = torch.empty(world_size(), len(values), dtype=torch.long)
    dist.all_gather(list(gathered), torch.tensor(values))
    return gathered.tolist()


def map_shared(function, x):
    """function(x), (n, ...) -> (n, ...), which treats each x[i] alone. x is the same in all
    processes, which all call this: each computes its share, and they gather the results."""
    n = world_size()
    if n == 1:
        return function(x)
    each = -(-len(x) // n)
    mine = x[rank() * each:(rank() + 1) * each]
    if len(mine) < each:  # the last processes
        mine = torch.cat((mine, x.new_zeros(each - len(mine), *x.shape[1:])))
    part = function(mine).contiguous()
    whole = part.new_empty(n * each, *part.shape[1:])
    dist.all_gather(list(whole.chunk(n)), part)
    return whole[:len(x)]


def micro_batches_per_process(config):
    """Gradient accumulation steps of each process. Raises UserError if that is not an int."""
    total, n = config.gradient_accumulation_steps, world_size()
    if total % n:
        choices = f'{total // n * n} or ' * (total > n) + f'{(total // n + 1) * n}'
        fail(f'gradient_accumulation_steps = {total} is not divisible by the {n} processes: '
             f'try {choices}, and a batch_size that keeps the tokens of a step')
    return total // n


def job():
    """torchrun's name for a job (--rdzv_id), the same when it restarts the processes; or None."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    return None if name == 'none' else name


def choose_parallel(parallel, size, memory):
    """'ddp' or 'fsdp'. auto: fsdp if weights, gradients and AdamW's state would fill half of a GPU.
    size: of all three, memory: of the GPU, both in bytes; None: not a GPU."""
    if parallel != 'auto':
        return parallel
    return 'fsdp' if memory and size > memory / 2 else 'ddp'


def wrap_fsdp(model, device, dtype, compile):
    """Shard parameters, gradients and optimizer state (Zhao et al. 2023), in place, in torchtitan's
    order: compile each block, shard each block, then the rest.

    A block is gathered in dtype while it runs, its gradients are reduced in fp32; embeddings, head
    and the last norm stay in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow, like the next one
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.transformer.h:
        if compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def wrap_ddp(model, device, compiled):
    config = model.config
    if compiled and (config.activation_checkpointing or config.eot_token is not None):
        # torch.compile splits its graph where a bucket of gradients is full, but not one with
        # recomputed blocks: it gives nan there (PyTorch 2.13), or fails with flex attention
        import torch._dynamo  # slow

        torch._dynamo.config.optimize_ddp = False
    ids = [device.index] if device.type == 'cuda' else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@torch.no_grad()
def init_weights(model, device):
    """Give a model on the meta device the initial weights of GPT(config), on device. Each is drawn
    whole on the CPU, then sharded: no process ever holds the whole model."""
    weights = {}
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        model.init_weight(name, whole)
        weights[p] = torch.nn.Parameter(shard_like(whole.to(device), p))
    tied = model.named_parameters(remove_duplicate=False)
    model.load_state_dict({name: weights[p] for name, p in tied}, assign=True)


def is_shard(tensor):
    return hasattr(tensor, 'device_mesh')  # a DTensor, without importing its module


def local(tensor):
    """This process's part of a tensor: all of it, unless it is a shard."""
    return tensor.to_local() if is_shard(tensor) else tensor


def full(tensor):
    """All of a tensor, on every process. All processes call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def gather_on_main(value):
    """Gather the shards in nested dicts and lists, one by one, on the main process's CPU; None
    replaces them elsewhere. All processes call it."""
    if is_shard(value):
        tensor = value.full_tensor()
        return tensor.cpu() if rank() == 0 else None
    if isinstance(value, dict):
        return {k: gather_on_main(v) for k, v in value.items()}
    return [gather_on_main(v) for v in value] if isinstance(value, list) else value


def gather_like(part, like):
    """All of a tensor whose local part is given, sharded like `like`. All processes call it."""
    if not is_shard(like):
        return part
    from torch.distributed.tensor import DTensor  # slow

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride()).full_tensor()


def shard_like(tensor, like):
    """This process's shard of a whole tensor, if `like` is one; nothing is sent."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class GradientSync:
    """Sums gradients over the micro-batches of a step, and over processes: DDP in the last
    backward, FSDP in each, so that no GPU ever holds all gradients."""

    def __init__(self, model, scaler):
        """model: wrapped by DDP or FSDP, or of a single process. scaler: the GradScaler."""
        self.model, self.scaler, self.losses = model, scaler, []
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.factor = world_size()  # DDP and FSDP average over the processes

    def begin(self, last):
        """Before each forward. last: of the step's micro-batches in this process."""
        self.last = last
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last

    def scale(self, fraction):
        """The factor on the mean loss of a micro-batch with this fraction of the step's targets."""
        self.fraction = fraction
        return fraction * self.factor

    def add(self, loss, measures=None):
        """After each backward; loss: scaled. measures: of measure_first, or None."""
        if measures == {} and not self.last:  # the last gradient is that of the whole step
            self.measure_first(measures)
        self.losses.append(loss.detach())

    def finish(self):
        """After the last backward: the mean loss of the step, on the device."""
        loss, self.losses = torch.stack(self.losses).sum(), []
        return all_reduce(loss) / world_size()

    def measure_first(self, measures):
        """Put into the dict measures what lib.step_log.noise_estimates needs: first_sq, the squared
        norm of what the first micro-batch adds to the gradient of the step, its fraction of the
        targets, and that squared. Each process has a first one, over which they are summed; FSDP
        has summed their gradients already: then they are one micro-batch. No host sync."""
        grads = [p.grad for p in self.params if p.grad is not None]
        sharded = is_shard(grads[0])
        norm = torch.nn.utils.get_total_norm([local(grad) for grad in grads])
        scale = self.scaler.scale(norm.new_full((), 1 if sharded else self.factor))
        fraction = norm.new_full((), self.fraction)
        sums = torch.stack(((norm / scale)**2, fraction, fraction**2))
        all_reduce(sums)
        measures |= {'first_sq': sums[0], 'fraction': sums[1],
                     'fraction_sq': sums[1]**2 if sharded else sums[2]}


class TreeSum(GradientSync):
    """--deterministic_sum: one balanced tree of sums over micro-batches and processes, the same for
    1, 2, 4, ... processes, so that the sums are bitwise equal."""

    def __init__(self, model, scaler, n_leaves):
        """n_leaves: micro-batches of a step in this process."""
        super().__init__(model, scaler)
        self.factor = 1
        self.joins = joins(n_leaves)
        self.nodes, self.n = [], 0

    def add(self, loss, measures=None):
        """Move the gradients of a micro-batch from the model into the tree."""
        if measures == {}:
            self.measure_first(measures)
        self.nodes.append([*(p.grad for p in self.params), loss.detach()])
        for _ in range(self.joins[self.n]):
            right = self.nodes.pop()
            torch._foreach_add_(self.nodes[-1], right)
        self.n += 1
        for p in self.params:
            p.grad = None

    def finish(self):
        """Put the sums over all processes into the model's gradients; returns the loss."""
        total = self.nodes.pop()
        self.n = 0
        if world_size() > 1:
            flat = sum_over_processes(torch.cat([x.flatten() for x in total]))
            parts = flat.split([x.numel() for x in total])
            total = [part.view_as(x) for part, x in zip(parts, total)]
        for p, gradient in zip(self.params, total):
            p.grad = gradient
        return total[-1]


def sum_over_processes(x):
    """All-reduce in a tree: neighbors first, as in the tree of one process; a + b is b + a."""
    distance = 1
    while distance < world_size():
        partner = rank() ^ distance
        theirs = torch.empty_like(x)
        send, receive = dist.P2POp(dist.isend, x, partner), dist.P2POp(dist.irecv, theirs, partner)
        for request in dist.batch_isend_irecv([send, receive]):
            request.wait()
        x += theirs
        distance *= 2
    return x


def joins(n):
    """How many times the last two nodes are joined after each of n leaves of a balanced tree."""
    if n == 1:
        return [0]
    left, right = joins(n // 2), joins(n - n // 2)
    return [*left, *right[:-1], right[-1] + 1]
