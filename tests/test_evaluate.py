"""tools/evaluate.py, against transformers without cache or batching, and against train.py."""

import json
import math
import re

import pytest
import tokenizers as hf
import torch
import transformers

import checkpoint as ckpt
import evaluate


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory, text):
    """(folder in Hugging Face's format, transformers model, its tokenizer) of a tiny GPT-2."""
    folder = tmp_path_factory.mktemp('gpt2')
    tok = hf.Tokenizer(hf.models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        hf.decoders.ByteLevel(),
    )
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [text],
        hf.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet),
    )
    tok.add_special_tokens(['<|endoftext|>'])
    (folder / 'vocab.json').write_text(json.dumps(tok.get_vocab()))
    torch.manual_seed(0)
    size = {
        'n_layer': 2,
        'n_head': 2,
        'n_embd': 32,
        'n_positions': 64,
        'vocab_size': tok.get_vocab_size(),
    }
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    )
    model.eval().save_pretrained(folder)
    return folder, model, tok


@torch.no_grad()
def log_p(model, context, ending):
    """Log probability of each token of an ending, from one forward pass."""
    logp = model(torch.tensor([(context + ending)[:-1]])).logits[0].log_softmax(dim=-1)
    return [logp[len(context) + i - 1, token].item() for i, token in enumerate(ending)]


def test_evaluate_scores_endings_like_transformers(gpt2):
    folder, theirs, _ = gpt2
    ours = ckpt.load(folder).build_model(dropout=0.0).eval()
    size = theirs.config.vocab_size
    contexts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    with torch.no_grad():
        greedy = theirs.generate(
            torch.tensor([contexts[2]]),
            attention_mask=torch.ones(1, 3),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 3:].tolist()
    endings = [[[1], [2, 3, 4, 5, 6]], [[7, 8]], [greedy, greedy[:2], [*greedy[:3], greedy[3] + 1]]]
    logp, same = evaluate.score(ours, contexts, endings, 395, torch.device('cpu'))
    assert same.tolist() == [False, False, False, True, True, False]
    expected = [(context, ending) for context, some in zip(contexts, endings) for ending in some]
    for row, (context, ending) in zip(logp.tolist(), expected):
        # over the first 395 ids only
        full = theirs(torch.tensor([context + ending])).logits[0, :, :395].log_softmax(dim=-1)
        plain = [full[len(context) + i - 1, token].item() for i, token in enumerate(ending)]
        assert row == pytest.approx(plain + [0.0] * (len(row) - len(ending)), abs=1e-4)
    (first, _), _ = evaluate.score(
        ours, [list(range(62)), [5]], [[[1]], [list(range(20))]], size, torch.device('cpu')
    )
    # the whole context is used
    assert first[0].item() == pytest.approx(log_p(theirs, list(range(62)), [1])[0], abs=1e-4)
    long = list(range(100))  # longer than the context, so only its end is used
    (row,), _ = evaluate.score(ours, [long], [[[1, 2, 3]]], size, torch.device('cpu'))
    assert row.tolist() == pytest.approx(log_p(theirs, long[-62:], [1, 2, 3]), abs=1e-4)


