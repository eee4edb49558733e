"""Downloads from a real server on this machine: whole, broken off, resumed, and not what was expected."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configurator import UserError
from data.download import download

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            server.requests.append((self.command, self.path, self.headers.get('Range')))
            if self.path == '/missing':
                self.send_error(404)
                return
            if self.path.startswith('/hub/'):  # as Hugging Face answers: the sha256, and where the file is
                self.send_response(302)
                self.send_header('X-Linked-Etag', f'"{SHA256}"')
                self.send_header('Location', '/file')
                self.end_headers()
                return
            start = int((self.headers.get('Range') or 'bytes=0-')[6:-1]) if server.resumes else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', str(len(CONTENT) - start))
            self.end_headers()
            if self.command == 'GET':
                end = len(CONTENT) if server.breaks_at is None else min(len(CONTENT), start + server.breaks_at)
                self.wfile.write(CONTENT[start:end])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.url, server.requests, server.breaks_at, server.resumes = f'http://127.0.0.1:{server.server_port}', [], None, True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_comes_once_and_whole(server, tmp_path):
    path = tmp_path / 'a' / 'x.bin'
    assert download(server.url + '/file', path, SHA256).read_bytes() == CONTENT
    download(server.url + '/file', path, SHA256)
    assert len(server.requests) == 1 and [p.name for p in path.parent.iterdir()] == ['x.bin']


@pytest.mark.parametrize('resumes', [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path, resumes):
    server.breaks_at, server.resumes = 300_000, resumes
    with pytest.raises(UserError, match='300,000 of 1,024,000 bytes; run the same command again'):
        download(server.url + '/file', tmp_path / 'x.bin', SHA256)
    assert [p.name for p in tmp_path.iterdir()] == ['x.bin.part']
    server.breaks_at = None
    assert download(server.url + '/file', tmp_path / 'x.bin', SHA256).read_bytes() == CONTENT
    assert server.requests[-1][2] == 'bytes=300000-'


def test_a_wrong_file_never_gets_the_name(server, tmp_path):
    with pytest.raises(UserError, match='sha256'):
        download(server.url + '/file', tmp_path / 'x.bin', '0' * 64)
    assert list(tmp_path.iterdir()) == []


def test_the_sha256_that_the_hub_announces_is_checked(server, tmp_path):
    assert download(server.url + '/hub/x', tmp_path / 'x.bin', 'linked').read_bytes() == CONTENT
    (tmp_path / 'y.bin.part').write_bytes(b'what an attacker left'.ljust(len(CONTENT), b'!'))
    with pytest.raises(UserError, match='sha256'):
        download(server.url + '/hub/y', tmp_path / 'y.bin', 'linked')


def test_what_cannot_be_had_is_one_sentence(tmp_path, server):
    for url, words in ((server.url + '/missing', 'Not Found'), ('http://127.0.0.1:9/x', 'refused')):
        with pytest.raises(UserError, match=f'{re.escape(url)} cannot be downloaded to .*x.bin.*{words}.*: do this'):
            download(url, tmp_path / 'x.bin', advice='do this')
    for url in ('http://example.com/x', 'ftp://example.com/x', 'file:///etc/passwd'):
        with pytest.raises(UserError, match='only https'):
            download(url, tmp_path / 'x.bin')
