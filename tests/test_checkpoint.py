"""Checkpoints are complete or absent, and loading one never runs code."""

import json
import math
import os
import pickle
import threading
import time
from dataclasses import asdict

import pytest
import safetensors.torch
import torch
import transformers

import checkpoint as ckpt
from helpers import Evil
from lib import formats
from lib import run as lib_run
from lib.errors import UserError
from lib.files import lock
from model import GPT, GPTConfig


def tiny_model(**options):
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{'block_size': 8, 'vocab_size': 5, 'n_layer': 1, 'n_head': 2, 'n_embd': 8} | options
        )
    )


def save(folder, step, val_loss=None, model=None, keep_last=2, **options):
    model = model or tiny_model()
    return ckpt.save(
        folder,
        ckpt.Checkpoint(
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


def test_checkpoint_save_keeps_newest_and_best(tmp_path):
    for step, val_loss in enumerate((5.0, 3.0, 1.0, 2.0, 4.0, None)):
        save(tmp_path, step, val_loss)
    assert sorted(p.name for p in tmp_path.glob('*.pt')) == [f'ckpt_{s:08d}.pt' for s in (2, 4, 5)]
    assert [m['step'] for m in ckpt.manifests(tmp_path)] == [5, 4, 2]
    assert ckpt.load(tmp_path).step == 5
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ['.json'] * 3 + ['.pt'] * 3


def test_best_is_the_best_on_the_data_of_the_newest(tmp_path):
    """A run that was resumed on other data: its losses do not compare with those before."""
    losses = ((1, 1.0, 'old'), (2, 5.0, 'new'), (3, 4.0, 'new'), (4, 6.0, 'new'))
    for step, val_loss, data in losses:
        save(tmp_path, step, val_loss, environment={'data': data}, keep_last=1,
             config={'always_save_checkpoint': False})
    assert [m['step'] for m in ckpt.manifests(tmp_path)] == [4, 3]
    assert ckpt.load(tmp_path, 'best').step == ckpt.load(tmp_path, 'auto').step == 3
    ckpt_path = tmp_path / 'ckpt_00000004.pt'
    (tmp_path / 'ckpt_00000003.pt').unlink()
    (tmp_path / 'ckpt_00000003.json').unlink()
    assert ckpt.load(tmp_path, 'best').path == str(ckpt_path)


def test_checkpoint_save_keeps_best_when_loss_diverges(tmp_path):
    for step, val_loss in enumerate((4.0, 3.0, math.nan, math.nan, math.nan)):
        save(tmp_path, step, val_loss, config={'always_save_checkpoint': False})
    assert [m['step'] for m in ckpt.manifests(tmp_path)] == [4, 3, 1]
    assert ckpt.load(tmp_path, 'auto').step == 1


def test_checkpoint_save_keeps_new_file_despite_damaged_later_one(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 3).write_bytes(b'garbage')
    assert ckpt.load(tmp_path).step == 1
    assert save(tmp_path, 2, keep_last=1).exists()
    assert ckpt.load(tmp_path).step == 2


def test_checkpoint_load_verifies_renamed_file(tmp_path):
    path = save(tmp_path, 1)
    for suffix in ('.pt', '.json'):
        path.with_suffix(suffix).rename(tmp_path / f'best{suffix}')
    assert ckpt.load(tmp_path / 'best.pt').step == 1
    size = (tmp_path / 'best.pt').stat().st_size
    with open(tmp_path / 'best.pt', 'ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match=f'{size + 1:,} bytes instead of {size:,}'):
        ckpt.load(tmp_path / 'best.pt')


@pytest.mark.parametrize(
    'change',
    [
        {'model_config': {'n_embd': '8'}},
        {'model_config': None},
        {'model_config': {}},
        {'step': 'x'},
        {'step': -5},
        {'config': None},
        {'val_loss': 'x'},
        {'optimizer': [1]},
        {'model': {1: 2}},
    ],
)
def test_checkpoint_load_rejects_invalid_fields(tmp_path, change):
    path = save(tmp_path, 1)
    path.with_suffix('.json').unlink()
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(UserError, match='ckpt_00000001.pt'):
        ckpt.load(path).build_model()


def test_checkpoint_load_prefers_best_if_only_improvements_were_saved(tmp_path):
    for step, val_loss in ((1, 1.0), (2, 2.0)):
        save(tmp_path, step, val_loss, config={'always_save_checkpoint': False})
    assert ckpt.load(tmp_path).step == 2
    assert ckpt.load(tmp_path, 'auto').step == 1
    save(tmp_path, 3, 3.0, config={'always_save_checkpoint': True})
    assert ckpt.load(tmp_path, 'auto').step == 3


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'missing', 'manifest'])
def test_checkpoint_load_skips_and_reports_damaged_file(tmp_path, damage, capsys):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
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


def test_checkpoint_save_cleans_up_after_failed_save(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(
        os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
    )
    with pytest.raises(UserError, match='No space left'):
        save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert ckpt.load(tmp_path).step == 1


@pytest.mark.parametrize('content', ['evil', 'evil_inside', 'garbage', 'list', 'text', 'numbers'])
def test_checkpoint_load_never_runs_pickled_code(tmp_path, content):
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


def write_nanogpt_checkpoint(path, prefix=''):
    """Write a ckpt.pt as nanoGPT does, after 3 steps; returns the model."""
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
            'config': {
                'batch_size': 2,
                'gradient_accumulation_steps': 4,
                'dataset': 'none',
                'device': 'cuda',
            },
        },
        path,
    )
    return model


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_checkpoint_load_reads_nanogpt_checkpoint(tmp_path, prefix):
    model = write_nanogpt_checkpoint(tmp_path / 'ckpt.pt', prefix)
    for where in (tmp_path, tmp_path / 'ckpt.pt'):
        restored = ckpt.load(where)
        assert (restored.step, restored.samples_seen, restored.val_loss) == (3, 24, 1.5)
        loaded = restored.build_model().eval()
        idx = torch.arange(5)[None]
        assert torch.equal(loaded(idx, idx)[0], model.eval()(idx, idx)[0])
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_load_model_returns_eval_model_and_tokenizer(tmp_path):
    model = tiny_model(dropout=0.5)
    path = save(tmp_path, 1, model=model)
    for where in (tmp_path, str(tmp_path), path):
        loaded, characters = ckpt.load_model(where)
        assert not loaded.training and loaded.config.dropout == 0.0
        assert characters.decode([0, 4]) == 'ae'
        idx = torch.arange(5)[None]
        assert torch.equal(loaded(idx)[0], model.eval()(idx)[0])


