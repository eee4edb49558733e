"""A user's mistake is one sentence and exit code 2; a bug keeps its traceback."""
import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# what is wrong with a file or a disk, not with the program
BAD_FILE = (*DISK_FULL, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS,
            errno.ELOOP, errno.ENXIO, errno.EIO, errno.ESTALE)


class UserError(ValueError):
    """A user's mistake, in one sentence that names the key or file, the value and the remedy."""


def require(condition, message):
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error):
    """The first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__


def reason_of(error, path=''):
    """Why a file cannot be read: our own sentence, without its path, or words for Python's."""
    if isinstance(error, UserError | OSError):
        return (getattr(error, 'strerror', None) or str(error)).removeprefix(f'{path}: ')
    if isinstance(error, KeyError):
        return f'{error} is missing'
    return 'it is damaged, or a value has the wrong type'


def plural(n, noun):
    """'1 file', '1,234 files'"""
    return f'{n:,} {noun}{"s" * (n != 1)}'


def duration(seconds):
    """'90s', '12.5m', '3.4h', '2.1d'"""
    for unit, size in (('d', 86_400), ('h', 3_600), ('m', 60)):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f}{unit}'
    return f'{seconds:.0f}s'


def shorten(value):
    """repr(value), at most about 60 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # str() refuses more than 4300 digits
        text = f'a large {type(value).__name__}'
    return text if len(text) <= 60 else f'{text[:57]}...'


@contextlib.contextmanager
def restate(kinds, where, what='', remedy=''):
    """Turn exceptions of these kinds in the enclosed call into a UserError: `where: what: reason;
    remedy`."""
    try:
        yield
    except kinds as error:
        message = ': '.join(filter(None, (str(where), what, reason_of(error, where)[:500])))
        raise UserError(f'{message}; {remedy}' if remedy else message) from None


def os_errors(where, remedy=''):
    return restate(OSError, where, remedy=remedy)


def exit_with(message):
    """Print a mistake and exit with code 2. Under torchrun every process may find the same one, and
    the first to exit ends the others on its host: they wait, so that it is printed once."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('RANK') != '0':
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)  # a mistake of these processes alone follows
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Wrap entry points in this: a UserError becomes one line on stderr and exit code 2. So does a
    full or failing disk, or a folder in place of a file, which can hit any read and write. Every
    other exception keeps its traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:  # the shell closed it: train.py >&-
            setattr(sys, name, open(os.devnull, mode))
    # a character that the terminal or PYTHONIOENCODING lacks ends no program
    sys.stdout.reconfigure(errors='replace')
    # exit through `finally` blocks, which delete half-written files
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if hasattr(signal, 'SIGUSR1'):  # "save now": ignored until train.py has something to save
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        yield
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            # Ctrl-C ends the imports that follow at once: torch's can hang in a KeyboardInterrupt
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except UserError as error:
        exit_with(error)
    except BrokenPipeError:  # sample.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (BAD_FILE if error.filename else DISK_FULL):
            raise
        exit_with(f'{error.filename or "output"}: {error.strerror}')
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
