"""tools/evaluate.py on texts, against train.py and transformers; damaged models, large batches."""

import dataclasses
import gzip
import math
import re

import pytest
import torch
import transformers
from torch.nn import functional as F

import checkpoint as ckpt
from helpers import save_overflowing

BLOCK_SIZE = 24
TEXT = 'The loss of a model\nis the  mean of\tits losses, città by città. ' * 3
OUT_OF_MEMORY = """
import torch
def out_of_memory(*arguments, **options):
    raise ERROR
torch.nn.functional.scaled_dot_product_attention = out_of_memory
"""


@pytest.fixture(scope='module')
def byte_run(tmp_path_factory):
    """(folder, transformers model) of a tiny random GPT-2 on bytes."""
    torch.manual_seed(0)
    size = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'n_positions': BLOCK_SIZE, 'vocab_size': 257}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, initializer_range=0.3))
    folder = tmp_path_factory.mktemp('bytes')
    model.eval().save_pretrained(folder / 'huggingface')
    tokenizer = {'kind': 'byte', 'end_of_text': True}
    checkpoint = dataclasses.replace(ckpt.load(folder / 'huggingface'), tokenizer=tokenizer)
    (folder / 'out').mkdir()
    ckpt.save(folder / 'out', checkpoint)
    return folder / 'out', model


@torch.no_grad()
def strided_nats(model, ids, stride, limit=None):
    """(nats, number of tokens scored), by the loop of Hugging Face's guide to the perplexity of
    fixed-length models; a window has one more token, since we drop its last one from the input.
    """
    nats = n_tokens = previous_end = 0
    for begin in range(0, len(ids), stride)[:limit]:
        end = min(begin + BLOCK_SIZE + 1, len(ids))
        labels = ids[begin:end].clone()
        labels[: previous_end - end] = -100
        logits = model(ids[None, begin : end - 1]).logits[0]
        nats += F.cross_entropy(logits, labels[1:], reduction='sum').item()
        n_tokens += (labels[1:] >= 0).sum().item()
        previous_end = end
        if end == len(ids):
            break
    return nats, n_tokens


def read_numbers(output):
    """(tokens, loss, bits per byte, per-word perplexity, words)"""
    pattern = (
        r'text: ([\d,]+) tokens: loss ([\d.]+), perplexity [\d.]+, ([\d.]+) bits per byte, '
        r'([\d.]+) per-word perplexity \(([\d,]+) words\)'
    )
    return [float(number.replace(',', '')) for number in re.search(pattern, output).groups()]


def test_words_end_at_the_end_of_a_document(run, byte_run, tmp_path):
    folder, _ = byte_run
    words = []
    for end in (' ', '<|endoftext|>'):
        (tmp_path / 'text.txt').write_text(f'one two{end}three', encoding='utf-8')
        output = run('tools/evaluate.py', f'--out_dir={folder}', f'--input={tmp_path}/text.txt')
        words.append(read_numbers(output.stdout)[-1])
    assert words == [3, 3]


@pytest.mark.parametrize('stride, limit', [(1, None), (7, None), (7, 3), (24, None), (None, None)])
def test_evaluate_stride_matches_huggingface_guide(run, byte_run, tmp_path, stride, limit):
    folder, model = byte_run
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    options = [f'--{key}={value}' for key, value in (('stride', stride), ('limit', limit)) if value]
    options += [f'--out_dir={folder}', '--dtype=float32', '--batch_size=5']
    output = run('tools/evaluate.py', *options, f'--input={tmp_path}/text.txt').stdout
    ids = torch.tensor(list(TEXT.encode()))
    nats, n_tokens = strided_nats(model, ids, stride or BLOCK_SIZE, limit)
    scored = TEXT.encode()[: n_tokens + 1].decode()
    tokens, loss, bits, per_word, words = read_numbers(output)
    assert tokens == n_tokens == (len(ids) - 1 if limit is None else BLOCK_SIZE + 2 * 7)
    assert loss == pytest.approx(nats / n_tokens, abs=1e-4)
    assert bits == pytest.approx(nats / n_tokens / math.log(2), abs=1e-4)
    assert words == len(re.findall(r'\S+', scored))
    assert math.log(per_word) == pytest.approx(nats / words, rel=1e-5)


