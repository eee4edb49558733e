"""The loss: chunked, smoothed, and with ignored targets."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import tiny, tokens


@pytest.mark.parametrize('multiple', [1, 64])
def test_chunked_loss_matches_plain_loss_and_gradients(monkeypatch, multiple):
    idx, targets = tokens(3, 16), tokens(3, 16, seed=2)
    targets[0, :7] = -1
    for options in ({}, {'tie_weights': False, 'logit_softcap': 3.0}, {'label_smoothing': 0.2}):
        model = tiny(**options).train('label_smoothing' in options)
        with torch.no_grad():
            model.lm_head.weight.mul_(30)  # spread the logits
        results = []
        monkeypatch.setattr('lib.loss.PAD_VOCAB_TO', {'cpu': multiple})
        monkeypatch.setattr('lib.loss.MAX_FP32', 3 * 40)  # 7 rows in threes
        for at_once, flags in ((2**25, {}), (7 * 40, {'return_logits': False})):
            model.max_logits = at_once
            loss = model(idx, targets, **flags)[1]
            model.zero_grad()
            (3 * loss).backward()
            results.append((loss, [p.grad.clone() for p in model.parameters()]))
        (plain, gradients), (chunked, same_gradients) = results
        if 'label_smoothing' in options:
            # smoothing acts only in training
            assert abs(plain - model.eval()(idx, targets)[1]) > 0.1
            model.train()
        torch.testing.assert_close(chunked, plain, atol=0, rtol=1e-6)
        for a, b in zip(same_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6 * b.abs().max().item(), rtol=0)
        monkeypatch.setattr(
            'torch.zeros_like', None
        )  # allocates the gradients, which evaluation must not
        with torch.no_grad():
            assert torch.equal(model(idx, targets, return_logits=False)[1], chunked)
        monkeypatch.undo()


def test_chunked_loss_never_materializes_all_logits():
    model = tiny(vocab_size=1000)
    model.max_logits = 2**16
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if torch.is_tensor(tensor) and 1000 in tensor.shape:
                    largest = max(largest, tensor.numel())
            return result

    idx = tokens(64, 16, vocab_size=1000)  # a million logits
    with Largest():
        model(idx, idx, return_logits=False)[1].backward()
    assert 2**15 < largest <= 2**16 * 1.01


def test_few_logits_are_in_fp32_at_once(monkeypatch):
    monkeypatch.setattr('lib.loss.MAX_FP32', 2**13)
    model = tiny(vocab_size=1000)
    model.max_logits = 2**16
    rows = set()

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.shape[1:] == (1000,):
                rows.add((result.dtype, len(result)))
            return result

    idx = tokens(16, 16, vocab_size=1000)
    with Rows(), torch.autocast('cpu', torch.bfloat16):
        model(idx, idx, return_logits=False)
    assert max(n for dtype, n in rows if dtype == torch.float32) == 8
    assert max(n for dtype, n in rows if dtype == torch.bfloat16) == 64


def test_tied_weights_take_one_gradient_of_their_size():
    model = tiny(vocab_size=5000)
    model.max_logits = 2**16
    weight, idx = model.lm_head.weight, tokens(4, 16, vocab_size=5000)
    large = set()

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.shape == weight.shape:
                large.add(result.data_ptr())
            return result

    with Large():
        model(idx, idx, return_logits=False)[1].backward()
    assert large - {weight.data_ptr()} == {weight.grad.data_ptr()}


def test_losses_of_one_backward_add_up():
    model = tiny(vocab_size=1000)
    model.max_logits = 2**14
    batches = [tokens(4, 16, vocab_size=1000, seed=seed) for seed in range(3)]

    def loss(idx):
        return model(idx, idx.roll(1), return_logits=False)[1]

    for idx in batches:
        loss(idx).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(map(loss, batches)).backward()
    for p, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


def test_loss_ignores_targets_of_minus_one():
    model = tiny()
    idx, targets = tokens(2, 8), tokens(2, 8, seed=2)
    targets[:, ::2] = -1
    logits, loss = model(idx, targets)
    expected = -logits.log_softmax(-1)[:, 1::2].gather(2, targets[:, 1::2, None]).mean()
    torch.testing.assert_close(loss, expected)
