"""Text as it is found: line ends, byte order marks, separators, compressed files, piece sizes."""

import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tiktoken

from helpers import ROOT, error_line, write_nanogpt_dataset
from lib import bins, tokenizer
from lib import text as texts
from lib.bpe import train_bpe
from lib.errors import UserError

END = '<|endoftext|>'
ODD_TEXTS = [
    "It's two  spaces,\n\n\nthree lines \t tabs 12345 don't  we'll \n x",
    '日本語、テキスト。 naïve café 🙂👨‍👩‍👧 ' * 5,
    'no-blank-at-all' * 30,
    ' leading and trailing ',
    'a\u00a0b\u2003c\x1cd\x0be \r f\u3000g h',
    f'one.{END}two {END} three\n{END}\n{END}{END}',
    '   \n \n\t\n   x   \n',
    'x',
]


@pytest.fixture(scope='module')
def bpe(text):
    return train_bpe([text], 500)


@pytest.fixture(scope='module')
def openai(bpe):
    """The same tokenizer in tiktoken itself."""
    ranks = {token: i for i, token in enumerate(bpe.tokens)}
    return tiktoken.Encoding(
        'x', pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens={END: bpe.eot}
    )


@pytest.fixture
def prepare(run, clone):
    """prepare(path, '--key=value', ...) returns the ids of both splits and the tokenizer."""

    def prepare(path, *arguments, **options):
        command = ('data/text/prepare.py', f'--input={path}', '--dataset=texts')
        prepare.result = run(*command, *arguments, **options)
        folder = clone / 'data' / 'texts'
        ids = [np.fromfile(folder / f'{split}.bin', '<u2').tolist() for split in ('train', 'val')]
        return ids[0] + ids[1], bins.open_tokenizer(folder)

    return prepare


def odd_texts(seed, n):
    """Random texts of characters at which a pre-tokenizer decides."""
    rng = random.Random(seed)
    atoms = [*"ab1.,'é日🙂", ' ', ' ', '  ', '\n', '\t', "'s", "'ll", '\u00a0', END, '<']
    atoms.append('<|end')  # the beginning of a separator
    return [''.join(rng.choices(atoms, k=rng.randint(1, 80))) for _ in range(n)]


def test_tokens_of_pieces_equal_those_of_the_whole_text(tmp_path, bpe, openai):
    """For any piece size, against tiktoken on the whole text."""
    path, n = tmp_path / 'x.txt', 0
    for content in ODD_TEXTS + odd_texts(seed=1, n=150):
        with open(path, 'w', encoding='utf-8', newline='') as file:
            file.write(content)
        whole = content.replace('\r\n', '\n').replace('\r', '\n')
        expected = openai.encode(whole, allowed_special='all')
        for size in (1, 2, 3, 5, 7, 16, 64, 2**20):
            pieces = list(texts.read_pieces(path, size))
            assert ''.join(pieces) == whole
            ids = [id_ for piece in pieces for id_ in bpe.encode(piece)]
            assert ids == expected, (content, size)
            byte = tokenizer.ByteTokenizer(end_of_text=True)
            pieces = texts.read_pieces(path, size, cuts_anywhere=True)
            assert [i for piece in pieces for i in byte.encode(piece)] == byte.encode(whole)
            n += 1
    print(f'{n} texts and piece sizes')


def test_bpe_training_does_not_depend_on_pieces(tmp_path, text):
    (tmp_path / 'x.txt').write_text(text)
    for limit in (10**9, 20_000):
        whole = train_bpe([text], 400, max_characters=limit).token_bytes
        for size in (100, 1000):
            pieces = list(texts.read_pieces(tmp_path / 'x.txt', size))
            assert len(pieces) > 10
            assert train_bpe(pieces, 400, max_characters=limit).token_bytes == whole


def test_split_does_not_cut_through_a_separator():
    content = 'a' * 85 + END + 'b' * 5
    pieces = list(texts.split_at_end([(content, False)], len(content)))
    assert [(p.split, p.text) for p in pieces] == [('train', 'a' * 85 + END), ('val', 'b' * 5)]


def test_splits_together_have_the_tokens_of_the_whole_text(bpe, text, openai):
    """The boundary of the splits is not within a word."""
    rng = random.Random(0)
    for content in [text[:3000], *ODD_TEXTS, *odd_texts(seed=2, n=50)]:
        expected = openai.encode(content, allowed_special='all')
        for share in [rng.uniform(0.05, 0.95) for _ in range(8)]:
            size = len(content.encode())
            pieces = texts.split_at_end([(content, False)], size, share, cuts_anywhere=False)
            ids = [id_ for piece in pieces for id_ in bpe.encode(piece.text)]
            assert ids == expected, (content[:80], share)