def test_evaluate_lambada_and_hellaswag_match_transformers(run, gpt2, tmp_path):
    folder, model, tok = gpt2
    passages = [
        'the loss of a model is the mean',
        'def main(config, given): return 0',
        'A killed run goes on from its save',
    ]
    (tmp_path / 'lambada.jsonl').write_text(
        ''.join(json.dumps({'text': text}) + '\n' for text in passages)
    )
    nats = -sum(
        sum(
            log_p(
                model,
                tok.encode(text.rpartition(' ')[0]).ids,
                tok.encode(' ' + text.rpartition(' ')[2]).ids,
            )
        )
        for text in passages
    )
    common = (f'--init_from={folder}', '--dtype=float32')
    output = run(
        'tools/evaluate.py',
        *common,
        '--task=lambada',
        f'--input={tmp_path}/lambada.jsonl',
        '--batch_size=2',
    ).stdout
    perplexity = re.search(r'3 passages: accuracy 0.00%, perplexity ([\d.]+)', output)[1]
    assert float(perplexity) == pytest.approx(math.exp(nats / 3), rel=1e-4)

    examples = [
        {
            'activity_label': 'Training',
            'ctx_a': f'A model [title] reads {a}.',
            'ctx_b': 'then it',
            'label': i % 4,
            'endings': [
                'writes [x] text.',
                'stops',
                'goes on with the next batch of tokens.',
                f'saves {a}',
            ],
        }
        for i, a in enumerate(
            ('a book', 'the data', 'tokens', 'its config', 'files', 'the whole of the val split')
        )
    ]
    (tmp_path / 'hellaswag.jsonl').write_text(
        ''.join(json.dumps(example) + '\n' for example in examples)
    )
    right = by_length = 0
    for a, example in zip(
        ('a book', 'the data', 'tokens', 'its config', 'files', 'the whole of the val split'),
        examples,
    ):
        context = tok.encode(f'Training: A model. reads {a}. Then it').ids
        endings = ['writes text.', 'stops', 'goes on with the next batch of tokens.', f'saves {a}']
        sums = [sum(log_p(model, context, tok.encode(' ' + ending).ids)) for ending in endings]
        right += max(range(4), key=sums.__getitem__) == example['label']
        by_length += max(range(4), key=lambda i: sums[i] / len(endings[i])) == example['label']
    output = run(
        'tools/evaluate.py',
        *common,
        '--task=hellaswag',
        f'--input={tmp_path}/hellaswag.jsonl',
        '--batch_size=4',
    ).stdout
    assert f'6 contexts: accuracy {right / 6:.2%}' in output
    assert f'accuracy {right / 6:.2%}, normalized by length {by_length / 6:.2%}' in output


def test_evaluate_loss_matches_train(run, trained, char_data, text, tmp_path):
    out = (f'--out_dir={trained}', '--device=cpu', '--dtype=float32')
    printed = run('train.py', '--init_from=resume', '--eval_only', '--eval_iters=-1', *out).stdout
    loss, perplexity, bits = re.search(
        r'val loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte', printed
    ).groups()
    expected = f'loss {loss}, perplexity {perplexity}, {bits} bits per byte'
    assert expected in run('tools/evaluate.py', *out).stdout
    characters = ckpt.load(trained).get_tokenizer()
    n_train = len(text.encode()) * 9 // 10
    # the validation split of the text
    (tmp_path / 'val.txt').write_text(text.encode()[n_train:].decode(), encoding='utf-8')
    assert characters.encode(text)
    assert expected in run('tools/evaluate.py', *out, f'--input={tmp_path}/val.txt').stdout


def test_evaluate_hellaswag_accepts_huggingface_labels(run, refused, gpt2, tmp_path):
    example = {
        'activity_label': 'A',
        'ctx_a': 'b',
        'ctx_b': 'c',
        'endings': ['d', 'e'],
        'label': '1',
    }
    command = (
        'tools/evaluate.py',
        f'--init_from={gpt2[0]}',
        '--task=hellaswag',
        f'--input={tmp_path}/x.jsonl',
    )
    for label, says in (('1', None), ('', 'take hellaswag_val.jsonl'), (2, 'label = ')):
        (tmp_path / 'x.jsonl').write_text(json.dumps(example | {'label': label}) + '\n')
        if says:
            refused(*command, says=says)
        else:
            assert '1 contexts' in run(*command).stdout
    (tmp_path / 'x.jsonl').write_bytes(json.dumps(example).encode()[:-1] + b', "x": "\xe9"}\n')
    refused(*command, says='line 1: not JSON')


@pytest.mark.parametrize(
    'line, says',
    [
        ('{', 'line 1: not JSON'),
        ('{"text": "a \\ud83d b"}', 'line 1: not JSON'),
        ('{"text": 3}', "line 1: 'text' must be a str"),
        ('', 'there are no examples'),
        ('{"text": "word"}', 'line 1: there is no last word'),
    ],
)
def test_evaluate_reports_malformed_input(refused, gpt2, tmp_path, line, says):
    (tmp_path / 'x.jsonl').write_text(line + '\n')
    refused(
        'tools/evaluate.py',
        f'--init_from={gpt2[0]}',
        '--task=lambada',
        f'--input={tmp_path}/x.jsonl',
        says=says,
    )
