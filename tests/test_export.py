"""tools/export.py: a model computes the same elsewhere, or is refused by the name of a key."""

import itertools
import json
import os
import re
import shutil
from dataclasses import asdict

import pytest
import torch
import transformers
from safetensors.torch import load_file

import checkpoint as ckpt
from architectures import one_by_one
from helpers import TINY, randomize
from lib import huggingface, write_huggingface
from lib.errors import UserError
from lib.tokenizer import Tokenizer
from model import GPT, GPTConfig

SIZES = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'block_size': 64, 'vocab_size': 50}
TABLE = {  # every choice that changes what is computed, for tokens of one document
    'position': ['learned', 'sinusoidal', 'rope', 'none'],
    'norm': ['layernorm', 'rmsnorm'],
    'norm_position': ['pre', 'post'],
    'activation': ['gelu_tanh', 'gelu', 'relu', 'relu2', 'swiglu'],
    'n_kv_head': [None, 2],
    'qk_norm': [False, True, 'gain'],
    'bias': [True, False],
    'tie_weights': [True, False],
}
EVERY = [dict(zip(TABLE, values)) for values in itertools.product(*TABLE.values())]


def make(architecture):
    return randomize(GPT(GPTConfig(**SIZES | architecture)), std=0.2)


def can_be_held(architecture):
    try:
        return write_huggingface.choose_layout(GPTConfig(**SIZES | architecture))[0]
    except UserError as error:
        named = [key for key in architecture if f'{key} = {architecture[key]}' in str(error)]
        assert named, error
        return None


HELD = [architecture for architecture in EVERY if can_be_held(architecture)]
FEW = {}  # one with, one without biases for each layout
for held in HELD:
    FEW[can_be_held(held), held['bias'], held['position']] = held


