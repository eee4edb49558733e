"""One flat, typed, checked config out of an entry point's defaults, config files and the command line.

    python train.py config/x.py --batch_size=32 --compile=False --eval_only

An entry point lists its keys in a dataclass: `key: type = default  # comment`. A config file is flat Python: `key = value`,
where a value is a literal, arithmetic, or the name of another key. It is parsed, never executed.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import signal
import sys
import time
import types
import typing
from pathlib import Path


class UserError(ValueError):
    """A user's mistake, told in one sentence that names the key or file, the value and the remedy."""


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__


def require(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_errors():
    """Entry points run inside: what the user or the machine did wrong is one sentence and exit code 2, no traceback.

    That is a UserError and an OSError (disk full, no permission, not a file). A bug keeps its traceback.
    """
    script = Path(sys.argv[0]).name
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))  # closed: train.py >&-
    report = sys.excepthook
    # Ctrl-C is no bug either, also while modules are imported after this; SIGTERM cleans up what is half written
    sys.excepthook = lambda kind, *rest: print('stopped', file=sys.stderr) if kind is KeyboardInterrupt else report(kind, *rest)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if hasattr(signal, 'SIGUSR1'):  # asks train.py to save: while there is nothing to save it is no reason to die
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        yield
    except UserError as error:
        print(f'{script}: {error}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has gone, as in sample.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f'{script}: {error.filename or "writing"}: {error.strerror or error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)


def configure(cls, argv=None):
    """Read argv (default: the command line) into the dataclass cls.

    Config files and --key=value are applied in the order in which they stand. Returns (config, the keys given, as a set that
    lists them in the order in which they were given last).
    Raises UserError on an unknown key, a value of the wrong type or an unreadable file; prints the keys and exits on --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(cls))
        sys.exit(0)
    types_ = typing.get_type_hints(cls)
    values = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith('-'):
            for key, value in read_config_file(word, cls).items():
                values.pop(key, None)
                values[key] = value
            continue
        key, equals, text = word.removeprefix('--').partition('=')
        require(word.startswith('--') and key, f'{word}: options are written --key=value')
        require(key in types_, f'--{key}: no such key{nearest(key, types_)}')
        if not equals:
            if types_[key] is bool or bool in typing.get_args(types_[key]):  # --flag alone
                text = 'True'
            else:  # --key value
                require(words and not words[0].startswith('--'), f'--{key}: a value is missing, write --{key}=value')
                text = words.pop(0)
        values.pop(key, None)
        values[key] = parse_value(key, text, types_[key])
    return cls(**values), values.keys()


def read_config_file(path, cls):
    """The keys that a config file sets, {key: value}, typed by cls. Raises UserError with file and line."""
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        others = [str(p) for p in sorted(Path('config').glob('*.py'))]
        raise UserError(f'{path}: {error.strerror or error}{nearest(path, others) if others else ""}; '
                        f'a word without -- is the path of a config file') from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f' line {error.lineno}' if isinstance(error, SyntaxError) else ''
        raise UserError(f'{path}{line}: not a config file: {error}; write lines of key = value') from None
    types_ = typing.get_type_hints(cls)
    names = {f.name: default_of(f) for f in dataclasses.fields(cls)}
    values = {}
    for statement in tree.body:
        where = f'{path} line {statement.lineno}'
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):  # `import time`, a docstring
                continue
            case (ast.Assign(targets=[ast.Name(id=key)], value=node)
                  | ast.AnnAssign(target=ast.Name(id=key), value=ast.AST() as node)):
                require(key in types_, f'{where}: {key}: no such key{nearest(key, types_)}')
                try:
                    values[key] = names[key] = check_type(key, evaluate(node, names), types_[key])
                except UserError as error:
                    raise UserError(f'{where}: {error}') from None
            case _:
                raise UserError(f'{where}: only lines of key = value are read here, config files are not executed')
    return values


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def evaluate(node, names):
    """The value of an expression: literals, arithmetic on numbers, text + text, lists, names, str(x) and time.time()."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            require(name in names, f'{name}: no such key{nearest(name, names)}')
            return names[name]
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
            return [evaluate(n, names) for n in nodes]
        case ast.UnaryOp(op=ast.USub(), operand=operand) if is_number(value := evaluate(operand, names)):
            return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = evaluate(left, names), evaluate(right, names)
            text = isinstance(a, str) and isinstance(b, str) and isinstance(op, ast.Add)
            require(text or is_number(a) and is_number(b), f'{ast.unparse(node)}: arithmetic takes two numbers')
            require(not isinstance(op, ast.Pow) or abs(b) <= 64 and abs(a) <= 2**64, f'{ast.unparse(node)} is too large')
            try:
                return OPERATORS[type(op)](a, b)
            except (ArithmeticError, ValueError) as error:
                raise UserError(f'{ast.unparse(node)}: {error}') from None
        case ast.Call(func=ast.Name(id='str'), args=[argument], keywords=[]):
            return str(evaluate(argument, names))
        case ast.Call(func=ast.Attribute(value=ast.Name(id='time'), attr='time'), args=[], keywords=[]):
            return time.time()
    raise UserError(f'{ast.unparse(node)}: write a literal, arithmetic, or the name of another key')


def parse_value(key, text, type_):
    """A value of the command line. A key that takes text gets it as it was typed; otherwise it is read like a file's value."""
    accepts_text = str in typing.get_args(type_)
    if type_ is str:
        return text
    try:
        value = evaluate(ast.parse(text.strip(), mode='eval').body, {'true': True, 'false': False, 'none': None})
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # not Python (UserError is a ValueError too): text
        value = text
    try:
        return check_type(key, text if accepts_text and not isinstance(value, (list, types.NoneType)) else value, type_)
    except UserError as error:
        with contextlib.suppress(UserError):  # a choice that reads like a value: --position=none
            return check_type(key, text, type_)
        raise error from None


def check_type(key, value, type_):
    """value as type_: a whole number where a float is meant, 0 or 1 for a bool, one text for a list of them. Or UserError."""
    union = isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union
    options = typing.get_args(type_) if union else [type_]
    choices = []
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is typing.Literal:
            choices += arguments
            if isinstance(value, str) and value in arguments:
                return value
        elif origin is list:
            values = value if isinstance(value, (list, tuple)) else [value] if not union else [None]
            if all(isinstance(v, arguments) and not isinstance(v, bool) for v in values):
                return list(values)
        elif option is types.NoneType and value is None or option is str and isinstance(value, str):
            return value
        elif option is bool and (isinstance(value, bool) or is_number(value) and value in (0, 1)):
            return bool(value)
        elif option is int and is_number(value) and value == value // 1 and abs(value) < 2**63:
            return int(value)
        elif option is float and is_number(value):
            return float(value)
    hint = nearest(value, choices) if isinstance(value, str) and choices else ''
    raise UserError(f'{key} = {value!r}: give {describe(type_)}{hint}')


def is_number(value):
    return isinstance(value, float) and math.isfinite(value) or type(value) is int and abs(value) < 2**63


def describe(type_):
    """A type in a user's words."""
    if type_ in WORDS:
        return WORDS[type_]
    if typing.get_origin(type_) is typing.Literal:
        *others, last = typing.get_args(type_)
        return f'{", ".join(others)} or {last}' if others else last
    if typing.get_origin(type_) is list:
        return 'a list'
    return ', or '.join(describe(option) for option in typing.get_args(type_))


WORDS = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text', types.NoneType: 'None'}


def nearest(word, choices):
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f'; did you mean {close[0]}?' if close else '; --help lists them all'


def default_of(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def help_text(cls):
    """Every key with its default, type and comment, under the headings of the dataclass's source."""
    lines = [inspect.getdoc(sys.modules[cls.__module__]) or '', '',
             f'usage: python {sys.argv[0]} [config/file.py] [--key=value ...]    (a switch: --key alone is --key=True)']
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for line in inspect.getsource(cls).splitlines():
        if heading := re.fullmatch(r'    # (.+)', line):
            lines += ['', heading[1]]
        elif (key := re.match(r'    (\w+):', line)) and key[1] in fields:
            comment = line.partition('  # ')[2]
            lines.append(f'  --{key[1]}={default_of(fields[key[1]])!r}'.ljust(42) + f' {describe(hints[key[1]])}'
                         + (f': {comment}' if comment else ''))
    return '\n'.join(lines)


def differences(config):
    """Lines of `key = value` for what differs from the defaults."""
    return [f'{f.name} = {getattr(config, f.name)!r}' for f in dataclasses.fields(config)
            if getattr(config, f.name) != default_of(f)]
