"""Chats: finetuning on them, answering, and evaluating every turn."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch

import checkpoint as ckpt
import evaluate
from helpers import ROOT, TINY, read_documents, save_overflowing
from lib import bins


@pytest.fixture(scope='module')
def chat_run(run, prepare_pairs, tmp_path_factory):
    """(out_dir, dataset) of a briefly trained run on chats of two turns."""
    lines = [
        {
            'messages': [
                {'role': role, 'content': f'{word} {i}'}
                for word, role in (
                    ('hello', 'user'),
                    ('hi', 'assistant'),
                    ('and', 'user'),
                    ('so', 'assistant'),
                )
            ]
        }
        for i in range(60)
    ]
    data = prepare_pairs(lines, '--tokenizer=byte', '--block_size=64', name='chat_run')
    out = tmp_path_factory.mktemp('chat_run') / 'out'
    options = (
        '--block_size=64',
        '--prefix_lm',
        '--max_iters=80',
        '--optimizer=muon',
        '--muon_learning_rate=0.05',
    )
    run('train.py', f'--dataset={data}', f'--out_dir={out}', *TINY, *options)
    return out, data


@pytest.mark.slow
def test_chat_answers_with_limited_history(run, chat_run):
    out, data = chat_run
    model, tok = ckpt.load_model(out)
    assert (model.config.turns, model.config.prefix_lm, model.config.eot_token) == (
        2,
        True,
        256,
    )
    eot, texts, answers = tok.eot, ['hello 3', 'and 4', 'hello 5'], []
    for i, text in enumerate(texts):
        # only the previous turn
        history = [part for pair in list(zip(texts, answers))[max(0, i - 1) : i] for part in pair]
        ids = [eot]
        for part in [*history, text]:
            ids += [*tok.encode_ordinary(part).tolist(), eot]
        room = min(10, 64 - len(ids))
        written = model.generate([ids], room, temperature=0, stop_tokens=[eot])[0][len(ids) :]
        answers.append(tok.decode([id_ for id_ in written if id_ != eot]))
    assert all(answers)
    options = (f'--out_dir={out}', '--temperature=0', '--dtype=float32', '--max_new_tokens=10')
    shown = run('sample.py', *options, '--interactive', input='\n'.join(texts) + '\n').stdout
    assert shown == ''.join(f'{answer}\n{"-" * 15}\n' for answer in answers)
    alone = run('sample.py', *options, '--num_samples=1', f'--start={texts[0]}').stdout
    assert alone == f'{texts[0]}\n{answers[0]}\n{"-" * 15}\n'
    beams = run(
        'sample.py', *options, '--num_samples=1', '--num_beams=2', f'--start={texts[0]}'
    ).stdout
    assert beams.startswith(f'{texts[0]}\n') and '<|endoftext|>' not in beams and 'score' in beams
    too_long = run('sample.py', *options, f'--start={"x" * 70}', code=2)
    message = 'start has 72 tokens: a source and its target share block_size = 64'
    assert message in too_long.stderr


def finetune_on_chats(run, prepare_pairs, tmp_path, text, pretrain_iters, finetune_iters):
    """Pretrain on plain text and finetune on 50 chats; returns the answers to 8 new questions."""
    (tmp_path / 'text.txt').write_text(text[:60000], encoding='utf-8')
    run(
        'data/text/prepare.py',
        f'--input={tmp_path}/text.txt',
        '--vocab_size=300',
        '--dataset=before',
    )
    small = (
        '--device=cpu',
        '--n_layer=2',
        '--n_head=2',
        '--n_embd=64',
        '--position=rope',
        '--batch_size=8',
        '--eval_iters=4',
        '--gradient_accumulation_steps=1',
        '--warmup_iters=2',
        '--optimizer=muon',
        '--learning_rate=5e-3',
    )
    run(
        'train.py',
        '--dataset=before',
        f'--out_dir={tmp_path}/base',
        *small,
        '--block_size=64',
        f'--max_iters={pretrain_iters}',
    )
    rng = random.Random(0)
    words = sorted({word for word in re.findall('[a-z]{4,9}', text)})
    questions = rng.sample(words, 58)
    lines = [
        {
            'messages': [
                {'role': 'user', 'content': f'What is {word}?'},
                {'role': 'assistant', 'content': f'{word.upper()}: a word.'},
            ]
        }
        for word in questions[:50]
    ]
    data = prepare_pairs(lines, f'--init_from={tmp_path}/base', '--block_size=64', name='chats')
    assert bins.open_tokenizer(data).to_dict() == ckpt.load(tmp_path / 'base').tokenizer
    chat = (f'--max_iters={finetune_iters}', f'--out_dir={tmp_path}/chat', *small[5:])
    run('train.py', f'--init_from={tmp_path}/base', f'--dataset={data}', *chat)
    tuned = ckpt.load(tmp_path / 'chat').model_config
    # packed chats are masked from each other
    assert tuned['eot_token'] == bins.open_tokenizer(data).eot and tuned['turns'] == 1
    start = json.dumps([f'What is {word}?' for word in questions[50:]])
    shown = run(
        'sample.py',
        f'--out_dir={tmp_path}/chat',
        f'--start={start}',
        '--num_samples=1',
        '--temperature=0',
    ).stdout
    answers = [part.strip().split('\n')[-1] for part in shown.split('-' * 15)[:-1]]
    assert len(answers) == 8
    return answers


def test_chat_finetuning_keeps_tokenizer_and_masks_chats(run, prepare_pairs, tmp_path, text):
    finetune_on_chats(run, prepare_pairs, tmp_path, text, pretrain_iters=1, finetune_iters=2)


@pytest.mark.slow
def test_chat_finetuning_learns_answer_format(run, prepare_pairs, tmp_path, text):
    answers = finetune_on_chats(run, prepare_pairs, tmp_path, text, 40, 120)
    assert all(re.fullmatch(r'[A-Z]+: a word\.', answer) for answer in answers), answers


def test_chat_answer_is_independent_of_batch(run, chat_run):
    """A long prompt fills the context; a short one in the same batch can still grow."""

    model, tok = ckpt.load_model(chat_run[0])
    long, short = ('hello ' * 9).strip(), 'hello 3'
    with torch.no_grad():
        model.lm_head.weight[tok.eot] = 0  # so that it keeps generating
    for num_beams in (1, 2):
        options = [
            SimpleNamespace(batch_size=size, num_beams=num_beams, length_penalty=0.6)
            for size in (1, 2, 3)
        ]
        turns = [([short], ''), ([long], ''), ([long[1:]], '')]
        alone, *together = [evaluate.write_answers(model, tok, turns, option) for option in options]
        assert all(answers == alone for answers in together) and len(alone[0]) > 30 > len(alone[1])
    sample = ('sample.py', f'--out_dir={chat_run[0]}', '--num_samples=1', '--temperature=0')
    plain = [run(*sample, f'--start={start}').stdout for start in (short, long)]
    assert run(*sample, f'--start={json.dumps([short, long])}').stdout == ''.join(plain)


def test_evaluate_reads_every_turn_of_a_chat(chat_run):
    split = bins.open_dataset(chat_run[1], 64).val
    expected = []
    for _, (a, b, c, d) in read_documents(chat_run[1], 'val'):
        expected += [([a], b), ([a, b, c], d)]
    assert evaluate.read_turns(split, bins.open_tokenizer(chat_run[1])) == expected
    assert len(expected) > 2


@pytest.mark.slow
def test_evaluate_pairs_refuses_nonfinite_logits_and_stride(refused, chat_run, tmp_path):
    save_overflowing(chat_run[0], tmp_path / 'out')
    for num_beams in (1, 2):
        command = ('tools/evaluate.py', f'--out_dir={tmp_path}/out', f'--num_beams={num_beams}')
        refused(*command, says=('the logits are not finite', '--dtype=float32'))
    out = ('tools/evaluate.py', f'--out_dir={chat_run[0]}', '--stride=4')
    for task in ('auto', 'text'):
        refused(*out, f'--task={task}', says='stride = 4 is for plain text')


@pytest.mark.slow
def test_prefix_lm_mismatch_is_reported(run, refused, chat_run, tmp_path):
    tuned = (
        'train.py',
        f'--init_from={chat_run[0]}',
        f'--out_dir={tmp_path}/out',
        '--max_iters=1',
        '--device=cpu',
    )
    run(
        'data/text/prepare.py',
        f'--input={ROOT}/model.py',
        f'--init_from={chat_run[0]}',
        '--dataset=plain',
    )
    resume = ('train.py', '--init_from=resume', f'--out_dir={chat_run[0]}')
    refused(*resume, '--prefix_lm=False', says=('prefix_lm = False', 'leave it out'))
    refused(*tuned, '--dataset=plain', says=('prefix_lm = True', 'give --prefix_lm=False'))
    run(
        *tuned,
        '--dataset=plain',
        '--prefix_lm=False',
        '--eval_iters=1',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
    )
    assert not ckpt.load(tmp_path / 'out').model_config['prefix_lm']
    assert 'parameters' in run('tools/plan.py', 'config/scan.py', '--gpus=1').stdout
