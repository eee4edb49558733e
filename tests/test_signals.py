"""Signals, closed streams and terminals."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

import checkpoint as ckpt
from helpers import (
    ROUNDING,
    TORCHRUN,
    assert_same_run,
    deep_equal,
    read_log,
    read_until,
    start_train,
    step_losses,
    worker_pids,
)


def test_ctrl_c_stops_eval_only_immediately(clone, trained):
    options = ('--init_from=resume', '--eval_only', '--eval_iters=1000000', '--batch_size=1')
    with start_train(clone, f'--out_dir={trained}', *options) as process:
        read_until(process, 'tokens per step')
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == 'stopped\n'
    assert process.returncode == 130


SLOW_IMPORT = """
import sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            print('importing torch', flush=True)
            time.sleep(20)
sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_during_imports_stops_immediately(clone, train_args, patched_env, tmp_path):
    options = (f'--out_dir={tmp_path}/out', *train_args)
    with start_train(clone, *options, env=patched_env(SLOW_IMPORT)) as process:
        read_until(process, 'importing torch')
        process.send_signal(signal.SIGINT)
        assert 'Traceback' not in process.stdout.read()
    assert process.returncode == -signal.SIGINT


def test_train_survives_closed_streams_and_early_sigusr1(
    clone, train_args, reference_run, tmp_path
):
    command = '"$0" "$@" >&- 2>&- & sleep 0.5; kill -USR1 $!; wait $!'
    argv = [sys.executable, clone / 'train.py', f'--out_dir={tmp_path}/out', *train_args]
    assert subprocess.run(['bash', '-c', command, *map(str, argv)]).returncode == 0
    assert_same_run(tmp_path / 'out', reference_run)


# slows training down, so that a signal arrives in time
SLOW = """
import time, torch
real_gelu = torch.nn.functional.gelu
def slow_gelu(*args, **kwargs):
    time.sleep(SECONDS)
    return real_gelu(*args, **kwargs)
torch.nn.functional.gelu = slow_gelu
"""


SLOW_EVALUATION = """
import numpy, time
real, calls = numpy.pad, []
def slow_pad(*args, **kwargs):
    calls.append(1)
    time.sleep(0.5 * (len(calls) > 8))  # except in the first evaluation
    return real(*args, **kwargs)
numpy.pad = slow_pad
"""


