"""CUDA code without a GPU: tensors on cuda:0 that have shapes and dtypes, but no values.

In a process started with `environment`, the programs train and sample on 'cuda' in `fake_gpu`:
forward, backward, optimizer. CPU and CUDA tensors do not mix, as on a GPU. A host sync raises, or,
where it is allowed, is noted and reads made-up values. Kernels and numbers are not tested.
"""

import contextlib
import linecache
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TESTS = Path(__file__).parent
ROOT = TESTS.parent
aten = torch.ops.aten

# What autograd asks of a GPU. A CPU build of PyTorch has no device guard for CUDA, no hooks, and
# its getAccelerator finds nothing.
LIBRARY = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct Guard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
std::optional<DeviceType> accelerator::getAccelerator(bool) { return DeviceType::CUDA; }
}
"""


def environment(folder):
    """Compile LIBRARY into folder with g++. Returns the environment of a process that uses it."""
    source, library = Path(folder) / 'cuda.cpp', Path(folder) / 'cuda.so'
    source.write_text(LIBRARY)
    home = Path(torch.__file__).parent
    paths = [f'-I{home}/include', f'-L{home}/lib', f'-Wl,-rpath,{home}/lib']
    command = ['g++', '-std=c++20', '-shared', '-fPIC', source, '-o', library, *paths]
    subprocess.run([*command, '-lc10', '-ltorch_cpu'], check=True)
    # LD_PRELOAD: its getAccelerator comes before the one in libtorch_cpu
    return os.environ | {'LD_PRELOAD': str(library), 'PYTHONPATH': f'{ROOT}:{TESTS}'}


class HostSync(Exception):
    """The CPU would wait for the GPU."""


class FakeCuda(FakeTensorMode):
    """Makes tensors without values, and watches the operations on them."""

    avoid_device_init = True  # torch.tensor([...], device='cuda') works without a driver

    def __init__(self):
        super().__init__()
        self.may_sync = False
        self.syncs = []  # 'function: line of code' of each host sync
        self.ops = []  # (name, dtype of the first argument) of each operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        self.ops.append((func.overloadpacket.__name__, getattr(first, 'dtype', None)))
        if is_host_sync(func, args, kwargs):
            self.sync(func)
            if func == aten.nonzero.default:  # a single element, the first one
                return first.new_zeros((1, first.dim()), dtype=torch.long)
        if func == aten._local_scalar_dense.default and first.constant is None:
            return {torch.bool: True, torch.long: 0}.get(first.dtype, 1.0)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def sync(self, what):
        where = caller()
        self.syncs.append(where)
        if not self.may_sync:
            raise HostSync(f'{what} in {where}')

    def tolist(self, tensor):
        """Tensor.tolist, which is a single sync."""
        if tensor.is_cuda:
            self.sync('tolist')
        return np.ones(tensor.shape).astype(int).tolist()


def is_host_sync(func, args, kwargs):
    """Whether the CPU waits for the GPU in this operation."""
    if func == aten._to_copy.default:
        target = torch.device(kwargs.get('device') or args[0].device)
        return copy_waits(args[0], target, kwargs.get('non_blocking', False))
    if func == aten.copy_.default:
        return copy_waits(args[1], args[0].device, args[2:] == (True,))
    if not (args and isinstance(args[0], torch.Tensor) and args[0].is_cuda):
        return False
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        # a list or a CPU tensor is copied to the GPU; the True in a mask are counted there
        index = [i for i in args[1] if i is not None]
        return any(not i.is_cuda or i.dtype == torch.bool for i in index)
    unknown = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not unknown.isdisjoint(func.tags)


def copy_waits(source, target, non_blocking):
    """Whether a copy to the device target waits, as all do but those from pinned memory."""
    if source.device.type == target.type:
        return False
    return not (non_blocking and target.type == 'cuda' and hasattr(source, 'pinned'))


def caller():
    """'function: line of code', the innermost one of the program."""
    frame = sys._getframe()
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and TESTS not in path.parents and path.name != 'errors.py':
            line = linecache.getline(str(path), frame.f_lineno).strip()
            return f'{frame.f_code.co_name}: {line}'
        frame = frame.f_back
    return 'a test, or autograd'  # whose engine has a thread per GPU


def pin_memory(tensor):
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def apply(module, function, recurse=True):
    """nn.Module._apply, whose swap_tensors refuses fake parameters. Tied ones stay tied."""
    new = {}
    for part in module.modules() if recurse else [module]:
        for name, p in part._parameters.items():
            if p is not None:
                if p not in new:
                    new[p] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
                part._parameters[name] = new[p]
        for name, buffer in part._buffers.items():
            part._buffers[name] = function(buffer)
    return module


@contextlib.contextmanager
def fake_gpu():
    """A FakeCuda in which PyTorch finds an H100."""
    mode, from_numpy = FakeCuda(), torch.from_numpy
    properties = types.SimpleNamespace(total_memory=80 * 2**30)
    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (torch.cuda, 'is_available', lambda: True),
            (torch.cuda, 'device_count', lambda: 1),
            (torch.cuda, 'current_device', lambda: 0),
            (torch.cuda, 'set_device', lambda device: None),
            (torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True),
            (torch.cuda, 'get_device_name', lambda device: 'NVIDIA H100 80GB HBM3'),
            (torch.cuda, 'get_device_properties', lambda device: properties),
            (torch, 'from_numpy', lambda array: mode.from_tensor(from_numpy(array))),
            (torch.Tensor, 'pin_memory', pin_memory),
            (torch.nn.Module, '_apply', apply),
            (FakeTensor, 'tolist', lambda tensor: mode.tolist(tensor)),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield stack.enter_context(mode)
