"""Which device, which number format, compiled or not: the choices behind 'auto', in one place."""
import contextlib
import os
import re
import sys

import torch

from configurator import UserError, first_line, require

# dense FLOP/s of bf16 (V100, T4: fp16) matrix products, from NVIDIA's data sheets
PEAK_FLOPS = {'B200': 2250e12, 'GH200': 989e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
              'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A40': 150e12, 'A30': 165e12, 'A10': 125e12,
              'V100': 125e12, 'T4': 65e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def pick_device(name):
    """torch.device for 'auto' (cuda, else mps, else cpu) or a device's name. Raises UserError if it is not there."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'device = {name!r}: give auto, cpu, cuda, cuda:1, ... or mps') from None
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device('cuda', device.index or 0)
        require(count > device.index, f'device = {name!r}: PyTorch sees {count} CUDA devices here; leave --device=auto '
                                             f'or use --device=cpu')
    else:
        require(device.type in ('cpu', 'mps'), f'device = {name!r}: give auto, cpu, cuda, cuda:1, ... or mps')
        require(device.type != 'mps' or torch.backends.mps.is_available(), f'device = {name!r}: PyTorch sees no Apple GPU '
                                                                           f'here; leave --device=auto or use --device=cpu')
    return device


def pick_dtype(name, device, n_embd):
    """torch.dtype for 'auto' or a dtype's name. auto: bfloat16 where the hardware has it, else float16 on CUDA, else float32.

    On a CPU narrow models stay in float32: up to n_embd = 128 the conversions cost more than the faster products save.
    """
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        return torch.bfloat16 if has_bfloat16(device.type) else torch.float16
    return torch.bfloat16 if has_bfloat16(device.type) and n_embd > 128 else torch.float32


def has_bfloat16(device_type):
    """Whether the hardware multiplies in bfloat16; PyTorch does it without, on a CPU 60 times slower than in float32. MPS, where
    that has not been measured: no.
    """
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device_type == 'cpu' else {}
    return any(cpu.get(name) for name in ('amx_bf16', 'avx512_bf16', 'bf16'))  # of x86, x86 and ARM


def autocast(device, dtype):
    """Matrix products in dtype; the weights stay in fp32, and their copies in dtype live no longer than they are needed."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype, cache_enabled=False)


def make_deterministic(wanted, device):
    """Kernels that give the same bits every time (PyTorch notes, "Reproducibility")."""
    if wanted:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    # on CUDA warn_only would leave flash attention's backward as it is, which adds in any order
    torch.use_deterministic_algorithms(wanted, warn_only=device.type != 'cuda')
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def describe(device):
    """The hardware behind a device, by name: other hardware may round in another way."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else torch.backends.cpu.get_cpu_capability()


def peak_flops(device, dtype):
    """The device's peak in FLOP/s for half-precision matrix products; None if it is not known."""
    if device.type != 'cuda' or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_FLOPS.items() if re.search(rf'\b{model}\b', name)), None)


def compile_or_not(model, choice, device, first_step, say):
    """torch.compile(model) if choice is True, or 'auto' on CUDA, after first_step(model) has run forward and backward once.

    Compiling happens in that step; if it fails, one line says why and the plain model is returned.
    """
    if choice is True or choice == 'auto' and device.type == 'cuda':
        say('compiling the model: the first step takes up to a minute')
        try:
            compiled = torch.compile(model, dynamic=False)
            first_step(compiled)
            return compiled
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler on the machine, an unsupported platform, ...
            say(f'torch.compile failed, going on without it: {type(error).__name__}: {first_line(error)[:150]}')
    first_step(model)
    return model


def total_memory(device):
    """A GPU's memory in bytes; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == 'cuda' else None


def peak_memory(device):
    """The most bytes that this process has held so far: on a GPU what PyTorch took there, else in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
