"""Files that are whole or absent: temporary names, fsync, rename; a lock per folder."""
import hashlib
import os
from pathlib import Path

from lib.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


def lock(folder, what):
    """Make the folder and keep other processes out of it until the returned file is closed. Raises
    UserError, which begins with `what`."""
    path = Path(folder) / '.lock'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, 'a')
    except OSError as error:
        reason = f'cannot write there: {error.strerror}; choose another folder'
        raise UserError(f'{what}: {reason}') from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError as error:
        file.close()
        reason = f'cannot lock it: {error.strerror}; choose a folder on another file system'
        if isinstance(error, BlockingIOError):
            reason = 'another process is writing there; wait for it or choose another folder'
        raise UserError(f'{what}: {reason}') from None


def temporary(path):
    """Where a file is written before the rename."""
    return path.with_name(path.name + '.tmp')


def replace(temporary, path):
    """Rename so that the new name survives a power cut: rename, then fsync the folder."""
    os.replace(temporary, path)
    if os.name == 'posix':
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path, text):
    """Replace a file atomically. Raises OSError that names it."""
    try:
        write_synced(temporary(path), text)
        replace(temporary(path), path)
    except OSError as error:
        temporary(path).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_synced(path, text):
    """Write and fsync. Raises OSError that names the file."""
    try:
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


class HashingFile:
    """A file for writing that hashes what passes through; fsynced when it is closed."""

    def __init__(self, path):
        self.file = open(path, 'wb', buffering=0)
        self.sha256, self.bytes = hashlib.sha256(), 0
        self.error = None  # torch.save raises its own, less useful error

    def write(self, data):
        self.sha256.update(data)
        self.bytes += len(data)
        try:
            left = memoryview(data)
            while left:
                left = left[self.file.write(left):]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
