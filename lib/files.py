"""Files: how they are found, read, and written whole or not at all; a lock per folder."""
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import shlex
import stat
import tempfile
import time
import zlib
from pathlib import Path

from lib.errors import UserError, first_line, os_errors, require, shorten

try:
    import fcntl
except ImportError:
    import msvcrt  # Windows
    fcntl = None

ROOT = Path(__file__).parents[1]
WINDOWS = os.name == 'nt'
MAX_JSON_BYTES = 2**28
LFS_POINTER = b'version https://git-lfs.github.com/spec/'

# Finding -----------------------------------------------------------------------------------------


def find(path):
    """The path that a user has given: `~` is the home folder; what is not in the working directory
    is looked for in the repository. Raises UserError if it cannot be the name of a file."""
    path = Path(os.path.expanduser(path))
    try:
        os.stat(path)
        return path
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        in_repository = ROOT / path
        return in_repository if os.path.exists(in_repository) else path
    except (OSError, ValueError) as error:  # too long, a null byte
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{shorten(str(path))}: {reason}') from None


def weights_of(config):
    """The folder, file or name that its keys init_from and out_dir name."""
    return config.out_dir if config.init_from == 'resume' else config.init_from


def printable(path):
    """A path as text: the name of a file need not be UTF-8."""
    return os.fsencode(path).decode(errors='replace')


