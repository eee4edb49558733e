"""tools/runs.py: the table of runs, what it reads from them, and what the page gets."""
import base64
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest

import checkpoint as ckpt
import runs
from helpers import TINY, log_lines, served
from lib.run import read_samples


def page_data(path):
    """What a page holds, as its script reads it."""
    packed = re.search(r'id="data">([^<]*)<', path.read_text(encoding='utf-8'))[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def write_run(folder, lines, status=None, **config):
    folder.mkdir(parents=True)
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'config.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in config.items()))
    if status is not None:
        (folder / 'status').write_text(status + '\n')
    return folder


def dead_pid():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


@pytest.fixture(scope='module')
def sampled(run, char_data, tmp_path_factory):
    """The folder of a tiny run that keeps samples."""
    out_dir = tmp_path_factory.mktemp('sampled') / 'out'
    run('train.py', f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=20', *TINY,
        '--n_layer=1', '--sample_every_eval')
    return out_dir


# The table ----------------------------------------------------------------------------------------

def test_table_shows_last_and_best_losses_of_log(run, trained, sampled, tmp_path):
    for name, folder in (('wide', trained), ('flat', sampled)):
        shutil.copytree(folder, tmp_path / 'all' / name)
    page = tmp_path / 'page.html'
    output = run('tools/runs.py', tmp_path / 'all', f'--out={page}', env={'COLUMNS': '80'}).stdout
    lines = output.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert str(page) in lines[-1] and page.is_file()
    for name, folder in (('wide', trained), ('flat', sampled)):
        evaluations = log_lines(folder, 'val_loss')
        last, best = evaluations[-1], min(evaluations, key=lambda line: line['val_loss'])
        cells = next(line for line in lines if line.startswith(name)).split()
        assert cells[1:3] == ['done', '20/20']
        assert cells[3:6] == [f'{x:.4f}' for x in (last['train_loss'], last['val_loss'],
                                                   best['val_loss'])]
        assert cells[6] == str(best['step'])
        assert cells[7] == f'{last["val_bits_per_byte"]:.4f}'
    # 20 steps of 4 samples of 32 tokens; of the keys only those that differ
    assert lines[0].split()[-3:] == ['tokens', 'time', 'n_layer'] and '2.56k' in lines[1]
    assert 'sample_every_eval' in output and 'learning_rate' not in output


def test_table_tells_status_of_each_run(run, tmp_path):
    done = {'step': 4, 'train_loss': 2.0, 'val_loss': 2.5}
    states = {'alive': (f'running {os.getpid()}', 'running'),
              'gone': (f'running {dead_pid()}', 'killed'), 'odd': ('running x', 'killed'),
              'ended': ('done', 'done'), 'ctrl-c': ('stopped', 'stopped'),
              'nan': ('failed', 'failed'), 'strange': ('?!', 'done'), 'old': (None, 'done')}
    for name, (status, _) in states.items():
        write_run(tmp_path / name, [done], status, max_iters=4)
    write_run(tmp_path / 'cut', [done], max_iters=9)
    output = run('tools/runs.py', tmp_path, '--out=').stdout
    shown = dict(line.split()[:2] for line in output.split('\n\n')[0].splitlines()[1:])
    assert shown == {name: expected for name, (_, expected) in states.items()} | {'cut': 'unknown'}


def test_runs_are_found_below_folders_but_not_in_those_set_aside(tmp_path):
    for path in ('a/x', 'a/x/earlier-1', 'b', 'data/c', '.git/d', 'v/w/x/y', 'v/w/x/y/z/too/deep'):
        write_run(tmp_path / path, [{'step': 0, 'loss': 1.0}])
    (tmp_path / 'loop').symlink_to(tmp_path)
    found = runs.find_runs([tmp_path, tmp_path / 'b'])
    assert [str(path.relative_to(tmp_path)) for path in found] == ['a/x', 'b', 'v/w/x/y']
    assert runs.short_names(found) == ['a/x', 'b', 'v/w/x/y']
    assert runs.short_names(found[:1]) == ['x']
    assert runs.find_runs([tmp_path / 'a/x/earlier-1'])  # which is named
    (tmp_path / 'links').mkdir()
    for name, target in (('one', 'b'), ('same', 'b'), ('folder', 'v/w'), ('loop', 'links')):
        (tmp_path / 'links' / name).symlink_to(tmp_path / target)
    found = runs.find_runs([tmp_path / 'links'])
    assert [str(path.relative_to(tmp_path)) for path in found] == ['links/folder/x/y', 'links/one']


@pytest.mark.slow
def test_runs_reports_mistakes_in_one_line(refused, tmp_path):
    (tmp_path / 'empty').mkdir()
    mine = tmp_path / 'notes.html'
    mine.write_text('mine')
    refused('tools/runs.py', tmp_path / 'empty', says=('empty', 'no runs', 'log.jsonl'))
    refused('tools/runs.py', tmp_path / 'nowhere', says=('nowhere', 'no such folder'))
    refused('tools/runs.py', f'--out={mine}', says=('out =', 'move it'))
    refused('tools/runs.py', f'--png={mine}', says=('png =', 'move it'))
    refused('tools/runs.py', f'--out={tmp_path}/no/page.html', says=('out =', 'folder'))
    refused('tools/runs.py', '--prot=1', says='--prot: no such key')
    assert mine.read_text() == 'mine'


def test_damaged_logs_and_configs_of_other_versions_are_read_as_far_as_possible(run, char_data,
                                                                           tmp_path):
    good = '{"step": 0, "loss": 3.5, "lr": 0.1}\n{"step": 2, "val_loss": 3.25, "train_loss": 3.0}\n'
    logs = {
        'empty': '',
        'garbage': '\0\xff nonsense\n[1, 2]\n{"step": "x", "loss": 1}\n{"loss": 2}\n',
        'cut': good + '{"step": 3, "lo',
        'twice': good + '{"step": 0, "loss": 3.75}\n',
        'nulls': good + '{"step": 1, "loss": null, "grad_norm": null, "skipped": true}\n',
        'nan': good + '{"step": 1, "loss": NaN, "grad_norm": Infinity, "tokens_per_second": 0}\n',
        'huge': good + '{"step": 1, "loss": 1' + '0' * 400 + '}\n',
        'odd steps': good + '{"step": NaN, "loss": 1}\n{"step": -1, "loss": 1}\n{"step": 1e999, '
                            '"loss": 2}\n{"step": 3, "val_loss": 1' + '0' * 400 + '}\n',
    }
    for name, log in logs.items():
        write_run(tmp_path / name, [], 'done', max_iters=4, new_key=[1, 2], learning_rate=0.1)
        (tmp_path / name / 'log.jsonl').write_text(log, encoding='utf-8')
    (tmp_path / 'cut' / 'config.py').write_bytes(b'\xff\0 = (')
    (tmp_path / 'nan' / 'config.py').write_text('max_iters = inf\nblock_size = -1\nimport os\n')
    (tmp_path / 'twice' / 'config.py').unlink()
    for name, line in (('nulls', 'x = {[1]: 2}'), ('huge', "lora_rank = 'abc'"),
                       ('odd steps', 'lora_rank = 10**9')):
        (tmp_path / name / 'config.py').write_text(f"{line}\ndataset = '{char_data}'\n")
    (tmp_path / 'twice' / 'ckpt_00000001.pt').write_bytes(b'damaged')
    page = tmp_path / 'page.html'
    run('tools/runs.py', tmp_path, f'--out={page}')
    found = {run['name']: run for run in page_data(page)['runs']}
    assert found.keys() == logs.keys()
    for name in logs.keys() - {'empty', 'garbage'}:
        assert (found[name]['best'], found[name]['best_step']) == (3.25, 2), name
    assert found['twice']['curves']['loss'] == [3.75]
    assert found['nulls']['curves']['loss'] == [3.5, None]
    assert found['empty']['step'] == 0 and found['empty']['val_loss'] is None


# What the page gets -------------------------------------------------------------------------------

def test_axes_of_curves_follow_from_log(trained):
    found = runs.read_run(trained, 'x')
    lines, evaluations = log_lines(trained, 'loss'), log_lines(trained, 'val_loss')
    curves, evaluated = found['curves'], found['evaluations']
    for key in ('loss', 'lr', 'grad_norm', 'tokens_per_second', 'epoch', 'peak_memory',
                'update_ratio_adamw', 'update_ratio_gains'):
        np.testing.assert_allclose(curves[key], [line[key] for line in lines], rtol=1e-4)
    assert evaluated['val_loss'] == [line['val_loss'] for line in evaluations]  # to the last bit
    assert curves['tokens'] == [32 * line['samples_seen'] for line in lines]
    assert evaluated['tokens'] == [32 * 4 * line['step'] for line in evaluations]
    n_samples = lines[0]['samples_seen'] / lines[0]['epoch']
    assert evaluated['epoch'] == pytest.approx([4 * line['step'] / n_samples
                                                for line in evaluations])
    seconds = sum(32 * 4 / line['tokens_per_second'] for line in lines)
    assert found['seconds'] == pytest.approx(seconds)
    assert found['tokens'] == 32 * 4 * 20
    model, _ = ckpt.load_model(trained)
    assert found['flops_per_token'] == model.flops_per_token()
    assert found['n_params'] == model.get_num_params(False)


def test_tokens_of_a_run_with_one_log_line_are_those_of_all_its_steps(tmp_path):
    lines = [{'step': 0, 'loss': 4.0, 'samples_seen': 4, 'tokens_per_second': 64.0},
             {'step': 8, 'val_loss': 3.0}]
    found = runs.read_run(write_run(tmp_path / 'x', lines, batch_size=4, block_size=32,
                                    gradient_accumulation_steps=1, log_interval=10), 'x')
    assert (found['step'], found['tokens'], found['seconds']) == (8, 8 * 4 * 32, 8 * 2.0)


def test_flops_are_known_without_checkpoints(trained, tmp_path):
    folder = tmp_path / 'logs-only'
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns('ckpt_*'))
    known, found = runs.read_run(trained, 'x'), runs.read_run(folder, 'x')
    assert found['flops_per_token'] == known['flops_per_token'] > 0


