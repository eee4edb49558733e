"""Fixtures shared by the tests: a clone of the repository to run programs in, data, and runs."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import checkpoint as ckpt
from helpers import FAULT_RUN, ROOT, TINY
from lib import write
from lib.bpe import train_char
from lib.text import split_at_end

os.environ['OMP_NUM_THREADS'] = '1'  # two tests run at a time, each on one core


# Running programs ---------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def clone(tmp_path_factory):
    """A copy of the repository without prepared data and training runs."""
    folder = tmp_path_factory.mktemp('clone') / 'plaingpt'
    ignored = ('*.bin', 'meta.json', 'input.txt', 'out*', 'wandb', '.*', '__pycache__', 'tests')
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*ignored))
    return folder


class ForkServer:
    """Runs scripts in processes forked from one that has imported torch (fork_server.py)."""

    def __init__(self):
        command = [sys.executable, Path(__file__).with_name('fork_server.py')]
        pipe = subprocess.PIPE
        # is_available() must not initialize CUDA: a forked process could not use it
        env = os.environ | {'PYTORCH_NVML_BASED_CUDA_CHECK': '1'}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def start(self, script, arguments, cwd, env):
        self.command = [script, *arguments]
        self.files = [tempfile.NamedTemporaryFile('r') for _ in range(2)]  # stdout, stderr
        request = [script, arguments, str(cwd), env, *(file.name for file in self.files)]
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def wait(self):
        """What subprocess.run would return."""
        code = int(self.process.stdout.readline())
        with self.files[0] as stdout, self.files[1] as stderr:
            return subprocess.CompletedProcess(self.command, code, stdout.read(), stderr.read())


@pytest.fixture(scope='session')
def fork_servers():
    """Fork servers, one per process that runs at a time; started when they are needed."""
    servers = []

    def fork_servers(n):
        while len(servers) < n:
            servers.append(ForkServer())
        return servers[:n]

    yield fork_servers
    for server in servers:
        with server.process as process:
            process.stdin.close()


@pytest.fixture(scope='session')
def forked(fork_servers):
    """forked(script, arguments, cwd, env) is a faster subprocess.run."""

    def forked(*request):
        (server,) = fork_servers(1)
        server.start(*request)
        return server.wait()

    return forked


@pytest.fixture(scope='session')
def ranks(clone, fork_servers):
    """ranks(n, '--key=value', ..., code=0) runs train.py in n processes with the environment that
    torchrun gives them, without its startup time; returns their output. Each must exit with code.
    '{rank}' in an argument becomes the number of the process.
    """

    def ranks(n, *arguments, code=0, env=None):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        common = {'WORLD_SIZE': n, 'LOCAL_WORLD_SIZE': n, 'MASTER_ADDR': '127.0.0.1',
                  'MASTER_PORT': port, 'TORCHELASTIC_RUN_ID': uuid.uuid4().hex}
        servers = fork_servers(n)
        for rank, server in enumerate(servers):
            values = common | {'RANK': rank, 'LOCAL_RANK': rank}
            values = {name: str(value) for name, value in values.items()} | (env or {})
            own = [str(argument).replace('{rank}', str(rank)) for argument in arguments]
            server.start(str(clone / 'train.py'), own, clone, values)
        results = [server.wait() for server in servers]
        output = ''.join(result.stdout + result.stderr for result in results)
        assert [result.returncode for result in results] == [code] * n, output
        return output

    return ranks


@pytest.fixture(scope='session')
def run(clone, forked):
    """run('train.py', '--key=value', ..., code=0) returns the finished process; it must exit with
    this code.
    """

    def run(script, *arguments, code=0, cwd=clone, env=None, **options):
        command = [str(clone / script), *map(str, arguments)]
        env = env or {}
        # OMP_NUM_THREADS is read when torch is imported; Windows cannot fork
        if options or 'OMP_NUM_THREADS' in env or not hasattr(os, 'fork'):
            result = subprocess.run(
                [sys.executable, *command],
                cwd=cwd,
                text=True,
                timeout=600,
                capture_output=True,
                env=os.environ | env,
                **options,
            )
        else:
            result = forked(command[0], command[1:], cwd, env)
        output = f'{result.stdout}\n{result.stderr}'
        assert result.returncode == code, f'{script} {arguments}: {result.returncode}\n{output}'
        return result

    return run


@pytest.fixture(scope='session')
def refused(run):
    """refused('train.py', '--key=value', ..., says=('text',)): the program must exit with code 2
    and a single line on stderr that contains the texts.
    """

    def refused(script, *arguments, says, **options):
        result = run(script, *arguments, code=2, **options)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith(Path(script).name + ': '), lines
        for text in (says,) if isinstance(says, str) else says:
            assert text in lines[0], f'{text!r} is not in: {lines[0]}'

    return refused


@pytest.fixture
def patched_env(tmp_path):
    """patched_env(code, NAME=value, ...) returns an environment in which Python first runs this
    code: it imports sitecustomize on startup.
    """

    def patched_env(code, **values):
        folder = tmp_path / 'patch'
        folder.mkdir(exist_ok=True)
        constants = ''.join(f'{name} = {value!r}\n' for name, value in values.items())
        (folder / 'sitecustomize.py').write_text(constants + code)
        return {'PYTHONPATH': str(folder)}

    return patched_env


# A GPU --------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def gpu():
    """The device of the tests marked cuda. CUDA_TESTS_ON=cpu runs them there: without a GPU that
    finds mistakes in the tests, but none in the kernels.
    """
    name = os.environ.get('CUDA_TESTS_ON', 'cuda')
    if name == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs an NVIDIA GPU: PyTorch sees none here')
    return torch.device(name, 0)


# Data ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def text():
    """Real text that nobody edits: what a tiny model learns from it must not change by accident."""
    return Path(__file__).with_name('text.txt').read_text(encoding='utf-8')


@pytest.fixture(scope='session')
def char_data(tmp_path_factory, text):
    """A character-level dataset of that text."""
    folder = tmp_path_factory.mktemp('data') / 'char'
    pieces = split_at_end([(text, False)], len(text.encode()))
    write.write_dataset(folder, pieces, train_char([text]), 'test')
    return folder


@pytest.fixture(scope='module')
def prepare_pairs(run, clone):
    """prepare_pairs(lines, '--key=value', ...) returns the dataset folder; a line is a tuple of
    columns, or an object to be written as JSON.
    """

    def prepare_pairs(lines, *arguments, name='tested', **options):
        if isinstance(lines[0], tuple):
            path = clone / f'{name}.tsv'
            text = ['\t'.join(line) for line in lines]
        else:
            path = clone / f'{name}.jsonl'
            text = [json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text(''.join(line + '\n' for line in text), encoding='utf-8')
        command = ('data/pairs/prepare.py', f'--input={path}', f'--dataset={name}')
        prepare_pairs.result = run(*command, *arguments, **options)
        return clone / 'data' / name

    return prepare_pairs


# A browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def chromium():
    """Chromium; tests that use it are skipped without one."""
    names = ('chromium', 'chromium-browser', 'google-chrome')
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip('needs Chromium: apt-get install chromium')
    from playwright.sync_api import sync_playwright  # installed only where there is a browser

    arguments = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-sync',
                 '--disable-background-networking', '--disable-component-update']
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def trained(run, char_data, tmp_path_factory):
    """The folder of a tiny run of 20 steps."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    run('train.py', f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=20', *TINY)
    return out_dir