def test_prepare_does_not_cut_a_word_in_two(prepare, tmp_path, text):
    (tmp_path / 'x.txt').write_text(text[:30_000], encoding='utf-8')
    for share in (0.1, 0.11, 0.12, 0.13):
        arguments = ('--tokenizer=bpe', '--vocab_size=500', f'--val_fraction={share}')
        ids, tok = prepare(tmp_path / 'x.txt', *arguments)
        assert ids == tok.encode(text[:30_000])


@pytest.mark.parametrize('kind', ['gpt2-like', 'char', 'byte', 'bpe'])
def test_end_of_text_separates_documents_in_data_and_prompts(prepare, tmp_path, kind, bpe, trained):
    content = f'one cat.\n{END}\ntwo dogs.\n{END}\n' * 30
    (tmp_path / 'x.txt').write_text(content)
    options = [f'--tokenizer={kind}', '--vocab_size=265']
    if kind == 'gpt2-like':  # a tokenizer that is not made from this text
        write_huggingface(tmp_path / 'hf', {t: i for i, t in enumerate([END, *printable()])})
        options = [f'--init_from={tmp_path / "hf"}']
    ids, tok = prepare(tmp_path / 'x.txt', *options)
    assert ids.count(tok.eot) == 60 and tok.decode(ids) == content
    assert ids == tok.encode(content)  # as a prompt or an evaluation is encoded
    assert f'60 {END}' in prepare.result.stdout
    characters = [c for c in getattr(tok, 'characters', '')]
    assert '|' not in characters
    if kind != 'gpt2-like':
        ids, tok = prepare(tmp_path / 'x.txt', *options, '--special_tokens=False')
        assert tok.eot not in ids and tok.decode(ids) == content


def printable():
    return [chr(b) if 33 <= b <= 126 else c for c, b in tokenizer.printable_bytes().items()]


