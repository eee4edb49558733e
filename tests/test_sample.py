"""sample.py as a person runs it: what comes on stdout, what on stderr, and what is refused."""

import re
import signal
import subprocess
import sys
from subprocess import PIPE

import torch

from checkpoint import load_model
from data import tokenizer
from sample import Text


def samples(result, n):
    """The n texts of stdout, each followed by nanoGPT's line of 15 dashes; the last line of stderr is the speed."""
    parts = result.stdout.split('\n' + '-' * 15 + '\n')
    assert parts[-1] == '' and len(parts) == n + 1, result.stdout
    assert re.fullmatch(r'\d+ tokens in [\d.]+ s \([\d.]+ tokens/s\)', result.stderr.strip().splitlines()[-1])
    return parts[:-1]


def test_samples_are_on_stdout_and_the_speed_on_stderr(run, trained):
    result = run('sample.py', f'--out_dir={trained}', '--num_samples=3', '--max_new_tokens=50', '--start=def ')
    texts = samples(result, 3)
    assert all(text.startswith('def ') and len(text) == 54 for text in texts) and len(set(texts)) == 3
    assert result.stderr.strip().splitlines()[-1].startswith('150 tokens')
    again = run('sample.py', f'--out_dir={trained}', '--num_samples=3', '--max_new_tokens=50', '--start=def ')
    assert again.stdout == result.stdout
    other = run('sample.py', f'--out_dir={trained}', '--num_samples=3', '--max_new_tokens=50', '--start=def ', '--seed=2')
    assert other.stdout != result.stdout


def test_greedy_text_is_that_of_the_plain_loop_past_block_size(run, trained, tmp_path):
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
    model, characters = load_model(trained)
    ids = characters.encode('import os\n')
    for _ in range(60):
        ids.append(model(torch.tensor([ids[-32:]]))[0][0, -1].argmax().item())
    assert samples(result, 1) == [characters.decode(ids)]


def test_prompts_of_unequal_length_are_one_batch(run, trained):
    result = run(
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=2',
        '--max_new_tokens=10',
        '--start=["def main(", "x"]',
        '--temperature=0',
        '--dtype=float32',
    )
    texts = samples(result, 4)
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
        assert samples(alone, 1) == [text]


def test_a_sample_ends_at_its_stop(run, trained):
    model, characters = load_model(trained)
    plain = samples(run('sample.py', f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=200', '--start=d'), 1)[0]
    stop = plain[20:22]
    stopped = samples(
        run('sample.py', f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=200', '--start=d', f'--stop=[{stop!r}]'), 1
    )
    assert stopped == [plain[: plain.index(stop, 1)]]
    token = characters.encode(plain[20])[0]
    stopped = samples(
        run('sample.py', f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=200', '--start=d', f'--stop=[{token}]'), 1
    )
    assert stopped == [plain[: plain.index(plain[20], 1) + 1]]


def test_a_beam_shows_the_likeliest_texts_with_their_scores(run, trained):
    model, characters = load_model(trained)
    options = ('--start=de', '--max_new_tokens=12', '--dtype=float32', '--length_penalty=1')
    shown = run('sample.py', f'--out_dir={trained}', '--num_beams=4', '--num_samples=2', *options).stdout
    expected = model.beam_search([characters.encode('de')], 12, num_beams=4, length_penalty=1)[0][:2]
    text = ''.join(f'de{characters.decode(ids)}\n{"-" * 15} score {score:.4f}\n' for ids, score in expected)
    assert shown == text


def test_typed_prompts_are_continued_and_ctrl_c_ends_a_text_only(run, clone, trained):
    typed = '日\n\nde\nde\n'  # what cannot be continued is said, and the next one is
    result = run('sample.py', f'--out_dir={trained}', '--interactive', '--max_new_tokens=30', input=typed)
    assert "'日' at position 0" in result.stderr and 'start is empty' in result.stderr
    first, second, rest = result.stdout.split('\n' + '-' * 15 + '\n')
    assert first.startswith('de') and second.startswith('de') and first != second and not rest

    command = [sys.executable, clone / 'sample.py', f'--out_dir={trained}', '--interactive', '--max_new_tokens=1000000']
    with subprocess.Popen(command, cwd=clone, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        for prompt in ('de', 'x'):
            process.stdin.write(prompt + '\n')
            process.stdin.flush()
            assert process.stdout.read(100).startswith(prompt)  # it is written
            process.send_signal(signal.SIGINT)
            while (line := process.stdout.readline()).strip() != '-' * 15:
                assert line
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said.count('stopped') == 2 and 'Traceback' not in said


def test_half_a_character_is_never_shown():
    text, shown = Text(tokenizer.ByteTokenizer(), []), []
    for byte in 'aé日🙂z'.encode():
        shown.append(text.add(byte))
    assert shown == ['a', '', 'é', '', '', '日', '', '', '', '🙂', 'z']
    text.add('🙂'.encode()[0])
    assert text.finish() == '�'


def test_what_could_become_a_stop_text_is_held_back():
    text = Text(tokenizer.ByteTokenizer(), ['END', '\n\n'])
    assert [text.add(b) for b in b'xENxEND'] == ['x', '', '', 'ENx', '', '', ''] and text.ended and text.n_tokens == 7
    text = Text(tokenizer.ByteTokenizer(), [' '])  # a token may hold a stop and half a character behind it
    text.tokenizer.token_bytes = [b'a \xe2\x80']
    assert (text.add(0), text.ended, text.finish()) == ('a', True, '')
    del text.tokenizer.token_bytes
    text = Text(tokenizer.ByteTokenizer(), ['END'])
    assert [text.add(b) for b in b'aEN'] == ['a', '', ''] and text.finish() == 'EN'


def test_mistakes_are_one_sentence(refused, trained, tmp_path):
    refused('sample.py', f'--out_dir={trained}', '--start=a日', says=("'日' at position 1",))
    refused('sample.py', f'--out_dir={trained}', '--start=FILE:nothing.txt', says=('FILE:nothing.txt', 'No such file'))
    refused('sample.py', f'--out_dir={trained}', '--start=', says='start is empty')
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
        'max_new_tokens=31 --num_beams=2'.split(),  # and the prompt, in 32
        'out_dir=',
    ):
        first, *more = [mistake] if isinstance(mistake, str) else mistake
        refused('sample.py', f'--out_dir={trained}', '--start=ab', f'--{first}', *more, says=first.split('=')[0])
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'ckpt.pt').write_bytes(b'garbage')
    refused('sample.py', f'--out_dir={tmp_path}/foreign', says='ckpt.pt')


def test_every_option_has_its_effect(run, trained):
    common = (f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=60', '--start=d', '--temperature=1', '--top_k=50')
    options = ((), '--top_k=None', '--top_k=3', '--top_p=0.5', '--min_p=0.2', '--repetition_penalty=1.5', '--temperature=2')
    texts = [run('sample.py', *common, *([option] if option else [])).stdout for option in options]
    assert all(text != texts[0] for text in texts[1:])