def check(architecture, folder):
    """Logits, greedy tokens and the way back."""
    ours = make(architecture)
    saved, tensors = write_huggingface.convert(ours.config, ours.state_dict())
    # in transformers 4 ApertusConfig scales RoPE unless this is null
    assert saved.get('rope_scaling', 'absent') == (None if 'rope_theta' in saved else 'absent')
    (folder / 'config.json').write_text(json.dumps(saved))
    write_huggingface.write_safetensors(folder / 'model.safetensors', tensors)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert [type(theirs).__name__] == saved['architectures']
    low = 1 + (ours.config.eot_token or 0)  # within one document
    idx = torch.randint(low, 50, (2, ours.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
    continued = theirs.generate(
        idx[:1, :9], max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours.generate(idx[:1, :9], 50, temperature=0), continued)
    if architecture.get('position') != 'sinusoidal':  # which become learned positions there
        config, weights, _ = huggingface.load(folder)
        expected = ours.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        for key in (*TABLE, 'head_size', 'n_hidden', 'norm_eps', 'eot_token', 'turns'):
            assert config[key] == getattr(ours.config, key), key


@pytest.mark.parametrize('architecture', FEW.values(), ids=str)
def test_exported_models_compute_the_same_in_transformers(architecture, tmp_path):
    check(architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('architecture', HELD, ids=str)
def test_every_combination_computes_the_same_in_transformers(architecture, tmp_path):
    check(architecture, tmp_path)


def test_every_combination_is_held_or_refused_by_name():
    """The other half of the table; can_be_held checks the names."""
    assert len(EVERY) == 1920 and len(HELD) == 160


def test_long_wavelengths_of_rope_are_not_scaled(tmp_path):
    """which short contexts and small heads would not show"""
    sizes = {'position': 'rope', 'norm': 'rmsnorm', 'activation': 'relu2', 'qk_norm': True}
    check(sizes | {'bias': False, 'block_size': 512, 'n_embd': 128, 'n_head': 2}, tmp_path)


OTHERS = [change for change in one_by_one() if not change.keys() & TABLE.keys()]


@pytest.mark.parametrize('architecture', OTHERS, ids=str)
def test_every_other_key_is_exported_or_refused_by_name(architecture, tmp_path):
    for base in ({}, {'position': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu'}):
        if can_be_held(base | architecture):
            check(base | architecture, tmp_path)


# The program --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def exported(run, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported') / 'hf'
    result = run('tools/export.py', f'--out_dir={trained}', f'--export_dir={folder}')
    assert f'written to {folder}' in result.stdout
    return folder


def test_exported_run_loads_in_transformers(exported, trained):
    """Model and tokenizer, by the classes that anybody would use."""
    checkpoint = ckpt.load(trained)
    ours, tokenizer = ckpt.load_model(trained)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    text = 'def main(config):\n    return'
    ids = transformers.AutoTokenizer.from_pretrained(exported)(text, return_tensors='pt').input_ids
    assert ids[0].tolist() == tokenizer.encode(text)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, ids)[0], theirs(ids).logits, atol=1e-4, rtol=0)
    card = (exported / 'README.md').read_text()
    assert f'{checkpoint.val_loss:.4f}' in card and '20 steps' in card


@pytest.mark.parametrize('kind', ['char', 'digits', 'chat', 'ids'])
def test_code_of_the_model_card_runs(tmp_path, capsys, kind):
    saved = {'char': {'kind': 'char', 'characters': 'The quick'},
             'digits': {'kind': 'char', 'characters': '- 0123\n', 'end_of_text': True},
             'chat': {'kind': 'byte', 'end_of_text': True},
             'ids': {'kind': 'ids', 'names': [str(i) for i in range(50)]}}[kind]
    tokenizer = Tokenizer.from_dict(saved)
    chats = {'turns': 2, 'eot_token': tokenizer.eot} if kind == 'chat' else {}
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64,
                          vocab_size=tokenizer.vocab_size, **chats))
    checkpoint = ckpt.Checkpoint(asdict(model.config), model.state_dict(), tokenizer=saved)
    folder = tmp_path / "it's"
    folder.mkdir()
    write_huggingface.write_folder(checkpoint, model, folder, torch.float32, str(folder))
    code = re.search('```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)[1]
    exec(code, {})
    written = capsys.readouterr().out
    start = {'char': 'The', 'digits': '0', 'chat': '<|endoftext|>The<|endoftext|>',
             'ids': 'tensor([[ 0, '}[kind]
    assert written.startswith(start)


@pytest.mark.parametrize('format', ['hf', 'gguf'])
def test_export_folder_may_have_any_name(run, trained, clone, tmp_path, format):
    """Bytes that are not UTF-8; by default in the run's folder, wherever the command is run."""
    if format == 'gguf':
        pytest.importorskip('gguf')
    run('tools/export.py', f'--out_dir={trained}', f'--format={format}',
        '--export_dir=' + os.fsdecode(os.fsencode(tmp_path) + b'/b\xff'))
    assert os.listdir(os.fsencode(tmp_path)) == [b'b\xff']
    shutil.copytree(trained, clone / f'run-{format}')
    (tmp_path / 'elsewhere').mkdir()
    run('tools/export.py', f'--out_dir=run-{format}', f'--format={format}',
        cwd=tmp_path / 'elsewhere')
    assert (clone / f'run-{format}' / format).is_dir()
    assert not any((tmp_path / 'elsewhere').iterdir())


def test_exported_run_comes_back(run, exported, trained):
    """sample.py writes the same with the folder as with the run, tokenizer included."""
    options = ('--start=def ', '--num_samples=1', '--max_new_tokens=20', '--dtype=float32')
    first = run('sample.py', f'--out_dir={trained}', *options).stdout
    assert run('sample.py', f'--init_from={exported}', *options).stdout == first
    expected = ckpt.load(trained).model
    for name, weight in ckpt.load(exported).model.items():
        assert torch.equal(weight, expected[name]), name


def test_safetensors_of_any_run(run, trained, tmp_path):
    """--format=safetensors: one file that no code can hide in, with model and tokenizer."""
    folder = tmp_path / 'plain'
    run('tools/export.py', f'--out_dir={trained}', '--format=safetensors', f'--export_dir={folder}')
    path = folder / 'model.safetensors'
    before, after = ckpt.load(trained), ckpt.load(path)
    assert after.get_tokenizer().to_dict() == before.get_tokenizer().to_dict()
    assert (after.step, after.val_loss) == (before.step, before.val_loss)
    assert after.model_config == before.model_config
    assert all(torch.equal(after.model[name], before.model[name]) for name in before.model)
    assert ckpt.load(folder).step == before.step
    assert load_file(path).keys() == before.model.keys() - {'transformer.wte.weight'}  # tied


def test_gguf_of_a_run(run, refused, trained, tmp_path):
    """The file's content: tests/test_gguf.py."""
    common = ('tools/export.py', f'--out_dir={trained}', '--format=gguf')
    whole = run(*common, f'--export_dir={tmp_path}/whole')
    assert 'gpt2 of llama.cpp' in whole.stdout
    run(*common, f'--export_dir={tmp_path}/small', '--dtype=q8_0')
    sizes = [(tmp_path / name / 'model.gguf').stat().st_size for name in ('whole', 'small')]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.slow  # torch.onnx takes seconds
def test_onnx_of_a_run(run, refused, trained, tmp_path):
    import onnxruntime

    common = ('tools/export.py', f'--out_dir={trained}', '--format=onnx')
    run(*common, f'--export_dir={tmp_path}/onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'onnx' / 'model.onnx')
    ours, tokenizer = ckpt.load_model(trained)
    ids = torch.tensor([tokenizer.encode('def main(config):')])
    with torch.no_grad():
        expected = ours(ids, ids)[0]
    found = torch.from_numpy(session.run(None, {'input_ids': ids.numpy()})[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    files = {path.name for path in (tmp_path / 'onnx').iterdir()}
    assert files == {'model.onnx', 'tokenizer.json', 'tokenizer_config.json'}


def test_bf16_halves_the_file(run, trained, tmp_path, exported):
    folder = tmp_path / 'half'
    run('tools/export.py', f'--out_dir={trained}', f'--export_dir={folder}', '--dtype=bfloat16')
    weights, whole = (load_file(f / 'model.safetensors') for f in (folder, exported))
    assert all(torch.equal(weights[name], whole[name].bfloat16()) for name in whole)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_export_refuses_in_one_sentence(refused, trained, exported, tmp_path):
    common = ('tools/export.py', f'--out_dir={trained}')
    refused(*common, f'--export_dir={exported}', says=(str(exported), 'name another'))
    refused(*common, '--dtype=q8_0', says='dtype = q8_0')
    refused(*common, '--format=onnx', '--dtype=bfloat16', says='dtype = bfloat16')
    refused(*common, '--format=peft', says='--lora_rank')
    refused('tools/export.py', '--init_from=gpt2', says='export_dir')
    refused('tools/export.py', f'--out_dir={tmp_path}/none', says='none')
    assert not (tmp_path / 'none').exists()
    (tmp_path / 'file').write_text('mine')
    refused(*common, f'--export_dir={tmp_path}/file', says='there is something already')
    refused(*common, f'--export_dir={tmp_path}/file/sub', says=('file/sub', 'name another'))
    (tmp_path / 'adapter').mkdir()
    (tmp_path / 'adapter' / 'adapter_config.json').write_text('{}')
    for path in ('adapter', 'model.gguf'):
        (tmp_path / 'model.gguf').touch()
        with pytest.raises(UserError, match=f'{path}: only whole models'):
            ckpt.load(tmp_path / path)


def test_models_with_ngrams_are_told_where_they_can_go(run, refused, char_data, tmp_path):
    common = ('--ngram=3', '--ngram_rows=97', '--max_iters=1', *TINY)
    run('train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *common)
    before = sorted((tmp_path / 'out').iterdir())
    refused('tools/export.py', f'--out_dir={tmp_path}/out', says=('ngram = 3', '--ngram=1', 'onnx'))
    assert sorted((tmp_path / 'out').iterdir()) == before
