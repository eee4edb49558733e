"""Checkpoints: whole or not there, and nothing in them runs."""

import json
import math
import os
import pickle
import time
from dataclasses import asdict

import pytest
import torch

import checkpoint as ckpt
from checkpoint import Checkpoint
from configurator import UserError
from files import lock
from model import GPT, GPTConfig


def tiny_model(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{'block_size': 8, 'vocab_size': 5, 'n_layer': 1, 'n_head': 2, 'n_embd': 8} | options))


def write(folder, step, val_loss=None, model=None, keep_last=2, **options):
    model = model or tiny_model()
    return ckpt.save(
        folder,
        Checkpoint(
            asdict(model.config),
            model.state_dict(),
            step,
            step * 4,
            val_loss,
            tokenizer={'kind': 'char', 'characters': 'abcde'},
            **options,
        ),
        keep_last,
    )


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, val_loss in enumerate((5.0, 3.0, 1.0, 2.0, 4.0, None)):
        write(tmp_path, step, val_loss)
    assert sorted(p.name for p in tmp_path.glob('*.pt')) == [f'ckpt_{s:08d}.pt' for s in (2, 4, 5)]
    assert [m['step'] for m in ckpt.manifests(tmp_path)] == [5, 4, 2]
    assert ckpt.load(tmp_path).step == 5
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ['.json'] * 3 + ['.pt'] * 3


def test_the_best_survives_a_run_that_diverges(tmp_path):
    for step, val_loss in enumerate((4.0, 3.0, math.nan, math.nan, math.nan)):
        write(tmp_path, step, val_loss, config={'always_save_checkpoint': False})
    assert [m['step'] for m in ckpt.manifests(tmp_path)] == [4, 3, 1]
    assert ckpt.load(tmp_path, prefer_best=True).step == 1


def test_what_was_just_saved_is_kept_beside_a_damaged_later_one(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 3).write_bytes(b'garbage')
    assert ckpt.load(tmp_path).step == 1
    assert write(tmp_path, 2, keep_last=1).exists()
    assert ckpt.load(tmp_path).step == 2


