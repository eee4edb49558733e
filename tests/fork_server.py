"""Forks processes from one that has already imported torch, which otherwise takes seconds.

Each line on stdin is JSON: [script, arguments, working directory, environment, stdout, stderr],
the last two being file names. The server runs it in a forked child and prints the exit code.
"""

import gc
import importlib.util
import json
import os
import signal
import sys

# the slow imports, but none of the repository's modules
import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch._inductor  # noqa: F401  torch.use_deterministic_algorithms imports it
import torch.distributed  # noqa: F401
import tqdm  # noqa: F401

TIMEOUT = 600  # seconds


def run_script(script, arguments, cwd, env, stdout, stderr):
    """Turn this process into `python script *arguments`."""
    os.chdir(cwd)
    os.environ.update(env)
    for fd, path in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(path, os.O_RDWR), fd)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    if 'PYTHONPATH' in env:
        sys.path[1:1] = env['PYTHONPATH'].split(os.pathsep)
        if importlib.util.find_spec('sitecustomize'):
            importlib.import_module('sitecustomize')
    with open(script, encoding='utf-8') as file:
        code = compile(file.read(), script, 'exec')
    signal.alarm(TIMEOUT)
    namespace = sys.modules['__main__'].__dict__
    for name in [name for name in namespace if not name.startswith('__')]:
        del namespace[name]
    namespace['__file__'] = script
    namespace['__doc__'] = None
    exec(code, namespace)


gc.freeze()  # otherwise every child traverses and thereby copies all objects when it exits
for request in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run_script(*json.loads(request))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
