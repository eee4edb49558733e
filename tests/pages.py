"""README, CONTRIBUTING and docs as text: their links, and the commands in them."""

import itertools
import re
import shlex
from typing import NamedTuple

from helpers import ROOT

PAGES = ['README.md', 'CONTRIBUTING.md', *sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob('docs/*.md'))]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?:\]\(|src=")([^()"\s]+)[)"]')


def page(name):
    return (ROOT / name).read_text(encoding='utf-8')


def prose(name):
    """A page without its code blocks."""
    return BLOCK.sub('', page(name))


def blocks(name, language):
    return [code for kind, code in BLOCK.findall(page(name)) if kind == language]


def links(name):
    return LINK.findall(re.sub(r'`[^`]*`', '', prose(name)))


def anchor(heading):
    """As GitHub makes it, and mkdocs for headings without other punctuation."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


ANCHORS = {name: {anchor(heading) for heading in re.findall(r'^#+ (.+)$', prose(name), re.M)}
           for name in PAGES}


class Command(NamedTuple):
    """python SCRIPT ARGUMENTS, perhaps under torchrun (then with the latter's flags)."""
    page: str
    script: str
    arguments: list
    torchrun: list
    text: str  # of the whole line

    def __str__(self):
        return f'{self.page}: {self.text}'


def commands(name):
    """[Command] of a page, in order: of its sh blocks, and of code in its prose."""
    lines = itertools.chain.from_iterable(map(shell_lines, blocks(name, 'sh')))
    spans = re.findall(r'`((?:python|torchrun) [^`]+)`', prose(name))
    return [command for line in [*lines, *(span.replace('\n', ' ') for span in spans)]
            for command in read_line(name, line)]


def shell_lines(block):
    """The lines of a block, with each value of a loop's variable put in."""
    lines, loops = [], [('', [''])]
    for line in block.replace('\\\n', ' ').splitlines():
        if loop := re.fullmatch(r'for (\w+) in (.*); do', line):
            loops.append((f'${loop[1]}', loop[2].split()))
        elif line == 'done':
            loops.pop()
        elif line and not line.startswith('#'):
            variable, values = loops[-1]
            lines += [line.strip().replace(variable, value) if variable else line.strip()
                      for value in values]
    return lines


def read_line(name, line):
    """[Command] of a line of shell. Raises AssertionError on a program that it does not know."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found = []
    for separator, group in itertools.groupby(words, lambda word: word in ('&&', ';', '|')):
        if separator:
            continue
        words = list(itertools.takewhile(lambda word: word.strip('<>&'), group))
        while words[0] == 'time' or re.match(r'[A-Z_]+=', words[0]):
            words.pop(0)
        program, *arguments = words
        if program == 'ssh':
            found += read_line(name, arguments[-1])
        elif program in ('python', 'torchrun', 'sbatch') and arguments[0] != '-m':
            place = next(i for i, word in enumerate(arguments) if re.search(r'\.\w+$', word)
                         and not word.startswith('-'))
            script, own = arguments[place], arguments[place + 1:]
            script = 'train.py' if script == 'tools/slurm.sbatch' else script
            found.append(Command(name, script, own, arguments[:place], line))
        else:
            assert program in ('python', 'python3', 'pip', 'cd', '.', 'mkdocs', 'ruff', 'git',
                               'wandb', 'docker'), f'{name}: {line}'
    return found
