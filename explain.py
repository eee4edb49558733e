"""Look inside a GPT: write one self-contained HTML page that shows what a checkpoint computes.

The page opens from disk and loads nothing from the network.

    python explain.py --out_dir=out-quickstart --start="def main("
    python explain.py --out_dir=out-quickstart --start=FILE:prompt.txt --checkpoints=all
    python explain.py --out_dir=out-quickstart --start="def main(" --serve
    python explain.py --out_dir=out-quickstart --start="def main(" --compare=out-other
    python explain.py --out_dir=out-scan --start="jump twice<|endoftext|>JUMP JUMP"
"""
from dataclasses import dataclass
from typing import Literal

from configurator import FilePath, Port, Text, Which, configure
from lib.errors import UserError, os_errors, plural, require, user_errors


@dataclass
class Config:
    # model
    init_from: FilePath = 'resume'  # resume (out_dir), gpt2, ..., gpt2-xl, or a path to weights
    out_dir: FilePath = 'out'  # folder of a run; the page is its explain.html
    checkpoint: Which = 'auto'  # last, best (by val loss) or a step; auto: docs/sampling.md
    checkpoints: Literal['last', 'all'] = 'last'  # all: also plot head scores over training
    compare: FilePath = ''  # show another one too: a run's folder, a file, ...; empty: none
    # text
    start: Text = ''  # the text, or FILE:path; only its last min(256, block_size) tokens are used
    # system
    serve: bool = False  # serve the page on this machine instead, with a text box for new texts
    port: Port = 8337  # for --serve, on 127.0.0.1; 0: any free port


def check(config):
    """Validate the config. Raises UserError."""
    require(config.start, 'start is empty: give a text, --start="Once upon a time" '
                          'or --start=FILE:path')
    require(config.init_from and config.out_dir, 'init_from or out_dir is empty: name a folder')
    require(config.checkpoints == 'last' or config.init_from == 'resume',
            f'checkpoints = all needs the checkpoints of a run: '
            f'drop init_from = {config.init_from!r} and set --out_dir')


if __name__ == '__main__':  # before the slow imports, so that --help and typos answer at once
    with user_errors():
        config, _ = configure(Config)
        check(config)

import base64
import json
import math
import os
from pathlib import Path

import torch
from torch.nn import functional as F

import checkpoint as ckpt
import interpret
from interpret.answers import Answers, circuit_tokens, curve_around, explained_tokens
from interpret.causal import collect_ablations
from interpret.compare import collect_comparison, collect_other, load_other
from interpret.graph import collect_graphs
from interpret.snippets import collect_snippets
from interpret.step import collect_step
from lib.files import find, printable, weights_of, write_text
from lib.page import (
    DATA,
    compress,
    join_streams,
    nan_to_none,
    pack_answer,
    page_template,
    root_in_8_bits,
    to_half,
)
from lib.page_weights import logit_difference, weights_for_page
from lib.run import read_log
from lib.serve import Server, serve
from lib.tokenizer import END_OF_TEXT, encode_prompt, encode_turns, read_prompt

MAX_TOKENS = 256  # of the text
MAX_PAGES = 4  # served pages that can be answered: each keeps the activations of its text
MAX_PAGE_BYTES = 20_000_000  # a larger page drops arrays in the order of DROPPABLE
MAX_DATA_WITH_WEIGHTS = 1_500_000  # if the page has the weights: it computes what is dropped
CODE_BYTES = 500_000  # upper bound for style and scripts
DROPPABLE = {
    'by_source': 'head contributions by source token',
    'q': 'attention scores term by term',
    'snippet_ids': 'snippets from the validation data',
    'embeddings': 'embedding vectors',
    'compositions': 'head composition',
    'promoted': 'tokens promoted by each head',
    'neurons': 'neurons',
    'attention': 'attention patterns',
}
DROPPED_TOGETHER = {
    'promoted': ('promoted_by',),
    'q': ('k',),
    'snippet_ids': ('neuron_best', 'neuron_places', 'head_best', 'head_places'),
    'neurons': ('neuron_pre', 'neuron_post', 'neuron_tokens', 'neuron_gates', 'curve'),
}
# histogram of the logits outside the top 512: counts by distance from the largest logit
TAIL_BINS = 2048
BINS_PER_NAT = 32
MODEL_KEYS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'position', 'norm', 'norm_position',
              'activation', 'qk_norm', 'logit_softcap', 'bias', 'eot_token', 'turns', 'prefix_lm',
              'ngram')