@pytest.mark.slow
def test_evaluate_loss_matches_train(run, trained, text, tmp_path):
    out = (f'--out_dir={trained}', '--device=cpu', '--dtype=float32')
    printed = run('train.py', '--init_from=resume', '--eval_only', '--eval_iters=-1', *out).stdout
    loss, perplexity, bits = re.search(
        r'val loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte', printed
    ).groups()
    expected = f'loss {loss}, perplexity {perplexity}, {bits} bits per byte'
    assert expected in run('tools/evaluate.py', *out).stdout
    n_train = len(text.encode()) * 9 // 10
    # the validation split of the text
    val = text.encode()[n_train:]
    (tmp_path / 'val.txt').write_bytes(val)
    # with a byte order mark and Windows' line ends, compressed, in the home folder
    windows = b'\xef\xbb\xbf' + val.replace(b'\n', b'\r\n')
    (tmp_path / 'val.txt.gz').write_bytes(gzip.compress(windows))
    home = {'HOME': str(tmp_path)}
    for name in (f'{tmp_path}/val.txt', '~/val.txt.gz'):
        assert expected in run('tools/evaluate.py', *out, f'--input={name}', env=home).stdout
    (tmp_path / 'link').symlink_to(trained)
    assert expected in run('tools/evaluate.py', '--out_dir=~/link', *out[1:], env=home).stdout
    strided = (*out, '--stride=20', '--limit=9')
    of_split = run('tools/evaluate.py', *strided).stdout.rstrip()
    of_file = run('tools/evaluate.py', *strided, f'--input={tmp_path}/val.txt').stdout
    assert of_file.startswith(of_split + ', ') and expected not in of_split


def test_evaluate_names_file_and_line_of_unknown_character(refused, trained, tmp_path):
    (tmp_path / 'text.txt').write_text('one line\n\nand \u2603 more\n', encoding='utf-8')
    out = f'--out_dir={trained}'
    says = (f'{tmp_path}/text.txt line 3: ', "character '\u2603' at position 4 ")
    refused('tools/evaluate.py', out, f'--input={tmp_path}/text.txt', says=says)
    path = tmp_path / 'lambada.jsonl'
    path.write_text('{"text": "a word"}\n{"text": "a \u2603"}\n', encoding='utf-8')
    task = ('tools/evaluate.py', out, '--task=lambada', f'--input={path}')
    refused(*task, says=(f"{path} line 2: character '\u2603'"))
    path.write_text('[{"text": "word"}]')
    refused(*task, says=(f'{path} item 1: ', '(char) has no <|endoftext|>'))


def test_evaluate_refuses_nonfinite_results(refused, byte_run, tmp_path):
    save_overflowing(byte_run[0], tmp_path / 'out')
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'lambada.jsonl').write_text('{"text": "a word"}\n')
    out = f'--out_dir={tmp_path}/out'
    refused('tools/evaluate.py', out, f'--input={tmp_path}/text.txt', says='the loss is nan: ')
    lambada = ('--task=lambada', f'--input={tmp_path}/lambada.jsonl')
    says = ('lambada.jsonl line 1: the log probability of an ending is nan', 'earlier checkpoint')
    refused('tools/evaluate.py', out, *lambada, says=says)


@pytest.mark.slow
def test_evaluate_batch_size_has_no_upper_limit(run, byte_run, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'lambada.jsonl').write_text('{"text": "a word"}\n{"text": "and another word"}\n')
    out = (f'--out_dir={byte_run[0]}', '--dtype=float32')
    for task in (f'--input={tmp_path}/text.txt',), (
        '--task=lambada',
        f'--input={tmp_path}/lambada.jsonl',
    ):
        expected = run('tools/evaluate.py', *out, *task).stdout
        assert run('tools/evaluate.py', *out, *task, '--batch_size=1000000000').stdout == expected


@pytest.mark.parametrize(
    'error',
    [
        "torch.OutOfMemoryError('CUDA out of memory.')",
        "RuntimeError('[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can\\'t "
        "allocate memory: you tried to allocate 4000000000000 bytes.')",
    ],
)
def test_evaluate_reports_out_of_memory(refused, byte_run, patched_env, tmp_path, error):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    command = ('tools/evaluate.py', f'--out_dir={byte_run[0]}', f'--input={tmp_path}/text.txt')
    env = patched_env(OUT_OF_MEMORY.replace('ERROR', error))
    refused(*command, env=env, says='out of memory with batch_size = 32: lower --batch_size')


def test_evaluate_reports_invalid_keys(refused, byte_run, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    command = ('tools/evaluate.py', f'--out_dir={byte_run[0]}', f'--input={tmp_path}/text.txt')
    refused(*command, '--stride=25', says='stride = 25: give at most block_size = 24')
    refused(*command, '--stride=0', says='stride = 0: give at least 1')
    refused(*command, '--task=lambada', '--stride=4', says='stride = 4 is for task = text')
    for penalty in ('1e308', '-11'):
        says = f'length_penalty = {float(penalty)}: give -10 to 10'
        refused(*command, f'--length_penalty={penalty}', says=says)