def test_read_safetensors_matches_safetensors(tmp_path):
    tensors = {
        'a': torch.randn(3, 4),
        'b': torch.arange(5),
        'c': torch.randn(2).bfloat16(),
        'd': torch.tensor(True),
        'e': torch.zeros(0),
    }
    safetensors.torch.save_file(tensors, tmp_path / 'x.safetensors', metadata={'k': 'v'})
    restored = formats.read_safetensors(tmp_path / 'x.safetensors')
    assert restored.keys() == tensors.keys()
    for name in tensors:
        torch.testing.assert_close(restored[name], tensors[name], rtol=0, atol=0)
    content = (tmp_path / 'x.safetensors').read_bytes()
    for broken in (
        content[:-4],
        content[:20],
        b'',
        b'\xff' * 100,
        (10**6).to_bytes(8, 'little') + b'{}',
        (2).to_bytes(8, 'little') + b'[]',
    ):
        (tmp_path / 'x.safetensors').write_bytes(broken)
        with pytest.raises(UserError, match='x.safetensors'):
            formats.read_safetensors(tmp_path / 'x.safetensors')


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model_type': 'mistral'}, 'mistral'),
        ({'model_type': 'llama'}, 'max_position_embeddings'),
        ({'activation_function': 'tanh'}, 'tanh'),
        ({'n_inner': 7}, 'do not fit'),
        ({'n_embd': 12}, 'do not fit'),
        ({'n_layer': 9}, 'do not fit'),
    ],
)
def test_checkpoint_load_rejects_other_huggingface_models(tmp_path, change, message):
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=1,
            n_head=2,
            n_embd=8,
            vocab_size=5,
            n_positions=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text()) | change
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        ckpt.load(tmp_path).build_model()


def test_lock_rejects_second_writer(tmp_path):
    held = lock(tmp_path, 'x')
    with pytest.raises(UserError, match='another process'):
        lock(tmp_path, 'x')
    held.close()
    lock(tmp_path, 'x').close()


def test_set_aside_moves_earlier_run(tmp_path, capsys):
    save(tmp_path, 1)
    (tmp_path / 'log.jsonl').write_text('{"step": 0}\n')
    (tmp_path / 'notes.txt').write_text('mine')
    lib_run.set_aside(tmp_path)
    assert ckpt.load(tmp_path / 'earlier-1').step == 1
    assert (tmp_path / 'earlier-1' / 'log.jsonl').exists()
    assert not list(tmp_path.glob('ckpt*'))
    assert (tmp_path / 'notes.txt').exists()
    assert 'earlier-1' in capsys.readouterr().out
    lib_run.set_aside(tmp_path)
    save(tmp_path, 2)
    lib_run.set_aside(tmp_path)
    assert ckpt.load(tmp_path / 'earlier-2').step == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    # left by a run that was killed before its first checkpoint
    (tmp_path / 'log.jsonl').write_text('{"step": 0}\n')
    lib_run.set_aside(tmp_path)
    assert (tmp_path / 'earlier-3' / 'log.jsonl').exists()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_weights_that_were_moved_aside_are_found_there(tmp_path):
    """init_from in config.py, which repeats the run."""
    out_dir, link = tmp_path / 'out', tmp_path / 'link'
    link.symlink_to(out_dir)
    out_dir.mkdir()
    save(out_dir, 1)
    kept = lib_run.set_aside(out_dir)
    (out_dir / 'mine.pt').touch()
    for path in (out_dir, link):
        assert lib_run.moved(str(path), str(out_dir), kept) == str(kept)
    old = lib_run.moved(str(out_dir / 'ckpt_00000001.pt'), str(out_dir), kept)
    assert ckpt.load(old).step == 1
    for path in ('scratch', 'gpt2', str(out_dir / 'mine.pt'), str(kept), str(tmp_path)):
        assert lib_run.moved(path, str(out_dir), kept) == path