# Data for the page --------------------------------------------------------------------------------
# Each function returns (facts, arrays): JSON-serializable values, and {name: tensor} for web/*.js.

def collect_weights(model, tokenizer):
    """(facts, arrays) that depend on the weights only."""
    config = model.config
    vocab_size = tokenizer.vocab_size
    vocabulary = json.dumps([token_text(t) for t in tokenizer.token_bytes], ensure_ascii=False)
    eigenvalues = interpret.ov_eigenvalues(model, vocab_size)
    scores, losses = interpret.head_scores(model, vocab_size, eigenvalues)
    compositions = interpret.composition_scores(model)
    facts = {
        'model': {key: getattr(config, key) for key in MODEL_KEYS},
        'n_kv_head': config.kv_heads, 'head_size': config.head_dim,
        'parameters': model.get_num_params(False),
        'vocab_size': vocab_size,
        'tables': model.transformer.ngram.tables.weight.numel() if config.ngram > 1 else 0,
        'score_names': list(scores),
    }
    arrays = {
        # stored as an array so that it is compressed too
        'vocabulary': torch.tensor(list(vocabulary.encode()), dtype=torch.uint8),
        'scores': torch.stack(list(scores.values())),  # (4, L, nh)
        'repeat_losses': losses,  # (2 length - 1,)
        'compositions': to_half(torch.stack(list(compositions.values()))),  # (3, L nh, L nh)
        'eigenvalues': to_half(torch.view_as_real(eigenvalues)),  # (L, nh, hs, 2)
    }
    if vocab_size <= 512:
        whole, direct = interpret.bigrams(model, torch.arange(vocab_size), vocab_size)
        arrays['bigrams_whole'] = root_in_8_bits(whole)  # (V, V)
        arrays['bigrams_direct'] = root_in_8_bits(direct)
    return facts, arrays


def collect_text(model, tokenizer, ids, means=None, checkpoint=None, other=None):
    """(facts, arrays) of a forward pass over ids, a list of T token ids.

    means: of heads and neurons, for ablations; None: those over the text. checkpoint: where model
    is from, for a training step by its optimizer. other: a model to compare. Raises UserError if
    the logits are not finite.
    """
    vocab_size = tokenizer.vocab_size
    idx = torch.tensor([ids])
    trace = interpret.run(model, idx)
    expected, _ = model(idx, idx)
    require(expected.isfinite().all(),
            'the logits of this model are not finite: its weights are too large')
    logits = trace.logits[0, :, :vocab_size]  # (T, V)
    next_tokens = idx[0, 1:]
    # the token after the last one is unknown: explain the most likely one instead
    target = torch.cat((next_tokens, logits[-1:].argmax(dim=-1)))  # (T,)
    distinct = list(dict.fromkeys(ids))
    text = tokenizer.decode(ids)
    if model.config.turns:  # as in --start
        text = text.removeprefix(END_OF_TEXT).removesuffix(END_OF_TEXT)
    facts = {
        'ids': ids,
        'text': text,
        'distinct': distinct,
        'difference': (trace.logits - expected).abs().max().item(),
        'largest': expected.abs().max().item(),
    }
    arrays = {}
    for more_facts, more_arrays in (
        collect_next_token(logits, next_tokens),
        collect_stream(model, trace, vocab_size),
        collect_attribution(model, trace, logits, target),
        collect_embeddings(model, trace, distinct, vocab_size),
        collect_heads(model, trace, target, vocab_size),
        collect_neurons(model, trace, vocab_size),
        collect_circuits(model, trace, distinct, vocab_size),
        collect_ablations(model, trace, target, vocab_size, means),
        collect_graphs(model, trace, target),
        collect_comparison(other, ids, logits, target),
        collect_step(model, ids, target, vocab_size, checkpoint),
    ):
        facts |= more_facts
        arrays |= more_arrays
    facts['of_text'] = {'facts': list(facts), 'arrays': list(arrays)}  # not of the weights
    return facts, arrays


