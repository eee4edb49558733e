"""What 'auto' selects, and the errors for missing devices; CUDA is mocked, no GPU is needed."""

import pytest
import torch

from configurator import TrainConfig
from lib import device
from lib.errors import UserError
from lib.recipe import read_train_config
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
    assert device.pick_dtype('auto', torch.device('cpu'), 128) == torch.bfloat16
    assert device.pick_dtype('auto', torch.device('cpu'), 64) == torch.float32
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


@pytest.fixture
def stance():
    """Undo torch.compiler.set_stance('force_eager')."""
    yield
    torch.compiler.set_stance('default')


def test_compile_falls_back_to_eager_on_error(monkeypatch, capsys, stance):
    cpu, failed = torch.device('cpu'), 'torch.compile failed, going on without it'

    def broken(*args, **kwargs):
        raise RuntimeError('no C++ compiler\nlong trace')

    monkeypatch.setattr(torch, 'compile', broken)
    assert not device.can_compile('auto', cpu) and not device.can_compile(False, cpu)
    assert capsys.readouterr().out == ''
    assert not device.can_compile(True, cpu)
    assert capsys.readouterr().out.splitlines()[-1] == f'{failed}: RuntimeError: no C++ compiler'

    tried = []

    def dry_run(model):  # of a model that Inductor cannot compile
        tried.append(model)
        if len(tried) == 1:
            raise AssertionError

    assert device.fits('model', dry_run, compiled=True) and tried == ['model', 'model']
    assert capsys.readouterr().out.splitlines()[-1] == f'{failed}: AssertionError: AssertionError'

    monkeypatch.undo()
    graphs = []
    torch.compile(torch.sin, backend=lambda graph, _: graphs.append(graph) or graph)(torch.ones(1))
    assert not graphs  # what was compiled before runs eagerly now

    def bug(model):
        raise AssertionError

    with pytest.raises(AssertionError):  # of the model itself
        device.fits('model', bug, compiled=True)


def out_of_memory_above(config, limit, tried):
    def dry_run(model):
        tried.append(config.batch_size)
        if config.batch_size > limit:
            raise torch.OutOfMemoryError

    return dry_run


@pytest.mark.parametrize('limit, batch_size, accumulation',
                         [(50, 48, 10), (12, 12, 40), (999, 96, 5)])
def test_auto_batch_size_doubles_while_it_fits(limit, batch_size, accumulation):
    config, tried = TrainConfig(batch_size=12, gradient_accumulation_steps=40, eval_iters=20), []
    device.grow_batch(None, config, torch.device('cpu'), out_of_memory_above(config, limit, tried))
    assert config.batch_size == batch_size
    assert config.gradient_accumulation_steps == accumulation
    assert config.eval_iters * config.batch_size >= 20 * 12  # as many samples
    assert tried == [size for size in (24, 48, 96) if size <= 2 * batch_size]


def test_batch_that_does_not_fit_is_cut():
    config, tried = TrainConfig(batch_size=12, gradient_accumulation_steps=40, eval_iters=20), []
    dry_run = out_of_memory_above(config, 4, tried)
    device.shrink_batch(None, config, torch.device('cpu'), dry_run, False)
    assert tried == [12, 6, 3] and config.gradient_accumulation_steps == 160
    assert config.eval_iters == 80
    with pytest.raises(UserError, match='out of memory with a single sequence'):
        dry_run = out_of_memory_above(config, 0, tried)
        device.shrink_batch(None, config, torch.device('cpu'), dry_run, False)


@pytest.mark.parametrize('argv', [['--batch_size=auto'], ['--batch_size', 'auto']])
def test_auto_batch_size_starts_from_the_config(argv, tmp_path, refused, char_data):
    (tmp_path / 'x.py').write_text('batch_size = 7\n')
    config, given = read_train_config([str(tmp_path / 'x.py'), *argv])
    assert config.batch_size == 7 and config.auto_batch_size and 'batch_size' in given
    assert not read_train_config([str(tmp_path / 'x.py')])[0].auto_batch_size
    config, _ = read_train_config([str(tmp_path / 'x.py'), *argv, '--batch_size=8'])
    assert config.batch_size == 8 and not config.auto_batch_size  # the last flag counts
    config, _ = read_train_config([str(tmp_path / 'x.py'), '--batch_size=8', *argv])
    assert config.batch_size == 8 and config.auto_batch_size
    (tmp_path / 'x.py').write_text("batch_size = 'auto'\n")
    config, _ = read_train_config([str(tmp_path / 'x.py')])
    assert config.batch_size == 12 and config.auto_batch_size
    refused('train.py', *argv, '--device=cpu', f'--dataset={char_data}',
            f'--out_dir={tmp_path}/out', says='batch_size = auto: finds out what fits a GPU')


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
    assert device.can_compile(True, torch.device('cpu'))
    compiled = torch.compile(model, dynamic=False)
    assert device.fits(compiled, lambda m: steps.append(m(idx, idx)[1].backward()), compiled=True)
    assert len(steps) == 1
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
