"""What test_fake_cuda.py runs on the fake GPU, in a process of its own: one line per case.

    python fake_cuda_cases.py training sampling details

A line is JSON: the case, its error or null, and its host syncs.
"""

import contextlib
import functools
import itertools
import json
import sys
import traceback
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from architectures import SIZES, combined, describe, gpt_config, one_by_one
from fake_cuda import HostSync, fake_gpu
from lib import device as devices
from lib.distributed import init_weights
from lib.evaluation import evaluate
from lib.generation import beam_search
from lib.linear import quantize
from model import GPT
from optimizer import Optimizer
from stub_trainer import Rows, make_trainer

CUDA = torch.device('cuda', 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIMIZERS = ('adamw', 'muon')


def main(groups):
    for name, case in itertools.chain(*(GROUPS[group]() for group in groups)):
        error = None
        with fake_gpu() as gpu:
            try:
                case(gpu)
            except Exception as exception:
                frames = traceback.extract_tb(exception.__traceback__)
                own = [f for f in frames if 'site-packages' not in f.filename]
                where = '\n'.join(f'  {f.filename}:{f.lineno} {f.line}' for f in own)
                error = f'{type(exception).__name__}: {exception}\n{where}'
        print(json.dumps({'case': name, 'error': error, 'syncs': Counter(gpu.syncs)}), flush=True)


@contextlib.contextmanager
def syncs_allowed(gpu):
    """While something is prepared; its syncs are not noted."""
    gpu.may_sync = True
    yield
    gpu.may_sync = False
    gpu.syncs.clear()
    gpu.ops.clear()


# Training -----------------------------------------------------------------------------------------


def prepare(gpu, architecture, dtype, **keys):
    """A Trainer whose next step is watched."""
    with syncs_allowed(gpu):
        device = devices.start_device('cuda', True)
        return make_trainer(architecture, device, dtype, **keys)


def step_without_host_sync(gpu, architecture, dtype, way):
    with mock.patch('lib.device.shrink_batch'):  # no dry run
        trainer = prepare(gpu, architecture, dtype, optimizer=way)
    trainer.train_step()


def training():
    return cases(step_without_host_sync, OPTIMIZERS)


def cases(case, ways):
    """(name, function of a FakeCuda): combined() in every dtype and way, one_by_one() in one."""
    everything = list(itertools.product(DTYPES, ways))
    for architecture, (dtype, way) in [
        *zip(one_by_one(), itertools.cycle(everything)),
        *itertools.product(combined(), everything),
    ]:
        name = getattr(way, '__name__', way)
        yield (f'{name}, {devices.dtype_name(dtype)}, {describe(architecture)}',
               functools.partial(case, architecture=architecture, dtype=dtype, way=way))


# Sampling -----------------------------------------------------------------------------------------


def make_model(gpu, architecture, dtype):
    """A model as main of sample.py makes it."""
    with syncs_allowed(gpu):
        with torch.device('meta'):
            model = GPT(gpt_config(architecture | {'dropout': 0.0}))
        init_weights(model, CUDA)
        return model.to(CUDA, dtype).eval()


def padded(model, n=3):
    """Prompts of unequal length, past the context, with all filters."""
    longest = model.config.block_size - 2
    filters = {'top_k': 5, 'top_p': 0.9, 'min_p': 0.1, 'repetition_penalty': 1.2}
    model.generate([[1] * longest, [2, 3]], n, slide=4, seed=1, stop_tokens=[7], **filters)


def static(model, n=3):
    """Static shapes, as torch.compile gets them."""
    with mock.patch.object(torch, 'compile', lambda model, **options: model):
        model.generate([[1, 2, 3], [4]], n, seed=1, compile=True)


def beams(model, n=3):
    beam_search(model, [[1, 2, 3], [4]], n, num_beams=2, stop_tokens=[7])


def int8(model, n=3):
    """int8 weights, and a prompt that sequences share."""
    prompt = torch.zeros(2, 3, dtype=torch.long, device=CUDA)
    quantize(model).generate(prompt, n, temperature=0)


def sample(gpu, architecture, dtype, way):
    model = make_model(gpu, architecture, dtype)
    gpu.may_sync = True
    way(model)


def sampling():
    return cases(sample, (padded, static, beams, int8))


# Details ------------------------------------------------------------------------------------------


def details():
    functions = (
        waiting_raises,
        mixing_devices_raises,
        batches_do_not_wait,
        chunked_loss_does_not_wait,
        tree_sum_does_not_wait,
        adamw_is_fused,
        products_are_in_autocast_dtype,
        tf32_is_on,
        scaler_order,
        evaluation_waits_at_its_end,
        syncs_per_token,
    )
    return [(function.__name__, function) for function in functions]


def expect(error, function):
    try:
        function()
    except error:
        return
    raise AssertionError(f'no {error.__name__}')


def waiting_raises(gpu):
    """The fake GPU notices what makes a CPU wait for a real one."""
    x, index = torch.ones(3, device=CUDA), torch.zeros(1, dtype=torch.long, device=CUDA)
    waits = {
        'item': lambda: x.sum().item(),
        'if': lambda: bool(x.any()),
        'print': lambda: print(x.tolist()),
        'nonzero': lambda: x.nonzero(),
        'mask': lambda: x[x > 0],
        'list': lambda: x[[0, 1]],
        'to the CPU': lambda: x.cpu(),
        'from the CPU': lambda: torch.zeros(3).to(CUDA),
        'from a list': lambda: torch.tensor([1], device=CUDA),
        'not pinned': lambda: torch.zeros(3).to(CUDA, non_blocking=True),
        'blocking': lambda: torch.zeros(3).pin_memory().to(CUDA),
        'assignment': lambda: x.copy_(torch.zeros(3)),
        'repeats': lambda: x.repeat_interleave(index.expand(3)),
    }
    for wait in waits.values():
        expect(HostSync, wait)
    assert len(gpu.syncs) == len(waits)
    x[index], x[:2], x.masked_fill(x > 0, 0), x.repeat_interleave(2), x + torch.tensor(1.0)
    assert len(gpu.syncs) == len(waits)


def mixing_devices_raises(gpu):
    x = torch.ones(3, device=CUDA)
    expect(RuntimeError, lambda: x + torch.ones(3))
    expect(RuntimeError, lambda: torch.nn.functional.embedding(torch.zeros(1).long(), x[None]))


def batches_do_not_wait(gpu):
    """Pinned and copied in the background: x and y of a micro-batch."""
    rows = np.zeros((2, 3), dtype=np.int64)
    devices.to_device(rows, rows, CUDA)
    assert [name for name, _ in gpu.ops].count('_to_copy') == 2


def chunked_loss_does_not_wait(gpu):
    smooth = {'logit_softcap': 5.0, 'label_smoothing': 0.1}
    for architecture, dtype in zip(({}, smooth, {'tie_weights': False}), DTYPES):
        trainer = prepare(gpu, architecture, dtype)
        trainer.raw_model.max_logits = 2 * Rows.block_size * 40 // 3
        trainer.train_step()
        assert 'logsumexp' in [name for name, _ in gpu.ops]  # not a fused cross-entropy


def tree_sum_does_not_wait(gpu):
    prepare(gpu, {}, torch.bfloat16, deterministic_sum=True,
            gradient_accumulation_steps=2).train_step()


def adamw_is_fused(gpu):
    prepare(gpu, {}, torch.float32).train_step()
    names = [name for name, _ in gpu.ops]
    assert '_fused_adamw_' in names and '_foreach_addcdiv_' not in names


def products_are_in_autocast_dtype(gpu):
    for dtype in DTYPES:
        trainer = prepare(gpu, {}, dtype)
        trainer.train_step()
        products = Counter(op for op in gpu.ops if op[0] in ('mm', 'addmm'))
        assert {dtype for _, dtype in products} == {dtype}, products
        assert {p.dtype for p in trainer.raw_model.parameters()} == {torch.float32}


def tf32_is_on(gpu):
    """For the products that stay in fp32."""
    torch.set_float32_matmul_precision('highest')
    devices.start_device('cuda', True)
    assert torch.get_float32_matmul_precision() == 'high'


def scaler_order(gpu):
    """fp16: gradients are clipped after unscaling, and the scale changes after the step."""
    trainer = prepare(gpu, {}, torch.float16, gradient_accumulation_steps=2)
    trainer.log.measures = lambda step: None  # which would call scale
    calls = []
    with contextlib.ExitStack() as stack:
        for target, name in (
            (torch.amp.GradScaler, 'scale'),
            (torch.Tensor, 'backward'),
            (torch.amp.GradScaler, 'unscale_'),
            (torch.nn.utils, 'clip_grad_norm_'),
            (Optimizer, 'step'),
            (torch.amp.GradScaler, 'update'),
        ):
            original = getattr(target, name)

            def noted(*args, name=name, original=original, **kwargs):
                calls.append(name)
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(target, name, noted))
        trainer.train_step()
    after = ['unscale_', 'clip_grad_norm_', 'step', 'update']
    assert calls == ['scale', 'backward'] * 2 + after, calls


