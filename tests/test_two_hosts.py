"""Two hosts on one machine: network namespaces connected by a veth pair, and torchrun over it."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import PARALLEL_RUN, step_losses, worker_pids

HOSTS = {'a': '10.77.0.1', 'b': '10.77.0.2'}


@pytest.fixture
def start_on(tmp_path):
    """start_on(folder, '--key=value', ..., host='a') starts torchrun there, one rank of two."""
    names = {host: f'plaingpt-{host}-{os.getpid()}' for host in HOSTS}
    cables = {host: f'pg{host}{os.getpid()}' for host in HOSTS}
    started = []

    def ip(*argv):
        return subprocess.run(['ip', *argv], capture_output=True, text=True, check=True)

    try:
        ip('netns', 'add', names['a'])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'two hosts need root and iproute2 here: {getattr(error, "stderr", error)}')
    ip('netns', 'add', names['b'])
    ends = [[cables[host], 'netns', names[host]] for host in HOSTS]
    ip('link', 'add', *ends[0], 'type', 'veth', 'peer', 'name', *ends[1])
    for host, address in HOSTS.items():
        ip('-n', names[host], 'addr', 'add', f'{address}/24', 'dev', cables[host])
        for device in (cables[host], 'lo'):
            ip('-n', names[host], 'link', 'set', device, 'up')

    def start_on(folder, *arguments, host, env):
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nnodes=2',
            '--nproc_per_node=1',
            '--max-restarts=3',
            '--rdzv_backend=c10d',
            f'--rdzv_endpoint={HOSTS["a"]}:29400',
            '--rdzv_id=two-hosts',
            f'--local_addr={HOSTS[host]}',
            f'--rdzv_conf=is_host={int(host == "a")}',
            folder / 'train.py',
            *arguments,
        ]
        with open(tmp_path / f'{len(started)}.txt', 'w') as output:
            process = subprocess.Popen(
                ['ip', 'netns', 'exec', names[host], *command],
                cwd=folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {'GLOO_SOCKET_IFNAME': cables[host]} | env,
            )
        started.append(process)
        return process

    yield start_on
    for name in names.values():
        for pid in ip('netns', 'pids', name).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip('netns', 'del', name)
    for process in started:
        process.wait()


def wait_for_steps(out_dir, n, *agents):
    while len(step_losses(out_dir)) < n:
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize('kill', ['workers', 'host'])
def test_torchrun_on_two_hosts_survives_kill(run, start_on, clone, char_data, tmp_path, kill):
    arguments = (
        f'--dataset={char_data}',
        *PARALLEL_RUN,
        '--max_iters=300',
        '--save_interval=20',
        '--eval_interval=300',
    )
    run('train.py', f'--out_dir={tmp_path}/whole', *arguments)
    out_dir = tmp_path / 'out'
    env = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'} if kill == 'host' else {}  # docs/scale.md
    start = functools.partial(start_on, clone, f'--out_dir={out_dir}', *arguments, env=env)
    a, b = (start(host=host) for host in HOSTS)
    wait_for_steps(out_dir, 20, a, b)
    if kill == 'host':
        workers = worker_pids(b)
        b.kill()  # first, or it would restart them
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
        b.wait()
        b = start(host='b')
    else:
        for rank, host, n_steps in ((1, b, 60), (0, a, 100)):
            os.kill(worker_pids(host)[rank], signal.SIGKILL)
            wait_for_steps(out_dir, n_steps, a, b)
    codes = a.wait(timeout=600), b.wait(timeout=600)
    outputs = [path.read_text()[-2000:] for path in sorted(tmp_path.glob('*.txt'))]
    assert codes == (0, 0), '\n'.join(outputs)
    output = (tmp_path / '0.txt').read_text()
    assert output.count('restarted the processes, the run continues') >= 1 + (kill == 'workers')
    assert (out_dir / 'status').read_text() == 'done\n'
    parts = step_losses(out_dir)
    assert [step for step, *_ in parts] == list(range(300))
    assert [loss for _, loss, _ in parts] == pytest.approx(
        [loss for _, loss, _ in step_losses(tmp_path / 'whole')], abs=1e-5
    )
