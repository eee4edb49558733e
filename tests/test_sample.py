"""sample.py: what it prints to stdout and stderr, and the errors for wrong arguments."""

import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

import checkpoint as ckpt
from helpers import read_until, start_train
from lib import tokenizer
from lib.generation import beam_search
from sample import Sample


@pytest.mark.slow
def test_sample_reads_checkpoints_of_running_training(clone, run, train_args, tmp_path):
    options = (
        '--max_iters=1000000',
        '--save_interval=1',
        '--keep_last=1',
        '--eval_interval=1000000',
    )
    with start_train(clone, f'--out_dir={tmp_path}/out', *train_args, *options) as process:
        read_until(process, 'saved ')
        threading.Thread(target=process.stdout.read).start()
        try:
            for _ in range(3):
                run(
                    'sample.py',
                    f'--out_dir={tmp_path}/out',
                    '--start=d',
                    '--num_samples=1',
                    '--max_new_tokens=2',
                )
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM


def read_samples(result, n):
    """The n texts on stdout, each followed by 15 dashes; stderr must end with the speed."""
    parts = result.stdout.split('\n' + '-' * 15 + '\n')
    assert parts[-1] == '' and len(parts) == n + 1, result.stdout
    assert re.fullmatch(
        r'\d+ tokens in [\d.]+ s \([\d.]+ tokens/s\)', result.stderr.strip().splitlines()[-1]
    )
    return parts[:-1]


def test_sample_prints_text_to_stdout_and_speed_to_stderr(run, trained):
    result = run(
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=3',
        '--max_new_tokens=50',
        '--start=def ',
    )
    texts = read_samples(result, 3)
    assert all(text.startswith('def ') and len(text) == 54 for text in texts)
    assert len(set(texts)) == 3
    assert result.stderr.strip().splitlines()[-1].startswith('150 tokens')
    again = run(
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=3',
        '--max_new_tokens=50',
        '--start=def ',
    )
    assert again.stdout == result.stdout
    other = run(
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=3',
        '--max_new_tokens=50',
        '--start=def ',
        '--seed=2',
    )
    assert other.stdout != result.stdout


