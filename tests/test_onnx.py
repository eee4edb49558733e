"""ONNX files compute the same in onnxruntime, for every architecture, batch and length."""

import sys

import onnxruntime
import pytest
import torch

from architectures import combined, describe
from helpers import ARCHITECTURES, POST, awake, tokens
from lib import write_onnx
from lib.errors import UserError

PAIRS = {'eot_token': 3, 'turns': 2, 'prefix_lm': True, 'ngram': 3, 'ngram_rows': 97}
SHAPES = [(1, 1), (1, 2), (3, 16), (2, 8), (5, 7)]


def check(model, folder, shapes=SHAPES):
    """Ids are low, so that a row has several <|endoftext|>."""
    write_onnx.write_onnx(model, folder / 'model.onnx')
    session = onnxruntime.InferenceSession(folder / 'model.onnx')
    for i, shape in enumerate(shapes):
        idx = tokens(*shape, vocab_size=6, seed=i)
        (found,) = session.run(None, {'input_ids': idx.numpy()})
        with torch.no_grad():
            expected, _ = model(idx, idx)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_model_with_documents_and_ngrams_computes_the_same(tmp_path):
    model = awake(
        n_layer=1,
        position='rope',
        n_kv_head=2,
        qk_norm='gain',
        logit_softcap=5.0,
        ngram=2,
        ngram_rows=97,
        eot_token=3,
    )
    check(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.slow
@pytest.mark.parametrize('options', [*ARCHITECTURES, POST, PAIRS, *combined()], ids=describe)
def test_every_architecture_computes_the_same(options, tmp_path):
    check(awake(**{'n_layer': 1, 'ngram_rows': 97} | options), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('T', [1, 2])
def test_the_shortest_contexts(T, tmp_path):
    check(awake(n_layer=1, block_size=T), tmp_path, [(1, 1), (3, T)])


@pytest.mark.slow
def test_weights_of_a_large_model_are_in_a_second_file(tmp_path, monkeypatch):
    """Tied weights are stored once."""
    monkeypatch.setattr(write_onnx, 'MAX_PROTOBUF', 100_000)
    model = awake(n_layer=1, vocab_size=3000)
    check(model, tmp_path)
    data = tmp_path / 'model.onnx.data'
    assert data.stat().st_size <= 1.05 * sum(p.nbytes for p in model.parameters())


def test_without_the_packages_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(UserError, match='^--format=onnx needs .*: pip install onnx onnxscript$'):
        write_onnx.write_onnx(awake(), tmp_path / 'model.onnx')