def test_cut_log_drops_steps_after_resume_point(tmp_path):
    (tmp_path / 'log.jsonl').write_bytes(
        b'{"step": 0}\n\xff garbage}\n[1]\n{"step": 1}\n{"step": 2}\n{"step": 1, "lo'
    )
    lib_run.cut_log(tmp_path, 2)
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 0}\n{"step": 1}\n'


def test_checkpoint_finds_tokenizer_of_nanogpt_dataset(tmp_path):
    write_nanogpt_checkpoint(tmp_path / 'ckpt.pt')
    restored = ckpt.load(tmp_path)
    restored.config['dataset'] = str(tmp_path / 'data')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'meta.pkl').write_bytes(
        pickle.dumps({'vocab_size': 5, 'itos': dict(enumerate('abcde'))})
    )
    (tmp_path / 'data' / 'train.bin').write_bytes(b'')
    assert restored.get_tokenizer().decode([0, 4]) == 'ae'


def test_checkpoint_finds_the_data_of_a_clone_of_nanogpt(tmp_path):
    """out-x/ckpt.pt and data/x/meta.pkl, wherever sample.py runs."""
    (tmp_path / 'nanoGPT' / 'out-x').mkdir(parents=True)
    write_nanogpt_checkpoint(tmp_path / 'nanoGPT' / 'out-x' / 'ckpt.pt')
    restored = ckpt.load(tmp_path / 'nanoGPT' / 'out-x')
    restored.config['dataset'] = 'some_letters'
    with pytest.raises(UserError, match='5 tokens.*copy the meta.pkl of its data set to data/some'):
        restored.get_tokenizer()
    folder = tmp_path / 'nanoGPT' / 'data' / 'some_letters'
    folder.mkdir(parents=True)
    meta = {'vocab_size': 5, 'itos': dict(enumerate('abcde'))}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert restored.get_tokenizer().decode([0, 4]) == 'ae'


@pytest.mark.parametrize('copy', [True, False])
def test_async_save_snapshots_weights_at_call_time(tmp_path, monkeypatch, copy):
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    write_out, running = torch.save, []

    def slow_save(*args, **kwargs):
        running.append(len(running))
        time.sleep(0.2)
        write_out(*args, **kwargs)
        running.append('done')

    monkeypatch.setattr(torch, 'save', slow_save)
    saver = ckpt.Saver(tmp_path, copy=copy)
    saver.save(ckpt.Checkpoint(asdict(model.config), model.state_dict(), 1))
    # in the background, or written before the weights change
    assert running in ([], [0]) if copy else running == [0, 'done']
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    saver.save(
        ckpt.Checkpoint(asdict(model.config), model.state_dict(), 2)
    )  # waits for the first one
    assert running[:2] == [0, 'done']
    saver.wait()
    assert running == [0, 'done', 2, 'done']
    for step, expected in ((1, before), (2, before + 1)):
        restored = ckpt.load(tmp_path / f'ckpt_0000000{step}.pt')
        assert torch.equal(restored.model['lm_head.weight'], expected)
        assert restored.build_model().transformer.wte.weight is not None
        storage = {
            restored.model[name].untyped_storage().data_ptr()
            for name in ('lm_head.weight', 'transformer.wte.weight')
        }
        assert len(storage) == 1  # tied weights are stored once


def test_save_without_a_copy_returns_before_the_file_is_hashed(tmp_path, monkeypatch):
    model = tiny_model()
    returned, hashed = threading.Event(), []
    sha256_of = ckpt.files.sha256_of

    def wait_and_hash(path):
        hashed.append(returned.wait(10))
        return sha256_of(path)

    monkeypatch.setattr(ckpt.files, 'sha256_of', wait_and_hash)
    saver = ckpt.Saver(tmp_path, copy=False)
    saver.save(ckpt.Checkpoint(asdict(model.config), model.state_dict(), 1))
    returned.set()
    saver.wait()
    assert hashed == [True] and ckpt.load(tmp_path).step == 1


def test_checkpoint_save_renames_after_fsync(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, 'fsync', lambda fd: (done.append(os.readlink(f'/proc/self/fd/{fd}')), sync(fd))
    )
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(str(b)), rename(a, b)))
    path = str(save(tmp_path, 1))
    manifest = path.replace('.pt', '.json')
    assert done == [path + '.tmp', manifest + '.tmp', path, str(tmp_path), manifest, str(tmp_path)]
