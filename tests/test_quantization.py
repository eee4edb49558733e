"""sample.py --quantize=auto: int8 on a CPU where it costs the model nothing to speak of."""

import copy

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import checkpoint as ckpt
from helpers import tiny
from lib import bins, quantization
from lib.linear import Int8Linear, quantize
from lib.quantization import compare, quantize_if_it_pays
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of what is remembered. Small models count too, however fast int8 is here."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(quantization, 'MIN_PARAMS', 0)
    monkeypatch.setattr(quantization, 'MIN_SPEEDUP', 0)
    return tmp_path / 'plaingpt' / 'int8'


def with_outliers(model, size=3000):
    """The same function, but one channel before each MLP is as large as in some real models
    (Dettmers et al. 2022): int8 inputs lose the others."""
    for block in model.transformer.h:
        block.ln_2.weight.data[3] *= size
        block.mlp.c_fc.weight.data[:, 3] /= size
    return model


def talkative(**options):
    """A model whose predictions depend on its MLPs."""
    model = tiny(n_embd=64, **options).eval()
    model.lm_head.weight = torch.nn.Parameter(0.3 * model.lm_head.weight.data)
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data.normal_(std=0.1)
        block.mlp.c_proj.weight.data.normal_(std=0.1)
    return model


def test_int8_is_chosen_unless_it_costs_quality():
    idx = torch.tensor([[1, 2, 3]])
    model = talkative()
    expected = model(idx)[0]
    model, gain = quantize_if_it_pays(model, 0)
    assert isinstance(model.lm_head, Int8Linear) and gain.startswith('loss +0.0')
    assert model.transformer.wte.weight.dtype == torch.float32
    model = with_outliers(talkative())
    torch.testing.assert_close(model(idx)[0], expected)
    chosen, gain = quantize_if_it_pays(model, 0)
    assert chosen is model and gain is None
    torch.testing.assert_close(model(idx)[0], expected)


def test_added_loss_is_the_divergence_of_the_predictions():
    model = with_outliers(talkative())
    int8 = quantize(copy.deepcopy(model))
    n_new = model.config.block_size - 1
    text = model.generate(torch.zeros(8, 1, dtype=torch.long), n_new, seed=0)
    with torch.no_grad():
        p, q = (Categorical(logits=m(text, text)[0]) for m in (model, int8))
    expected = kl_divergence(p, q).mean() / p.entropy().mean()
    assert expected > 0.001
    assert compare(model, int8, 0)[1] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize('outliers', [False, True])
def test_choice_is_made_once_per_model(monkeypatch, cache, outliers):
    make = (lambda: with_outliers(talkative())) if outliers else talkative
    _, gain = quantize_if_it_pays(make(), 0)
    (path,) = cache.iterdir()
    path.write_text('[123.0, 0.0005]')  # another answer
    model, again = quantize_if_it_pays(make(), 0)
    assert isinstance(model.lm_head, Int8Linear) and again == 'loss +0.05%, 123.0 times as fast'
    path.write_text('[123.0, 0.5]')
    model, again = quantize_if_it_pays(make(), 0)
    assert not isinstance(model.lm_head, Int8Linear) and again is None
    assert path.read_text() == '[123.0, 0.5]' and (gain is None) == outliers
    quantize_if_it_pays(make(), 0, n_samples=10)  # timed anew
    assert len(list(cache.iterdir())) == 2
    changed = make()
    changed.transformer.h[1].mlp.c_proj.weight.data.mul_(1.5)
    quantize_if_it_pays(changed, 0)
    assert len(list(cache.iterdir())) == 3


def test_damaged_memory_is_replaced(cache):
    quantize_if_it_pays(talkative(), 0)
    (path,) = cache.iterdir()
    damaged = ('', '[1', '{}', '[1.5]', '["a", 1]', 'null', '[NaN, 0.0]', '"90"', '{"9": 1}',
               f'[1{"0" * 400}, 0.0]', b'\xff')  # fmt: skip
    for content in damaged:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        _, gain = quantize_if_it_pays(talkative(), 0)
        assert gain and path.read_bytes() != content


def test_speed_is_measured_with_as_many_samples():
    batch_sizes, model = [], talkative()
    model.register_forward_pre_hook(lambda model, inputs: batch_sizes.append(len(inputs[0])))
    compare(model, quantize(copy.deepcopy(model)), 0, n_samples=3)
    assert set(batch_sizes) == {1, 3, 8}  # prefill of one prompt, decoding, loss


def test_nothing_can_be_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    (tmp_path / 'file').touch()
    model, gain = quantize_if_it_pays(talkative(), 0)
    assert isinstance(model.lm_head, Int8Linear) and gain


def test_small_model_is_not_measured(cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
    model = talkative()
    assert quantize_if_it_pays(model, 0) == (model, None) and not cache.exists()


@pytest.mark.slow
def test_sample_says_what_it_chose_and_repeats_it(run, tmp_path, char_data):
    torch.manual_seed(0)
    tokenizer = bins.open_tokenizer(char_data)
    config = GPTConfig(n_layer=3, n_head=8, n_embd=1024, block_size=64,
                       vocab_size=tokenizer.vocab_size)
    model = GPT(config)
    ckpt.save(tmp_path, ckpt.Checkpoint(vars(config), model.state_dict(),
                                        tokenizer=tokenizer.to_dict()))
    command = ('sample.py', f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=20')
    env = {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    first, second = (run(*command, env=env) for _ in range(2))
    assert first.stdout == second.stdout
    about = first.stderr.splitlines()[0]
    assert about == second.stderr.splitlines()[0]
    assert len(list((tmp_path / 'cache' / 'plaingpt' / 'int8').iterdir())) == 1
    chosen = 'int8' if '; cpu, int8 (loss +0.0' in about else 'none'
    result = run(*command, f'--quantize={chosen}', env=env)
    assert result.stdout == first.stdout
    plain = run(*command, '--quantize=none', env=env).stderr
    assert 'int8' not in plain.splitlines()[0]
