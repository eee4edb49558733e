"""Training and sampling on a fake GPU: no host sync in a step, no CPU tensor among CUDA ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fake_cuda


@pytest.fixture(scope='session')
def environment(tmp_path_factory):
    if not shutil.which('g++'):
        pytest.skip('needs g++, which compiles a device guard for the fake GPU')
    return fake_cuda.environment(tmp_path_factory.mktemp('fake_cuda'))


@pytest.mark.slow
@pytest.mark.parametrize('groups', ['training', 'sampling details'])
def test_fake_gpu(environment, groups):
    script = Path(__file__).with_name('fake_cuda_cases.py')
    command = [sys.executable, script, *groups.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    print(result.stdout, result.stderr)  # one line per case, and the host syncs of sampling
    assert result.returncode == 0
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    failed = [f'{case["case"]}: {case["error"]}' for case in cases if case['error']]
    assert cases and not failed, '\n\n'.join(failed)
