"""Pairs of source and target: packing, splits, loss masks, and the errors for bad input."""

import json
from collections import Counter

import pytest
import torch

from helpers import TINY, random_pairs, read_documents
from lib import bins
from model import GPT, GPTConfig


@pytest.mark.parametrize('kind', ['bpe', 'char', 'byte'])
@pytest.mark.parametrize('packing', [True, False])
def test_pairs_round_trip_with_disjoint_splits(prepare_pairs, kind, packing):
    pairs = random_pairs(80)
    # some lines have a third column
    lines = [(*pair, 'licence')[: 2 + i % 2] for i, pair in enumerate(pairs)]
    options = ('--vocab_size=300', '--block_size=160', f'--packing={packing}', '--val_fraction=0.2')
    data = prepare_pairs(lines, f'--tokenizer={kind}', *options)
    train, val = read_documents(data, 'train'), read_documents(data, 'val')
    assert Counter((source, target) for _, (source, target) in train + val) == Counter(pairs)
    assert not {source for _, (source, _) in train} & {source for _, (source, _) in val}
    assert 0.05 * len(pairs) < len(val) < 0.4 * len(pairs)
    in_a_row = Counter(row for row, _ in train).values()
    meta = json.loads((data / 'meta.json').read_text())
    if packing:  # little padding
        n_ids = sum(
            len(bins.open_tokenizer(data).encode_ordinary(text))
            for _, pair in train
            for text in pair
        ) + 3 * len(train)
        assert n_ids > 0.85 * meta['train_tokens'] and max(in_a_row) > 1
    else:
        assert set(in_a_row) == {1} and meta['train_tokens'] == 160 * len(train)


def test_pairs_keep_split_when_file_grows(prepare_pairs):
    pairs = random_pairs(150)
    small = prepare_pairs(pairs[:80], '--tokenizer=byte', '--block_size=256', '--val_fraction=0.3')
    before = {source for _, (source, _) in read_documents(small, 'val')}
    large = prepare_pairs(pairs, '--tokenizer=byte', '--block_size=256', '--val_fraction=0.3')
    assert before == {source for _, (source, _) in read_documents(large, 'val')} & {
        source for source, _ in pairs[:80]
    }