@pytest.fixture(scope='session')
def train_args(char_data):
    """The arguments of train.py in the tests that inject faults."""
    return (*FAULT_RUN, f'--dataset={char_data}')


@pytest.fixture(scope='session')
def reference_run(run, train_args, tmp_path_factory):
    """The run without a fault. It has checkpoints at steps 16 and 20."""
    out_dir = tmp_path_factory.mktemp('reference') / 'out'
    run('train.py', f'--out_dir={out_dir}', *train_args)
    assert [manifest['step'] for manifest in ckpt.manifests(out_dir)] == [20, 16]
    return out_dir


@pytest.fixture
def out_dir(reference_run, tmp_path):
    """A copy of the reference run, to be damaged."""
    return shutil.copytree(reference_run, tmp_path / 'out')


@pytest.fixture
def hub(tmp_path):
    """hub(folder, 'owner/name'): a local server with this model, which announces hashes as Hugging
    Face's does: the sha256 of large files, the git hash of small ones."""
    answers, servers = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in answers:
                self.send_error(404)
                return
            content, announced = answers[self.path]
            self.send_response(200)
            if self.path.endswith('.safetensors'):
                self.send_header('X-Linked-Etag', f'"{hashlib.sha256(announced).hexdigest()}"')
            else:
                blob = b'blob %d\0' % len(announced) + announced
                self.send_header('ETag', f'"{hashlib.sha1(blob).hexdigest()}"')
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    def hub(folder, name, corrupt=None):
        for path in folder.iterdir():
            content = path.read_bytes()
            sent = content.replace(b'0', b'1') if path.name == corrupt else content
            answers[f'/{name}/resolve/main/{path.name}'] = sent, content
        server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return {
            'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
            'XDG_CACHE_HOME': str(tmp_path / 'cache'),
        }

    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()
