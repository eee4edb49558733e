"""A web page on this machine only: the server of explain.py and tools/runs.py."""
import contextlib
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from lib.errors import UserError

MAX_CONNECTIONS = 32
TIMEOUT = 10  # seconds in which a browser neither sends nor takes a byte
HEADERS = {
    'X-Frame-Options': 'DENY',
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',  # the address has the text
}


class Server(ThreadingHTTPServer):
    """At most MAX_CONNECTIONS at a time. A further one replaces the one that has kept us waiting
    for its request longest; if none does, it is closed at once."""
    request_queue_size = 128  # a burst of connections does not wait for a retransmission

    def __init__(self, address, handler):
        super().__init__(address, handler)
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


def serve(answer, port, policy):
    """Serve pages on 127.0.0.1 until Ctrl-C.

    answer(path, query): (status, content type, text), or None if there is no such page; query: a
    dict of texts. policy: their Content-Security-Policy. Raises UserError if the port cannot be
    used.
    """
    answer_lock = threading.Lock()  # one forward pass at a time: each takes memory and all cores

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT

        def do_GET(self):
            if not self.server.start_answer(self.connection):
                return
            path, _, query = self.path.partition('?')
            host = self.headers.get('Host', '').rsplit(':', 1)[0].lower()
            query = {key: values[0] for key, values in
                     parse_qs(query, keep_blank_values=True).items()}
            found = None
            if host in ('127.0.0.1', 'localhost'):  # against DNS rebinding
                with answer_lock:
                    found = answer(path, query)
            if found is None:
                self.send_error(404)
                return
            status, kind, text = found
            body = text.encode()
            self.send_response(status)
            self.send_header('Content-Type', f'{kind}; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            body = body if self.command == 'GET' else b''
            for start in range(0, len(body), 2**16):  # the timeout is for each write
                self.wfile.write(body[start:start + 2**16])

        do_HEAD = do_GET

        def end_headers(self):
            for name, value in HEADERS.items():
                self.send_header(name, value)
            # frame-ancestors: which a <meta> cannot hold
            self.send_header('Content-Security-Policy', f"{policy}; frame-ancestors 'none'")
            super().end_headers()

        def log_message(self, *args):
            pass

    try:
        server = Server(('127.0.0.1', port), Handler)
    except OSError as error:
        raise UserError(f'port = {port}: cannot listen: {error.strerror}; '
                        f'choose another --port (0: any free one)') from None
    with server:
        print(f'http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C to stop)', flush=True)
        server.serve_forever()