def write_huggingface(folder, vocab):
    """A tiny GPT-2 of transformers with this vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=max(vocab.values()) + 1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / 'vocab.json').write_text(json.dumps(vocab))


@pytest.mark.slow
@pytest.mark.parametrize('encoding', ['crlf', 'bom+crlf', 'gz'])
def test_line_ends_and_byte_order_marks_do_not_change_a_text(
    run, prepare, tmp_path, encoding, trained, clone
):
    """Data, prompts, config files, pairs and evaluations read the same text."""
    content = 'to be or not\nto be\n\n' * 30

    def write(name, content):
        ending = {'crlf': '\r\n', 'bom+crlf': '\r\n', 'cr': '\r'}.get(encoding, '\n')
        data = content.replace('\n', ending).encode('utf-8-sig' if 'bom' in encoding else 'utf-8')
        path = tmp_path / (f'{name}.gz' if encoding == 'gz' else name)
        path.write_bytes(gzip.compress(data) if encoding == 'gz' else data)
        return path

    ids, tok = prepare(write('x.txt', content), '--tokenizer=char')
    assert tok.decode(ids) == content and tok.characters == ''.join(sorted(set(content)))
    prompt = write('prompt.txt', 'def x(\n')
    shown = run('sample.py', f'--out_dir={trained}', '--device=cpu', f'--start=FILE:{prompt}',
                '--max_new_tokens=1', '--num_samples=1').stdout  # fmt: skip
    assert shown.startswith('def x(\n')
    if encoding != 'gz':
        config = write('c.py', 'max_new_tokens = 2\nnum_samples = 1\n')
        assert '2 tokens' in run('sample.py', config, f'--out_dir={trained}').stderr
    pairs = write('p.tsv', ''.join(f'{i} ab\tcd {i}\n' for i in range(60)))
    run('data/pairs/prepare.py', f'--input={pairs}', '--tokenizer=char', '--dataset=crlf')
    assert bins.open_tokenizer(clone / 'data' / 'crlf').characters == ' 0123456789abcd'
    evaluated = write('e.txt', 'def main(config):\n    return 1\n' * 9)
    result = run('tools/evaluate.py', f'--init_from={trained}', f'--input={evaluated}')
    plain = tmp_path / 'plain.txt'
    plain.write_text('def main(config):\n    return 1\n' * 9)
    assert result.stdout == run('tools/evaluate.py', f'--init_from={trained}',
                                f'--input={plain}').stdout  # fmt: skip


def test_prepare_reads_pipes_links_and_compressed_files(prepare, tmp_path, clone, refused):
    content = 'to be or not to be\n' * 50
    plain = tmp_path / 'x.txt'
    plain.write_text(content)
    for path in ('-', '/dev/stdin'):
        with open(plain) as stdin:
            assert prepare(path, '--tokenizer=char', stdin=stdin)[0]
    fifo = tmp_path / 'fifo'
    os.mkfifo(fifo)
    writer = subprocess.Popen(['sh', '-c', f'cat {plain} > {fifo}'])
    ids, tok = prepare(fifo, '--tokenizer=char')
    assert tok.decode(ids) == content and writer.wait() == 0
    # a folder with a link to another folder, a link to itself, and a compressed file
    folder, other = tmp_path / 'folder', tmp_path / 'other'
    folder.mkdir(), other.mkdir()
    (other / 'a.txt').write_text(content)
    (folder / 'b.txt.gz').write_bytes(gzip.compress(content.encode()))
    (folder / 'link').symlink_to(other)
    (folder / 'loop').symlink_to(folder)
    (other / '.hidden').mkdir()
    (other / '.hidden' / 'c.txt').write_text('x')
    ids, tok = prepare(folder, '--tokenizer=char')
    assert tok.decode(ids) == 2 * content
    # more links to the same: each text counts once, or the training split would have the other's
    (folder / 'again').symlink_to(other)
    (folder / 'd.txt').symlink_to(other / 'a.txt')
    (folder / 'z.txt.gz').symlink_to(folder / 'b.txt.gz')
    (folder / 'shown').symlink_to(other / '.hidden')
    ids, tok = prepare(folder, '--tokenizer=char')
    assert sorted(tok.decode(ids)) == sorted(2 * content + 'x')
    (tmp_path / 'cut.gz').write_bytes(gzip.compress(content.encode())[:-9])
    refused('data/text/prepare.py', f'--input={tmp_path / "cut.gz"}', says='damaged')


def test_words_without_end_are_cut_so_that_time_and_memory_stay_bounded(tmp_path, monkeypatch):
    """A text without blanks was one piece, looked at again for each megabyte."""
    monkeypatch.setattr(texts, 'LONGEST_WORD', 1000)
    for unit in ('a', 'ACGT', ' ', '日本', f'abc{END}'):
        content = 'one two ' + (unit * 5000)[:20_000] + ' three'
        (tmp_path / 'x.txt').write_text(content, encoding='utf-8')
        pieces = list(texts.read_pieces(tmp_path / 'x.txt', 100))
        assert ''.join(pieces) == content and max(map(len, pieces)) < 1100 + len(END)
        assert sum(piece.count(END) for piece in pieces) == content.count(END)


def test_a_text_of_one_word_has_two_splits():
    for unit in ('a', 'ACGT', ' ', '日本'):
        content = unit * 9000
        size = len(content.encode())
        pieces = texts.split_at_end([(content, False)], size, cuts_anywhere=False)
        train, val = (piece.text for piece in pieces)
        assert train + val == content and len(train) == 0.9 * len(content)


def test_a_million_blanks_are_refused_in_a_sentence(bpe):
    with pytest.raises(UserError, match='million blanks in a row'):
        bpe.encode(' ' * 1_100_000 + 'x')


@pytest.mark.slow
def test_bpe_of_text_without_blanks_takes_seconds():
    """A megabyte without blanks took half an hour."""
    dna = ''.join(random.Random(0).choices('ACGT', k=300_000))
    code = 'import sys; from lib.bpe import train_bpe; train_bpe([sys.stdin.read()], 2048)'
    subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, input=dna, text=True, timeout=600, check=True
    )


@pytest.mark.slow
def test_ids_without_names_are_trained_on(run, clone, tmp_path):
    """nanoGPT's bins with a meta.pkl that has no text for its ids, or names of several letters."""
    import pickle

    write_nanogpt_dataset(tmp_path, 'abcdefgh' * 400)
    for meta, shown in (
        ({'vocab_size': 8}, {str(i) for i in range(8)}),
        ({'vocab_size': 8, 'itos': {i: f'<{i}>' for i in range(8)}}, None),
        ({'vocab_size': 8, 'itos': {0: 'one', 1: 'two'}}, None),
    ):
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
        out_dir = tmp_path / f'out{len(str(meta))}'
        run('train.py', f'--dataset={tmp_path}', f'--out_dir={out_dir}', '--max_iters=2',
            '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
            '--gradient_accumulation_steps=1', '--eval_iters=1', '--device=cpu')  # fmt: skip
        text = run('sample.py', f'--out_dir={out_dir}', '--start=0 1 2', '--num_samples=1',
                   '--max_new_tokens=8', '--device=cpu').stdout  # fmt: skip
        if shown:
            assert set(text.split()[:-1]) <= shown
        result = run('sample.py', f'--out_dir={out_dir}', '--start=abc', code=2)
        assert 'give ids' in error_line(result)


