"""Pages in one HTML file, with style and scripts inlined from web/: they load nothing."""
import base64
import functools
import hashlib
import math
import re

from lib.errors import os_errors
from lib.files import ROOT

DATA = '<!-- data -->'  # its place in a template


RUNS_MARK = 'plainGPT runs'  # near the beginning of what tools/runs.py writes


def may_replace(path, mark):
    """Whether there is no such file, or one that begins as ours do. Raises UserError."""
    if not path.exists():
        return True
    with os_errors(path), open(path, 'rb') as file:
        return mark.encode() in file.read(4096)


@functools.cache
def page_template(name, connects=False):
    """(web/<name> with style and scripts inlined and DATA for its data, Content-Security-Policy)

    connects: whether its scripts may ask the server that the page comes from.
    """
    web = ROOT / 'web'
    page = (web / name).read_text(encoding='utf-8')
    # Inline modules cannot import each other. They are concatenated into one, so names at their
    # top level must be unique across files.
    sources = []
    for path in re.findall(r'<script type="module" src="(.+)"></script>', page):
        source = (web / path).read_text(encoding='utf-8')
        sources.append(re.sub(r'^import .*?;\n|^export ', '', source, flags=re.M | re.S))
    code = '\n' + '\n'.join(sources)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    # charts set style attributes; saving a picture as PNG draws a data: image
    policy = (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
              f"img-src data:; base-uri 'none'; form-action 'none'")
    if connects:
        policy += "; connect-src 'self'"
    script = f'{DATA}<script type="module">{code}</script>\n'
    page = re.sub(r'(<script type="module" src=".+"></script>\n)+', lambda match: script, page)
    links = r'<link rel="stylesheet" href="(.+)">\n'
    style = ''.join((web / path).read_text(encoding='utf-8') for path in re.findall(links, page))
    head = (f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<style>\n{style}</style>\n')
    return re.sub(f'({links})+', lambda match: head, page), policy


def nan_to_none(value):
    """value with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_half(x):
    """x in fp16, about three significant digits; values out of range are clamped."""
    return x.clamp(-65504, 65504).half()
