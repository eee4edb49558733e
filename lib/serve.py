"""Web pages on this machine only: the server of explain.py, tools/runs.py and sample.py."""
import contextlib
import json
import os
import re
import select
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from lib.errors import UserError

MAX_CONNECTIONS = 32
MAX_BODY = 2_000_000  # bytes of a message
TIMEOUT = 10  # seconds in which a browser neither sends nor takes a byte
HEADERS = {
    'X-Frame-Options': 'DENY',
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',  # the address has the text
}


class Server(ThreadingHTTPServer):
    """At most MAX_CONNECTIONS at a time. A further one replaces the one that has kept us waiting
    for its request longest; if none is waiting, it is closed at once."""
    request_queue_size = 128  # a burst of connections does not wait for a retransmission
    allow_reuse_address = os.name == 'posix'  # on Windows it shares a port that is in use

    def __init__(self, port):
        """Listen on 127.0.0.1; `serve` answers. Raises UserError if the port cannot be used."""
        try:
            super().__init__(('127.0.0.1', port), Handler)
        except OSError as error:
            raise UserError(f'port = {port}: cannot listen: {error.strerror}; '
                            f'choose another --port (0: any free one)') from None
        self.lock = threading.Lock()
        self.waiting = {}  # sockets whose request has not arrived; a dict keeps their order
        self.answering = set()

    def process_request(self, request, client_address):
        with self.lock:
            is_full = len(self.waiting) + len(self.answering) >= MAX_CONNECTIONS
            if is_full and self.waiting:
                oldest = next(iter(self.waiting))
                del self.waiting[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # ends the read of its thread
                is_full = False
            if not is_full:
                self.waiting[request] = None
        if is_full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def start_answer(self, request):
        """Whether the request may be answered: its connection has not been replaced."""
        with self.lock:
            if request not in self.waiting:
                return False
            del self.waiting[request]
            self.answering.add(request)
            return True

    def shutdown_request(self, request):
        with self.lock:
            self.waiting.pop(request, None)
            self.answering.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = TIMEOUT

    def do_GET(self):
        if not self.server.start_answer(self.connection):
            return
        path, _, query = self.path.partition('?')
        query = {key: values[0] for key, values in
                 parse_qs(query, keep_blank_values=True).items()}
        self.reply(self.server.answer, path, query)

    do_HEAD = do_GET

    def do_POST(self):
        """JSON only, which a page of another origin cannot send without asking first."""
        size = self.headers.get('Content-Length', '')
        size = int(size) if size.isdecimal() and len(size) < 10 else -1
        if size < 0 or self.headers.get_content_type() != 'application/json' or size > MAX_BODY:
            self.send_error(400, f'send JSON with the headers Content-Type: application/json and '
                                 f'Content-Length, at most {MAX_BODY:,} bytes')
            for start in range(0, size, 2**16):  # a client reads no answer while it is sending
                self.rfile.read(min(2**16, size - start))
            return
        body = self.rfile.read(size)
        if self.server.start_answer(self.connection):
            self.reply(self.server.answer_message, self.path, body)

    def reply(self, answer, *request):
        host = ', '.join(self.headers.get_all('Host', []))
        if not answer or not re.fullmatch(r'(127\.0\.0\.1|localhost)(:\d+)?', host.lower()):
            self.send_error(404)  # against DNS rebinding
            return
        if self.headers.get('Origin', f'http://{host}') != f'http://{host}':
            self.send_error(400, 'pages of another origin get no answer')
            return
        try:
            with self.server.answer_lock:
                found = answer(*request)
            if found is None:
                self.send_error(404)
            elif isinstance(found[2], bytes):
                self.send_body(*found)
            else:
                self.send_stream(*found)
        except UserError as error:
            self.send_error(getattr(error, 'status', 400), str(error),
                            code=getattr(error, 'code', None))

    def send_head(self, status, kind, size=None):
        self.send_response(status)
        self.send_header('Content-Type', f'{kind}; charset=utf-8')
        if size is not None:
            self.send_header('Content-Length', str(size))
        self.end_headers()

    def send_body(self, status, kind, body):
        self.send_head(status, kind, len(body))
        body = body if self.command != 'HEAD' else b''
        for start in range(0, len(body), 2**16):  # the timeout is for each write
            self.wfile.write(body[start:start + 2**16])

    def send_stream(self, status, kind, pieces):
        """Send the bytes of a generator as they come, until the client is gone. A UserError before
        the first of them can still be answered; b'': nothing yet."""
        begun = False
        with contextlib.closing(pieces):
            for piece in pieces:
                if self.is_gone():
                    return
                if piece and not begun:
                    begun = True
                    self.send_head(status, kind)
                self.wfile.write(piece)

    def is_gone(self):
        """Whether the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def send_error(self, status, message=None, explain=None, code=None):
        error = error_json(message or self.responses[status][0], status, code)
        self.send_body(status, 'application/json', json.dumps(error).encode())

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        # frame-ancestors: which a <meta> cannot hold
        self.send_header('Content-Security-Policy',
                         f"{self.server.policy}; frame-ancestors 'none'")
        super().end_headers()

    def log_message(self, *args):
        pass


def error_json(message, status=400, code=None):
    """An error as OpenAI's API has them."""
    kind = 'invalid_request_error' if status < 500 else 'server_error'
    return {'error': {'message': message, 'type': kind, 'param': None, 'code': code}}


def serve(server, answer, policy, answer_message=None, at_once=False):
    """Serve pages on a Server until Ctrl-C.

    answer(path, query): (status, content type, bytes, or a generator of bytes to stream), or None
    if there is no such page; query: a dict of texts. policy: their Content-Security-Policy.
    answer_message(path, body): the same for JSON that is posted, body: bytes. at_once: whether
    several may be answered at the same time. A UserError becomes an answer in JSON.
    """
    server.answer, server.policy, server.answer_message = answer, policy, answer_message
    # each forward pass takes memory and all cores
    server.answer_lock = contextlib.nullcontext() if at_once else threading.Lock()
    with server:
        print(f'http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C to stop)', flush=True)
        server.serve_forever()
