"""Write a GPT as an ONNX file, for onnxruntime, also in a browser: every architecture, by
torch.onnx. Needs the packages onnx and onnxscript.
"""
import contextlib
import logging
import warnings
from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from lib.errors import UserError, os_errors
from model import GPT

MAX_PROTOBUF = 2**31 - 2**24  # bytes; weights of larger models go into a second file


class Logits(nn.Module):
    """input_ids (B, T) -> logits (B, T, V)"""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, input_ids)[0]  # with targets it returns all positions


def write_onnx(model, path):
    """Write a GPT as path, and path + '.data' if it is larger than 2 GB: input_ids (B, T) int64,
    T <= block_size -> logits (B, T, V) fp32. Raises UserError."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError('--format=onnx needs two packages: pip install onnx onnxscript') from None
    T = model.config.block_size
    shapes = {0: torch.export.Dim('batch')}
    if T > 1:
        shapes[1] = torch.export.Dim('length', max=T)
    size = sum(p.nbytes for p in model.parameters())
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Logits(exportable(model)), (torch.zeros(2, min(3, T), dtype=torch.long),),
            input_names=['input_ids'], output_names=['logits'],
            dynamic_shapes={'input_ids': shapes}, dynamo=True, verbose=False)
        with os_errors(path):
            program.save(path, external_data=size > MAX_PROTOBUF)


def exportable(model):
    """A GPT with the same weights, made of operations that ONNX has for every shape."""
    config = replace(model.config, attention='math', activation_checkpointing=False)
    with torch.device('meta'):  # no memory for weights that are replaced
        copy = GPT(config)
    copy.load_state_dict(model.state_dict(), assign=True)
    if config.tie_weights:
        copy.transformer.wte.weight = copy.lm_head.weight
    if config.ngram > 1:
        ngram = copy.transformer.ngram  # F.embedding_bag would become a loop over tokens
        ngram.forward = lambda tokens: F.embedding(ngram.hash(tokens), ngram.tables.weight).sum(2)
    return copy.float().eval()


@contextlib.contextmanager
def quiet():
    """Without the exporter's notes on what it need not do."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
