"""How several processes start and restart: torchrun's variables, disagreements, restarts."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from helpers import (
    PARALLEL_RUN,
    TINY,
    TORCHRUN,
    assert_same_run,
    step_losses,
    worker_pids,
)
from lib import bins, device
from lib.errors import UserError


@pytest.fixture
def variables():
    """What torchrun sets for a single process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}


# Variables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('missing', ['WORLD_SIZE MASTER_ADDR MASTER_PORT', 'RANK', ''])
def test_train_is_one_process_unless_all_variables_are_set(
    run, char_data, tmp_path, variables, missing
):
    """A scheduler that sets some of them is not torchrun."""
    options = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=1')
    env = {'LOCAL_RANK': '3'} | variables | dict.fromkeys(missing.split(), '')
    output = run('train.py', *options, env=env).stdout
    notes = [line for line in output.splitlines() if line.startswith('note: one process')]
    assert len(notes) == bool(missing) and ', 1 process;' in output
    assert all(note.endswith(', '.join(missing.split())) for note in notes)


@pytest.mark.parametrize(
    'values, says',
    [
        ({'RANK': 'zero'}, "RANK = 'zero'"),
        ({'RANK': '2', 'WORLD_SIZE': '2'}, ("RANK = '2'", 'WORLD_SIZE = 2')),
        ({'RANK': '-1'}, "RANK = '-1'"),
        ({'WORLD_SIZE': '2.0'}, "WORLD_SIZE = '2.0'"),
        ({'WORLD_SIZE': '0'}, "WORLD_SIZE = '0'"),
        ({'MASTER_PORT': 'http'}, "MASTER_PORT = 'http'"),
        ({'MASTER_PORT': '70000'}, "MASTER_PORT = '70000'"),
    ],
)
def test_train_refuses_malformed_variables(refused, char_data, tmp_path, variables, values, says):
    options = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out')
    refused('train.py', *options, env=variables | values, says=says)
    assert not (tmp_path / 'out').exists()


def test_one_process_needs_no_network(run, char_data, tmp_path, variables):
    """Variables that an earlier job has left behind."""
    env = variables | {'MASTER_ADDR': 'no.such.host', 'TORCHELASTIC_USE_AGENT_STORE': 'True'}
    run('train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=1',
        env=env)  # fmt: skip


def test_train_reports_port_in_use(refused, char_data, variables):
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        env = variables | {'WORLD_SIZE': '2', 'MASTER_PORT': str(port)}
        refused('train.py', f'--dataset={char_data}', env=env, says=f'MASTER_PORT = {port}: ')


def test_each_process_has_its_own_gpu(monkeypatch):
    """LOCAL_RANK chooses among GPUs, but only if there are several processes."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)

    def gpu(local_rank, n_gpus, several=True):
        monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: several)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n_gpus)
        monkeypatch.delenv('LOCAL_RANK', raising=False)
        if local_rank is not None:
            monkeypatch.setenv('LOCAL_RANK', local_rank)
        return device.start_device('auto', deterministic=False).index

    assert gpu('1', 2, several=False) == gpu('x', 2, several=False) == 0
    assert gpu('1', 2) == 1
    assert gpu(None, 1) == 0  # a scheduler that shows each process its own
    for local_rank, n_gpus in (('2', 2), ('x', 2), (None, 2), ('1', 1)):
        with pytest.raises(UserError, match=f'LOCAL_RANK = .*--nproc_per_node={n_gpus}'):
            gpu(local_rank, n_gpus)


# Mistakes -----------------------------------------------------------------------------------------


def torchrun(clone, command):
    """Run a shell command in two processes under torchrun. Returns train.py's lines on stderr."""
    arguments = [sys.executable, *TORCHRUN, '--no-python', 'bash', '-c', f'exec {command}']
    env = os.environ | {'PYTHON': sys.executable}
    result = subprocess.run(
        arguments, capture_output=True, text=True, timeout=600, cwd=clone, env=env
    )
    assert result.returncode
    return [line for line in result.stderr.splitlines() if line.startswith('train.py: ')]


@pytest.mark.slow
def test_torchrun_reports_user_error_once(clone, trained, char_data):
    resume = f'--init_from=resume --out_dir={trained} --gradient_accumulation_steps=2'
    for arguments, says in (
        ('--learning_rat=1', '--learning_rat: no such key'),
        (f'{resume} --n_layer=3', 'n_layer = 3 but'),  # every process reads the checkpoint
        ('--see$( [ $RANK = 1 ] || echo d)=1', '--see: no such key'),  # only the second process
    ):
        (line,) = torchrun(clone, f'$PYTHON train.py {arguments}')
        assert says in line


def test_ddp_reports_user_error_once(ranks):
    output = ranks(2, '--dataset=openwebtext', code=2)
    assert output.count('train.py: dataset =') == 1 and 'RuntimeError' not in output


@pytest.mark.parametrize(
    'options, says',
    [
        ('--seed=1{rank}', 'seed = 10 on rank 0 but 11 on rank 1'),
        ('--learning_rate=1e-{rank}', 'learning_rate = 1.0 on rank 0 but 0.1 on rank 1'),
        ('--batch_size=1{rank}', 'batch_size = 10 on rank 0 but 11 on rank 1'),
        ('--init_from=nowhere{rank}', "init_from = 'nowhere0' on rank 0 but 'nowhere1' on rank 1"),
        # resuming, they would go on with different rates
        ('{tmp_path}/{rank}.py', 'learning_rate = 0.0006 on rank 0 but 0.0006 (default) on rank 1'),
    ],
)
def test_processes_with_different_keys_are_refused(ranks, char_data, tmp_path, options, says):
    (tmp_path / '0.py').write_text('learning_rate = 6e-4\n')
    (tmp_path / '1.py').write_text('')
    common = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out')
    output = ranks(2, *common, options.replace('{tmp_path}', str(tmp_path)), code=2)
    assert output.count('train.py: ') == 1 and f'train.py: {says}' in output
    assert not (tmp_path / 'out').exists()