def relative(path, folder='.'):
    """A path as seen from a folder; as it is if that is on another drive of Windows."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return str(path)


def quote(words):
    """Words of a command line as text, for the shell of this system."""
    if WINDOWS:
        from subprocess import list2cmdline  # slow

        return list2cmdline(words)
    return shlex.join(words)


def command(script, *files, **flags):
    """The command that runs a script of the repository, to be printed: quoted for a shell."""
    path = min(str(ROOT / script), relative(ROOT / script), key=len)
    words = [f'--{key}={value}' for key, value in flags.items()]
    return quote(['python', path, *map(str, files), *words])


# Reading -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_text(path):
    """A UTF-8 text file for reading, perhaps compressed (.gz): line ends become `\\n`, as in
    nanoGPT, and a byte order mark is dropped. Only read it in the body. Raises UserError."""
    try:
        with open_binary(path) as binary, io.TextIOWrapper(binary, encoding='utf-8-sig') as file:
            try:
                yield file
            except UnicodeDecodeError as error:  # in the last of the bytes that were read
                n_read = binary.tell() if binary.seekable() else len(error.object)
                position = n_read - len(error.object) + error.start
                raise UserError(f'{path}: byte {position} is not UTF-8 text; convert the file to '
                                f'UTF-8') from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f'{path}: its compressed data is damaged ({error})') from None
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}') from None


def check_lfs(path):
    """Raise UserError if Git LFS has left a pointer in the place of a file."""
    if os.path.isfile(path):  # a pipe can be read only once
        with open(path, 'rb') as file:
            require(file.read(len(LFS_POINTER)) != LFS_POINTER,
                    f'{path}: this is a Git LFS pointer: run git lfs pull in its folder')


def open_binary(path):
    """An open file with the content of a file, decompressed if its name ends in .gz."""
    check_lfs(path)
    name = str(path).lower()
    require(not name.endswith(('.zst', '.xz', '.bz2', '.zip')),
            f'{path}: of compressed files only .gz is read: decompress it, or pipe the text, '
            f'zstdcat FILE | python data/text/prepare.py --input=-')
    return gzip.open(path) if name.endswith('.gz') else open(path, 'rb')


def read_text(path):
    """The text of a file, as open_text reads it. Raises UserError."""
    with open_text(path) as file:
        return file.read()


def parse_json(text, surrogates=False):
    """json.loads; whatever is wrong is a ValueError: nesting that is too deep, and half a character
    unless surrogates are allowed, which stand for bytes in the names of files."""
    try:
        value = json.loads(text)
        return check_characters(value) if not surrogates and '\\ud' in text.lower() else value
    except RecursionError:
        raise ValueError('it is nested too deeply') from None


def check_characters(value):
    """The same value. Raises ValueError if a text in it has half a character, such as \\ud83d."""
    json.dumps(value, ensure_ascii=False).encode('utf-8')
    return value


def read_json(path):
    """The value in a JSON file. Raises UserError, FileNotFoundError if it is missing."""
    try:
        status = os.stat(path)
        require(stat.S_ISREG(status.st_mode), f'{path}: not JSON: it is a folder or a pipe')
        require(status.st_size <= MAX_JSON_BYTES,
                f'{path}: {status.st_size:,} bytes are too many for JSON')
        return parse_json(read_text(path), surrogates=True)
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or f'not JSON: {first_line(error)[:200]}'
        raise UserError(f'{path}: {reason}') from None


def check_kinds(table, kinds, path):
    """Raise UserError unless the table read from path has all keys of {key: type}, with values of
    that type; ints have 64 bits, and a bool is none."""
    require(isinstance(table, dict), f'{path}: not a table of keys and values')
    for key, kind in kinds.items():
        require(key in table, f'{path}: {key} is missing')
        value = table[key]
        fits = isinstance(value, kind)
        if isinstance(value, int) and kind is not bool:
            fits = fits and type(value) is int and abs(value) < 2**63
            fits = fits and (kind is not int or value >= 0)  # a count
        if not fits:  # only now: repr() of a large state takes long
            raise UserError(f'{path}: {key} = {shorten(value)} is not of the right type')


# Writing -----------------------------------------------------------------------------------------


def create(path):
    """Open a new file for writing in binary. What had its name is unlinked first, so that nothing
    is written through a symbolic link."""
    Path(path).unlink(missing_ok=True)
    return open(path, 'xb')


def open_own(path, mode):
    """open() of a regular file: neither through a symbolic link nor of a pipe, which could wait."""
    more = getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)  # Windows lacks them
    file = open(path, mode, 0, opener=lambda p, flags: os.open(p, flags | more, 0o666))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ENXIO, 'not a regular file', str(path))
    return file


def lock(folder, what):
    """Make the folder and keep other processes out of it until the returned file is closed. Raises
    UserError, which begins with `what`."""
    path = Path(folder) / '.lock'
    with os_errors(f'{what}: cannot write there', 'choose another folder'):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_own(path, 'ab')
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return file
    except OSError as error:
        file.close()
        reason = f'cannot lock it: {error.strerror}; choose a folder on another file system'
        if isinstance(error, BlockingIOError | PermissionError):
            reason = 'another process is writing there; wait for it or choose another folder'
        raise UserError(f'{what}: {reason}') from None


def cache_folder():
    """~/.cache/plaingpt, or in XDG_CACHE_HOME: for what can be made again."""
    folder = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if folder.startswith('~'):  # a user without a home, as in some containers
        folder = tempfile.gettempdir()
    return Path(folder) / 'plaingpt'


def temporary(path):
    """Where a file is written before the rename."""
    return path.with_name(path.name + '.tmp')


def replace(temporary, path):
    """Rename so that the new name survives a power cut: rename, then fsync the folder."""
    patiently(os.replace, temporary, path)
    if os.name == 'posix':
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def patiently(function, *paths):
    """Rename or delete. Windows refuses while another program reads the file: try for a second."""
    for _ in range(20 * WINDOWS):
        try:
            return function(*paths)
        except PermissionError:
            time.sleep(0.05)
    return function(*paths)


def write_text(path, text):
    """Replace a file atomically. Raises OSError that names it."""
    try:
        write_synced(temporary(path), text)
        replace(temporary(path), path)
    except OSError as error:
        temporary(path).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_synced(path, text):
    with create_synced(path) as file:
        file.write(text.encode('utf-8'))


@contextlib.contextmanager
def create_synced(path):
    """`create` in a with statement that ends with an fsync."""
    with create(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
