"""What users do: other terminals, other working directories, paths with ~ and blanks, links in run
folders, longer runs, small texts."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest

import checkpoint as ckpt
from configurator import TrainConfig, configure
from helpers import (
    TINY,
    assert_same_run,
    error_line,
    folder_contents,
    log_lines,
    read_until,
    start_train,
    step_losses,
)
from lib.errors import UserError
from lib.recipe import read_train_config

RUN = (*TINY, '--max_iters=4', '--eval_interval=2')


# Terminals ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    'env',
    [
        {'PYTHONIOENCODING': 'cp1252'},
        pytest.param({'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'},
                     marks=pytest.mark.slow),
    ],
    ids=['cp1252', 'C'],
)
def test_every_program_prints_to_a_terminal_without_unicode(run, clone, tmp_path, env):
    text = 'быть или не быть 日本\n' * 40
    (tmp_path / 'быть.txt').write_text(text, encoding='utf-8')
    options = {'env': env, 'stdin': subprocess.DEVNULL}
    source = f'--input={tmp_path / "быть.txt"}'
    run('data/text/prepare.py', source, '--tokenizer=char', '--dataset=cyrillic', **options)
    out = tmp_path / 'папка'
    run('train.py', *RUN, '--dataset=cyrillic', f'--out_dir={out}', '--block_size=16',
        '--sample_every_eval', **options)  # fmt: skip
    assert ckpt.load(out).step == 4
    run('train.py', '--init_from=resume', f'--out_dir={out}', '--max_iters=5', **options)
    run('sample.py', f'--out_dir={out}', '--start=быть', '--max_new_tokens=9', **options)
    run('tools/evaluate.py', f'--out_dir={out}', source, **options)
    run('explain.py', f'--out_dir={out}', '--start=быть', **options)


def test_interactive_sampling_ends_where_stdin_is_closed(clone, trained):
    command = f'{sys.executable} sample.py --out_dir={trained} --interactive <&-'
    result = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0 and 'Traceback' not in result.stderr


def test_prepare_draws_no_progress_bar_into_files(run, tmp_path):
    (tmp_path / 'x.txt').write_text('to be or not to be\n' * 100)
    result = run('data/text/prepare.py', f'--input={tmp_path / "x.txt"}', '--vocab_size=260',
                 '--dataset=bars')  # fmt: skip
    assert '%|' not in result.stdout + result.stderr


# Paths --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_home_and_other_working_directories(run, clone, char_data, text, tmp_path):
    """`~` is the home folder in every key; what is not here is looked for in the repository."""
    home, elsewhere = tmp_path / 'home', tmp_path / 'elsewhere'
    home.mkdir(), elsewhere.mkdir()
    env = {'HOME': str(home)}
    shutil.copytree(char_data, home / 'char')
    (home / 'c.py').write_text("out_dir = '~/a run'\ndataset = '~/char'\n")
    (home / 'prompt.txt').write_text('def ')
    (home / 'text.txt').write_text(text[:5000])
    result = run('train.py', '~/c.py', *RUN, cwd=elsewhere, env=env)
    assert not list(elsewhere.iterdir()) and (home / 'a run' / 'log.jsonl').exists()
    command = re.search(r'^sample: +python (.*)', result.stdout, re.MULTILINE)[1]
    command = f'{sys.executable} {command} --num_samples=1 --max_new_tokens=2'
    subprocess.run(command, shell=True, check=True, cwd=elsewhere, env=os.environ | env)
    common = ('--max_new_tokens=2', '--device=cpu', '--start=a')
    where = '--out_dir=~/a run'
    text = run('sample.py', where, *common, '--start=FILE:~/prompt.txt', cwd=elsewhere, env=env)
    assert text.stdout.startswith('def ')
    for name in ('--init_from=~/a run', '--init_from=~/a run/ckpt_00000004.pt'):
        run('sample.py', name, *common, cwd=elsewhere, env=env)
    run('tools/evaluate.py', where, '--input=~/prompt.txt', '--task=text', cwd=elsewhere, env=env)
    run('data/text/prepare.py', '--input=~/text.txt', '--tokenizer=char', '--dataset=home',
        cwd=elsewhere, env=env)  # fmt: skip
    # in the repository: a config file, data by path and by name, a run
    for dataset in ('data/home', 'home'):
        run('train.py', 'config/quickstart.py', *RUN, f'--dataset={dataset}', '--optimizer=adamw',
            '--out_dir=out-here', cwd=clone)  # fmt: skip
    run('sample.py', '--out_dir=out-here', *common, cwd=elsewhere)
    run('train.py', '--init_from=resume', '--out_dir=out-here', '--max_iters=5', cwd=elsewhere)
    assert ckpt.load(clone / 'out-here').step == 5 and not list(elsewhere.iterdir())


def test_sample_takes_a_config_file_of_train(run, trained, tmp_path):
    path = tmp_path / 'c.py'
    path.write_text(f"out_dir = {str(trained)!r}\ninit_from = 'scratch'\nn_layer = 2\n"
                    "compile = 'auto'\nseed = 5\n")  # fmt: skip
    result = run('sample.py', path, '--max_new_tokens=3', '--num_samples=1', '--device=cpu')
    assert 'ignored: n_layer, compile, init_from' in result.stderr
    same = run('sample.py', f'--out_dir={trained}', '--seed=5', '--max_new_tokens=3',
               '--num_samples=1', '--device=cpu')  # fmt: skip
    assert result.stdout == same.stdout


# Config files and hints ---------------------------------------------------------------------------


def test_config_files_may_use_helper_variables(tmp_path):
    (tmp_path / 'c.py').write_text('epochs = 3\nper_epoch = 100\nmax_iters = epochs * per_epoch\n')
    config, given = configure(TrainConfig, [str(tmp_path / 'c.py')])
    assert config.max_iters == 300 and list(given) == ['max_iters']
    (tmp_path / 'c.py').write_text('max_itres = 300\n')  # used nowhere: a typo
    with pytest.raises(UserError, match='did you mean max_iters'):
        configure(TrainConfig, [str(tmp_path / 'c.py')])
    (tmp_path / 'c.py').write_text('seed = 1\nn_layer = 0\n')
    with pytest.raises(UserError, match='c.py line 2: n_layer = 0'):
        configure(TrainConfig, [str(tmp_path / 'c.py')])


@pytest.mark.parametrize(
    'typed, meant',
    [('lr', 'learning_rate'), ('bs', 'batch_size'), ('wd', 'weight_decay'), ('layers', 'n_layer'),
     ('num_heads', 'n_head'), ('d_model', 'n_embd'), ('seq_len', 'block_size'),
     ('ctx', 'block_size'), ('steps', 'max_iters'), ('epochs', 'max_iters'),
     ('max-iters', 'max_iters'),
     ('LEARNING_RATE', 'learning_rate'), ('batchsize', 'batch_size'), ('warmup', 'warmup_iters'),
     ('outdir', 'out_dir'), ('output_dir', 'out_dir'), ('data', 'dataset')],
)  # fmt: skip
def test_hints_know_the_words_of_the_field(typed, meant):
    with pytest.raises(UserError, match=f'did you mean {meant}[?]'):
        read_train_config([f'--{typed}=1'])


def test_unrelated_words_get_no_hint():
    for word in ('foo', 'n_experts', 'zzz', 'sliding_window', 'use_flash'):
        with pytest.raises(UserError, match='--help lists them all'):
            read_train_config([f'--{word}=1'])


def test_escapes_of_flags_are_decoded():
    import explain
    import sample

    config, _ = configure(sample.Config, ['--stop=\\n', '--start=Q: x\\nA:'])
    assert config.stop == ['\n'] and config.start == 'Q: x\nA:'
    config, _ = configure(sample.Config, ['--stop=\\n\\n', '--start=FILE:C:\\new\\t.txt'])
    assert config.stop == ['\n\n'] and config.start == 'FILE:C:\\new\\t.txt'
    assert configure(sample.Config, ['--start=a\\\\nb'])[0].start == 'a\\nb'
    assert configure(explain.Config, ['--start=a\\tb'])[0].start == 'a\tb'
    for words in (['--compile', 'False'], ['--compile=False'], ['--compile', 'false', '--seed=1']):
        assert configure(TrainConfig, words)[0].compile is False


def test_a_text_without_input_is_explained(refused, clone):
    (clone / 'book.txt').write_text('To be, or not to be\n')
    refused('data/text/prepare.py', 'book.txt', says='--input=book.txt')


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'explain.py', 'tools/evaluate.py',
                                    'tools/plan.py', 'data/text/prepare.py'])  # fmt: skip
def test_help_shows_bounds_and_repeats_nothing(clone, script):
    shown = subprocess.run([sys.executable, script, '--help'], cwd=clone, text=True,
                           capture_output=True, check=True).stdout  # fmt: skip
    for line in shown.splitlines():
        if line.startswith('  --'):
            words = line.partition('(')[2].split()
            assert not any(a == b for a, b in zip(words, words[1:])), line
    assert script in ('explain.py', 'data/text/prepare.py') or 'at least 1' in shown


# Run folders --------------------------------------------------------------------------------------


def test_nothing_is_written_through_links_in_a_run_folder(run, train_args, tmp_path, reference_run):
    victims = tmp_path / 'victims'
    victims.mkdir()
    names = ('status', 'status.tmp', 'config.py.tmp', 'log.jsonl', 'log.jsonl.tmp', 'explain.html',
             'explain.html.tmp', 'ckpt_00000024.pt.tmp', 'ckpt_00000024.json.tmp', 'config.py')
    for dangling in (False, True):
        out_dir = tmp_path / f'out-{dangling}'
        shutil.copytree(reference_run, out_dir)
        for name in names:
            (victims / name).unlink(missing_ok=True)
            if not dangling:
                content = out_dir / name
                (victims / name).write_bytes(content.read_bytes() if content.exists() else b'keep')
            (out_dir / name).unlink(missing_ok=True)
            (out_dir / name).symlink_to(victims / name)
        before = folder_contents(victims)
        run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=24')
        run('explain.py', f'--out_dir={out_dir}', '--start=def')
        assert folder_contents(victims) == before
        assert ckpt.load(out_dir).step == 24


def test_lock_is_not_written_through_a_link(refused, train_args, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / '.lock').symlink_to(tmp_path / 'victim')
    refused('train.py', *train_args, f'--out_dir={tmp_path / "out"}', says='cannot write there')
    assert not (tmp_path / 'victim').exists()


def test_prepare_does_not_write_through_links(run, clone, tmp_path):
    (tmp_path / 'x.txt').write_text('to be or not to be\n' * 100)
    folder = clone / 'data' / 'linked'
    folder.mkdir()
    for name in ('train.bin', 'train.bin.tmp', 'val.bin.tmp', 'meta.json.tmp', 'progress.json.tmp'):
        (folder / name).symlink_to(tmp_path / 'victim')
    run('data/text/prepare.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=char',
        '--dataset=linked')  # fmt: skip
    assert not (tmp_path / 'victim').exists() and not (folder / 'train.bin').is_symlink()


@pytest.mark.slow
def test_a_killed_run_is_told_from_a_running_one(refused, clone, train_args, tmp_path):
    """status has the process id; resuming says that nothing was saved yet."""
    out_dir = tmp_path / 'out'
    arguments = [a for a in train_args if 'interval' not in a and 'max_iters' not in a]
    process = start_train(clone, *arguments, '--max_iters=100000', f'--out_dir={out_dir}')
    read_until(process, 'step 3:')
    assert (out_dir / 'status').read_text().split() == ['running', str(process.pid)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (out_dir / 'status').read_text().split() == ['running', str(process.pid)]
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    refused('train.py', '--init_from=resume', f'--out_dir={out_dir}', says='before it saved one')


def test_earlier_runs_keep_their_status(run, train_args, tmp_path):
    for _ in range(2):
        run('train.py', *train_args, f'--out_dir={tmp_path}/out', '--max_iters=2')
    assert (tmp_path / 'out' / 'earlier-1' / 'status').read_text() == 'done\n'
    assert (tmp_path / 'out' / 'status').read_text() == 'done\n'


def test_changed_data_are_noticed_with_the_same_dataset_flag(run, refused, char_data, tmp_path):
    data, out_dir = tmp_path / 'data', tmp_path / 'out'
    shutil.copytree(char_data, data)
    run('train.py', *RUN, f'--dataset={data}', f'--out_dir={out_dir}')
    ids = bytearray((data / 'train.bin').read_bytes())
    ids[:200] = ids[200:400]
    (data / 'train.bin').write_bytes(ids)
    shutil.copytree(data, tmp_path / 'other')
    again = ('train.py', *RUN, f'--out_dir={out_dir}', '--init_from=resume', '--max_iters=6')
    refused(*again, f'--dataset={data}', says='has changed since')
    refused(*again, says='has changed since')
    assert 'other data' in run(*again, f'--dataset={tmp_path / "other"}').stdout


def test_a_damaged_manifest_is_told_from_a_missing_checkpoint(refused, reference_run, tmp_path):
    out_dir = tmp_path / 'out'
    shutil.copytree(reference_run, out_dir)
    for path in out_dir.glob('ckpt_*.json'):
        path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match='restore ckpt_00000020.json, or delete it'):
        ckpt.load(out_dir)
    for path in out_dir.glob('ckpt_*.json'):
        path.unlink()
    assert ckpt.load(out_dir / 'ckpt_00000020.pt').step == 20


def test_a_run_that_diverges_is_not_said_to_overfit(run, char_data, tmp_path):
    result = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "o"}',
                 '--max_iters=4', '--eval_interval=2', '--learning_rate=3')  # fmt: skip
    assert 'overfits' not in result.stdout


@pytest.mark.parametrize('script', ['train.py', 'tools/plan.py', 'tools/sweep.py'])
def test_help_may_be_cut_off_by_head(clone, script):
    command = f'PYTHONUNBUFFERED=1 {sys.executable} {script} --help | true'
    result = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True)
    assert 'Traceback' not in result.stderr


@pytest.mark.slow
def test_interactive_drops_only_the_line_that_is_not_utf8(clone, trained):
    command = [sys.executable, 'sample.py', f'--out_dir={trained}', '--interactive',
               '--max_new_tokens=1', '--device=cpu']  # fmt: skip
    result = subprocess.run(command, cwd=clone, input=b'\xff\nto\nbe\n', capture_output=True)
    assert result.stdout.count(b'-' * 15) == 2 and b'not UTF-8' in result.stderr


# Longer runs and small texts ----------------------------------------------------------------------


def test_an_extended_run_warms_up_again_and_resumes_exactly(run, char_data, tmp_path):
    schedule = ('--schedule=wsd', '--decay_fraction=0.5', '--min_lr=0', '--warmup_iters=0')
    keys = (*TINY, *schedule, f'--dataset={char_data}', '--save_interval=5', '--keep_last=20')
    out, broken = tmp_path / 'out', tmp_path / 'broken'
    run('train.py', *keys, '--max_iters=20', f'--out_dir={out}')
    result = run('train.py', '--init_from=resume', f'--out_dir={out}', '--max_iters=60')
    assert 'warms up again' in result.stdout and 'to 0% of its peak' in result.stdout
    rates = [line['lr'] for line in log_lines(out, 'lr')]
    assert rates[20] < rates[21] < rates[25] == max(rates[20:]) == pytest.approx(rates[0] / 2)
    # resumed within the extension: the same to the last bit, and not extended once more
    shutil.copytree(out, broken)
    for step in (40, 45, 50, 55, 60):
        (broken / f'ckpt_{step:08d}.json').unlink()
        (broken / f'ckpt_{step:08d}.pt').unlink()
    result = run('train.py', '--init_from=resume', f'--out_dir={broken}')
    assert 'warms up again' not in result.stdout
    assert_same_run(broken, out)


@pytest.mark.slow
def test_overfitting_is_said_once_and_the_best_checkpoint_can_be_named(run, refused, tmp_path):
    text = ''.join(random.Random(0).choices('abcdefghij \n', k=1500))  # nothing to generalize
    (tmp_path / 'x.txt').write_text(text)
    run('data/text/prepare.py', f'--input={tmp_path / "x.txt"}', '--tokenizer=char',
        '--dataset=small')  # fmt: skip
    out = tmp_path / 'out'
    result = run('train.py', *TINY, '--dataset=small', f'--out_dir={out}', '--max_iters=400',
                 '--eval_interval=40', '--n_embd=64', '--batch_size=16')  # fmt: skip
    assert result.stdout.count('the model overfits') == 1
    losses = {line['step']: line['val_loss'] for line in log_lines(out, 'val_loss')}
    best = min(losses, key=losses.get)
    end = result.stdout.partition('done: ')[2]
    assert f'best val loss {losses[best]:.4f}' in end
    assert f'sample.py --out_dir={out} --checkpoint=best' in end
    steps = {}
    for which in ('best', 'last', '400', 'auto'):
        shown = run('sample.py', f'--out_dir={out}', f'--checkpoint={which}', '--max_new_tokens=1',
                    '--device=cpu').stderr  # fmt: skip
        steps[which] = int(shown.partition('step ')[2].partition(',')[0])
    assert steps == {'best': best, 'last': 400, '400': 400, 'auto': 400}
    refused('sample.py', f'--out_dir={out}', '--checkpoint=7', says=('checkpoint = 7', '400'))
    refused('sample.py', f'--init_from={out}/ckpt_00000400.pt', '--checkpoint=best',
            says='only for the folder of a run')  # fmt: skip


def test_a_decay_that_ends_within_warmup_is_said(run, char_data, tmp_path):
    result = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "o"}',
                 '--max_iters=4', '--warmup_iters=3', '--lr_decay_iters=2')  # fmt: skip
    assert 'lr_decay_iters = 2 is not more than warmup_iters = 3' in result.stdout


def test_the_start_of_a_run_is_a_few_lines(run, char_data, tmp_path, clone):
    result = run('train.py', 'config/quickstart.py', *TINY, '--optimizer=adamw', '--max_iters=2',
                 f'--dataset={char_data}', f'--out_dir={tmp_path / "o"}', '--seed=7')  # fmt: skip
    before = result.stdout.partition('step 0:')[0]
    assert len(before.splitlines()) <= 6
    assert 'config/quickstart.py with ' in before and 'seed = 7' in before
    assert 'untrained model' in result.stdout and 'mfu' not in result.stdout.lower()
    saved = configure(TrainConfig, [str(tmp_path / 'o' / 'config.py')])[0]
    assert saved.seed == 7 and saved.schedule == 'wsd'


def test_errors_are_at_most_a_few_lines_long(run):
    assert len(error_line(run('train.py', f'--n_layer={"9" * 5000}', code=2))) < 200


@pytest.mark.slow
@pytest.mark.parametrize(('key', 'values', 'ignored', 'used'), [
    ('embedding_learning_rate', (0.01, 0.1), (), ('--ngram=2',)),
    ('muon_learning_rate', (0.01, 0.1), (), ('--optimizer=muon',)),
    ('ngram_rows', (50, 60), (), ('--ngram=3',)),
    ('rope_theta', (10, 100), (), ('--position=rope',)),
    ('min_lr', (1e-5, 1e-4), ('--schedule=constant',), ('--schedule=linear',)),
    ('decay_fraction', (0.5, 1), (), ('--schedule=wsd',)),
])
def test_keys_that_change_nothing_are_named(run, char_data, tmp_path, key, values, ignored, used):
    for flags in (ignored, used):
        losses = []
        for value in values:
            out_dir = tmp_path / f'{len(flags)}{value}{flags is used}'
            output = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={out_dir}',
                         '--max_iters=8', *flags, f'--{key}={value}').stdout
            losses.append(step_losses(out_dir))
            assert (f'note: {key} changes nothing: ' in output) == (flags is ignored)
        assert (losses[0] == losses[1]) == (flags is ignored)