def collect_next_token(logits, next_tokens):
    """Loss and rank of next_tokens (T - 1,), and the logits (T, V).

    If those are too many: all logits at the last position; at the others the top 512 and a
    histogram of the rest.
    """
    T, vocab_size = logits.shape
    next_logits = logits[:-1].gather(1, next_tokens[:, None])
    facts = {}
    arrays = {
        'loss': F.cross_entropy(logits[:-1], next_tokens, reduction='none'),
        'rank': 1 + (logits[:-1] > next_logits).sum(dim=1),
    }
    if T * vocab_size <= 2**16:
        arrays['logits'] = logits
        return facts, arrays
    facts['bins_per_nat'] = BINS_PER_NAT
    arrays['last_logits'] = logits[-1]
    arrays['top_logits'], arrays['top_ids'] = logits.topk(min(512, vocab_size))
    distance = logits.max(dim=1, keepdim=True).values - logits
    bins = (distance * BINS_PER_NAT).floor().clamp(max=TAIL_BINS - 1).long()
    counts = torch.ones_like(bins).scatter_(1, arrays['top_ids'], 0)  # the top 512 do not count
    histogram = torch.zeros(T, TAIL_BINS, dtype=torch.long)
    arrays['tail'] = histogram.scatter_add_(1, bins, counts)
    return facts, arrays


def collect_stream(model, trace, vocab_size):
    """Norms of the residual stream and of everything added to it; the logit lens."""
    arrays = {f'size_{name}': x[0].norm(dim=-1) for name, x in trace.embeddings.items()}  # (T,)
    arrays['size_attn'] = trace.attn_out[:, 0].norm(dim=-1)  # (L, T)
    arrays['size_mlp'] = trace.mlp_out[:, 0].norm(dim=-1)
    arrays['size_stream'] = trace.residual[:, 0].norm(dim=-1)  # (L + 1, T)
    arrays['size_middle'] = trace.middle[:, 0].norm(dim=-1)  # (L, T) after attention
    top = [probs.topk(min(10, vocab_size))
           for probs in interpret.logit_lens(model, trace, vocab_size=vocab_size)]
    arrays['lens_ids'] = torch.stack([x.indices for x in top])  # (L + 1, T, 10)
    arrays['lens'] = to_half(torch.stack([x.values for x in top]))
    return {}, arrays


def collect_attribution(model, trace, logits, target):
    """Direct effect of each part on the logits of the target and of its strongest rivals."""
    config = model.config
    n_parts = config.n_layer * (config.n_head + 1) + 5
    tokens = explained_tokens(logits, target, n_parts)  # (T, K)
    names, parts = interpret.attribute(model, trace, tokens)
    facts = {'parts': names}
    arrays = {
        'parts': parts,  # (parts, T, K)
        'part_tokens': tokens,
        'part_logits': logits.gather(1, tokens),
    }
    return facts, arrays


def collect_embeddings(model, trace, distinct, vocab_size):
    """Embedding vectors, their nearest neighbors, and the angles of rotary positions."""
    nearest, cosines = interpret.nearest_tokens(model, torch.tensor(distinct), 8, vocab_size)
    facts = {'embeddings': list(trace.embeddings)}
    arrays = {
        'embeddings': to_half(torch.stack([x[0] for x in trace.embeddings.values()])),  # (n, T, C)
        'near': nearest,  # (N, 8)
        'cosines': to_half(cosines),
    }
    rotary = model.rotary(torch.arange(trace.idx.size(1)))
    if rotary is not None:
        cos, _ = rotary
        arrays['rotary'] = to_half(cos[0, 0])  # (T, hs/2)
    return facts, arrays