@pytest.fixture
def copies(char_data, tmp_path):
    """The folders of two copies of a data set."""
    folders = tmp_path / 'data0', tmp_path / 'data1'
    for folder in folders:
        shutil.copytree(char_data, folder)
    return folders


def other_tokens(folder):
    ids = np.fromfile(folder / 'val.bin', dtype='<u2')
    ids[0] ^= 1
    ids.tofile(folder / 'val.bin')


def other_tokenizer(folder):
    meta = json.loads((folder / 'meta.json').read_text())
    meta['tokenizer']['characters'] = meta['tokenizer']['characters'][::-1]
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.mark.parametrize('change', [other_tokens, other_tokenizer])
def test_processes_with_different_data_are_refused(ranks, tmp_path, copies, change):
    change(copies[1])
    options = (f'--dataset={tmp_path}/data{{rank}}', f'--out_dir={tmp_path}/out', *PARALLEL_RUN)
    output = ranks(2, *options, code=2)
    both = [f'{str(folder)!r} on rank {i}' for i, folder in enumerate(copies)]
    assert output.count('train.py: ') == 1 and f'train.py: dataset = {" and ".join(both)}' in output
    assert not (tmp_path / 'out').exists()


def test_processes_may_differ_in_what_does_not_change_the_run(ranks, tmp_path, copies):
    """Copies of the data on each host; nanoGPT's configs put the time into the name of a run."""
    (tmp_path / 'config.py').write_text("import time\nwandb_run_name = 'ft-' + str(time.time())\n")
    options = (f'--dataset={tmp_path}/data{{rank}}', f'--out_dir={tmp_path}/out', *PARALLEL_RUN)
    assert 'done: ' in ranks(2, *options, '--max_iters=1', tmp_path / 'config.py')


OWN_HARDWARE = """
import os, torch
torch.cpu.get_capabilities = lambda: {'amx_bf16': os.environ['RANK'] == '0'}
"""


def test_processes_with_different_dtypes_are_refused(ranks, char_data, patched_env, tmp_path):
    options = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *PARALLEL_RUN)
    wide = ('--dtype=auto', '--n_embd=256')
    output = ranks(2, *options, *wide, code=2, env=patched_env(OWN_HARDWARE))
    assert output.count('train.py: dtype = bfloat16 on rank 0 but float32 on rank 1') == 1


@pytest.mark.slow
def test_processes_with_different_checkpoints_are_refused(run, clone, char_data, tmp_path):
    """A relative path is another folder on each host unless they share it."""
    for rank in range(2):
        options = (f'--seed={rank}', '--max_iters=3', f'--out_dir={tmp_path}/host{rank}/out')
        run('train.py', f'--dataset={char_data}', *PARALLEL_RUN, *options)
    command = f'env -C {tmp_path}/host$RANK $PYTHON {clone}/train.py --out_dir=out'
    (line,) = torchrun(clone, f'{command} --init_from=resume')
    assert line.startswith('train.py: out is not the same for all processes')


def test_fingerprint_reads_the_data_once(char_data, monkeypatch):
    data = bins.open_dataset(char_data, 32)
    fingerprint = data.fingerprint()
    monkeypatch.setattr(bins.TokenBin, 'read', None)
    assert data.fingerprint() == fingerprint


# Restarts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kills',
    [
        pytest.param([(1, 12), (0, 32), (1, 52)], marks=pytest.mark.slow),
        pytest.param([(1, 12), (1, 0), (1, 52)], marks=pytest.mark.slow),
        pytest.param([(0, 12), (0, 0), (1, 0)], marks=pytest.mark.slow),
    ],
    ids=['each', 'the-second', 'the-first'],
)
def test_torchrun_restart_resumes_run(ranks, clone, char_data, tmp_path, kills):
    """Kill (rank, after this many steps), or as it starts again (0)."""
    options = ('--max_iters=99', '--lr_decay_iters=99', '--save_interval=5', '--eval_interval=99')
    options = (f'--dataset={char_data}', *PARALLEL_RUN, *options)
    ranks(2, f'--out_dir={tmp_path}/whole', *options)
    out_dir, output = tmp_path / 'out', tmp_path / 'output.txt'
    command = [sys.executable, *TORCHRUN, '--max-restarts=3', clone / 'train.py', *options]
    with (
        open(output, 'w') as file,
        subprocess.Popen(
            [*command, f'--out_dir={out_dir}'], cwd=clone, stdout=file, stderr=file
        ) as agent,
        contextlib.ExitStack() as cleanup,
    ):
        cleanup.callback(agent.terminate)
        dead = [None]
        for rank, n_steps in kills:
            end = time.monotonic() + 600
            while worker_pids(agent).get(rank) in dead or len(step_losses(out_dir)) < n_steps:
                assert agent.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.1)
            if n_steps == 0:
                time.sleep(3)
            dead += worker_pids(agent).values()
            os.kill(worker_pids(agent)[rank], signal.SIGKILL)
        agent.wait(timeout=600)
    text = output.read_text()
    assert agent.returncode == 0, text
    assert 'restarted the processes, the run continues' in text
    assert (out_dir / 'status').read_text() == 'done\n'
    assert_same_run(out_dir, tmp_path / 'whole')
