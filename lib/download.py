"""Downloads: https, resumed after a break, checked by sha256 before the file gets its name."""
import hashlib
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from lib.errors import UserError, require, restate
from lib.files import create, open_own, replace, sha256_of


def download(url, path, sha256=None, advice='put the file there by hand', optional=False):
    """Fetch url into path unless path exists; a broken download continues from path.part. sha256:
    of the content; 'linked': what Hugging Face's hub announces, a git hash for small files.
    Returns path, or None if it is optional and not there (404). Raises UserError."""
    path = Path(path)
    if path.exists():
        return path
    check_scheme(url)
    part = path.with_name(path.name + '.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sha256 == 'linked':
            sha256 = announced_hash(url)
        fetch(url, part)
    except urllib.error.HTTPError as error:
        if error.code == 404 and optional:
            return None
        raise UserError(f'{url} cannot be downloaded to {path} ({error}): {advice}') from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
            TimeoutError) as error:
        reason = getattr(error, 'reason', error)
        raise UserError(f'{url} cannot be downloaded to {path} ({reason}): {advice}') from None
    except OSError as error:
        raise UserError(f'{path}: cannot write there: {error.strerror or error}') from None
    found = git_hash(part) if sha256 and len(sha256) == 40 else sha256_of(part)
    if sha256 and found != sha256:
        part.unlink()
        raise UserError(f'{url}: the download has sha256 {found}, not {sha256}; it was deleted: '
                        f'try again, or {advice}')
    replace(part, path)
    return path


def check_scheme(url):
    with restate(ValueError, url, 'not a URL'):
        parts = urllib.parse.urlsplit(url)
    require(parts.scheme == 'https' or parts.hostname in ('127.0.0.1', 'localhost'),
            f'{url}: only https downloads are allowed')


def fetch(url, part):
    """Append the missing bytes of url to the file `part`."""
    done = part.stat().st_size if part.exists() else 0
    headers = {'Range': f'bytes={done}-'} if done else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise
    with response:
        check_scheme(response.url)  # a redirect may lead elsewhere
        if response.status != 206:  # the server sends all of it
            done = 0
        length = response.headers.get('Content-Length')
        total = done + int(length) if length else None
        with (open_own(part, 'ab') if done else create(part)) as file, \
                tqdm(total=total, initial=done, unit='B', unit_scale=True, desc=part.stem,
                     disable=None, leave=False) as bar:
            while block := response.read(2**20):
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if total and done < total:
        raise ConnectionError(f'connection lost after {done:,} of {total:,} bytes; '
                              f'run the same command again to continue')


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def git_hash(path):
    """What git calls a file of this content."""
    content = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def announced_hash(url):
    """What Hugging Face's hub announces before its redirect: the sha256 of a large file, the git
    hash of a small one, or None."""
    request = urllib.request.Request(url, method='HEAD')
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        if error.code not in (301, 302, 303, 307, 308):
            raise
        headers = error.headers
    etag = (headers.get('X-Linked-Etag') or headers.get('Etag', '')).removeprefix('W/').strip('"')
    return etag if re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', etag) else None
