"""What train.py prints: in a terminal of 80 columns, into a file, at the end, and without keys."""

import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import pytest

from helpers import TINY, folder_contents, log_lines, read_log
from lib.errors import plural
from lib.recipe import read_train_config
from lib.step_log import StepLog

RUN = (*TINY, '--max_iters=30', '--log_interval=1')
LINE = r'loss ([\d.]+), val ([\d.]+), [\d.]+k? tokens/s, [\d.]+[smh] left'


@pytest.fixture
def terminal(clone):
    """terminal(*arguments, stop_at=None) runs train.py in a terminal of 80 columns and presses
    Ctrl-C when a text appears. Returns (exit code, the lines, each with all its versions)."""
    fcntl, termios = map(pytest.importorskip, ('fcntl', 'termios'))

    def terminal(*arguments, stop_at=None):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
        env = {key: value for key, value in os.environ.items() if key not in ('COLUMNS', 'LINES')}
        process = subprocess.Popen(
            [sys.executable, 'train.py', *arguments],
            cwd=clone, env=env, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b''
        try:
            while part := os.read(ours, 2**16):
                shown += part
                if stop_at and stop_at in shown:
                    process.send_signal(signal.SIGINT)
                    stop_at = None
        except OSError:  # the other side is closed
            pass
        os.close(ours)
        text = shown.decode().replace('\r\n', '\n')
        return process.wait(), [line.split('\r') for line in text.splitlines()]

    return terminal


def last_words(lines):
    """{name: command} at the end of what train.py prints."""
    found = (re.fullmatch(r'(\w+): +(python .*)', line) for line in lines[-5:])
    return {match[1]: shlex.split(match[2])[1:] for match in found if match}


def val_at(evaluations, step):
    """The val loss that is known when `step` steps are done."""
    return next(line['val_loss'] for line in reversed(evaluations) if line['step'] < step)


def test_in_a_terminal_nothing_wraps(terminal, clone, char_data):
    code, lines = terminal(*RUN, f'--dataset={char_data}', '--out_dir=out-tty', '--patience=100')
    assert code == 0
    too_long = [text for line in lines for text in line if len(text) > 80]
    assert not [text for text in too_long if str(char_data) not in text]
    losses, evaluations = (log_lines(clone / 'out-tty', key) for key in ('lr', 'val_loss'))
    assert [line['step'] for line in evaluations] == [0, 10, 20, 30]
    drawn = [text for line in lines for text in line if re.match(r'\d+/30 ', text)]
    seen = [re.fullmatch(rf'(\d+)/30 \S* +{LINE}', text.rstrip()) for text in drawn]
    assert any(seen)
    for done, loss, val in (match.groups() for match in seen if match):
        done = int(done)
        assert float(loss) == pytest.approx(losses[done - 1]['loss'], abs=1e-4)
        assert float(val) == pytest.approx(val_at(evaluations, done), abs=1e-4)
    last = [line[-1] for line in lines]
    val_loss, bits = (evaluations[-1][key] for key in ('val_loss', 'val_bits_per_byte'))
    best = f'best val loss {val_loss:.4f}, perplexity {math.exp(val_loss):.2f}, {bits:.4f} bits'
    assert best in '\n'.join(last[-6:])
    assert last[-4] == 'saved in out-tty: ckpt_00000030.pt, log.jsonl, config.py'
    assert list(last_words(last)) == ['sample', 'explain', 'compare']


def test_in_a_file_there_is_a_line_for_each_log_interval(run, char_data, tmp_path):
    """In a run and where it is resumed, which knows the val loss of its last checkpoint."""
    options = (*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out', '--log_interval=3')
    evaluations = {}
    for resume, first, end in (((), 0, 14), (('--init_from=resume',), 15, 20)):
        text = run('train.py', *options, *resume, f'--max_iters={end}').stdout
        assert '\r' not in text and '\x1b' not in text
        steps = {int(step): values for step, *values in re.findall(rf'step (\d+): {LINE}\n', text)}
        assert list(steps) == list(range(first, end, 3))
        logged = {line['step']: line['loss'] for line in log_lines(tmp_path / 'out', 'lr')}
        evaluations |= {line['step']: line for line in log_lines(tmp_path / 'out', 'val_loss')}
        known = sorted(evaluations.values(), key=lambda line: line['step'])
        for step, (loss, val) in steps.items():
            assert float(loss) == pytest.approx(logged[step], abs=1e-4)
            assert float(val) == pytest.approx(val_at(known, step + 1), abs=1e-4)


@pytest.mark.slow
def test_the_commands_in_the_last_lines_run_also_after_ctrl_c(terminal, run, clone, char_data):
    keys = (*RUN, '--max_iters=100000', f'--dataset={char_data}', '--out_dir=out-ctrl-c')
    code, lines = terminal(*keys, stop_at=b'/100000 ')
    assert code == 128 + signal.SIGINT
    last = [line[-1] for line in lines]
    step = read_log(clone / 'out-ctrl-c')[-1]['step'] + 1
    assert f'stopped by SIGINT after {plural(step, "step")}' in last
    commands = last_words(last)
    assert list(commands) == ['resume', 'sample', 'explain', 'compare']
    commands['resume'] += [f'--max_iters={step + 1}']
    commands['sample'] += ['--num_samples=1', '--max_new_tokens=5']
    for command in commands.values():
        run(*command)
    assert read_log(clone / 'out-ctrl-c')[-1]['step'] == step + 1


@pytest.mark.slow
def test_several_processes_print_once(ranks, char_data, tmp_path):
    text = ranks(2, *RUN, '--gradient_accumulation_steps=2', f'--dataset={char_data}',
                 f'--out_dir={tmp_path}/out')  # fmt: skip
    shown = [int(step) for step, *_ in re.findall(rf'step (\d+): {LINE}', text)]
    assert shown == list(range(30))
    assert text.count('done: best val loss') == text.count('sample.py') == 1


def test_an_evaluation_ends_with_its_loss(run, trained):
    text = run('train.py', '--init_from=resume', f'--out_dir={trained}', '--eval_only').stdout
    (_, loss, again) = re.findall(r'val loss ([\d.]+)', text)
    assert loss == again and text.splitlines()[-1].startswith(f'val loss {loss}, perplexity ')


@pytest.fixture
def step_log():
    """A StepLog of a GPU that takes 0.3 s a step, and 40 s to evaluate."""
    log = StepLog.__new__(StepLog)
    log.config = SimpleNamespace(max_iters=6_000_000, max_minutes=None, eval_interval=100)
    log.evaluation, log.pace = {'val_loss': 3.12345, 'seconds': 40.0}, deque([(10, 3.0), (10, 3.0)])
    log.seconds, log.flops_per_token, log.peak_flops = 0.0, 3.7e8, 1e15
    log.bar = SimpleNamespace(disable=True)
    return log


def test_widest_line_fits_into_80_columns(step_log, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    step_log.bar = SimpleNamespace(disable=True, n=0, update=lambda share: None)
    step_log.show(1_000_000, 3.23456, 1_234_567.8)
    line = capsys.readouterr().out.rstrip('\n')
    assert len(line) < 80
    assert line.startswith('step 1000000: loss 3.2346, val 3.1235, 1.23M tokens/s, mfu 45.7%, ')
    step_log.draw(1_000_000)
    line = step_log.bar.bar_format
    assert len(line) < 80 and line.endswith(' left')
    assert line.startswith('1000000/6000000 loss 3.2346, val 3.1235, 1.23M tokens/s, mfu 45.7%, ')


@pytest.mark.parametrize(
    'budget, step, used, seconds',
    [
        # 250 steps, and evaluations at 200, 300 and 400
        ({'max_iters': 400}, 150, 0, 250 * 0.3 + 3 * 40),
        ({'max_iters': 410}, 400, 0, 10 * 0.3 + 2 * 40),
        # 90 s of 2 minutes: 300 steps, to 450; evaluations at 200, 300, 400 and the end
        ({'max_minutes': 2}, 150, 30, 90 + 4 * 40),
        ({'max_minutes': 2}, 150, 121, 40),
    ],
)
def test_time_left_follows_the_budget(step_log, budget, step, used, seconds):
    vars(step_log.config).update(budget)
    step_log.seconds = used
    assert step_log.seconds_left(step) == pytest.approx(seconds)


# Without keys -------------------------------------------------------------------------------------


def test_without_keys_train_says_what_to_type(run, clone, tmp_path):
    before = folder_contents(tmp_path)
    result = run('train.py', code=2, cwd=tmp_path)
    assert not result.stdout and folder_contents(tmp_path) == before
    offered = re.findall(r'^  python (\S+) ?(.*)$', result.stderr, re.M)
    assert all((tmp_path / script).exists() for script, _ in offered)
    offered = [(os.path.basename(script), keys) for script, keys in offered]
    assert ('train.py', 'config/quickstart.py') in offered
    assert ('prepare.py', '--input=PATH --dataset=mine') in offered
    assert ('train.py', 'config/speedrun_shakespeare_char.py') in offered
    assert 'resume' not in result.stderr
    for script, keys in offered:  # all of them are known
        if script == 'train.py':
            read_train_config(shlex.split(keys))


def test_without_keys_train_offers_the_run_that_is_there(run, tmp_path):
    for folder, age in (('out', 0), ('out-old', 1000)):
        (tmp_path / folder).mkdir()
        manifest = tmp_path / folder / 'ckpt_00000020.json'
        manifest.write_text(json.dumps({}))
        os.utime(manifest, (1e9 - age, 1e9 - age))
    lines = run('train.py', code=2, cwd=tmp_path).stderr.splitlines()
    assert lines[-2] == 'Go on with the run in out'
    assert lines[-1].endswith('train.py --init_from=resume --out_dir=out')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['text', 'pairs'])
def test_prepare_ends_with_the_command_that_trains(run, clone, tmp_path, kind):
    lines = [f'{a} and {b}\t{b} or {a}' for a in 'abcdefghij' for b in 'klmnopqrst']
    (tmp_path / 'input.txt').write_text('\n'.join(lines * 3))
    rows = ['--block_size=32'] * (kind == 'pairs')
    result = run(f'data/{kind}/prepare.py', f'--input={tmp_path}/input.txt', '--vocab_size=270',
                 f'--dataset=first-{kind}', *rows)  # fmt: skip
    start, *words = shlex.split(result.stdout.splitlines()[-1])
    assert (start, *words[:2]) == ('next:', 'python', 'train.py')
    run('train.py', *words[2:], *TINY, '--optimizer=adamw', '--max_iters=1')
    assert (clone / f'out-first-{kind}' / 'status').read_text() == 'done\n'