def test_sample_greedy_matches_plain_loop_beyond_block_size(run, trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('import os\n')
    result = run(
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=1',
        '--max_new_tokens=60',
        f'--start=FILE:{tmp_path}/prompt.txt',
        '--temperature=0',
        '--slide=1',
        '--dtype=float32',
    )
    model, characters = ckpt.load_model(trained)
    ids = characters.encode('import os\n')
    for _ in range(60):
        ids.append(model(torch.tensor([ids[-32:]]))[0][0, -1].argmax().item())
    assert read_samples(result, 1) == [characters.decode(ids)]


def test_sample_batches_prompts_of_unequal_length(run, trained):
    result = run(
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=2',
        '--max_new_tokens=10',
        '--start=["def main(", "x"]',
        '--temperature=0',
        '--dtype=float32',
    )
    texts = read_samples(result, 4)
    assert texts[0] == texts[1] and texts[2] == texts[3]
    for prompt, text in (('def main(', texts[0]), ('x', texts[2])):
        alone = run(
            'sample.py',
            f'--out_dir={trained}',
            '--num_samples=1',
            '--max_new_tokens=10',
            f'--start={prompt}',
            '--temperature=0',
            '--dtype=float32',
        )
        assert read_samples(alone, 1) == [text]


def test_sample_ends_at_stop_text_or_token(run, trained):
    model, characters = ckpt.load_model(trained)
    options = ('--num_samples=1', '--max_new_tokens=200', '--start=d')
    command = ('sample.py', f'--out_dir={trained}', *options)
    plain = read_samples(run(*command), 1)[0]
    stop = plain[20:22]
    stopped = read_samples(run(*command, f'--stop=[{stop!r}]'), 1)
    assert stopped == [plain[: plain.index(stop, 1)]]
    token = characters.encode(plain[20])[0]
    stopped = read_samples(run(*command, f'--stop=[{token}]'), 1)
    assert stopped == [plain[: plain.index(plain[20], 1) + 1]]


def test_sample_beam_search_prints_best_texts_with_scores(run, trained):
    model, characters = ckpt.load_model(trained)
    options = ('--start=de', '--max_new_tokens=12', '--dtype=float32', '--length_penalty=1')
    shown = run(
        'sample.py', f'--out_dir={trained}', '--num_beams=4', '--num_samples=2', *options
    ).stdout
    expected = beam_search(model, [characters.encode('de')], 12, num_beams=4, length_penalty=1)[0][
        :2
    ]
    text = ''.join(
        f'de{characters.decode(ids)}\n{"-" * 15} score {score:.4f}\n' for ids, score in expected
    )
    assert shown == text


@pytest.mark.slow
def test_sample_interactive_continues_after_ctrl_c(run, clone, trained):
    typed = '日\n\nde\nde\n'  # an invalid prompt is reported, the next one is continued
    result = run(
        'sample.py', f'--out_dir={trained}', '--interactive', '--max_new_tokens=30', input=typed
    )
    assert "'日' at position 0" in result.stderr and 'start is empty' in result.stderr
    first, second, rest = result.stdout.split('\n' + '-' * 15 + '\n')
    assert first.startswith('de') and second.startswith('de') and first != second and not rest

    command = [
        sys.executable,
        clone / 'sample.py',
        f'--out_dir={trained}',
        '--interactive',
        '--max_new_tokens=1000000',
    ]
    with subprocess.Popen(
        command,
        cwd=clone,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for prompt in ('de', 'x'):
            process.stdin.write(prompt + '\n')
            process.stdin.flush()
            assert process.stdout.read(100).startswith(prompt)
            process.send_signal(signal.SIGINT)
            while (line := process.stdout.readline()).strip() != '-' * 15:
                assert line
        _, output = process.communicate(timeout=600)
    assert process.returncode == 0 and output.count('stopped') == 2 and 'Traceback' not in output


def test_sample_text_never_shows_partial_characters():
    text, shown = Sample(tokenizer.ByteTokenizer(), []), []
    for byte in 'aé日🙂z'.encode():
        shown.append(text.add(byte))
    assert shown == ['a', '', 'é', '', '', '日', '', '', '', '🙂', 'z']
    text.add('🙂'.encode()[0])
    assert text.finish() == '�'


def test_sample_text_holds_back_possible_stop_text():
    text = Sample(tokenizer.ByteTokenizer(), ['END', '\n\n'])
    assert [text.add(b) for b in b'xENxEND'] == ['x', '', '', 'ENx', '', '', '']
    assert text.ended
    assert text.n_tokens == 7
    # a token may contain a stop text followed by a partial character
    text = Sample(tokenizer.ByteTokenizer(), [' '])
    text.tokenizer.token_bytes = [b'a \xe2\x80']
    assert (text.add(0), text.ended, text.finish()) == ('a', True, '')
    del text.tokenizer.token_bytes
    text = Sample(tokenizer.ByteTokenizer(), ['END'])
    assert [text.add(b) for b in b'aEN'] == ['a', '', ''] and text.finish() == 'EN'


@pytest.mark.slow
def test_sample_reports_user_errors(refused, trained, tmp_path):
    refused('sample.py', f'--out_dir={trained}', '--start=a日', says=("'日' at position 1",))
    refused(
        'sample.py',
        f'--out_dir={trained}',
        '--start=FILE:nothing.txt',
        says=('FILE:nothing.txt', 'No such file'),
    )
    refused('sample.py', f'--out_dir={trained}', '--start=', says='start is empty')
    refused('sample.py', f'--out_dir={trained}', '--num_beams=2', '--stop=["a", 3]',
            says="stop = ['a']: beam search ends at token ids only")
    refused('sample.py', f'--out_dir={trained}', '--stop=["a", 1.5]', says="stop = ['a', 1.5]")
    refused('sample.py', f'--out_dir={trained}', '--interactive', '--start=d',
            says='start: with --interactive you type the prompts')
    refused('sample.py', f'--out_dir={tmp_path}', says=(str(tmp_path), 'no whole checkpoint'))
    refused('sample.py', f'--out_dir={tmp_path}/none', says='there is no checkpoint')
    refused('sample.py', f'--out_dir={trained}', '--temprature=1', says='did you mean temperature')
    refused('sample.py', f'--out_dir={trained}', '--device=cuda:7', says='cuda:7')
    for mistake in (
        'temperature=-1',
        'top_k=0',
        'top_p=0',
        'top_p=2',
        'min_p=-1',
        'num_samples=0',
        'max_new_tokens=0',
        'slide=99',
        'repetition_penalty=0',
        'stop=[""]',
        'stop=1000',
        'seed=-1',
        'num_beams=0',
        'max_new_tokens=31 --num_beams=2'.split(),  # more than block_size = 32 with the prompt
        'out_dir=',
    ):
        first, *more = [mistake] if isinstance(mistake, str) else mistake
        refused(
            'sample.py',
            f'--out_dir={trained}',
            '--start=ab',
            f'--{first}',
            *more,
            says=first.split('=')[0],
        )
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'ckpt.pt').write_bytes(b'garbage')
    refused('sample.py', f'--out_dir={tmp_path}/foreign', says='ckpt.pt')


def test_sample_options_change_output(run, trained):
    common = (
        f'--out_dir={trained}',
        '--num_samples=1',
        '--max_new_tokens=60',
        '--start=d',
        '--temperature=1',
        '--top_k=50',
    )
    options = (
        (),
        '--top_k=None',
        '--top_k=3',
        '--top_p=0.5',
        '--min_p=0.2',
        '--repetition_penalty=1.5',
        '--temperature=2',
    )
    texts = [run('sample.py', *common, *([option] if option else [])).stdout for option in options]
    assert all(text != texts[0] for text in texts[1:])
