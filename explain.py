"""See inside a GPT: write one HTML page that shows what a checkpoint does with a text, and opens from disk without a network.

    python explain.py --out_dir=out-quickstart --start="def main("
    python explain.py --out_dir=out-quickstart --start=FILE:prompt.txt --checkpoints=all
    python explain.py --out_dir=out-quickstart --start="def main(" --serve
"""
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, configure, require, user_errors


@dataclass
class Config:
    # model
    init_from: str = 'resume'  # resume (from out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to weights
    out_dir: str = 'out'  # the folder of a run; the page becomes explain.html in it
    checkpoints: Literal['last', 'all'] = 'last'  # all: also how the heads and losses changed over the checkpoints of out_dir
    # text
    start: str = ''  # the text to look at, or FILE:path for that of a file; at most the last 256 tokens, or block_size, are taken
    # system
    serve: bool = False  # instead of writing a page, serve it on this machine, where new texts can be typed
    port: int = 8337  # of --serve, on 127.0.0.1


def check(config):
    """What can be seen to be wrong before anything is loaded. Raises UserError."""
    require(config.start, 'start is empty: give the text to look at, --start="Once upon a time" or --start=FILE:path')
    require(config.init_from and config.out_dir, 'init_from or out_dir is empty: name a folder')
    require(config.checkpoints == 'last' or config.init_from == 'resume',
            f'checkpoints = all looks at those of a run: leave init_from = {config.init_from!r} out and give --out_dir')
    require(0 <= config.port < 2**16, f'port = {config.port}: give 0 (any) to 65535')


if __name__ == '__main__':  # before the slow imports: --help and a mistyped key are answered at once
    with user_errors():
        config, _ = configure(Config)
        check(config)

import base64
import contextlib
import json
import math
import os
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint as ckpt
import interpret
from data.tokenizer import END_OF_TEXT, encode_prompt, encode_turns, read_prompt
from files import write_text

LONGEST = 256  # tokens of a text
LARGEST = 20_000_000  # bytes of a page: beyond it arrays are left out, by DROPPABLE from the first on
DROPPABLE = {'by_source': 'heads\' effects by source token', 'q': 'scores term by term', 'embeddings': 'embedding rows',
             'compositions': 'composition', 'promoted': 'what each head promotes', 'neurons': 'neurons', 'attention': 'attention'}
NEXT_TO_IT = {'promoted': ('promoted_by',), 'q': ('k',), 'neurons': ('neuron_pre', 'neuron_post', 'neuron_tokens')}
TAIL_BINS, BINS_PER_NAT = 2048, 32  # of the logits below the likeliest that are not kept one by one


# What the page shows ----------------------------------------------------------------------------------------------------------

def collect_weights(model, tokenizer):
    """(facts, arrays) of what does not depend on a text: JSON values, and {name: tensor}. web/ says what becomes of them."""
    c, V = model.config, tokenizer.vocab_size
    vocabulary = json.dumps([token_text(token) for token in tokenizer.token_bytes], ensure_ascii=False)
    eigenvalues = interpret.ov_eigenvalues(model, V)
    scores, losses = interpret.head_scores(model, V, eigenvalues)
    facts = {
        'model': {key: getattr(c, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'position', 'norm', 'activation',
                                                   'qk_norm', 'logit_softcap', 'bias')},
        'n_kv_head': c.n_kv_head or c.n_head, 'parameters': model.get_num_params(False), 'vocab_size': V,
        'tables': model.transformer.ngram.tables.weight.numel() if c.ngram > 1 else 0, 'score_names': list(scores)}
    arrays = {'vocabulary': torch.tensor(list(vocabulary.encode()), dtype=torch.uint8),  # JSON, too, is smaller deflated
              'scores': torch.stack(list(scores.values())), 'repeat_losses': losses,  # (4, L, nh), (2 length - 1,)
              'compositions': half(torch.stack(list(interpret.composition_scores(model).values()))),  # q, k, v
              'eigenvalues': half(torch.stack((eigenvalues.real, eigenvalues.imag), dim=-1))}
    if V <= 512:
        whole, direct = interpret.bigrams(model, torch.arange(V), V)
        arrays |= {name: (x.sqrt() * 255).round().byte() for name, x in (('bigrams_whole', whole), ('bigrams_direct', direct))}
    return facts, arrays