def evaluation_waits_at_its_end(gpu):
    """Not after each batch."""
    trainer = prepare(gpu, {}, torch.bfloat16)
    trainer.model.eval()
    gpu.may_sync = True

    def loss_of(x, y):
        return trainer.loss_of(trainer.model, *devices.to_device(x, y, CUDA))

    token_bytes, signals = np.ones(SIZES['vocab_size'], dtype=int), SimpleNamespace(stop=0)
    evaluate(loss_of, Rows(), np.arange(8), 2, token_bytes, signals)
    assert len(gpu.syncs) == 1, gpu.syncs


def syncs_per_token(gpu):
    """None in sampling, which only looks for stop tokens every 16; one in beam search."""
    for how, expected in ((padded, {}), (static, {}), (int8, {}), (beams, {'beam_search': 1.0})):
        short, long = Counter(), Counter()
        for n, syncs in ((3, short), (9, long)):
            model = make_model(gpu, {'block_size': 32}, torch.bfloat16)
            gpu.may_sync = True
            how(model, n)
            syncs.update(gpu.syncs)
        per_token = {where: count / 6 for where, count in (long - short).items()}
        print(f'{how.__name__}: {per_token}', file=sys.stderr)
        per_token = {where.partition(':')[0]: n for where, n in per_token.items()}
        assert per_token == expected, per_token


GROUPS = {'training': training, 'sampling': sampling, 'details': details}

if __name__ == '__main__':
    main(sys.argv[1:])
