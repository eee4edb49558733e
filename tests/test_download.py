"""Downloads from a local server: complete, interrupted, resumed, and with unexpected content."""

import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib.download import download
from lib.errors import UserError

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
            # like Hugging Face: the sha256 and a redirect
            if self.path.startswith('/hub/'):
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
                end = (
                    len(CONTENT)
                    if server.breaks_at is None
                    else min(len(CONTENT), start + server.breaks_at)
                )
                self.wfile.write(CONTENT[start:end])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.url, server.requests, server.breaks_at, server.resumes = (
        f'http://127.0.0.1:{server.server_port}',
        [],
        None,
        True,
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_fetches_file_once(server, tmp_path):
    path = tmp_path / 'a' / 'x.bin'
    assert download(server.url + '/file', path, SHA256).read_bytes() == CONTENT
    download(server.url + '/file', path, SHA256)
    assert len(server.requests) == 1 and [p.name for p in path.parent.iterdir()] == ['x.bin']


@pytest.mark.parametrize('resumes', [True, False])
def test_download_resumes_after_disconnect(server, tmp_path, resumes):
    server.breaks_at, server.resumes = 300_000, resumes
    with pytest.raises(UserError, match='300,000 of 1,024,000 bytes; run the same command again'):
        download(server.url + '/file', tmp_path / 'x.bin', SHA256)
    assert [p.name for p in tmp_path.iterdir()] == ['x.bin.part']
    server.breaks_at = None
    assert download(server.url + '/file', tmp_path / 'x.bin', SHA256).read_bytes() == CONTENT
    assert server.requests[-1][2] == 'bytes=300000-'


def test_download_discards_file_with_wrong_sha256(server, tmp_path):
    with pytest.raises(UserError, match='sha256'):
        download(server.url + '/file', tmp_path / 'x.bin', '0' * 64)
    assert list(tmp_path.iterdir()) == []


def test_download_verifies_sha256_from_hub(server, tmp_path):
    assert download(server.url + '/hub/x', tmp_path / 'x.bin', 'linked').read_bytes() == CONTENT
    (tmp_path / 'y.bin.part').write_bytes(b'left by an attacker'.ljust(len(CONTENT), b'!'))
    with pytest.raises(UserError, match='sha256'):
        download(server.url + '/hub/y', tmp_path / 'y.bin', 'linked')


CUT = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab'


@pytest.mark.parametrize('answer', [b'nonsense\r\n\r\n', b'', CUT])
def test_download_reports_a_server_that_does_not_speak_http(tmp_path, answer):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f'http://127.0.0.1:{listener.getsockname()[1]}/x'
        with pytest.raises(UserError, match=f'{url} cannot be downloaded to .*x.bin'):
            download(url, tmp_path / 'x.bin')
        thread.join()
    assert not (tmp_path / 'x.bin').exists()


def test_download_reports_failure_in_one_line(tmp_path, server):
    for url, message in (
        (server.url + '/missing', 'Not Found'),
        ('http://127.0.0.1:9/x', 'refused'),
    ):
        with pytest.raises(
            UserError,
            match=f'{re.escape(url)} cannot be downloaded to .*x.bin.*{message}.*: do this',
        ):
            download(url, tmp_path / 'x.bin', advice='do this')
    for url in ('https://[', 'https://127.0.0.1:port/x', 'https://a b/x'):
        with pytest.raises(UserError, match=re.escape(url)):
            download(url, tmp_path / 'x.bin')
    for url in ('http://example.com/x', 'ftp://example.com/x', 'file:///etc/passwd'):
        with pytest.raises(UserError, match='only https'):
            download(url, tmp_path / 'x.bin')
