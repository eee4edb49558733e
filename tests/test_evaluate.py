"""tools/evaluate.py: LAMBADA and HellaSwag, against the rules of lm-evaluation-harness."""

import itertools
import json
import math
import re
from types import SimpleNamespace

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
def harness(model, tok, context, ending):
    """(log p of an ending, whether it is the greedy one) by the rules of lm-evaluation-harness
    0.4.13 (TemplateLM._encode_pair and HFLM._loglikelihood_tokens): one item at a time, no cache.
    """
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        context, ending = context[:-n_spaces], context[-n_spaces:] + ending
    whole, ids = tok.encode(context + ending).ids, tok.encode(context).ids
    ending_ids = whole[len(ids) :]
    if not ids:
        ids = [tok.token_to_id('<|endoftext|>')]
    size = model.config.n_positions
    inputs = (ids + ending_ids)[-(size + 1) :][:-1]
    logits = model(torch.tensor([inputs])).logits[0, -len(ending_ids) :]
    logp = logits.log_softmax(dim=-1)[range(len(ending_ids)), ending_ids]
    return logp.sum().item(), logits.argmax(dim=-1).tolist() == ending_ids


def greedy_ending(model, tok, context, n):
    """The text of n greedy tokens."""
    ids = tok.encode(context).ids
    options = {'max_new_tokens': n, 'do_sample': False, 'eos_token_id': None, 'pad_token_id': 0}
    mask = torch.ones(1, len(ids))
    new = model.generate(torch.tensor([ids]), attention_mask=mask, **options)[0, len(ids) :]
    return tok.decode(new.tolist())


@pytest.mark.parametrize('batch_size', [1, 3, 100])
def test_evaluate_scores_endings_like_lm_evaluation_harness(gpt2, batch_size):
    folder, theirs, tok = gpt2
    ours, tokenizer = ckpt.load_model(folder)
    words = ' the loss of a model is the mean of the losses of its tokens'
    endings = [' a', ' model.generate(idx)', ' naïve 日本 😀', ' ', ' the loss\n', 'x']
    items = [
        # white space between a context and an ending
        *((f'def main({space}', endings) for space in ('', ' ', '  ', '\n', '\n\t', '\u00a0')),
        ('日本<|endoftext|>', endings),
        ('', endings),
        # each ending keeps as much of the context as fits
        (words * 20, [' a', words, words * 2, endings[2]]),
        (words * 20 + ' ', [' a', words]),
        (words, [' a', words * 2]),
    ]
    for context in ('the loss', 'return', 'import torch', 'def main', 'x = 1', words * 20):
        context = tok.decode(tok.encode(context).ids[-40:])
        items.append((context, [greedy_ending(theirs, tok, context, n) for n in (1, 2, 3)]))
    examples = [evaluate.Example('here', context, endings) for context, endings in items]
    config = SimpleNamespace(batch_size=batch_size)
    results = evaluate.score_examples(ours, tokenizer, examples, config, torch.device('cpu'))
    n_greedy = 0
    for (context, endings), (logp, greedy) in zip(items, results):
        expected = [harness(theirs, tok, context, ending) for ending in endings]
        assert logp.tolist() == pytest.approx([total for total, _ in expected], abs=1e-3)
        assert greedy.tolist() == [is_greedy for _, is_greedy in expected]
        n_greedy += sum(greedy.tolist())
    assert n_greedy >= 1


def write_lines(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_evaluate_lambada_matches_lm_evaluation_harness(run, gpt2, tmp_path):
    folder, model, tok = gpt2
    greedy = 'the loss' + greedy_ending(model, tok, 'the loss', 1)
    passages = [
        'the loss of a model is the mean',
        'A killed run goes on from its save\n',
        'spaces  before the  last',
        'and after it ',
        'word',
        ' word',
        'def main(config, given): ' * 20,
        greedy,
    ]
    write_lines(tmp_path / 'lambada.jsonl', [{'text': text} for text in passages])
    # lambada_openai.yaml
    expected = [
        harness(model, tok, ' '.join(text.split(' ')[:-1]), ' ' + text.split(' ')[-1])
        for text in passages
    ]
    nats = -sum(logp for logp, _ in expected) / len(passages)
    accuracy = sum(is_greedy for _, is_greedy in expected) / len(passages)
    options = (f'--init_from={folder}', '--dtype=float32', '--task=lambada', '--batch_size=2')
    output = run('tools/evaluate.py', *options, f'--input={tmp_path}/lambada.jsonl').stdout
    accuracies = f'8 passages: accuracy {accuracy:.2%}, perplexity '
    assert accuracies in output
    perplexity = float(output.partition(accuracies)[2])
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-4)


def preprocess(text):
    """lm-evaluation-harness 0.4.13, tasks/hellaswag/utils.py"""
    text = text.strip()
    text = text.replace(' [title]', '. ')
    text = re.sub('\\[.*?\\]', '', text)
    return text.replace('  ', ' ')


def test_evaluate_hellaswag_matches_lm_evaluation_harness(run, gpt2, tmp_path):
    folder, model, tok = gpt2
    examples = [
        {
            'activity_label': 'Training',
            'ctx_a': f'A model [title] reads {a}.',
            'ctx_b': b,
            'endings': [
                'writes [x] text.',
                '[step] stops',
                'goes on with the next batch of tokens, and then with the one after it.',
                f'saves {a[:9]}',
            ],
        }
        for a, b in itertools.product(
            ('a book', 'tokens', 'files ' * 30, 'words ' * 40, 'the val split ' * 9),
            ('then it', 'it [title]', ''),
        )
    ]
    by_length = 0
    for example in examples:
        context = example['ctx_a'] + ' ' + example['ctx_b'].capitalize()
        query = preprocess(example['activity_label'] + ': ' + context)
        choices = [preprocess(ending) for ending in example['endings']]
        sums = [harness(model, tok, query, f' {choice}')[0] for choice in choices]
        example['label'] = max(range(4), key=sums.__getitem__)
        by_length += max(range(4), key=lambda i: sums[i] / len(choices[i])) == example['label']
    write_lines(tmp_path / 'hellaswag.jsonl', examples)
    options = (f'--init_from={folder}', '--dtype=float32', '--task=hellaswag', '--batch_size=4')
    output = run('tools/evaluate.py', *options, f'--input={tmp_path}/hellaswag.jsonl').stdout
    accuracies = f'accuracy 100.00%, normalized by length {by_length / 15:.2%}'
    assert f'15 contexts: {accuracies}' in output


@pytest.mark.slow
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
    refused(*command, says='is not UTF-8 text')


@pytest.mark.parametrize(
    'line, says',
    [
        ('{', 'line 1: not JSON'),
        ('{"text": "a \\ud83d b"}', 'line 1: not JSON'),
        ('{"text": 3}', "line 1: 'text' must be a str"),
        ('', 'there are no examples'),
        ('[]', 'there are no examples'),
        ('[{"text": "a b"}, {"text": 3}]', "item 2: 'text' must be a str"),
        ('{"text": " "}', "line 1: there is no word in ' '"),
        ('{"text": "a b' + 'xyz' * 50 + '"}', 'more than block_size = 64'),
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
