"""Which device, which dtype, compiled or not: what 'auto' chooses."""
import contextlib
import ctypes
import importlib.util
import math
import os
import re
import sys
from fractions import Fraction

import torch
import torch.distributed as dist

from lib.distributed import (
    any_process,
    env_int,
    fail,
    gather,
    micro_batches_per_process,
    print0,
)
from lib.errors import UserError, first_line, plural, require

try:
    import resource
except ImportError:  # Windows
    resource = None

# dense FLOP/s of bf16 (V100, T4: fp16) matrix products, from NVIDIA's data sheets
PEAK_FLOPS = {'B200': 2250e12, 'GH200': 989e12, 'H200': 989e12, 'H100 PCIe': 756e12,
              'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12,
              'L4': 121e12, 'A40': 150e12, 'A30': 165e12, 'A10': 125e12, 'V100': 125e12,
              'T4': 65e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}
NAMES = 'give auto, cpu, cuda, cuda:1, ... or mps'


def pick_device(name):
    """torch.device for 'auto' (cuda, else mps, else cpu) or a name. Raises UserError."""
    if name == 'auto':
        available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
                     'cpu': True}
        name = next(name for name, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'device = {name!r}: {NAMES}') from None
    known = device.type in ('cuda', 'mps') or name == 'cpu'
    require(known, f'device = {name!r}: {NAMES}')
    remedy = 'leave --device=auto or use --device=cpu'
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device('cuda', device.index or 0)
        require(count > device.index,
                f'device = {name!r}: PyTorch sees {plural(count, "CUDA device")} here; {remedy}')
    require(device.type != 'mps' or torch.backends.mps.is_available(),
            f'device = {name!r}: PyTorch sees no Apple GPU here; {remedy}')
    return device


def start_device(name, deterministic):
    """torch.device of this process, set up; of several processes each has a GPU of its own.
    deterministic: True, False, or 'auto': on a CPU. Raises UserError."""
    device = pick_device(name)
    if deterministic == 'auto':
        deterministic = device.type != 'cuda'
    if device.type == 'cuda' and dist.is_initialized():
        n = torch.cuda.device_count()
        if n > 1 or 'LOCAL_RANK' in os.environ:  # unless each process sees its own GPU only
            remedy = f'start one process per GPU: torchrun --nproc_per_node={n}'
            device = torch.device('cuda', env_int('LOCAL_RANK', 0, n - 1, remedy))
    # same bits every time (PyTorch notes, "Reproducibility"); warn_only on CUDA would keep flash
    # attention's nondeterministic backward
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    # use_deterministic_algorithms does the same, but takes 2 s to import Inductor
    mode = 'error' if device.type == 'cuda' else 'warn'
    torch.set_deterministic_debug_mode(mode if deterministic else 'default')
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    elif sys.platform == 'linux':
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep what is freed for the next step: the kernel would zero it again, page by page,
    for a tenth of a step's time."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # musl has none
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no mmap for large arrays
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no heap is given back


def use_flash_attention_3(device):
    """FlashAttention 3 (Shah et al. 2024) in sdpa, on Hopper and where its package is installed. It
    has no dropout."""
    if device.type != 'cuda' or importlib.util.find_spec('flash_attn_interface') is None:
        return
    if torch.cuda.get_device_capability(device)[0] == 9:
        try:
            torch.nn.attention.activate_flash_attention_impl('FA3')
            torch.backends.cuda.enable_cudnn_sdp(False)  # which would come first
            print0('attention: FlashAttention 3')
        except Exception as error:  # built for another PyTorch
            print0(f'note: flash_attn_interface cannot be used: {first_line(error)}')


def pick_dtype(name, device, n_embd):
    """torch.dtype for 'auto' or a dtype's name.

    auto: bf16 where the hardware has it, else fp16 on CUDA and fp32 elsewhere. On a CPU narrow
    models stay in fp32: below n_embd = 128 faster products hardly pay for the conversions.
    """
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        return torch.bfloat16 if has_bfloat16(device.type) else torch.float16
    return torch.bfloat16 if has_bfloat16(device.type) and n_embd >= 128 else torch.float32


def dtype_name(dtype):
    """torch.bfloat16 -> 'bfloat16'"""
    return str(dtype).removeprefix('torch.')


def has_bfloat16(device_type):
    """Whether the hardware multiplies in bf16; emulated on a CPU it is 60 times slower than fp32.
    MPS, where that has not been measured: no."""
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != 'cpu':
        return False
    capabilities = cpu_capabilities()
    return any(capabilities.get(name) for name in ('amx_bf16', 'avx512_bf16', 'bf16'))  # bf16: ARM


def cpu_capabilities():
    """{name: whether this CPU has it}, or some of them."""
    if hasattr(torch.cpu, 'get_capabilities'):
        return torch.cpu.get_capabilities()
    return {'avx512_bf16': torch.cpu._is_avx512_bf16_supported(),  # PyTorch 2.9
            'amx_bf16': torch.cpu._is_amx_tile_supported(),
            'avx512_vnni': torch.cpu._is_vnni_supported()}


