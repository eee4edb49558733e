"""FSDP2 over 8 processes, of which this one plays the first: collectives return at once."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lib import distributed
from stub_trainer import make_trainer

WORLD_SIZE, MICRO_BATCHES, N_LAYER = 8, 4, 2

pytestmark = pytest.mark.filterwarnings('ignore:FSDP2-wrapped module')


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'c10d':
            self.counts[func.overloadpacket.__name__.strip('_')] += 1
        return func(*args, **kwargs or {})


def out_of_memory_once(module, *args):
    out_of_memory_once.handle.remove()
    raise torch.OutOfMemoryError


@pytest.fixture
def trainer(request, monkeypatch):
    """request.param: whether the first dry run ends in its backward pass."""
    wrap = distributed.wrap_fsdp

    def wrap_fsdp(model, *args):
        wrap(model, *args)
        block = model.transformer.h[0].mlp
        out_of_memory_once.handle = block.register_full_backward_pre_hook(out_of_memory_once)

    if getattr(request, 'param', False):
        monkeypatch.setattr(distributed, 'wrap_fsdp', wrap_fsdp)
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    yield make_trainer(
        {'n_layer': N_LAYER},
        torch.device('cpu'),
        torch.bfloat16,
        parallel='fsdp',
        gradient_accumulation_steps=WORLD_SIZE * MICRO_BATCHES,
    )
    dist.destroy_process_group()


def test_blocks_and_root_are_sharded(trainer):
    model = trainer.raw_model
    assert isinstance(model, FSDPModule)
    for block in model.transformer.h:
        assert any(isinstance(module, FSDPModule) for module in block.modules())
    for name, p in model.named_parameters():
        assert len(p.to_local()) == -(-len(p) // WORLD_SIZE), name


def test_every_micro_batch_reduces_its_gradients(trainer):
    """Otherwise each process accumulates gradients of the whole model: no memory is saved."""
    with Collectives() as collectives:
        trainer.train_step()
    expected = MICRO_BATCHES * (N_LAYER + 1)  # a block each, and the rest
    assert collectives.counts['reduce_scatter_base'] == expected, collectives.counts


@pytest.mark.parametrize('trainer', [True], indirect=True)
def test_a_step_after_running_out_of_memory_has_all_gradients(trainer, monkeypatch):
    """The error leaves FSDP in the middle of a backward pass."""
    assert trainer.config.batch_size == 1  # cut
    has_gradient = []
    params = [p for group in trainer.optimizer.param_groups for p in group['params']]
    monkeypatch.setattr(trainer.optimizer, 'step_if_finite', lambda finite, measures:
                        has_gradient.extend(p.grad is not None for p in params))
    trainer.train_step()
    trainer.train_step()
    assert has_gradient and all(has_gradient)
