"""The prepare scripts: from text to a dataset."""

import os

import pytest

from helpers import TINY, folder_contents
from lib import bins, write
from lib.errors import UserError
from lib.tokenizer import ByteTokenizer


@pytest.mark.slow
def test_prepare_text_builds_dataset_from_file_or_folder(run, refused, clone, tmp_path, text):
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    (tmp_path / 'in' / 'a.txt').write_text(text[:30000])
    (tmp_path / 'in' / 'sub' / 'b.txt').write_text(text[30000:])
    (tmp_path / 'in' / os.fsdecode(b'caf\xe9.txt')).write_text('')
    (tmp_path / 'in' / 'picture.png').write_bytes(b'\x89PNG\0\xff')
    result = run(
        'data/text/prepare.py',
        '--input',
        tmp_path / 'in',
        '--tokenizer',
        'bpe',
        '--vocab_size',
        400,
        '--dataset=mine',
    )
    assert 'left out: 1 file, the first one: ' in result.stdout
    assert 'not UTF-8 text' in result.stdout
    assert ' tokens to train on, ' in result.stdout
    data = bins.open_dataset(clone / 'data' / 'mine', 32)
    everything = data.tokenizer.decode(
        [*data.train.read([0], data.train.n_tokens)[0], *data.val.read([0], data.val.n_tokens)[0]]
    )
    assert sorted(filter(None, everything.split('<|endoftext|>'))) == sorted(
        [text[:30000], text[30000:]]
    )
    for kind in ('char', 'byte'):
        result = run(
            'data/text/prepare.py',
            f'--input={tmp_path}/in/a.txt',
            f'--tokenizer={kind}',
            '--dataset=mine',
        )
        assert 'replacing the data set' in result.stdout
        data = bins.open_dataset(clone / 'data' / 'mine', 32)
        ids = [
            *data.train.read([0], data.train.n_tokens)[0],
            *data.val.read([0], data.val.n_tokens)[0],
        ]
        assert data.tokenizer.decode(ids) == text[:30000]
    run('train.py', '--dataset=mine', f'--out_dir={tmp_path}/out', '--max_iters=1', *TINY)
    refused('data/text/prepare.py', says='--input=PATH')
    for name in ('', '../config', 'text/prepare.py'):
        refused(
            'data/text/prepare.py',
            f'--input={tmp_path}/in/a.txt',
            f'--dataset={name}',
            says='dataset = ',
        )
    refused('data/text/prepare.py', '--input=/no/such', says='/no/such')
    refused('data/text/prepare.py', f'--input={tmp_path}/in/picture.png', says='not UTF-8')
    (tmp_path / 'empty').mkdir()
    refused('data/text/prepare.py', f'--input={tmp_path}/empty', says='no text')


@pytest.mark.slow
def test_train_prepares_missing_small_dataset(run, clone, tmp_path):
    result = run(
        'train.py', '--dataset=python_stdlib', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=1'
    )
    assert 'running python data/python_stdlib/prepare.py' in result.stdout
    data = bins.open_dataset(clone / 'data' / 'python_stdlib', 32)
    assert data.tokenizer.vocab_size == 2048
    assert 'def ' in data.tokenizer.decode(data.train.read([0], 5000)[0].tolist())
    assert data.train.n_tokens > 1_000_000


def test_prepare_shakespeare_reports_missing_network(refused, run, clone):
    offline = {'https_proxy': 'http://127.0.0.1:9'}
    refused(
        'data/shakespeare_char/prepare.py',
        env=offline,
        says=(
            'https://raw.githubusercontent.com',
            'data/shakespeare_char/input.txt',
            'config/quickstart.py',
        ),
    )
    (clone / 'data' / 'shakespeare_char' / 'input.txt').write_text(
        'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 50
    )
    run('data/shakespeare_char/prepare.py', env=offline)
    (clone / 'data' / 'shakespeare_char' / 'input.txt').unlink()


def test_prepare_large_dataset_reports_missing_package(refused, tmp_path):
    (tmp_path / 'datasets.py').write_text('raise ImportError("not installed")')
    (tmp_path / 'tiktoken_cache').mkdir()
    for name in ('openwebtext', 'fineweb_edu'):
        refused(
            f'data/{name}/prepare.py',
            says='pip install datasets',
            env={'PYTHONPATH': str(tmp_path)},
        )


@pytest.mark.parametrize('error', [KeyboardInterrupt, PermissionError(1, 'not permitted')])
def test_the_data_set_stays_if_its_files_cannot_be_replaced(tmp_path, monkeypatch, error):
    """Ctrl-C between two renames, or a program on Windows that has one of the files open."""
    def prepare(text, fails_at=0):
        def replace(source, target):
            renamed.append(source)
            if len(renamed) == fails_at:
                raise error
            os.replace(source, target)

        renamed = []
        monkeypatch.setattr(write, 'replace', replace)
        pieces = [write.Piece(split, text) for split in ('train', 'val')]
        write.write_dataset(tmp_path / 'mine', pieces, ByteTokenizer(), 'a text')
        return len(renamed)

    assert prepare('old') == 3
    old = folder_contents(tmp_path / 'mine')
    for fails_at in range(1, 7):  # three are moved aside, three come in their place
        with pytest.raises((KeyboardInterrupt, UserError)):
            prepare('new text', fails_at)
        assert folder_contents(tmp_path / 'mine') == old
    assert prepare('new text') == 6 and folder_contents(tmp_path / 'mine').keys() == old.keys()
    assert bins.open_dataset(tmp_path / 'mine', 2).train.n_tokens == len('new text')