def test_long_logs_are_means_with_their_range(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 1, 5003)
    losses[[7, 2500]] = math.nan, 99.0
    lines = [{'step': 10 * i, 'loss': None if math.isnan(loss) else loss, 'grad_norm': 1.0}
             for i, loss in enumerate(losses)]
    lines += [{'step': 50_030, 'val_loss': 2.123456789012345, 'train_loss': 2.0}]
    folder = write_run(tmp_path / 'long', lines, max_iters=50_030)
    found = runs.read_run(folder, 'long')
    curves = found['curves']
    assert len(curves['loss']) <= 501 and found['lines'] == 5003
    first = np.array(curves['loss'][:100], dtype=float)  # one by one; None becomes nan
    np.testing.assert_allclose(first, losses[:100], rtol=1e-4)
    assert (curves['step'][-1], curves['loss'][-1]) == (50_020, pytest.approx(losses[-1], rel=1e-4))
    weights = np.diff(np.concatenate((runs.bucket_starts(5003), [5003])))
    total = np.dot(weights, [0 if x is None else x for x in curves['loss']])
    assert total == pytest.approx(np.nansum(losses), rel=1e-4)  # no line is left out
    assert max(x for x in curves['loss_high'] if x) == 99.0
    assert min(x for x in curves['loss_low'] if x) == pytest.approx(np.nanmin(losses), abs=1e-3)
    assert found['val_loss'] == found['best'] == 2.123456789012345