def test_a_renamed_checkpoint_is_read_and_checked(tmp_path):
    path = write(tmp_path, 1)
    for suffix in ('.pt', '.json'):
        path.with_suffix(suffix).rename(tmp_path / f'best{suffix}')
    assert ckpt.load(tmp_path / 'best.pt').step == 1
    size = (tmp_path / 'best.pt').stat().st_size
    with open(tmp_path / 'best.pt', 'ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match=f'{size + 1:,} bytes instead of {size:,}'):
        ckpt.load(tmp_path / 'best.pt')


@pytest.mark.parametrize('change', [
    {'model_config': {'n_embd': '8'}}, {'model_config': None}, {'model_config': {}}, {'step': 'x'}, {'step': -5},
    {'config': None}, {'val_loss': 'x'}, {'optimizer': [1]}, {'model': {1: 2}}])
def test_a_checkpoint_with_wrong_fields_is_named(tmp_path, change):
    path = write(tmp_path, 1)
    path.with_suffix('.json').unlink()
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(UserError, match='ckpt_00000001.pt'):
        ckpt.load(path).build_model()


def test_the_best_is_read_where_only_improvements_were_saved(tmp_path):
    for step, val_loss in ((1, 1.0), (2, 2.0)):
        write(tmp_path, step, val_loss, config={'always_save_checkpoint': False})
    assert ckpt.load(tmp_path).step == 2
    assert ckpt.load(tmp_path, prefer_best=True).step == 1
    write(tmp_path, 3, 3.0, config={'always_save_checkpoint': True})
    assert ckpt.load(tmp_path, prefer_best=True).step == 3


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'missing', 'manifest'])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, capsys):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if damage == 'flip':
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == 'truncate':
        path.write_bytes(content[: len(content) // 2])
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'missing':
        path.unlink()
    else:
        path.with_suffix('.json').write_text('{"step": 2')
    assert ckpt.load(tmp_path).step == 1
    assert 'ckpt_00000002' in capsys.readouterr().err
    (tmp_path / 'ckpt_00000001.pt').write_bytes(b'x')
    with pytest.raises(UserError, match='whole|damaged'):
        ckpt.load(tmp_path)


def test_a_failed_write_leaves_nothing_behind_and_the_old_ones_alone(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match='No space left'):
        write(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert ckpt.load(tmp_path).step == 1


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('content', ['evil', 'evil_inside', 'garbage', 'list', 'text', 'numbers'])
def test_a_foreign_file_is_refused_and_cannot_run_code(tmp_path, content):
    path = tmp_path / 'ckpt.pt'
    if content == 'evil':
        path.write_bytes(pickle.dumps(Evil(str(tmp_path / 'ran'))))
    elif content == 'evil_inside':
        torch.save({'model': {'x': Evil(str(tmp_path / 'ran'))}, 'model_args': {}}, path)
    elif content == 'garbage':
        path.write_bytes(os.urandom(1000))
    elif content == 'text':
        path.write_text('hello')
    else:
        torch.save([1, 2] if content == 'list' else {'model': {}, 'format': 99}, path)
    with pytest.raises(UserError, match='ckpt.pt'):
        ckpt.load(path)
    assert not (tmp_path / 'ran').exists()


def nanogpt_checkpoint(path, prefix=''):
    """A ckpt.pt as nanoGPT writes it, after 3 steps."""
    model = tiny_model(activation='gelu', bias=False)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    for _ in range(3):
        model(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {
            'model': {prefix + k: v for k, v in model.state_dict().items()},
            'optimizer': optimizer.state_dict(),
            'model_args': {
                'n_layer': 1,
                'n_head': 2,
                'n_embd': 8,
                'block_size': 8,
                'bias': False,
                'vocab_size': 5,
                'dropout': 0.0,
            },
            'iter_num': 3,
            'best_val_loss': torch.tensor(1.5),
            'config': {'batch_size': 2, 'gradient_accumulation_steps': 4, 'dataset': 'none', 'device': 'cuda'},
        },
        path,
    )
    return model


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_nanogpts_checkpoint_is_read(tmp_path, prefix):
    model = nanogpt_checkpoint(tmp_path / 'ckpt.pt', prefix)
    for where in (tmp_path, tmp_path / 'ckpt.pt'):
        found = ckpt.load(where)
        assert (found.step, found.samples_seen, found.val_loss) == (3, 24, 1.5)
        loaded = found.build_model().eval()
        idx = torch.arange(5)[None]
        assert torch.equal(loaded(idx, idx)[0], model.eval()(idx, idx)[0])
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_load_model_gives_a_model_ready_to_use_and_its_tokenizer(tmp_path):
    model = tiny_model(dropout=0.5)
    path = write(tmp_path, 1, model=model)
    for where in (tmp_path, str(tmp_path), path):
        loaded, characters = ckpt.load_model(where)
        assert not loaded.training and loaded.config.dropout == 0.0
        assert characters.decode([0, 4]) == 'ae'
        idx = torch.arange(5)[None]
        assert torch.equal(loaded(idx)[0], model.eval()(idx)[0])


def test_tensors_of_a_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        'a': torch.randn(3, 4),
        'b': torch.arange(5),
        'c': torch.randn(2).bfloat16(),
        'd': torch.tensor(True),
        'e': torch.zeros(0),
    }
    save_file(tensors, tmp_path / 'x.safetensors', metadata={'k': 'v'})
    found = ckpt.read_safetensors(tmp_path / 'x.safetensors')
    assert found.keys() == tensors.keys()
    for name in tensors:
        torch.testing.assert_close(found[name], tensors[name], rtol=0, atol=0)
    content = (tmp_path / 'x.safetensors').read_bytes()
    for broken in (
        content[:-4], content[:20], b'', b'\xff' * 100, (10**6).to_bytes(8, 'little') + b'{}', (2).to_bytes(8, 'little') + b'[]'
    ):
        (tmp_path / 'x.safetensors').write_bytes(broken)
        with pytest.raises(UserError, match='x.safetensors'):
            ckpt.read_safetensors(tmp_path / 'x.safetensors')


@pytest.mark.parametrize(
    'change, words',
    [
        ({'model_type': 'llama'}, 'llama'),
        ({'activation_function': 'tanh'}, 'tanh'),
        ({'n_inner': 7}, 'n_inner = 7'),
        ({'n_embd': 12}, 'do not fit'),
        ({'n_layer': 9}, 'do not fit'),
    ],
)
def test_a_folder_that_is_not_gpt2_is_named(tmp_path, change, words):
    import transformers

    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=5, n_positions=8, bos_token_id=0, eos_token_id=0)
    )
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text()) | change
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        ckpt.load(tmp_path).build_model()


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    held = lock(tmp_path, 'x')
    with pytest.raises(UserError, match='another process'):
        lock(tmp_path, 'x')
    held.close()
    lock(tmp_path, 'x').close()


