"""The layout that CONTRIBUTING.md describes: imports run downwards, files stay short."""
import ast
from pathlib import Path

from helpers import ROOT

# lowest first; a module imports only from lower layers, or from its own without a cycle
LAYERS = [
    ['lib', 'lib.errors', 'lib.files', 'lib.version', 'configurator'],
    ['lib.pairs', 'lib.loss', 'lib.linear', 'lib.ngram', 'lib.generation',
     'lib.download', 'lib.formats', 'lib.huggingface', 'lib.distributed', 'lib.device'],
    ['optimizer'],
    ['model'],
    ['lib.*'],
    ['checkpoint', 'interpret', 'interpret.*'],
    ['train', 'sample', 'explain', 'tools.*', 'data.*'],
]
FOLDERS = ('.', 'interpret', 'lib', 'tools', 'data/*')
FILES = [path for folder in FOLDERS for path in ROOT.glob(f'{folder}/*.py')]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def layer(name):
    for pattern in (name, name.split('.')[0] + '.*'):
        for i, names in enumerate(LAYERS):
            if pattern in names:
                return i
    raise KeyError(f'{name} is in no layer')


def imports(path):
    """Modules of the repository that a file imports, also inside functions."""
    modules = {module_name(path): path for path in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        else:
            continue
        yield from (name for name in found if name in modules)


def test_imports_run_downwards_without_a_cycle():
    graph = {module_name(path): set(imports(path)) for path in FILES}
    for name, imported in graph.items():
        for other in imported:
            assert layer(other) <= layer(name) < len(LAYERS), f'{name} imports {other}'
            assert layer(other) < len(LAYERS) - 1, f'{name} imports the entry point {other}'
    while graph:  # remove the modules that import nothing, until none is left
        leaves = {name for name, imported in graph.items() if not imported & graph.keys()}
        assert leaves, f'a cycle among {sorted(graph)}'
        graph = {name: imported for name, imported in graph.items() if name not in leaves}


def closure(*names):
    """The files that these modules import, directly and indirectly, and their own."""
    modules = {module_name(path): path for path in FILES}
    found, todo = set(), [Path(ROOT, name) for name in names]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += [modules[name] for name in imports(path)]
    return found


def n_lines(path):
    return len(path.read_text(encoding='utf-8').splitlines())


def test_files_can_be_read_in_one_sitting():
    assert n_lines(ROOT / 'model.py') <= 460 and n_lines(ROOT / 'train.py') <= 420
    model = ast.parse((ROOT / 'model.py').read_text(encoding='utf-8'))
    assert sum(isinstance(node, ast.IfExp) for node in ast.walk(model)) <= 15
    page = {ROOT / 'lib' / f'{name}.py' for name in ('playground', 'serve', 'page', 'messages')}
    n = sum(map(n_lines, closure('train.py', 'sample.py') - page))  # without sample.py --serve
    assert n <= 7440, f'train.py and sample.py import {n} lines: delete before you add'
    for path in [*FILES, *ROOT.glob('tests/*.py'), *ROOT.glob('web/**/*.js')]:
        assert n_lines(path) <= 600, path
        assert all(len(line) <= 100 for line in path.read_text(encoding='utf-8').splitlines()), path