SLOW_SIGNALS = [pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize('signum', [signal.SIGINT, *SLOW_SIGNALS])
def test_train_saves_and_stops_after_step_on_signal(
    clone, run, train_args, patched_env, reference_run, tmp_path, signum
):
    with start_train(
        clone, f'--out_dir={tmp_path}/out', *train_args, env=patched_env(SLOW, SECONDS=0.05)
    ) as process:
        read_until(process, 'step 1:')
        process.send_signal(signum)
        rest = process.stdout.read()
    assert process.returncode == 128 + signum
    step = ckpt.load(tmp_path / 'out').step
    assert f'stopped by {signum.name} after {step} steps' in rest
    assert 'Traceback' not in rest
    assert 2 <= step < 20
    run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume')
    assert_same_run(tmp_path / 'out', reference_run)


@pytest.mark.slow
def test_second_ctrl_c_stops_immediately(clone, train_args, patched_env, tmp_path):
    with start_train(
        clone, f'--out_dir={tmp_path}/out', *train_args, env=patched_env(SLOW, SECONDS=0.5)
    ) as process:
        read_until(process, 'step 0: train loss')
        process.send_signal(signal.SIGINT)
        read_until(process, 'Ctrl-C again stops at once')
        process.send_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGINT and not list((tmp_path / 'out').glob('ckpt_*'))


@pytest.mark.slow
def test_signal_during_evaluation_defers_it_to_resume(
    clone, run, train_args, patched_env, reference_run, tmp_path
):
    with start_train(
        clone, f'--out_dir={tmp_path}/out', *train_args, env=patched_env(SLOW_EVALUATION)
    ) as process:
        read_until(process, 'step 7:')
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert 'stopped by SIGTERM after 8 steps' in process.stdout.read()
    assert ckpt.manifests(tmp_path / 'out')[0]['val_loss'] is None
    result = run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume', '--keep_last=9')
    assert 'step 8: train loss' in result.stdout
    evaluated = {
        manifest['step']: manifest['val_loss'] is not None
        for manifest in ckpt.manifests(tmp_path / 'out')
    }
    assert evaluated == {4: False, 8: True, 12: False, 16: True, 20: True}
    assert read_log(tmp_path / 'out') == read_log(reference_run)
    assert deep_equal(ckpt.load(tmp_path / 'out').model, ckpt.load(reference_run).model)


@pytest.mark.slow
def test_sigusr1_saves_and_continues(clone, train_args, patched_env, tmp_path):
    options = ('--save_interval=1000', '--eval_interval=1000', '--max_iters=12', '--keep_last=9')
    with start_train(
        clone,
        f'--out_dir={tmp_path}/out',
        *train_args,
        *options,
        env=patched_env(SLOW, SECONDS=0.03),
    ) as process:
        read_until(process, 'step 1:')
        process.send_signal(signal.SIGUSR1)
        rest = process.stdout.read()
    assert process.returncode == 0 and 'done' in rest
    last, requested = (manifest['step'] for manifest in ckpt.manifests(tmp_path / 'out'))
    assert last == 12 and 2 <= requested < 12


SLOW_SAVE = """
save = torch.save
def slow_save(*args, **kwargs):
    time.sleep(2)
    save(*args, **kwargs)
torch.save = slow_save
"""


@pytest.mark.slow
def test_ddp_ranks_stop_after_same_step_on_signal(
    clone, run, train_args, patched_env, reference_run, tmp_path
):
    slow = patched_env(SLOW + SLOW_SAVE, SECONDS=0.05)
    with start_train(
        clone, f'--out_dir={tmp_path}/out', *train_args, command=TORCHRUN, env=slow
    ) as process:
        read_until(process, 'step 2:')
        # a scheduler may signal every process, and torchrun then signals them again
        for _ in range(2):
            for pid in worker_pids(process).values():
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.3)
        rest = process.stdout.read()
    assert process.returncode != 0 and 'stopped by SIGTERM' in rest
    assert 3 <= ckpt.load(tmp_path / 'out').step < 20  # step 2, counted from 0, was done
    result = run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume')
    assert 'processes 2 then, 1 now' in result.stdout
    losses = [loss for _, loss, _ in step_losses(tmp_path / 'out')]
    expected = [loss for _, loss, _ in step_losses(reference_run)]
    assert losses == pytest.approx(expected, rel=0, abs=ROUNDING['muon'])


@pytest.mark.slow
def test_ddp_stops_all_ranks_when_one_is_signalled_during_evaluation(
    clone, train_args, patched_env, tmp_path
):
    slow = patched_env(
        SLOW_EVALUATION.replace('0.5', "(os.environ['RANK'] == '0')").replace(
            'import', 'import os,'
        )
    )
    options = ('--eval_iters=4', '--gradient_accumulation_steps=2')
    with start_train(
        clone, f'--out_dir={tmp_path}/out', *train_args, *options, command=TORCHRUN, env=slow
    ) as process:
        read_until(process, 'step 7:')
        time.sleep(0.5)  # the signalled rank is waiting for the other one
        os.kill(worker_pids(process)[1], signal.SIGTERM)
        rest = process.stdout.read()
    assert 'stopped by SIGTERM after 8 steps' in rest and ckpt.load(tmp_path / 'out').step == 8
    assert (tmp_path / 'out' / 'status').read_text() == 'stopped\n'


@pytest.mark.slow
def test_train_survives_broken_stdout_pipe(clone, train_args, tmp_path):
    with start_train(clone, f'--out_dir={tmp_path}/out', *train_args) as process:
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0 and ckpt.load(tmp_path / 'out').step == 20


@pytest.mark.slow
def test_train_locks_out_dir_and_saves_on_closed_terminal(clone, refused, train_args, tmp_path):
    master, slave = os.openpty()
    command = [
        sys.executable,
        clone / 'train.py',
        f'--out_dir={tmp_path}/out',
        *train_args,
        '--max_iters=1000000',
    ]
    process = subprocess.Popen(
        command, cwd=clone, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    os.set_blocking(master, False)
    while not (tmp_path / 'out' / 'log.jsonl').exists() or len(read_log(tmp_path / 'out')) < 4:
        with contextlib.suppress(BlockingIOError):
            os.read(master, 1000)
        time.sleep(0.1)
        assert process.poll() is None
    for resume in ((), ('--init_from=resume',)):
        refused(
            'train.py',
            f'--out_dir={tmp_path}/out',
            *train_args,
            *resume,
            says='another process is writing there',
        )
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=600) == 128 + signal.SIGHUP
    assert ckpt.load(tmp_path / 'out').step >= 3
