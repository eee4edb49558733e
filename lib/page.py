"""Pages in one HTML file, with style and scripts inlined from web/: they load nothing."""
import base64
import functools
import hashlib
import json
import math
import re
import zlib

import numpy as np

from lib.errors import os_errors
from lib.files import ROOT

DATA = '<!-- data -->'  # its place in a template
CODE = '<!-- code -->'
WORKER = '<!-- worker -->'


RUNS_MARK = 'plainGPT runs'  # near the beginning of what tools/runs.py writes


def may_replace(path, mark):
    """Whether there is no such file, or one that begins as ours do. Raises UserError."""
    if not path.exists():
        return True
    with os_errors(path), open(path, 'rb') as file:
        return mark.encode() in file.read(4096)


@functools.cache
def page_template(name, connects=False, computes=False):
    """(web/<name> with style and scripts inlined and DATA for its data, Content-Security-Policy)

    connects: whether its scripts may ask the server that the page comes from. computes: whether it
    has weights and the Worker that computes with them.
    """
    web = ROOT / 'web'
    page = (web / name).read_text(encoding='utf-8')
    code, page = join_modules(page, r'<script type="module" src="(.+)"></script>\n', CODE)
    worker, page = join_modules(page, r'<script type="text/plain" src="(.+)"></script>\n', WORKER)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    webassembly = " 'wasm-unsafe-eval'" if computes else ''  # what web/matmul.js assembles
    # charts set style attributes; saving a picture as PNG draws a data: image
    policy = (f"default-src 'none'; script-src 'sha256-{digest}'{webassembly}; "
              f"style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'")
    if connects:
        policy += "; connect-src 'self'"
    if computes:  # the Worker is made of the page's own text and inherits this policy
        policy += '; worker-src blob:'
        worker = f'<script type="text/plain" id="worker">{worker}</script>\n'
    page = page.replace(WORKER, worker if computes else '')
    page = page.replace(CODE, f'{DATA}<script type="module">{code}</script>\n')
    links = r'<link rel="stylesheet" href="(.+)">\n'
    style = ''.join((web / path).read_text(encoding='utf-8') for path in re.findall(links, page))
    head = (f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<style>\n{style}</style>\n')
    return re.sub(f'({links})+', lambda match: head, page), policy


def join_modules(page, scripts, mark):
    """(the code of all scripts that match in one text, the page with mark in their place)

    Inline modules cannot import each other. They are concatenated into one, so names at their top
    level must be unique across files.
    """
    sources = []
    for path in re.findall(scripts, page):
        source = (ROOT / 'web' / path).read_text(encoding='utf-8')
        sources.append(re.sub(r'^import .*?;\n|^export ', '', source, flags=re.M | re.S))
    code = ''.join('\n' + source for source in sources)
    return code, re.sub(f'({scripts})+', lambda match: mark, page)


def compress(tensor, level=6):
    """(dtype, shape, a deflate stream) of a tensor; level: of compression, 0 to 9.

    Multi-byte numbers are split into byte planes (all first bytes, then all second bytes, ...),
    which compress better. Integers get the smallest dtype that holds the largest.
    """
    array = tensor.numpy()
    if array.dtype.kind in 'iu':
        array = array.astype(np.min_scalar_type(int(array.max(initial=0))))
    as_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    planes = as_bytes.reshape(-1, array.dtype.itemsize).T
    return str(array.dtype), array.shape, zlib.compress(planes.tobytes(), level)


def join_streams(streams):
    """({name: its dtype, shape and byte range}, all bytes) of {name: compress(...)}."""
    index = {}
    start = 0
    for name, (dtype, shape, data) in streams.items():
        end = start + len(data)
        index[name] = {'dtype': dtype, 'shape': shape, 'start': start, 'end': end}
        start = end
    return index, b''.join(data for _, _, data in streams.values())


def pack_answer(value):
    """JSON with tensors in it as bytes, for web/live-model.js: a line with the places of all
    tensors, a line of JSON, in which {"array": i} stands for the i-th, and the tensors."""
    streams = {}

    def without_tensors(value):
        if isinstance(value, dict):
            return {key: without_tensors(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [without_tensors(item) for item in value]
        if not hasattr(value, 'numpy'):
            return value
        streams[len(streams)] = compress(value, level=0)  # it does not travel far
        return {'array': len(streams) - 1}

    text = json.dumps(nan_to_none(without_tensors(value)))
    index, data = join_streams(streams)
    return f'{json.dumps(list(index.values()))}\n{text}\n'.encode() + data


def nan_to_none(value):
    """value with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def root_in_8_bits(probs):
    """Probabilities as 255 * sqrt(p) in uint8: the root keeps small ones apart."""
    return (probs.sqrt() * 255).round().byte()


def to_half(x):
    """x in fp16, about three significant digits; values out of range are clamped."""
    return x.clamp(-65504, 65504).half()
