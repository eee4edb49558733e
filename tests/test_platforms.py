"""Windows and macOS: what they lack, refuse and spell differently. The first tests imitate that;
the CI runs this file on all three."""

import ntpath
import os
import shlex
import sys
from dataclasses import replace

import pytest

import checkpoint as ckpt
from configurator import TrainConfig, configure, read_config_file
from helpers import ROOT, TINY, assert_same_run, folder_contents
from lib import files, version
from lib.errors import UserError
from lib.run import write_config

# what Windows' Python lacks, and a console with few characters
WINDOWS = """
import builtins, fcntl, os, signal, sys, types

for module, names in ((os, 'fork pread sysconf O_NOFOLLOW O_NONBLOCK getuid killpg setpgid'),
                      (signal, 'SIGHUP SIGUSR1 SIGUSR2 pthread_sigmask')):
    for name in names.split():
        delattr(module, name)
locked = types.ModuleType('msvcrt')
locked.LK_NBLCK = fcntl.LOCK_EX | fcntl.LOCK_NB
locked.locking = lambda file, mode, size: fcntl.flock(file, mode)
sys.modules |= {'fcntl': None, 'resource': None}
import_ = builtins.__import__

def import_module(name, module=None, *rest, **options):
    ours = name == 'msvcrt' and module['__name__'] == 'lib.files'
    return locked if ours else import_(name, module, *rest, **options)

builtins.__import__ = import_module
sys.stdout.reconfigure(encoding='ascii', errors='strict')
"""

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this is Windows itself')


@pytest.fixture
def windows(monkeypatch):
    """Makes lib/files.py take this for Windows."""
    monkeypatch.setattr(files, 'WINDOWS', True)
    monkeypatch.setattr(files.time, 'sleep', lambda seconds: None)


@needs_fork
def test_a_run_is_the_same_without_what_windows_lacks(
    run, refused, patched_env, char_data, trained, tmp_path
):
    out, env = f'--out_dir={tmp_path}/out', patched_env(WINDOWS)
    command = ('train.py', f'--dataset={char_data}', out, *TINY)
    run(*command, '--max_iters=10', '--lr_decay_iters=20', env=env)
    with files.lock(tmp_path / 'out', 'test'):
        refused('train.py', out, '--init_from=resume', env=env, says='another process is writing')
    run('train.py', out, '--init_from=resume', '--max_iters=20', env=env)
    assert_same_run(tmp_path / 'out', trained)


@needs_fork
def test_text_that_the_console_lacks_is_replaced(run, patched_env, tmp_path):
    env = patched_env(WINDOWS)
    (tmp_path / 'text').write_text('Łódź, 日本, ' * 400, encoding='utf-8')
    source = (f'--input={tmp_path}/text', '--tokenizer=byte')
    run('data/text/prepare.py', *source, '--dataset=cities', env=env)
    out = f'--out_dir={tmp_path}/out'
    run('train.py', '--dataset=cities', out, *TINY, '--max_iters=1', env=env)
    sample = ('sample.py', out, '--start=日', '--num_samples=1', '--max_new_tokens=20')
    assert run(*sample, env=env).stdout.startswith('?')


def test_a_folder_has_one_writer(tmp_path):
    with files.lock(tmp_path, 'first'):
        with pytest.raises(UserError, match='second: another process is writing there'):
            files.lock(tmp_path, 'second')
    files.lock(tmp_path, 'third').close()


def test_a_file_that_is_being_read_is_replaced_a_little_later(windows, monkeypatch, tmp_path):
    path, failures = tmp_path / 'status', [PermissionError(13, 'in use')] * 3
    path.write_text('running\n')

    def rename(*paths, rename=os.replace):
        if failures:
            raise failures.pop()
        rename(*paths)

    monkeypatch.setattr(os, 'replace', rename)
    files.write_text(path, 'done\n')
    assert path.read_text() == 'done\n'
    failures += [PermissionError(13, 'in use')] * 999
    with pytest.raises(PermissionError, match='in use'):
        files.write_text(path, 'never\n')
    assert folder_contents(tmp_path) == {'status': b'done\n'}


def test_an_old_checkpoint_that_a_program_has_mapped_stays_whole(trained, monkeypatch, tmp_path):
    unlink = type(tmp_path).unlink

    def refuse(path, **options):
        if path.suffix == '.pt':
            raise PermissionError(13, 'in use', str(path))
        unlink(path, **options)

    def save(step):
        ckpt.save(tmp_path, replace(ckpt.load(trained), step=step, val_loss=9.0 - step), 1)
        assert not list(tmp_path.glob('*.tmp'))
        return [manifest['step'] for manifest in ckpt.manifests(tmp_path)]

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), 'unlink', refuse)
        assert save(2) == [2, 1]
    assert ckpt.load(tmp_path, which=1).step == 1
    assert save(3) == [3]


@pytest.mark.parametrize('value', [r'C:\new\tables', 'C:/runs/x', r'\\server\share\data', 'a b'])
def test_paths_of_windows_are_kept(value, tmp_path):
    config, _ = configure(TrainConfig, [f'--out_dir={value}', '--dataset', value])
    assert config.out_dir == config.dataset == value
    write_config(tmp_path, vars(config))
    path = tmp_path / 'config.py'
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))  # an editor of Windows
    assert read_config_file(str(path), TrainConfig)['out_dir'] == value


def test_commands_are_quoted_for_the_shell_of_the_system(windows, monkeypatch):
    command = files.command('train.py', out_dir=r'C:\my runs\x', init_from='resume')
    assert command.endswith(r'train.py "--out_dir=C:\my runs\x" --init_from=resume')
    monkeypatch.setattr(files, 'WINDOWS', False)
    assert shlex.split(files.command('train.py', out_dir='a b'))[-1] == '--out_dir=a b'
    monkeypatch.setattr(files.os.path, 'relpath', ntpath.relpath)
    assert files.relative(r'D:\plainGPT\train.py', r'C:\work') == r'D:\plainGPT\train.py'


def test_version_says_what_a_bug_report_needs(run, monkeypatch):
    shown = run('train.py', '--version').stdout
    assert [line.split()[0] for line in shown.splitlines()] == [
        'plainGPT', 'Python', 'packages', 'devices']  # fmt: skip
    assert f'Python    {sys.version.split()[0]}, ' in shown and ' cpu ' in shown
    # the clone is no repository: the commit is that of git archive
    assert shown.startswith('plainGPT  unknown\n')
    monkeypatch.setattr(version, 'ROOT', ROOT / 'nowhere')
    monkeypatch.setattr(version, 'COMMIT', '1234567 of 2026-01-31')
    assert version.commit() == '1234567 of 2026-01-31'
    monkeypatch.setitem(sys.modules, 'torch', None)  # a broken installation
    assert version.devices().startswith('unknown: ModuleNotFoundError: import of torch')
