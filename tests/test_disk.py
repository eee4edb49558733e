"""Full disks and folders that cannot be written."""

import os
import resource
import subprocess
import sys

import pytest

import checkpoint as ckpt
from helpers import assert_same_run, error_line, folder_contents


@pytest.mark.slow
def test_train_stops_on_full_disk_and_keeps_checkpoints(run, out_dir):
    size = (out_dir / 'ckpt_00000020.pt').stat().st_size
    for background in (True, False):
        result = run(
            'train.py',
            '--init_from=resume',
            f'--out_dir={out_dir}',
            '--max_iters=40',
            f'--async_save={background}',
            code=2,
            preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (size - 5000, size - 5000)
            ),
        )
        output = error_line(result)
        assert 'ckpt_00000024.pt: cannot write the checkpoint: File too large' in output
        assert 'go on from step 20' in output
        assert 'step 39' not in result.stdout and not list(out_dir.glob('*.tmp'))
        assert [manifest['step'] for manifest in ckpt.manifests(out_dir)] == [20, 16]
        assert ckpt.load(out_dir).step == 20


@pytest.mark.slow
def test_train_reports_unwritable_log(run, out_dir):
    size = (out_dir / 'log.jsonl').stat().st_size + 400
    result = run(
        'train.py',
        '--init_from=resume',
        f'--out_dir={out_dir}',
        '--max_iters=40',
        code=2,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert 'log.jsonl: cannot write: File too large' in error_line(result)


@pytest.mark.slow
def test_train_survives_full_disk_on_stdout(clone, train_args, reference_run, tmp_path):
    with open('/dev/full', 'w') as full:
        command = [sys.executable, clone / 'train.py', f'--out_dir={tmp_path}/out', *train_args]
        assert subprocess.run(command, stdout=full, stderr=subprocess.PIPE).returncode == 0
    assert_same_run(tmp_path / 'out', reference_run)


def test_train_checks_free_space_before_first_step(refused, train_args, patched_env, tmp_path):
    nearly_full = patched_env(
        'import shutil\n'
        'shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5)\n'
    )
    says = ('out_dir', '0.1 MB are free', 'keep_last')
    refused('train.py', f'--out_dir={tmp_path}/out', *train_args, env=nearly_full, says=says)
    assert folder_contents(tmp_path / 'out') == {}


def test_train_reports_unwritable_out_dir(refused, train_args):
    refused(
        'train.py',
        '--out_dir=/sys/plaingpt',
        *train_args,
        says=("out_dir = '/sys/plaingpt'", 'choose another'),
    )


@pytest.mark.slow
@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_train_reports_folders_and_pipes_in_place_of_its_files(clone, out_dir, make):
    names = ('log.jsonl', 'status.tmp', 'config.py.tmp', 'ckpt_00000024.pt.tmp', 'ckpt_00000024.pt',
             'ckpt_00000020.json', 'log.jsonl.tmp')  # fmt: skip
    for name in names:
        path = out_dir / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        make(path)
        command = ('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=22')
        result = subprocess.run([sys.executable, *command], cwd=clone, text=True, timeout=600,
                                capture_output=True)  # fmt: skip
        assert result.returncode in (0, 2) and 'Traceback' not in result.stderr
        if result.returncode:
            assert name in error_line(result)
        if path.is_dir():
            path.rmdir()
        elif not path.is_file():
            path.unlink(missing_ok=True)
        if kept is not None and not path.exists():
            path.write_bytes(kept)
