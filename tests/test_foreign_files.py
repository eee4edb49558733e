"""Files that are no weights or tokenizers, though their names say so, are refused in one sentence
without the insides of Python."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
import safetensors.torch
import tokenizers as hf
import torch
import transformers

import checkpoint as ckpt
from helpers import nanogpt_state
from lib import bins, formats, tokenizer
from lib.errors import UserError

INTERNALS = re.compile(
    r"\w(Error|Exception)\b|NoneType|object|__|unhashable|subscript|invalid literal|codec|iterable"
    r"|not supported between|unpack|argument|<class"
)


def sentence(read, *arguments, **options):
    """The one sentence in which something is refused."""
    with pytest.raises(UserError) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert '\n' not in message and not INTERNALS.search(message), message
    return message


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """A tiny GPT-2 of transformers, with its tokenizer."""
    folder, theirs = tmp_path_factory.mktemp('gpt2'), hf.ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        ['the cat the hat'], 262, show_progress=False, special_tokens=['<|endoftext|>']
    )
    theirs.save_model(str(folder))
    theirs.save(str(folder / 'tokenizer.json'))
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2_folder(gpt2, tmp_path):
    """A copy of it."""
    return shutil.copytree(gpt2, tmp_path / 'gpt2')


SAFETENSORS = [
    (lambda h: None, 8, 'b has data_offsets = .8, 16. after 8 of 8'),
    (lambda h: h['b'].update(data_offsets=[12, 20]), 20, 'b has data_offsets = .12, 20. after 8'),
    (lambda h: h['a'].update(data_offsets=[0, 12]), 16, 'a has shape'),
    (lambda h: h['b'].update(data_offsets=[4, 12]), 16, 'b has data_offsets = .4, 12. after 8'),
    (lambda h: None, 20, 'after the last tensor: 4 bytes'),
    (lambda h: None, 17, 'after the last tensor: 1 byte$'),
    (lambda h: None, 12, 'b has data_offsets = .8, 16. after 8 of 12'),
    (lambda h: h['a'].update(shape=[-1]), 16, 'a has shape = .-1. but 8 bytes'),
    (lambda h: h['a'].update(shape=[-1, -2]), 16, 'a has shape = .-1, -2. but 8 bytes'),
    (lambda h: h['a'].update(shape=[2**70]), 16, 'a has shape'),
    (lambda h: h['a'].update(shape=[2.0]), 16, 'a has shape'),
    (lambda h: h['a'].update(shape=[2**40] * 10**5), 16, 'a has shape'),
    (lambda h: h['a'].update(dtype='F8_E4M3'), 16, "a has dtype = 'F8_E4M3'; known are F32"),
    (lambda h: h['a'].update(dtype=['F32']), 16, 'wrong type'),
    (lambda h: h['a'].pop('dtype'), 16, "'dtype' is missing"),
    (lambda h: h.update(c=None), 16, 'wrong type'),
]


@pytest.mark.parametrize('change, n_bytes, says', SAFETENSORS)
def test_safetensors_whose_header_does_not_fit_are_refused(tmp_path, change, n_bytes, says):
    header = {
        'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]},
        'b': {'dtype': 'F32', 'shape': [2, 1], 'data_offsets': [8, 16]},
    }
    path = tmp_path / 'model.safetensors'

    def write(n_bytes):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(n_bytes))

    write(16)
    assert [tensor.shape for tensor in formats.read_safetensors(path).values()] == [(2,), (2, 1)]
    change(header)
    write(n_bytes)
    message = sentence(formats.read_safetensors, path)
    assert re.search(says, message), message


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize('kind', ['ckpt.pt', 'model.safetensors', 'pytorch_model.bin'])
def test_weights_that_are_not_floating_point_are_refused(gpt2_folder, kind, dtype):
    """A causal mask may be anything."""
    weights = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder).state_dict()
    weights = {name: w.clone() for name, w in weights.items() if name != 'lm_head.weight'}
    weights['transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8, dtype=dtype)
    name = 'transformer.h.0.ln_1.weight'
    (gpt2_folder / 'model.safetensors').unlink()
    where = gpt2_folder
    for damaged in (False, True):
        if damaged:
            weights[name] = torch.ones(8, dtype=dtype)
        if kind == 'model.safetensors':
            safetensors.torch.save_file(weights, gpt2_folder / kind)
        elif kind == 'pytorch_model.bin':
            torch.save(weights, gpt2_folder / kind)
        else:
            state = nanogpt_state()
            state['model']['transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16, dtype=dtype)
            if damaged:
                state['model'][name] = torch.ones(32, dtype=dtype)
            where = gpt2_folder / kind
            torch.save(state, where)
        if not damaged:
            ckpt.load(where).build_model()
    message = sentence(ckpt.load, where)
    assert kind in message and name in message and str(dtype) in message


@pytest.mark.parametrize('value', [[1], 'x', {3: torch.zeros(2)}, {'a': [1]}, torch.zeros(2)])
def test_what_is_no_table_of_weights_is_refused(gpt2_folder, value):
    (gpt2_folder / 'model.safetensors').unlink()
    torch.save(value, gpt2_folder / 'pytorch_model.bin')
    assert 'pytorch_model.bin: ' in sentence(ckpt.load, gpt2_folder)
    torch.save({'model': value, 'model_args': {}}, gpt2_folder / 'x.pt')
    assert 'x.pt: ' in sentence(ckpt.load, gpt2_folder / 'x.pt')
    (gpt2_folder / 'pytorch_model.bin').write_bytes(b'PK' * 99)
    assert 'cut off' in sentence(ckpt.load, gpt2_folder)


@pytest.mark.parametrize('which', ['best', 7])
def test_one_of_several_checkpoints_is_asked_for_where_there_is_one(gpt2_folder, tmp_path, which):
    run = tmp_path / 'run'
    run.mkdir()
    torch.save(nanogpt_state(), run / 'ckpt.pt')
    for where in (gpt2_folder, run, run / 'ckpt.pt'):
        assert ckpt.load(where, 'auto').model and ckpt.load(where, 'last').model
        assert f'checkpoint = {which}' in sentence(ckpt.load, where, which)
        assert 'average_last = 2' in sentence(ckpt.load, where, average_last=2)


POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 548118077\n'


def test_git_lfs_pointers_are_named(gpt2, gpt2_folder, tmp_path, trained):
    def load():
        ckpt.load(gpt2_folder).get_tokenizer()

    load()
    for name in ('tokenizer.json', 'merges.txt', 'vocab.json', 'model.safetensors',
                 'pytorch_model.bin', 'config.json'):  # fmt: skip
        (gpt2_folder / name).write_text(POINTER)
        message = sentence(load)
        assert f'{name}: ' in message and 'this is a Git LFS pointer' in message, message
        assert 'git lfs pull' in message
        if name in ('tokenizer.json', 'merges.txt', 'model.safetensors'):
            (gpt2_folder / name).unlink()  # another file is read instead
        elif name == 'vocab.json':
            shutil.copy(gpt2 / name, gpt2_folder)
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'ckpt.pt').write_text(POINTER)
    (run / 'train.bin').write_text(POINTER)
    (run / 'val.bin').write_text(POINTER)
    reads = [(ckpt.load, run), (tokenizer.read_prompt, f'FILE:{run}/ckpt.pt')]
    reads += [(lambda path: bins.TokenBin(path, 'train', np.dtype('<u2'), 9, 4), run)]
    (run / 'meta.pkl').write_text(POINTER)
    reads += [(bins.open_tokenizer, run)]
    for read, where in reads:
        assert 'this is a Git LFS pointer' in sentence(read, where)
    manifest = next(trained.glob('ckpt_*20.json'))
    (tmp_path / manifest.name).write_bytes(manifest.read_bytes())
    (tmp_path / manifest.with_suffix('.pt').name).write_text(POINTER)
    path = tmp_path / manifest.with_suffix('.pt').name
    assert 'is damaged: this is a Git LFS pointer' in sentence(ckpt.load, path)


TOKENIZER = [
    *({'model': value} for value in (None, [], 'BPE', {}, {'type': None}, {'type': 'BPE'})),
    *({'vocab': value} for value in (None, [], {'a': 'x'}, {'a': None}, {'é': 0}, {'a': 2**70})),
    *({'merges': value} for value in (None, 3, [3], ['a'], ['a b c'], [['a', 'b', 'c']], [None],
                                      ['é à'], [['a', 3]])),
    *({'added_tokens': value} for value in (3, [None], [{}], [{'content': 3, 'id': 1}],
                                            [{'content': 'a', 'id': None}],
                                            [{'content': '<x>', 'id': '7'}], {'a': 3})),
    *({'pre_tokenizer': value} for value in (None, [], 'ByteLevel', {'type': 3})),
    *({'normalizer': value} for value in ('NFC', ['NFC'], 3)),
    *({'decoder': value} for value in ('x', [1])),
]  # fmt: skip


@pytest.mark.parametrize('change', TOKENIZER, ids=str)
def test_no_message_about_a_tokenizer_shows_the_insides_of_python(gpt2_folder, change):
    path = gpt2_folder / 'tokenizer.json'
    saved = json.loads(path.read_text())
    for key, value in change.items():
        (saved['model'] if key in ('vocab', 'merges') else saved)[key] = value
    path.write_text(json.dumps(saved))
    assert sentence(tokenizer.from_huggingface, gpt2_folder).startswith(str(path))


@pytest.mark.parametrize('name, content', [
    ('config.json', '[]'), ('config.json', '{'), ('config.json', 'null'), ('config.json', None),
    ('config.json', {'n_embd': 'x'}), ('config.json', {'n_head': None}),
    ('config.json', {'n_layer': [1]}), ('config.json', {'n_embd': {}}),
    ('config.json', {'activation_function': 3}), ('config.json', {'vocab_size': -5}),
    ('tokenizer_config.json', '[]'), ('tokenizer_config.json', '3'),
    ('tokenizer_config.json', {'added_tokens_decoder': {'x': {'content': 'a'}}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'5': 'a'}}),
    ('tokenizer_config.json', {'added_tokens_decoder': [1]}),
    ('added_tokens.json', '["a"]'), ('added_tokens.json', {'<a>': 'x'}),
    ('special_tokens_map.json', '[1]'), ('special_tokens_map.json', {'pad_token': {}}),
    ('vocab.json', '[]'), ('vocab.json', '{}'), ('vocab.json', '3'), ('merges.txt', 'a\nb\n'),
    ('merges.txt', 'a b c\n'), ('merges.txt', '\xff'),
], ids=str)  # fmt: skip
def test_no_message_about_a_folder_shows_the_insides_of_python(gpt2_folder, name, content):
    (gpt2_folder / 'tokenizer.json').unlink()
    path = gpt2_folder / name
    if isinstance(content, dict):
        saved = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps(saved | content)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode('latin-1')) if content is not None else path.mkdir()

    def load():
        ckpt.load(gpt2_folder).get_tokenizer()

    assert str(gpt2_folder) in sentence(load)