def test_an_earlier_run_is_moved_not_overwritten(tmp_path):
    write(tmp_path, 1)
    (tmp_path / 'log.jsonl').write_text('{"step": 0}\n')
    (tmp_path / 'notes.txt').write_text('mine')
    said = []
    ckpt.set_aside(tmp_path, said.append)
    assert ckpt.load(tmp_path / 'earlier-1').step == 1 and (tmp_path / 'earlier-1' / 'log.jsonl').exists()
    assert not list(tmp_path.glob('ckpt*')) and (tmp_path / 'notes.txt').exists() and 'earlier-1' in said[0]
    ckpt.set_aside(tmp_path, said.append)
    write(tmp_path, 2)
    ckpt.set_aside(tmp_path, said.append)
    assert ckpt.load(tmp_path / 'earlier-2').step == 2 and len(said) == 2
    (tmp_path / 'log.jsonl').write_text('{"step": 0}\n')  # of a run that was killed before its first checkpoint
    ckpt.set_aside(tmp_path, said.append)
    assert (tmp_path / 'earlier-3' / 'log.jsonl').exists() and len(said) == 3


def test_a_log_is_cut_where_the_run_goes_on(tmp_path):
    (tmp_path / 'log.jsonl').write_bytes(b'{"step": 0}\n\xff garbage}\n[1]\n{"step": 1}\n{"step": 2}\n{"step": 1, "lo')
    ckpt.cut_log(tmp_path, 2)
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 0}\n{"step": 1}\n'


def test_the_tokenizer_of_a_nanogpt_run_is_that_of_its_data_set(tmp_path):
    nanogpt_checkpoint(tmp_path / 'ckpt.pt')
    found = ckpt.load(tmp_path)
    found.config['dataset'] = str(tmp_path / 'data')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 5, 'itos': dict(enumerate('abcde'))}))
    (tmp_path / 'data' / 'train.bin').write_bytes(b'')
    assert found.get_tokenizer().decode([0, 4]) == 'ae'


def test_a_save_in_the_background_is_of_the_moment_in_which_it_was_asked_for(tmp_path, monkeypatch):
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    write_out, running = torch.save, []

    def slow(*arguments, **options):
        running.append(len(running))
        time.sleep(0.2)
        write_out(*arguments, **options)
        running.append('done')

    monkeypatch.setattr(torch, 'save', slow)
    said = []
    saver = ckpt.Saver(tmp_path, 2, True, said.append)
    start = time.perf_counter()
    saver.save(Checkpoint(asdict(model.config), model.state_dict(), 1))
    assert not said and time.perf_counter() - start < 0.2
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    saver.save(Checkpoint(asdict(model.config), model.state_dict(), 2))  # waits for the first
    assert len(said) == 1
    saver.wait()
    assert running == [0, 'done', 2, 'done'] and len(said) == 2
    for step, expected in ((1, before), (2, before + 1)):
        found = ckpt.load(tmp_path / f'ckpt_0000000{step}.pt')
        assert torch.equal(found.model['lm_head.weight'], expected)
        assert found.build_model().transformer.wte.weight is not None
        storage = {found.model[name].untyped_storage().data_ptr() for name in ('lm_head.weight', 'transformer.wte.weight')}
        assert len(storage) == 1  # tied weights are written once


def test_names_are_given_when_the_content_is_on_the_disk(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (done.append(os.readlink(f'/proc/self/fd/{fd}')), sync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(str(b)), rename(a, b)))
    path = str(write(tmp_path, 1))
    manifest = path.replace('.pt', '.json')
    assert done == [path + '.tmp', manifest + '.tmp', path, str(tmp_path), manifest, str(tmp_path)]