def collect_heads(model, trace, target, vocab_size):
    """Attention patterns, queries and keys, and the effect of each head on the logits."""
    mask = trace.mask[0]  # what it hides is not stored; without documents, lower triangles are
    attention = trace.attention[:, 0][..., mask]  # (L, nh, pairs), row by row
    by_source = interpret.effect_by_source(model, trace, target)[..., mask]
    ids, values = interpret.promoted(model, trace, min(5, vocab_size // 2), vocab_size=vocab_size)
    arrays = {
        'mask': mask.byte(),  # (T, T)
        'attention': root_in_8_bits(attention),
        'q': to_half(trace.q[:, 0]),  # (L, nh, T, hs)
        'k': to_half(trace.k[:, 0]),  # (L, nkv, T, hs)
        'promoted': ids,  # (L, nh, T, 10)
        'promoted_by': to_half(values),
        'by_source': to_half(by_source),
    }
    return {}, arrays


def collect_neurons(model, trace, vocab_size):
    """The most active neurons of each layer and position, the tokens they promote, and the
    activation function over the range of their pre-activations."""
    neurons = interpret.strongest_neurons(model, trace, 8)  # (L, T, 8)
    neuron_ids = [layer.unique().tolist() for layer in neurons]
    n_tokens = min(5, vocab_size // 2)
    tokens = [interpret.neuron_tokens(model, layer, torch.tensor(ids), n_tokens, vocab_size)
              for layer, ids in enumerate(neuron_ids)]
    pre = trace.pre[:, 0].gather(2, neurons)  # (L, T, 8)
    curves = [curve_around(model, layer, x) for layer, x in enumerate(pre)]
    facts = {
        'gated': interpret.is_gated(model),
        'neurons_in_a_layer': trace.post.size(-1),
        'neuron_ids': neuron_ids,  # the rows of neuron_tokens, layer by layer
    }
    arrays = {
        'neurons': neurons,
        'neuron_pre': to_half(pre),
        'neuron_post': to_half(trace.post[:, 0].gather(2, neurons)),
        'neuron_tokens': torch.cat(tokens),
        'curve': torch.stack(curves),  # (L, 2, 162): pre-activations, activations
    }
    if facts['gated']:  # post is not on the curve: it has the value as a factor
        gates = [interpret.activation_curve(model, layer, x.flatten()).view_as(x)
                 for layer, x in enumerate(pre)]
        arrays['neuron_gates'] = to_half(torch.stack(gates))
    return facts, arrays


def collect_circuits(model, trace, distinct, vocab_size):
    """QK and OV circuits among the first distinct tokens, and bigrams of all of them."""
    circuit_ids = circuit_tokens(distinct, model.config)
    scale = trace.later_scale[:-1:2].mean(dim=(1, 2))  # (L,)
    qk, ov = interpret.token_circuits(model, torch.tensor(circuit_ids), scale, vocab_size)
    arrays = {'qk': to_half(qk), 'ov': to_half(ov)}  # (L, nh, N, N)
    whole, direct = interpret.bigrams(model, torch.tensor(distinct), vocab_size)
    for name, probs in (('whole', whole), ('direct', direct)):
        top = probs.topk(min(8, vocab_size))
        arrays[f'bigram_{name}_ids'] = top.indices  # (N, 8)
        arrays[f'bigram_{name}_p'] = to_half(top.values)
    return {'circuit_ids': circuit_ids}, arrays


def token_text(token):
    """The bytes of a token as text; bytes that are not valid UTF-8 in hex."""
    try:
        return token.decode('utf-8')
    except UnicodeDecodeError:
        return '⟨' + '\xa0'.join(f'{byte:02X}' for byte in token) + '⟩'


def run_facts(checkpoint, out_dir):
    """Path, step and val loss of the checkpoint, and the training curves up to its step."""
    curves = {name: [] for name in ('loss', 'val_loss', 'lr', 'tokens_per_second')}
    for line in read_log(out_dir):
        if line['step'] > checkpoint.step:
            continue
        for name, curve in curves.items():
            value = line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                curve.append((line['step'], value))
    for name, curve in curves.items():
        stride = max(1, len(curve) // 400)
        curves[name] = curve[::-stride][::-1]  # at most about 400 points, the last one included
    return {
        'path': printable(checkpoint.path),
        'step': checkpoint.step,
        'val_loss': checkpoint.val_loss,
        'curves': curves,
    }


def collect_history(out_dir, ids, vocab_size):
    """(facts, arrays) over the checkpoints of a run: losses, and head scores (n, 4, L, nh).

    Checkpoints that cannot be loaded are skipped with a warning.
    """
    facts = {'steps': [], 'val_losses': [], 'losses': [], 'first_half': [], 'second_half': []}
    history = []
    idx = torch.tensor([ids])
    for manifest in reversed(ckpt.manifests(out_dir, ckpt.warn)):
        try:
            checkpoint = ckpt.load(Path(out_dir) / manifest['file'], mmap=True)
        except UserError as error:
            ckpt.warn(f'skipped: {error}')
            continue
        model = checkpoint.build_model(dropout=0.0).eval()
        scores, repeat_losses = interpret.head_scores(model, vocab_size)
        length = (len(repeat_losses) + 1) // 2
        loss = first_half = second_half = None
        if len(ids) > 1:
            with torch.no_grad():
                logits, _ = model(idx, idx)
            loss = F.cross_entropy(logits[0, :-1, :vocab_size], idx[0, 1:]).item()
        if length > 1:
            first_half = repeat_losses[:length - 1].mean().item()
            second_half = repeat_losses[length:].mean().item()
        facts['steps'].append(checkpoint.step)
        facts['val_losses'].append(manifest['val_loss'])
        facts['losses'].append(loss)
        facts['first_half'].append(first_half)
        facts['second_half'].append(second_half)
        history.append(torch.stack(list(scores.values())))
    arrays = {'history': to_half(torch.stack(history))} if history else {}
    return facts, arrays


# The page -----------------------------------------------------------------------------------------

def pack(facts, arrays, room):
    """(facts as JSON, arrays as base64). facts['arrays'] says where each array is.

    Arrays that would take more than room, in bytes, are left out and listed in facts['dropped'].
    """
    facts = nan_to_none(facts)
    streams = {name: compress(tensor) for name, tensor in arrays.items()}
    room -= CODE_BYTES + len(json.dumps(facts))
    dropped = []
    for name, description in DROPPABLE.items():
        computes = facts.get('engine') or facts.get('server')
        if computes and name not in facts['of_text']['arrays']:
            continue  # the page could not compute it
        size = sum(len(data) for _, _, data in streams.values()) * 4 / 3  # in base64
        if size < room:
            break
        if name in streams:
            dropped.append(description)
            for each in (name, *DROPPED_TOGETHER.get(name, ())):
                streams.pop(each, None)
    index, blob = join_streams(streams)
    facts |= {
        'arrays': index,
        'dropped': dropped,
        'largest_page': f'{MAX_PAGE_BYTES / 1e6:.0f} MB',
    }
    text = json.dumps(facts, ensure_ascii=False, separators=(',', ':'))
    return text, base64.b64encode(blob).decode()


def build_page(facts, arrays, weights=b''):
    """The HTML of the page: web/page.html with its style, scripts and data inlined.

    weights: of lib/page_weights.py, which facts['engine'] describes.
    """
    page, _ = page_template('page.html', facts.get('server', False), bool(weights))
    weights = base64.b64encode(weights).decode()
    room = MAX_DATA_WITH_WEIGHTS if weights else MAX_PAGE_BYTES
    facts_json, blob = pack(facts, arrays, room)
    facts_json = facts_json.replace('<', '\\u003c')  # no </script> inside a script
    data = (f'<script type="application/json" id="facts">{facts_json}</script>\n'
            f'<script type="text/plain" id="arrays">{blob}</script>\n')
    if weights:
        data += f'<script type="text/plain" id="weights">{weights}</script>\n'
    return page.replace(DATA, data)


def serve_pages(server, page, render, start, policy, make_answers):
    """Serve page, and render(text) for /?start=text, until Ctrl-C; start: the text of page.

    make_answers(): Answers, which each page has for itself.
    """
    pages = {}  # by the name that a page gives itself

    def answer(path, query):
        text = query.get('start')
        if path != '/':
            return None
        try:
            return 200, 'text/html', (page if text is None else render(text)).encode()
        except UserError as error:
            return 400, 'text/html', render(start, text=text, error=str(error)).encode()

    def answer_message(path, body):
        if path != '/ask':
            return None
        message = json.loads(body)
        name, kind = message.pop('page'), message.pop('kind')
        if name not in pages:
            pages[name] = make_answers()
        while len(pages) > MAX_PAGES:
            del pages[next(iter(pages))]
        return 200, 'application/octet-stream', pack_answer(pages[name].answer(kind, message))

    try:
        serve(server, answer, policy, answer_message)
    except KeyboardInterrupt:
        ckpt.warn('stopped')
        os._exit(130)  # a pass may be running: torch threads can crash a normal exit


def main(config):
    if config.init_from == 'resume':
        config.out_dir = str(find(config.out_dir))
    path = Path(config.out_dir) / 'explain.html'
    require(not path.is_dir(), f'{path} is a folder: move it, or choose another --out_dir')
    start = read_prompt(config.start)
    server = Server(config.port) if config.serve else None  # before the work, not after it
    source = weights_of(config)
    checkpoint = ckpt.load(source, config.checkpoint, mmap=True)
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).eval()
    model.requires_grad_(False)
    max_tokens = min(MAX_TOKENS, model.config.block_size)
    other = None
    if config.compare:
        other_checkpoint, other = load_other(config.compare, tokenizer, checkpoint.path)
        max_tokens = min(max_tokens, other.config.block_size)

    def encode(text):
        if model.config.turns:  # sources and targets, with <|endoftext|> between them
            ids = encode_turns(text.split(END_OF_TEXT), tokenizer)
            require(len(ids) <= max_tokens,
                    f'start has {len(ids)} tokens, but only {max_tokens} fit: '
                    f'give a shorter source or target')
            return ids
        return encode_prompt(text, tokenizer)

    ids = encode(start)
    cropped = f'the last {max_tokens} of ' if len(ids) > max_tokens else ''
    ckpt.warn(f'{checkpoint.path}: step {checkpoint.step}, '
              f'{model.get_num_params(False):,} parameters; '
              f'analyzing {cropped}{plural(len(ids), "token")}')
    if not config.serve:
        with os_errors(f'{path}: cannot write there'):  # before the work, not after it
            path.parent.mkdir(parents=True, exist_ok=True)
    facts, arrays = collect_weights(model, tokenizer)
    facts['run'] = run_facts(checkpoint, source)
    facts['live'] = config.serve
    snippet_facts, snippet_arrays, means = collect_snippets(checkpoint, model, tokenizer)
    facts |= snippet_facts
    arrays |= snippet_arrays
    if other:
        other_facts, other_arrays = collect_other(other_checkpoint, other, tokenizer.vocab_size)
        facts |= other_facts
        arrays |= other_arrays
    if config.checkpoints == 'all':
        history = collect_history(config.out_dir, ids[-max_tokens:], tokenizer.vocab_size)
        facts['history'] = history[0]
        arrays |= history[1]
    engine_facts, weights, rounded = weights_for_page(model, tokenizer) or (None, b'', None)
    facts['server'] = config.serve and not weights  # PyTorch answers what the page asks

    def render(prompt, **more_facts):
        ids = encode(prompt)
        text_facts, text_arrays = collect_text(model, tokenizer, ids[-max_tokens:], means,
                                               checkpoint, other)
        text_facts['left_out'] = max(0, len(ids) - max_tokens)
        if rounded:
            difference = logit_difference(model, rounded, torch.tensor([ids[-max_tokens:]]))
            text_facts['engine'] = engine_facts | {'difference': difference}
        return build_page(facts | text_facts | more_facts, arrays | text_arrays, weights)

    page = render(start)

    if config.serve:
        policy = page_template('page.html', facts['server'], bool(weights))[1]
        serve_pages(server, page, render, start, policy,
                    lambda: Answers(model, tokenizer, encode, max_tokens))
        return
    replaced = ', replacing the previous page' if path.exists() else ''
    with os_errors(f'{path}: cannot write'):
        write_text(path, page)
    print(f'{path}: {len(page.encode()) / 1e6:.1f} MB{replaced}; open it in a browser')


if __name__ == '__main__':
    with user_errors():
        main(config)
