"""What 'auto' picks, and what is said where a device is not there. (No GPU is needed: CUDA's answers are put in its place.)"""

import pytest
import torch

import device
from configurator import UserError


def cuda(monkeypatch, name='NVIDIA H100 80GB HBM3', count=2, bf16=True):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: name)


def test_auto_picks_the_best_device(monkeypatch):
    cuda(monkeypatch)
    assert device.pick_device('auto') == device.pick_device('cuda') == torch.device('cuda', 0)  # set_device needs the index
    cuda(monkeypatch, count=0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert device.pick_device('auto').type == 'mps'
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert device.pick_device('auto').type == 'cpu'


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    cuda(monkeypatch, count=1)
    assert device.pick_device('cuda:0').index == 0
    for name, words in (
        ('cuda:1', '1 CUDA devices'),
        ('mps', 'no Apple GPU'),
        ('gpu', 'give auto'),
        ('xpu', 'give auto'),
        ('', 'give auto'),
    ):
        with pytest.raises(UserError, match=words):
            device.pick_device(name)
    cuda(monkeypatch, count=0)
    with pytest.raises(UserError, match="device = 'cuda': PyTorch sees 0"):
        device.pick_device('cuda')


def test_auto_picks_the_number_format_of_the_hardware(monkeypatch):
    cuda(monkeypatch)
    assert device.pick_dtype('auto', torch.device('cuda'), 256) == torch.bfloat16
    cuda(monkeypatch, bf16=False)
    assert device.pick_dtype('auto', torch.device('cuda'), 256) == torch.float16
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'amx_bf16': True})
    assert device.pick_dtype('auto', torch.device('cpu'), 256) == torch.bfloat16
    assert device.pick_dtype('auto', torch.device('cpu'), 128) == torch.float32
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {})
    assert device.pick_dtype('auto', torch.device('cpu'), 256) == torch.float32
    assert device.pick_dtype('auto', torch.device('mps'), 256) == torch.float32
    assert device.pick_dtype('float16', torch.device('cpu'), 256) == torch.float16


@pytest.mark.parametrize(
    'name, peak',
    [
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA L40S', 362e12),
        ('Tesla T4', 65e12),
        ('NVIDIA GeForce RTX 4090', 165e12),
        ('NVIDIA A10', 125e12),
        ('Some New GPU', None),
    ],
)
def test_peaks_are_found_by_name(monkeypatch, name, peak):
    cuda(monkeypatch, name)
    assert device.peak_flops(torch.device('cuda'), torch.bfloat16) == peak
    assert device.peak_flops(torch.device('cuda'), torch.float32) is None
    assert device.peak_flops(torch.device('cpu'), torch.bfloat16) is None


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    model, said, tried = torch.nn.Linear(2, 2), [], []

    def broken(*args, **kwargs):
        raise RuntimeError('no C++ compiler\nlong trace')

    monkeypatch.setattr(torch, 'compile', broken)
    assert device.compile_or_not(model, True, torch.device('cpu'), tried.append, said.append) is model and tried == [model]
    assert said[-1] == 'torch.compile failed, going on without it: RuntimeError: no C++ compiler'
    monkeypatch.setattr(torch, 'compile', lambda *args, **kwargs: (_ for _ in ()).throw(AssertionError()))
    assert device.compile_or_not(model, True, torch.device('cpu'), lambda m: None, said.append) is model
    assert said.pop() == 'torch.compile failed, going on without it: AssertionError: AssertionError' and said.pop()
    assert device.compile_or_not(model, 'auto', torch.device('cpu'), lambda m: None, said.append) is model and len(said) == 2


def test_a_compiled_model_computes_the_same():
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, position='rope', norm='rmsnorm'))
    idx, steps, said = torch.randint(11, (2, 8)), [], []
    compiled = device.compile_or_not(
        model, True, torch.device('cpu'), lambda m: steps.append(m(idx, idx)[1].backward()), said.append
    )
    assert compiled is not model and len(steps) == 1 and len(said) == 1
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