@pytest.mark.slow
def test_commands_of_page_resume_and_repeat_run(run, clone, out_dir, tmp_path):
    (out_dir / 'status').write_text('stopped\n')
    commands = runs.read_run(out_dir, 'x')['commands']
    words = {name: shlex.split(text) for name, text in commands.items()}
    resumed = run('train.py', *words['resume'][2:]).stdout
    assert 'max_iters = 20 is reached' in resumed
    assert words['repeat'][:2] == ['python', words['resume'][1]]
    run('train.py', *words['repeat'][2:])
    again = out_dir.with_name('out-again')
    assert ([line['loss'] for line in log_lines(again, 'loss')]
            == [line['loss'] for line in log_lines(out_dir, 'loss')])


def test_samples_of_resumed_run_are_those_of_unbroken_one(run, sampled, tmp_path):
    samples = read_samples(sampled)
    assert [sample['step'] for sample in samples] == [0, 10, 20]
    assert all(len(sample['text']) > 10 for sample in samples)
    folder = shutil.copytree(sampled, tmp_path / 'out')
    for path in folder.glob('ckpt_00000020*'):
        path.unlink()
    run('train.py', '--init_from=resume', f'--out_dir={folder}')
    assert read_samples(folder) == samples
    assert runs.read_run(folder, 'x')['samples'] == samples