def math_attention_is_faster(device, dtype, T):
    """Whether training on T tokens takes less time with math_attention than with sdpa.

    On a CPU in bf16 it takes two thirds of the fused kernel's time up to 256 tokens (PyTorch 2.13;
    in fp32 1.3 times). It rounds the scores to bf16 too, without a visible difference in the loss.
    """
    return device.type == 'cpu' and dtype == torch.bfloat16 and T <= 256


def autocast(device, dtype):
    """Matrix products in dtype; weights stay in fp32, and their copies in dtype are not kept."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype, cache_enabled=False)


def to_device(x, y, device):
    """Two numpy arrays as tensors on the device; on CUDA the copy overlaps with computation."""
    x, y = torch.from_numpy(x).contiguous(), torch.from_numpy(y).contiguous()
    if device.type != 'cuda':
        return x.to(device), y.to(device)
    x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def device_name(device):
    """The hardware's name: other hardware may round differently."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


def peak_flops(device, dtype):
    """The device's peak FLOP/s for half-precision matrix products; None if unknown."""
    if device.type != 'cuda' or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((p for model, p in PEAK_FLOPS.items() if re.search(rf'\b{model}\b', name)), None)


def can_compile(choice, device):
    """Whether to use torch.compile, True, False, or 'auto': on CUDA. All processes agree: if a tiny
    function fails to compile in one, it prints why and none compiles."""
    if not (choice is True or choice == 'auto' and device.type == 'cuda'):
        return False
    print0('compiling the model: this takes up to a minute')
    torch.use_deterministic_algorithms(  # tell Inductor too
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled())
    reason = None
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # no compiler on the machine, an unsupported platform, ...
        reason = error
    return not compile_failed(reason)


def compile_failed(error):
    """Whether torch.compile failed in any process, with an error or None in this one. Then all of
    them go on without it."""
    reason = error and f'{type(error).__name__}: {first_line(error)[:150]}'
    reasons = [text for text in gather(reason) if text]
    if reasons:
        print0(f'torch.compile failed, going on without it: {reasons[0]}')
        torch.compiler.set_stance('force_eager')
    return bool(reasons)


def fits(model, dry_run, compiled=False):
    """Whether dry_run(model) has enough memory in all processes. compiled: where compiling fails,
    try without."""
    error, out_of_memory = None, False
    try:
        dry_run(model)
    except torch.OutOfMemoryError:
        out_of_memory = True
    except UserError:
        raise
    except Exception as e:
        if not compiled:
            raise
        error = e.with_traceback(None)  # whose frames hold the memory of the attempt
    if compiled and compile_failed(error):
        return fits(model, dry_run)
    return not any_process(out_of_memory)


def resize_batch(config, factor):
    """Multiply batch_size by a Fraction; the samples of a step and of an evaluation stay."""
    config.batch_size = int(config.batch_size * factor)
    config.gradient_accumulation_steps = int(config.gradient_accumulation_steps / factor)
    if config.eval_iters > 0:
        config.eval_iters = math.ceil(config.eval_iters / factor)


def grow_batch(model, config, device, dry_run):
    """--batch_size=auto: double it, as long as that divides a process's micro-batches and fits."""
    while micro_batches_per_process(config) % 2 == 0:
        resize_batch(config, Fraction(2))
        with torch.compiler.set_stance('force_eager'):  # which takes more memory
            fitting = fits(model, dry_run)
        free_memory(device)
        if not fitting:
            resize_batch(config, Fraction(1, 2))
            break
    print0(f'batch_size = {config.batch_size}, gradient_accumulation_steps = '
           f'{config.gradient_accumulation_steps}')


def shrink_batch(model, config, device, dry_run, compiled):
    """dry_run(model). As long as the micro-batch is too large for any process, cut it into several:
    the step keeps its samples. Raises UserError if one sequence is too large."""
    while not fits(model, dry_run, compiled):
        size = config.batch_size
        if size == 1:
            fail('out of memory with a single sequence: lower --block_size or the size of the '
                 'model, or give --activation_checkpointing')
        parts = next(n for n in range(2, size + 1) if size % n == 0)
        resize_batch(config, Fraction(1, parts))
        print0(f'out of memory with batch_size = {size}: going on with {config.batch_size}, and '
               f'{parts} times as many gradient_accumulation_steps; the samples of a step stay the '
               f'same (--activation_checkpointing saves memory too)')
        torch.compiler.reset()
        free_memory(device)


def free_memory(device):
    """Give the memory of a failed attempt back to other processes and other sizes."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def peak_memory(device):
    """Most bytes so far: allocated on a GPU, else resident in this process (0 on Windows)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    kilobyte = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte if resource else 0


def total_memory(device):
    """A GPU's memory in bytes; None for other devices."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
