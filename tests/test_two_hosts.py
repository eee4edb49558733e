"""Two hosts on one machine: network namespaces joined by a cable (a veth pair), torchrun's rendezvous over it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_parallel import RUN, losses

HOSTS = {'a': '10.77.0.1', 'b': '10.77.0.2'}


@pytest.fixture
def start_on(tmp_path):
    """start_on('a', folder, '--key=value', ...) starts torchrun with the folder's train.py there: one process of two."""
    names = {host: f'plaingpt-{host}-{os.getpid()}' for host in HOSTS}
    cables = {host: f'pg{host}{os.getpid()}' for host in HOSTS}
    ip = lambda *words: subprocess.run(['ip', *words], capture_output=True, text=True, check=True)  # noqa: E731
    started = []
    try:
        ip('netns', 'add', names['a'])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'two hosts need root and iproute2 here: {getattr(error, "stderr", error)}')
    ip('netns', 'add', names['b'])
    ip('link', 'add', cables['a'], 'netns', names['a'], 'type', 'veth', 'peer', 'name', cables['b'], 'netns', names['b'])
    for host, address in HOSTS.items():
        ip('-n', names[host], 'addr', 'add', f'{address}/24', 'dev', cables[host])
        for device in (cables[host], 'lo'):
            ip('-n', names[host], 'link', 'set', device, 'up')

    def start_on(host, folder, *arguments):
        command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3',
                   '--rdzv_backend=c10d', f'--rdzv_endpoint={HOSTS["a"]}:29400', '--rdzv_id=two-hosts',
                   f'--local_addr={HOSTS[host]}', f'--rdzv_conf=is_host={int(host == "a")}', folder / 'train.py', *arguments]
        with open(tmp_path / f'{len(started)}.txt', 'w') as said:
            process = subprocess.Popen(
                ['ip', 'netns', 'exec', names[host], *command], cwd=folder, stdout=said, stderr=said, start_new_session=True,
                env=os.environ | {'GLOO_SOCKET_IFNAME': cables[host], 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
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


def workers(agent):
    return [int(pid) for pid in Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split()]


def wait_for_steps(out_dir, n, *agents):
    while not (out_dir / 'log.jsonl').exists() or len(losses(out_dir)) < n:
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.1)


def test_two_hosts_survive_the_death_of_a_worker_and_of_an_agent(run, start_on, clone, char_data, tmp_path):
    arguments = (f'--dataset={char_data}', *RUN, '--max_iters=600', '--save_interval=20', '--eval_interval=600')
    run('train.py', f'--out_dir={tmp_path}/whole', *arguments)
    out_dir = tmp_path / 'out'
    a, b = (start_on(host, clone, f'--out_dir={out_dir}', *arguments) for host in HOSTS)
    wait_for_steps(out_dir, 20, a, b)
    os.kill(workers(b)[0], signal.SIGKILL)
    wait_for_steps(out_dir, 40, a, b)
    b.kill()
    b.wait()
    again = start_on('b', clone, f'--out_dir={out_dir}', *arguments)
    assert (a.wait(timeout=200), again.wait(timeout=200)) == (0, 0)
    assert (tmp_path / '0.txt').read_text().count('started the processes again, the run goes on') >= 2
    assert (out_dir / 'status').read_text() == 'done\n'
    parts = losses(out_dir)
    assert [step for step, *_ in parts] == list(range(600))
    assert [loss for _, loss, _ in parts] == pytest.approx([loss for _, loss, _ in losses(tmp_path / 'whole')], abs=1e-5)
