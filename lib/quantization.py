"""Whether a model samples faster in int8 on this machine's CPU, and what that costs: measured once
per model, remembered in ~/.cache/plaingpt/int8."""
import contextlib
import copy
import hashlib
import json
import math
import time

import torch

from lib import files
from lib.device import cpu_capabilities
from lib.generation import generate
from lib.linear import pack, quantize

MIN_PARAMS = 2**25  # smaller models stay in the CPU's cache, and gain nothing
MIN_SPEEDUP = 1.1
MAX_ADDED_LOSS = 1e-3  # share of the loss
MAX_SAMPLES = 32  # at once in the measurement


def quantize_if_it_pays(model, start, n_samples=1):
    """Make a model on the CPU ready to sample, in place: int8 if that is faster and adds at most
    0.1% to the loss, else packed. start: a token that texts begin with. n_samples: how many are
    generated at once. Returns (model, what the int8 weights cost and bring, in words, or None)."""
    if model.get_num_params() < MIN_PARAMS or torch.backends.quantized.engine == 'none':
        return pack(model), None
    n_samples = min(n_samples, MAX_SAMPLES)
    path = files.cache_folder() / 'int8' / f'{fingerprint(model, n_samples)}.json'
    int8 = None
    try:
        speedup, added = found = json.loads(path.read_text())
        if {type(x) for x in found} != {float} or not all(map(math.isfinite, found)):
            raise ValueError
    except (OSError, ValueError, TypeError, RecursionError):  # not measured yet, or damaged
        share = {id(p): p for p in model.parameters()}  # the copy has the same embeddings
        int8, model = quantize(copy.deepcopy(model, share)), pack(model)
        speedup, added = compare(model, int8, start, n_samples)
        with contextlib.suppress(OSError):  # a read-only home: measure again the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps([speedup, added]))
    if speedup < MIN_SPEEDUP or not added <= MAX_ADDED_LOSS:
        return pack(model), None
    return int8 or quantize(model), f'loss +{100 * added:.2f}%, {speedup:.1f} times as fast'


@torch.no_grad()
def fingerprint(model, n_samples):
    """A hash of the norms of the weights, and of what else the answer depends on."""
    norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in model.parameters()]
    machine = (torch.backends.cpu.get_cpu_capability(), sorted(cpu_capabilities().items()),
               torch.get_num_threads())
    about = torch.__version__, machine, model.lm_head.weight.dtype, n_samples
    return hashlib.sha256(f'{torch.stack(norms).tolist()} {about}'.encode()).hexdigest()


@torch.no_grad()
def compare(model, int8, start, n_samples=1):
    """(times as fast, share of the loss added) of int8. On text that the model writes its loss is
    the entropy of its predictions, and other predictions add their KL divergence."""
    prompts = torch.full((8, 1), start)
    n = min(32, model.config.block_size)
    text = generate(model, prompts, n - 1, seed=0)  # (8, n)
    logp, logq = (m(text, text)[0].float().log_softmax(-1) for m in (model, int8))  # (8, n, V)
    added = (logp.exp() * (logp - logq)).sum() / -(logp.exp() * logp).sum()
    seconds = [[], []]
    for _ in range(3):
        for m, times in zip((model, int8), seconds):
            begin = time.perf_counter()
            generate(m, prompts[:1].repeat(n_samples, 1), 6, temperature=0)
            times.append(time.perf_counter() - begin)
    return min(seconds[0]) / min(seconds[1]), added.item()
