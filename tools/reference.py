"""Write docs/config.md: the keys of every program, as their --help prints them.

    python tools/reference.py
"""
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import TrainConfig, configure, help_text
from lib.errors import user_errors
from lib.files import write_text

PAGE = ROOT / 'docs' / 'config.md'
PROGRAMS = ['train.py', 'sample.py', 'explain.py', 'tools/*.py', 'data/*/prepare.py']
# a line of help_text: --key=default (type: bounds) comment
KEY = re.compile(r'  --(\w+)=(.*?) +\(((?:[^()]|\([^()]*\))+)\) ?(.*)')
INTRODUCTION = """# Config: every key

<!-- written by `python tools/reference.py`; change the comments in the code instead -->

A key is set by a flag, `--key=value`, or by a line `key = value` in a config file. They are read
from left to right: the last one counts.

```sh
python train.py config/quickstart.py --batch_size=8 --compile=False --eval_only
```

A config file is flat Python: literals, arithmetic, names of other keys. It is parsed, never
executed. `--switch` alone means True. A mistyped key or a value out of bounds ends the program with
one sentence, before anything is written. `--help` prints a program's keys in the terminal.
"""


@dataclass
class Config:
    """It has no keys."""


def config_class(path):
    """The class of a program's keys."""
    if path.name == 'train.py':
        return TrainConfig
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return importlib.import_module(name).Config


def cell(text):
    """text inside a table of Markdown."""
    for character in '*|':
        text = text.replace(character, '\\' + character)
    return text.replace('<', '&lt;')


def section(path):
    """The lines about a program; [] if it has no keys of its own."""
    cls = config_class(path)
    own = {key for base in cls.__mro__ if cls is TrainConfig or base is cls
           for key in getattr(base, '__annotations__', ())}
    lines, heading = [], ''
    _, _, text = help_text(cls).partition('usage: ')
    for line in text.splitlines()[1:]:
        match = KEY.fullmatch(line)
        if match and match[1] in own:
            key, default, kind, comment = match.groups()
            if heading is not None:
                lines += ['', f'**{heading}**'] if heading else []
                lines += ['', '| key | default | what |', '| --- | --- | --- |']
                heading = None
            lines.append(f'| `{key}` | `{default}` | {cell(comment)} ({cell(kind)}) |')
        elif line and not match:
            heading = line
    return ['', f'## {path.relative_to(ROOT).as_posix()}', *lines] if lines else []


def render():
    """The text of the page."""
    lines = [INTRODUCTION.rstrip()]
    for pattern in PROGRAMS:
        for path in sorted(ROOT.glob(pattern)):
            lines += section(path)
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    with user_errors():
        configure(Config)
        write_text(PAGE, render())
        print(PAGE)