@pytest.mark.parametrize('mask_prompt', [True, False])
@pytest.mark.parametrize('packing', [True, False])
def test_pairs_loss_covers_only_targets(prepare_pairs, packing, mask_prompt):
    pairs = random_pairs(40)
    folder = prepare_pairs(
        pairs,
        '--tokenizer=byte',
        '--block_size=192',
        f'--packing={packing}',
        f'--mask_prompt={mask_prompt}',
    )
    data = bins.open_dataset(folder, 192)
    x, y = data.train.batch(0, data.train.n_windows, seed=1)
    learned = Counter()
    for ids, next_tokens in zip(x.tolist(), y.tolist()):
        assert all(b in (-1, a) for a, b in zip(ids[1:], next_tokens))
        assert next_tokens[-1] == -1
        learned.update(token for token in next_tokens if token >= 0)
    # targets with their eot, and without mask_prompt also sources with theirs
    expected = Counter()
    for _, (source, target) in read_documents(folder, 'train'):
        expected.update(
            [*target.encode(), 256] + ([*source.encode(), 256] if not mask_prompt else [])
        )
    assert learned == expected
    assert data.train.count_targets(0, len(x), seed=1) == sum(expected.values())

    model = GPT(GPTConfig(block_size=192, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    logits, loss = model(torch.tensor(x), torch.tensor(y))
    logits.retain_grad()
    loss.backward()
    assert (logits.grad[torch.tensor(y) < 0] == 0).all()
    assert (logits.grad[torch.tensor(y) >= 0].abs().sum(dim=-1) > 0).all()


def test_pairs_packing_preserves_loss(prepare_pairs):
    pairs = random_pairs(30)
    options = ('--tokenizer=byte', '--block_size=256')
    folders = [
        prepare_pairs(pairs, *options, f'--packing={p}', name=f'packed-{p}') for p in (True, False)
    ]
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=256,
            vocab_size=257,
            n_layer=2,
            n_head=2,
            n_embd=16,
            position='none',
            ngram=3,
            ngram_rows=97,
            eot_token=256,
            turns=1,
            prefix_lm=True,
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sums = []
    for folder in folders:
        split = bins.open_dataset(folder, 256).train
        x, y = (torch.tensor(part) for part in split.windows(range(split.n_windows)))
        sums.append(model(x, y)[1].item() * (y >= 0).sum().item())
    assert len(x) == len(read_documents(folders[1], 'train'))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_pairs_accept_windows_line_endings_and_bom(prepare_pairs, run, clone):
    pairs = random_pairs(30)
    plain = prepare_pairs(pairs, '--tokenizer=char', '--block_size=256')
    expected = [read_documents(plain, split) for split in ('train', 'val')]
    text = '\r\n'.join(f' {source}\t{target} ' for source, target in pairs)
    (clone / 'windows.tsv').write_bytes(b'\xef\xbb\xbf' + text.encode() + b'\r\n\r\n')
    run(
        'data/pairs/prepare.py',
        '--input=windows.tsv',
        '--dataset=windows',
        '--tokenizer=char',
        '--block_size=256',
    )
    assert [
        read_documents(clone / 'data' / 'windows', split) for split in ('train', 'val')
    ] == expected


def test_pairs_report_and_drop_overlong_pairs(prepare_pairs):
    pairs = random_pairs(20)
    pairs[3] = ('x' * 100, 'y')
    pairs[11] = ('x', 'y' * 90)
    data = prepare_pairs(pairs, '--tokenizer=byte', '--block_size=90')
    output = prepare_pairs.result.stdout
    message = '2 longer than block_size = 90 left out (line 4, line 12); --block_size=104 keeps all'
    assert message in output
    kept = [tuple(pair) for split in ('train', 'val') for _, pair in read_documents(data, split)]
    assert Counter(kept) == Counter(pair for i, pair in enumerate(pairs) if i not in (3, 11))


@pytest.mark.slow
def test_pairs_report_user_errors(refused, run, prepare_pairs, char_data, trained, clone, tmp_path):
    data = prepare_pairs(random_pairs(20), '--tokenizer=byte', '--block_size=100')
    train = ('train.py', f'--out_dir={tmp_path}/out', *TINY)
    refused(
        *train,
        f'--dataset={data}',
        says=('block_size = 32: the rows of', 'have 100 tokens', '--block_size=100'),
    )
    refused(
        *train,
        f'--dataset={data}',
        '--block_size=128',
        says=('block_size = 128', 'have 100 tokens: give --block_size=100'),
    )
    fits = (f'--dataset={data}', '--block_size=100')
    refused(*train, *fits, '--doc_mask=False', says=('doc_mask = False', '--packing=False'))
    refused(
        *train,
        f'--dataset={char_data}',
        '--prefix_lm',
        says=('prefix_lm = True', 'has no sources and targets'),
    )
    refused(
        'tools/compare_rnn.py',
        f'--dataset={data}',
        f'--out_dir={tmp_path}/out',
        says='has sources and targets',
    )
    refused(
        'tools/evaluate.py',
        f'--out_dir={trained}',
        '--task=pairs',
        says='was trained on plain text',
    )
    refused(
        'tools/evaluate.py',
        f'--out_dir={trained}',
        '--task=lambada',
        says='name its file with --input=PATH',
    )
    refused('data/pairs/prepare.py', says='name your pairs')
    refused(
        'data/pairs/prepare.py', '--input=nowhere', says='--input=nowhere: there is no such file'
    )
    assert not (tmp_path / 'out').exists()


def test_pairs_reject_tokenizer_without_eot(refused, trained, tmp_path):
    (tmp_path / 'a.tsv').write_text('a\tb\n')
    refused(
        'data/pairs/prepare.py',
        f'--input={tmp_path}/a.tsv',
        f'--init_from={trained}',
        says=('(char) has no <|endoftext|>'),
    )