def test_png_shows_val_losses(run, trained, tmp_path):
    pytest.importorskip('matplotlib')
    path = tmp_path / 'losses.png'
    for _ in range(2):  # a picture of its own is replaced
        run('tools/runs.py', trained, '--out=', f'--png={path}')
    assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_served_data_has_only_runs_that_changed(clone, trained, tmp_path):
    for name in ('a', 'b'):
        shutil.copytree(trained, tmp_path / name)

    def data(url, since):
        with urllib.request.urlopen(f'{url}data?since={since}') as answer:
            assert "connect-src 'self'" in answer.headers['Content-Security-Policy']
            return json.loads(answer.read())

    with served(clone, str(tmp_path), script='tools/runs.py') as (_, url):
        first = data(url, '')
        assert [run['name'] for run in first['runs']] == ['a', 'b']
        assert data(url, first['version'])['runs'] == []
        with open(tmp_path / 'b' / 'log.jsonl', 'a') as log:
            log.write('{"step": 30, "train_loss": 1.0, "val_loss": 1.5}\n')
        second = data(url, first['version'])
        assert [(run['name'], run['best']) for run in second['runs']] == [('b', 1.5)]
        shutil.rmtree(tmp_path / 'a')
        assert data(url, second['version'])['ids'] == [second['runs'][0]['id']]
        for path, host in (('etc/passwd', '127.0.0.1'), ('data', 'evil.example')):
            request = urllib.request.Request(url + path, headers={'Host': host})
            with pytest.raises(urllib.error.HTTPError, match='404'):
                urllib.request.urlopen(request)


@pytest.mark.slow
def test_page_of_200_long_runs_is_written_in_seconds_and_small(tmp_path):
    lines = [{'step': i, 'loss': 3 + 1 / (i + 1), 'lr': 1e-3, 'grad_norm': 1 + i % 7,
              'tokens_per_second': 1e4, 'samples_seen': 4 * (i + 1), 'epoch': (i + 1) / 700,
              'noise_scale': 1e5 / (1 + i % 9), 'peak_memory': 1e9,
              'update_ratio_muon': 0.01 / (1 + i % 11), 'update_ratio_adamw': 0.01 / (1 + i % 5)}
             for i in range(5000)]
    first = write_run(tmp_path / '0', lines, 'done', max_iters=5000, block_size=64)
    for i in range(1, 200):
        shutil.copytree(first, tmp_path / str(i))
    started = os.times()
    page = runs.build_page(runs.page_data(runs.read_runs([tmp_path])))
    ended = os.times()
    assert ended.user - started.user < 30  # 8 s on a core of its own
    assert len(page) < 8e6