def test_harmless_pickles_are_refused_with_a_line_that_saves_them_again(tmp_path):
    import pickle

    write_nanogpt_dataset(tmp_path, 'abcdefgh' * 400)
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta | {'vocab_size': np.int64(8)}))
    with pytest.raises(UserError, match='if you trust it') as error:
        bins.open_dataset(tmp_path, 16)
    line = str(error.value).partition('plain values: ')[2]
    subprocess.run(line.replace('python', sys.executable, 1), shell=True, check=True)
    assert bins.open_dataset(tmp_path, 16).tokenizer.characters == 'abcdefgh'


def test_llm_c_bins_are_read(tmp_path, monkeypatch):
    ids = np.arange(300, dtype='<u2')
    for split in ('train', 'val'):
        header = np.zeros(256, '<i4')
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / f'{split}.bin').write_bytes(header.tobytes() + ids.tobytes())
    monkeypatch.setattr(bins, 'gpt2', tokenizer.ByteTokenizer)
    split = bins.TokenBin(tmp_path, 'train', np.dtype('<u2'), 50257, 16)
    assert split.read([0], split.n_tokens)[0].tolist() == ids.tolist()
    header[0] = 20240801
    (tmp_path / 'train.bin').write_bytes(header.tobytes() + ids.tobytes())
    with pytest.raises(UserError, match='Llama 3'):
        bins.TokenBin(tmp_path, 'train', np.dtype('<u2'), 50257, 16)


@pytest.mark.slow
def test_reading_bins_keeps_memory_bounded(tmp_path):
    """Reading all of a large file leaves the process as small as it was."""
    np.zeros(2**27, '<u2').tofile(tmp_path / 'train.bin')  # 256 MB
    code = f"""
import resource, numpy as np
from lib.bins import TokenBin
data = TokenBin({str(tmp_path)!r}, 'train', np.dtype('<u2'), 10, 1024, 2**27)
data.batch(0, 64, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(2000):
    data.batch(64 * i, 64, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    shown = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert int(shown) < 30_000  # kB


def test_truncated_bins_end_a_run_in_a_sentence(tmp_path):
    np.zeros(1000, '<u2').tofile(tmp_path / 'train.bin')
    data = bins.TokenBin(tmp_path, 'train', np.dtype('<u2'), 10, 16, 1000)
    os.truncate(tmp_path / 'train.bin', 100)
    with pytest.raises(UserError, match='has become shorter.*--init_from=resume'):
        data.batch(0, 64, 1)


@pytest.mark.parametrize('suffix', ['.zst', '.xz', '.bz2', '.zip'])
def test_other_compressed_files_are_refused_with_a_remedy(refused, tmp_path, suffix):
    (tmp_path / f'x.txt{suffix}').write_bytes(b'PK\x03\x04' * 99)
    refused('data/text/prepare.py', f'--input={tmp_path}/x.txt{suffix}', says=('.gz', 'decompress'))


def test_a_text_of_separators_only_has_no_bits_per_byte(run, trained, prepare, tmp_path, clone):
    (tmp_path / 'x.txt').write_text('ab' + END * 40)
    ids, tok = prepare(tmp_path / 'x.txt', '--tokenizer=byte')
    assert ids.count(tok.eot) == 40
    run('train.py', '--dataset=texts', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=2',
        '--max_iters=1', '--eval_iters=1', '--device=cpu', f'--out_dir={tmp_path}/o')  # fmt: skip


def test_a_short_text_gets_as_many_tokens_as_it_has_pairs_for(run, refused, clone, tmp_path):
    """Unless --vocab_size asks for more."""
    path = tmp_path / 'short.txt'
    path.write_text('to be or not to be ' * 20)
    arguments = ('data/text/prepare.py', f'--input={path}', '--dataset=brief')
    run(*arguments)
    assert 257 < json.loads((clone / 'data/brief/meta.json').read_text())['vocab_size'] < 300
    refused(*arguments, '--vocab_size=4096', says='the text has pairs for')
