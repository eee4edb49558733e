"""What 'auto' selects, and the errors for missing devices; CUDA is mocked, no GPU is needed."""

import pytest
import torch

from lib import device
from lib.errors import UserError
from model import GPT, GPTConfig


def mock_cuda(monkeypatch, name='NVIDIA H100 80GB HBM3', count=2, bf16=True):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: name)


def test_pick_device_auto_selects_best_device(monkeypatch):
    mock_cuda(monkeypatch)
    # with an index, as torch.cuda.set_device needs it
    assert device.pick_device('auto') == device.pick_device('cuda') == torch.device('cuda', 0)
    mock_cuda(monkeypatch, count=0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert device.pick_device('auto').type == 'mps'
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert device.pick_device('auto').type == 'cpu'


def test_pick_device_reports_missing_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    mock_cuda(monkeypatch, count=1)
    assert device.pick_device('cuda:0').index == 0
    for name, message in (
        ('cuda:1', '1 CUDA device here'),
        ('mps', 'no Apple GPU'),
        ('gpu', 'give auto'),
        ('xpu', 'give auto'),
        ('', 'give auto'),
    ):
        with pytest.raises(UserError, match=message):
            device.pick_device(name)
    mock_cuda(monkeypatch, count=0)
    with pytest.raises(UserError, match="device = 'cuda': PyTorch sees 0"):
        device.pick_device('cuda')


def test_pick_dtype_auto_follows_hardware(monkeypatch):
    mock_cuda(monkeypatch)
    assert device.pick_dtype('auto', torch.device('cuda'), 256) == torch.bfloat16
    mock_cuda(monkeypatch, bf16=False)
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
def test_peak_flops_are_looked_up_by_gpu_name(monkeypatch, name, peak):
    mock_cuda(monkeypatch, name)
    assert device.peak_flops(torch.device('cuda'), torch.bfloat16) == peak
    assert device.peak_flops(torch.device('cuda'), torch.float32) is None
    assert device.peak_flops(torch.device('cpu'), torch.bfloat16) is None


def test_compile_falls_back_to_eager_on_error(monkeypatch, capsys):
    model, tried = torch.nn.Linear(2, 2), []
    cpu, failed = torch.device('cpu'), 'torch.compile failed, going on without it'

    def broken(*args, **kwargs):
        raise RuntimeError('no C++ compiler\nlong trace')

    monkeypatch.setattr(torch, 'compile', broken)
    assert device.compile_model(model, True, cpu, tried.append) is model
    assert tried == [model]
    assert capsys.readouterr().out.splitlines()[-1] == f'{failed}: RuntimeError: no C++ compiler'

    def failing(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch, 'compile', failing)
    assert device.compile_model(model, True, cpu, lambda m: None) is model
    assert capsys.readouterr().out.splitlines()[-1] == f'{failed}: AssertionError: AssertionError'
    assert device.compile_model(model, 'auto', cpu, lambda m: None) is model
    assert capsys.readouterr().out == ''


@pytest.mark.slow
def test_compile_preserves_loss():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=8,
            vocab_size=11,
            n_layer=1,
            n_head=2,
            n_embd=16,
            position='rope',
            norm='rmsnorm',
        )
    )
    idx, steps = torch.randint(11, (2, 8)), []
    compiled = device.compile_model(
        model,
        True,
        torch.device('cpu'),
        lambda m: steps.append(m(idx, idx)[1].backward()),
    )
    assert compiled is not model and len(steps) == 1
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