def collect_text(model, tokenizer, ids):
    """(facts, arrays) of what the model does with a text, token ids [T]."""
    c, V, T = model.config, tokenizer.vocab_size, len(ids)
    idx = torch.tensor([ids])
    trace = interpret.run(model, idx)
    plain, _ = model(idx, idx)
    require(plain.isfinite().all(), 'the logits of this model are not finite: its weights are too large')
    logits = trace.logits[0, :, :V]
    following = idx[0, 1:]
    distinct = list(dict.fromkeys(ids))
    target = torch.cat((following, logits[-1:].argmax(dim=-1)))  # the next token, behind the text the likeliest
    facts = {'ids': ids, 'text': tokenizer.decode(ids), 'distinct': distinct, 'embeddings': list(trace.embeddings),
             'difference': (trace.logits - plain).abs().max().item(), 'largest': plain.abs().max().item()}
    arrays = {}

    # the next token: all logits, or, of a large vocabulary, those of the last position and the most likely of the others
    arrays['loss'] = F.cross_entropy(logits[:-1], following, reduction='none')
    arrays['rank'] = 1 + (logits[:-1] > logits[:-1].gather(1, following[:, None])).sum(dim=1)
    if T * V <= 2**18:
        arrays['logits'] = logits
    else:
        arrays['last_logits'] = logits[-1]
        arrays['top_logits'], arrays['top_ids'] = logits.topk(min(512, V))
        below = ((logits.max(dim=1, keepdim=True).values - logits) * BINS_PER_NAT).floor().clamp(max=TAIL_BINS - 1).long()
        counts = torch.ones_like(below).scatter_(1, arrays['top_ids'], 0)
        facts['bins_per_nat'] = BINS_PER_NAT
        arrays['tail'] = torch.zeros(T, TAIL_BINS, dtype=torch.long).scatter_add_(1, below, counts)

    # the stream: how much each part writes, which part moves which logit
    for name, part in trace.embeddings.items():
        arrays[f'size_{name}'] = part[0].norm(dim=-1)
    arrays['size_attn'], arrays['size_mlp'] = trace.attn_out[:, 0].norm(dim=-1), trace.mlp_out[:, 0].norm(dim=-1)  # (L, T)
    arrays['size_stream'] = trace.residual[:, 0].norm(dim=-1)  # (L + 1, T)
    n_parts = c.n_layer * (c.n_head + 1) + 5
    n_others = min(V - 1, max(2, min(24, 75_000 // (T * n_parts))))
    others = logits.scatter(1, target[:, None], float('-inf')).topk(n_others).indices
    tokens = torch.cat((target[:, None], others), dim=1)  # (T, K)
    facts['parts'], arrays['parts'] = interpret.attribute(model, trace, tokens)
    arrays['part_tokens'], arrays['part_logits'] = tokens, logits.gather(1, tokens)
    lens = [probs.topk(min(10, V)) for probs in interpret.logit_lens(model, trace, vocab_size=V)]
    arrays['lens_ids'], arrays['lens'] = torch.stack([x.indices for x in lens]), half(torch.stack([x.values for x in lens]))

    # embeddings
    arrays['embeddings'] = half(torch.stack([part[0] for part in trace.embeddings.values()]))  # (parts, T, C)
    arrays['near'], cosines = interpret.nearest_tokens(model, torch.tensor(distinct), 8, V)
    arrays['cosines'] = half(cosines)
    rotary = model.rotary(torch.arange(T))
    if rotary is not None:
        arrays['rotary'] = half(rotary[0][0, 0])  # cos (T, hs/2)

    # heads: attention as its root in 8 bits, which keeps the small ones apart; lower triangles, row by row
    row, column = torch.tril_indices(T, T)
    attention = trace.attention[:, 0][..., row, column]  # (L, nh, T (T + 1) / 2)
    arrays['attention'] = (attention.sqrt() * 255).round().byte()
    arrays['q'], arrays['k'] = half(trace.q[:, 0]), half(trace.k[:, 0])
    arrays['promoted'], values = interpret.promoted(model, trace, min(5, V // 2), vocab_size=V)
    arrays['promoted_by'] = half(values)
    arrays['by_source'] = half(interpret.effect_by_source(model, trace, target)[..., row, column])

    # neurons
    chosen = interpret.strongest_neurons(model, trace, 8)  # (L, T, 8)
    facts['neurons_in_a_layer'] = trace.post.size(-1)
    arrays['neurons'] = chosen
    arrays['neuron_pre'], arrays['neuron_post'] = (half(x[:, 0].gather(2, chosen)) for x in (trace.pre, trace.post))
    facts['neuron_ids'] = [layer.unique().tolist() for layer in chosen]  # the rows of neuron_tokens, layer after layer
    arrays['neuron_tokens'] = torch.cat([interpret.neuron_tokens(model, layer, torch.tensor(rows), min(5, V // 2), V)
                                         for layer, rows in enumerate(facts['neuron_ids'])])

    # single tokens of the text
    few = distinct[:max(4, min(32, int(math.sqrt(40_000 / (c.n_layer * c.n_head)))))]
    facts['circuit_ids'] = few
    qk, ov = interpret.token_circuits(model, torch.tensor(few), trace.final_scale.mean().item(), V)
    arrays['qk'], arrays['ov'] = half(qk), half(ov)
    for name, x in zip(('whole', 'direct'), interpret.bigrams(model, torch.tensor(distinct), V)):
        best = x.topk(min(8, V))
        arrays[f'bigram_{name}_ids'], arrays[f'bigram_{name}_p'] = best.indices, half(best.values)
    return facts, arrays


def half(x):
    """In 16 bits, which leaves three digits; what is beyond their range is its end."""
    return x.clamp(-65504, 65504).half()


def token_text(token):
    """The bytes of a token as text; those of half a character as numbers."""
    try:
        return token.decode('utf-8')
    except UnicodeDecodeError:
        return '⟨' + '\xa0'.join(f'{byte:02X}' for byte in token) + '⟩'


def run_facts(checkpoint, out_dir):
    """What the run's folder says of it: its step, val loss and training curves up to there."""
    facts = {'path': checkpoint.path, 'step': checkpoint.step, 'val_loss': checkpoint.val_loss, 'curves': {}}
    curves = {name: [] for name in ('loss', 'val_loss', 'lr', 'tokens_per_second')}
    for _, line in ckpt.log_lines(out_dir):
        for name, curve in curves.items():
            value = line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value) and line['step'] <= checkpoint.step:
                curve.append((line['step'], value))
    for name, curve in curves.items():
        every = max(1, len(curve) // 400)
        facts['curves'][name] = curve[::-every][::-1]  # the last one is there
    return facts


def collect_history(out_dir, ids, V):
    """How scores and losses changed over the whole checkpoints of a run: ({'steps', ...}, {'history': (n, 4, L, nh)})."""
    facts, scores = {'steps': [], 'val_losses': [], 'losses': [], 'first_half': [], 'second_half': []}, []
    for manifest in reversed(ckpt.manifests(out_dir, ckpt.warn)):
        try:
            checkpoint = ckpt.load(Path(out_dir) / manifest['file'], mmap=True)
        except UserError as error:
            ckpt.warn(f'left out: {error}')
            continue
        model = checkpoint.build_model(dropout=0.0).eval()
        found, losses = interpret.head_scores(model, V)
        length = (len(losses) + 1) // 2
        idx = torch.tensor([ids])
        with torch.no_grad():
            logits = model(idx, idx)[0][0, :-1, :V]
        facts['losses'].append(F.cross_entropy(logits, idx[0, 1:]).item() if len(ids) > 1 else None)
        facts['steps'].append(checkpoint.step)
        facts['val_losses'].append(manifest['val_loss'])
        facts['first_half'].append(losses[:length - 1].mean().item() if length > 1 else None)
        facts['second_half'].append(losses[length:].mean().item() if length > 1 else None)
        scores.append(torch.stack(list(found.values())))
    return facts, {'history': half(torch.stack(scores))} if scores else {}


# The page ---------------------------------------------------------------------------------------------------------------------

def pack(facts, arrays):
    """facts, with where each array lies, as JSON; and the arrays: base64 of a deflate stream for each, one behind the other.

    Numbers of several bytes are split into planes (all first bytes, all second bytes, ...), which deflate better.
    """
    facts, streams = finite(facts), {}
    for name, array in arrays.items():
        array = array.numpy()
        if array.dtype.kind in 'iu':  # ids: as few bytes as the largest needs
            array = array.astype(np.min_scalar_type(int(array.max(initial=0))))
        planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T
        streams[name] = str(array.dtype), array.shape, zlib.compress(planes.tobytes(), 6)
    dropped, room = [], LARGEST - 500_000 - len(json.dumps(facts))  # style and scripts take 0.2 MB
    for name, what in DROPPABLE.items():
        if sum(len(data) for *_, data in streams.values()) * 4 / 3 < room:
            break
        if name in streams:
            dropped.append(what)
            for each in (name, *NEXT_TO_IT.get(name, ())):
                del streams[each]
    index, blob = {}, b''
    for name, (dtype, shape, data) in streams.items():
        index[name] = {'dtype': dtype, 'shape': shape, 'start': len(blob), 'end': len(blob) + len(data)}
        blob += data
    facts = facts | {'arrays': index, 'dropped': dropped, 'largest_page': f'{LARGEST / 1e6:.0f} MB'}
    return json.dumps(facts, ensure_ascii=False, separators=(',', ':')), base64.b64encode(blob).decode()


def finite(value):
    """JSON has no nan: None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_page(facts, arrays):
    """The page as text: web/page.html with its style, its modules and the data put in."""
    web = Path(__file__).parent / 'web'
    page = (web / 'page.html').read_text(encoding='utf-8')
    modules = re.findall(r'<script type="module" src="(.+)"></script>', page)
    # in one file modules cannot import each other: they become one, and their top-level names must differ
    code = '\n'.join(re.sub(r'^import .*?;\n|^export ', '', (web / name).read_text(encoding='utf-8'), flags=re.M | re.S)
                     for name in modules)
    text, blob = pack(facts, arrays)
    style = (web / 'style.css').read_text(encoding='utf-8')
    scripts = (f'<script type="application/json" id="facts">{text.replace("<", chr(92) + "u003c")}</script>\n'
               f'<script type="text/plain" id="arrays">{blob}</script>\n<script type="module">\n{code}</script>\n')
    page = re.sub(r'(<script type="module" src=".+"></script>\n)+', lambda found: scripts, page)
    return page.replace('<link rel="stylesheet" href="style.css">', f'<style>\n{style}</style>')


def main(config):
    where = config.out_dir if config.init_from == 'resume' else config.init_from
    path = Path(config.out_dir) / 'explain.html'
    require(not path.is_dir(), f'{path}: there is a folder of that name; move it or choose another --out_dir')
    start = read_prompt(config.start)
    checkpoint = ckpt.load(where, prefer_best=True, mmap=True)
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).eval()
    require(model.config.norm_position == 'pre', f'{checkpoint.path}: norm_position = {model.config.norm_position!r}: only '
                                                 f'pre-norm models can be taken apart; name another')
    require(not model.config.prefix_lm, f'{checkpoint.path}: prefix_lm = True: the page draws only what looks back; name another')
    model.requires_grad_(False).float()
    require(all(p.isfinite().all() for p in model.parameters()), f'{checkpoint.path}: its weights are not finite; name another')
    longest = min(LONGEST, model.config.block_size)

    def encode(text):  # of sources and targets: with `<|endoftext|>` between them
        return encode_turns(text.split(END_OF_TEXT), tokenizer) if model.config.turns else encode_prompt(text, tokenizer)

    ids = encode(start)
    cut = f'the last {longest} of ' if len(ids) > longest else ''
    ckpt.warn(f'{checkpoint.path}: step {checkpoint.step}, {model.get_num_params(False):,} parameters; computing what it does '
              f'with {cut}{len(ids)} tokens')
    if not config.serve:
        path.parent.mkdir(parents=True, exist_ok=True)  # whether it can be is seen before it costs
    facts, arrays = collect_weights(model, tokenizer)
    facts |= {'run': run_facts(checkpoint, where), 'live': config.serve}
    if config.checkpoints == 'all':
        facts['history'], history = collect_history(config.out_dir, ids[-longest:], tokenizer.vocab_size)
        arrays |= history

    def page_of(prompt, **more):
        ids = encode(prompt)
        text_facts, text_arrays = collect_text(model, tokenizer, ids[-longest:])
        text_facts |= {'left_out': len(ids[:-longest])} | more
        return build_page(facts | text_facts, arrays | text_arrays)

    page = page_of(start)
    if config.serve:
        serve(page, page_of, lambda text, error: page_of(start, text=text, error=error), config.port)
        return
    instead = ', in place of the one before' if path.exists() else ''
    write_text(path, page)
    print(f'{path}: {len(page.encode()) / 1e6:.1f} MB{instead}; open it in a browser')


def serve(page, page_of, page_with, port):
    """Serve page at /, and page_of(text) at /?start=text, to this machine alone, until Ctrl-C; where the text is a mistake,
    page_with(text, error)."""
    one_at_a_time = threading.Lock()  # each takes memory and all cores

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition('?')
            # a foreign name that leads here is not let in
            if path != '/' or self.headers.get('Host', '').rsplit(':', 1)[0] not in ('127.0.0.1', 'localhost'):
                self.send_error(404)
                return
            text = parse_qs(query, keep_blank_values=True).get('start', [None])[0]
            with one_at_a_time:
                try:
                    answer, status = page if text is None else page_of(text), 200
                except UserError as error:
                    answer, status = page_with(text, str(error)), 400
            body = answer.encode()
            self.send_response(status)
            self.send_header('Content-Type', 'text/html; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the reader has gone
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    try:
        server = ThreadingHTTPServer(('127.0.0.1', port), Handler)
    except OSError as error:
        raise UserError(f'port = {port}: cannot serve there: {error.strerror}; give another --port (0: any)') from None
    with server:
        print(f'http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # a page may be on its way: torch's threads do not survive the interpreter's own end
            ckpt.warn('stopped')
            os._exit(130)


if __name__ == '__main__':
    with user_errors():
        main(config)
