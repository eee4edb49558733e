"""What the page of explain.py asks of a model, answered by PyTorch: web/answers.js does the same in
the page, for models that fit into it."""
import time

import torch
from torch.nn import functional as F

import interpret
from interpret.causal import KINDS, ablate_parts
from interpret.changes import Changes, changed
from lib.errors import UserError, require
from lib.generation import require_drawn, sample_next_token
from lib.page import root_in_8_bits
from lib.tokenizer import END_OF_TEXT

SECONDS = 0.2  # of computing for one answer, so that a new text does not wait long
TOP = 8  # neurons, neighbors, bigrams
COST = 1e10  # tokens times parameters of one pass: about 0.3 s on two CPU cores


def explained_tokens(logits, target, n_parts):
    """The target (T,) and its strongest rivals at each position, as many as a page has room for:
    (T, K)"""
    T, vocab_size = logits.shape
    n_rivals = min(vocab_size - 1, max(2, min(24, 50_000 // (T * n_parts))))
    rivals = logits.scatter(1, target[:, None], float('-inf')).topk(n_rivals).indices
    return torch.cat((target[:, None], rivals), dim=1)


def circuit_tokens(distinct, config):
    """The first of the distinct tokens, as many as the circuits of all heads have room for."""
    limit = int((40_000 / (config.n_layer * config.n_head)) ** 0.5)
    return distinct[:max(4, min(32, limit))]


def curve_around(model, layer, x):
    """The activation function over the range of the pre-activations x: (2, 162)"""
    low = 1.05 * x.min().clamp(max=-3).item()
    high = 1.05 * x.max().clamp(min=3).item()
    grid = torch.cat((torch.linspace(-4, 4, 81), torch.linspace(low, high, 81))).sort().values
    return torch.stack((grid, interpret.activation_curve(model, layer, grid)))


class Answers:
    """To one page. Its messages are those of web/worker.js; numbers are tensors."""

    def __init__(self, model, tokenizer, encode, max_tokens):
        """encode(text): token ids. Raises UserError."""
        self.model, self.tokenizer, self.encode = model, tokenizer, encode
        self.max_tokens = max_tokens
        # of a pass with another change in each row
        self.batch_tokens = min(1024, int(COST / model.num_matmul_params()))
        self.V = tokenizer.vocab_size
        self.changes, self.frozen = '', None
        self.trace = None
        self.names = None  # of the parts of the model, in attributions

    @torch.no_grad()
    def answer(self, kind, message):
        """The answer to a message, JSON with tensors in it; to a user's mistake: {'problem': a
        sentence}."""
        if kind not in ('show', 'more', 'draw', 'ablate', 'patch', 'patchMore'):
            raise ValueError(f'{kind!r} is no message')
        if self.trace is None and kind in ('more', 'ablate', 'patchMore'):
            return {'error': 'too many pages are open: reload this one.'}
        try:
            return getattr(self, kind)(**message)
        except UserError as error:
            return {'problem': str(error), 'isOver': True}

    def change(self, changes, frozen):
        """Change the model from now on. frozen: the text whose attention is kept, or ''."""
        Changes(changes, self.model.config)
        self.frozen = None
        if frozen:
            ids = self.encode(frozen)[-self.max_tokens:]
            self.frozen = interpret.run(self.model, torch.tensor([ids]))
        self.changes = changes

    def changed(self):
        return changed(self.model, self.changes, self.frozen)

    # A text ---------------------------------------------------------------------------------------

    def show(self, text, changes, frozen, selection):
        ids = self.encode(text)
        self.change(changes, frozen)
        left_out = max(0, len(ids) - self.max_tokens)
        return {**self.analyze(ids[-self.max_tokens:]), 'leftOut': left_out}

    def analyze(self, ids):
        """{facts, arrays} that all panels need; the rest comes from `more`."""
        model, config, V = self.model, self.model.config, self.V
        idx = torch.tensor([ids])
        before = interpret.run(model, idx)
        is_changed = bool(self.changes or self.frozen)
        with self.changed():
            self.trace = trace = interpret.run(model, idx) if is_changed else before
            rotary = model.rotary(torch.arange(len(ids)))
        self.ids, self.found = ids, {}
        logits, next_tokens = trace.logits[0, :, :V], idx[0, 1:]
        require(logits.isfinite().all(), 'the logits of this model are not finite')
        self.target = torch.cat((next_tokens, logits[-1:].argmax(dim=-1)))  # (T,)
        n_parts = config.n_layer * (config.n_head + 1) + 5
        self.tokens = explained_tokens(logits, self.target, n_parts)
        self.names = self.names or self.once(interpret.attribute, self.tokens)[0]
        self.distinct = list(dict.fromkeys(ids))
        self.circuit_ids = circuit_tokens(self.distinct, config)
        facts = {
            'ids': ids, 'distinct': self.distinct, 'circuit_ids': self.circuit_ids,
            'embeddings': list(trace.embeddings), 'parts': self.names,
            'gated': interpret.is_gated(model), 'forced': self.forced(),
            'strongest': min(TOP, config.mlp_width), 'neurons_in_a_layer': config.mlp_width,
        }
        arrays = {
            'mask': trace.mask[0].byte(), 'logits': logits,
            'rank': 1 + (logits[:-1] > logits[:-1].gather(1, next_tokens[:, None])).sum(dim=1),
            'loss': F.cross_entropy(logits[:-1], next_tokens, reduction='none'),
            'part_tokens': self.tokens, 'part_logits': logits.gather(1, self.tokens),
            'embeddings': torch.stack([x[0] for x in trace.embeddings.values()]),
            'attention': root_in_8_bits(trace.attention[:, 0][..., trace.mask[0]]),
            'q': trace.q[:, 0], 'k': trace.k[:, 0],
        }
        sizes = {**trace.embeddings, 'attn': trace.attn_out[:, 0], 'mlp': trace.mlp_out[:, 0],
                 'stream': trace.residual[:, 0], 'middle': trace.middle[:, 0]}
        arrays |= {f'size_{name}': x.norm(dim=-1).squeeze(0) for name, x in sizes.items()}
        if rotary is not None:
            arrays['rotary'] = rotary[0][0, 0]
        if is_changed:
            old = before.logits[0, :, :V]
            arrays['logits_before'] = old
            arrays['loss_before'] = F.cross_entropy(old[:-1], next_tokens, reduction='none')
        return {'facts': facts, 'arrays': {name: {'data': x, 'shape': list(x.shape)}
                                           for name, x in arrays.items()}}

    def forced(self):
        """The heads whose patterns their queries and keys do not give."""
        L, nh = self.model.config.n_layer, self.model.config.n_head
        looks = Changes(self.changes, self.model.config).looks
        chosen = {(layer, head) for layer, head, *_ in looks}
        return [f'{layer}.{head}' for layer in range(L) for head in range(nh)
                if self.frozen or (layer, head) in chosen]

    # What panels ask for: LAZY_GROUPS in web/model.js ---------------------------------------------

    def more(self, wishes):
        """Answers to the first wishes, as many as the time allows, at least one."""
        end = time.monotonic() + SECONDS
        found = []
        for group, key in wishes:
            if found and time.monotonic() > end:
                break
            found.append([[group, key], LAZY[group](self, *key)])
        return {'found': found}

    def once(self, f, *args, **options):
        """What f(model, trace, ...) of this text is, computed once."""
        if f not in self.found:
            self.found[f] = f(self.model, self.trace, *args, **options)
        return self.found[f]

    def lens(self, depth):
        x = self.model.transformer.ln_f(self.trace.residual[depth, 0])
        probs = self.model.to_logits(x)[:, :self.V].softmax(dim=-1)
        top = probs.topk(min(10, self.V))
        return {'lens': top.values, 'lens_ids': top.indices}

    def attribution(self, t):
        return {'parts': self.once(interpret.attribute, self.tokens)[1][:, t]}

    def promoted(self, layer, head, t):
        written = interpret.output_matrices(self.model, layer)[head] @ \
            self.trace.mixed[layer, 0, head, t]
        U = interpret.against_mean(self.model, self.V)
        effect = U @ written * self.trace.later_scale[2 * layer, 0, t]
        ids, values = interpret.most_and_least(effect, min(5, self.V // 2))
        return {'promoted': ids, 'promoted_by': values}

    def by_source(self, layer, head):
        effects = self.once(interpret.effect_by_source, self.target)
        return {'by_source': effects[layer, head][self.trace.mask[0]]}

    def pattern(self, layer, head):
        return {'pattern': self.trace.attention[layer, 0, head][self.trace.mask[0]]}

    def neurons(self, layer):
        neurons = self.once(interpret.strongest_neurons, TOP)[layer]  # (T, TOP)
        pre = self.trace.pre[layer, 0].gather(1, neurons)
        gates = interpret.activation_curve(self.model, layer, pre.flatten())
        return {
            'neurons': neurons, 'neuron_pre': pre, 'neuron_gates': gates,
            'neuron_post': self.trace.post[layer, 0].gather(1, neurons),
            'curve': curve_around(self.model, layer, pre),
        }

    def neuron_tokens(self, layer, t):
        neurons = self.once(interpret.strongest_neurons, TOP)[layer, t]
        n = min(5, self.V // 2)
        return {'neuron_tokens': interpret.neuron_tokens(self.model, layer, neurons, n, self.V)}

    def neighbors(self, i):
        ids = torch.tensor([self.distinct[i]])
        near, cosines = interpret.nearest_tokens(self.model, ids, TOP, self.V)
        return {'near': near, 'cosines': cosines}

    def bigrams(self, i):
        ids = torch.tensor([self.distinct[i]])
        arrays = {}
        for name, p in zip(('whole', 'direct'), interpret.bigrams(self.model, ids, self.V)):
            top = p[0].topk(min(TOP, self.V))
            arrays |= {f'bigram_{name}_ids': top.indices, f'bigram_{name}_p': top.values}
        return arrays

    def circuits(self, layer, head):
        qk, ov = self.once(self.all_circuits)
        return {'qk': qk[layer, head], 'ov': ov[layer, head]}

    def all_circuits(self, model, trace):
        scale = trace.later_scale[:-1:2].mean(dim=(1, 2))
        return interpret.token_circuits(model, torch.tensor(self.circuit_ids), scale, self.V)

    # Ablations ------------------------------------------------------------------------------------

    def ablate(self, start):
        """The next effects, as AblationMap in web/ablate.js has them; size: how many there are."""
        L, n_parts = self.model.config.n_layer, self.model.config.n_head + 1
        size = len(KINDS) * L * n_parts
        end = time.monotonic() + SECONDS
        effects = []
        while start + len(effects) < size and (not effects or time.monotonic() < end):
            row, part = divmod(start + len(effects), n_parts)
            stop = min(n_parts, part + max(1, self.batch_tokens // len(self.ids)))
            parts = [(KINDS[row // L], i) for i in range(part, stop)]
            with self.changed():
                found = ablate_parts(self.model, self.trace, self.target, row % L, parts,
                                     vocab_size=self.V)
            effects += [{'loss': loss, 'logit': logit} for loss, logit in zip(*found)]
        return {'effects': effects, 'size': size}

    # Generation -----------------------------------------------------------------------------------

    def draw(self, text, temperature, k, p, changes, frozen, selection, seed=None):
        """One more token, drawn as sample.py does; seed: of the first one."""
        if seed is not None:
            self.show(text, changes, frozen, selection)
            require(len(self.ids) < self.max_tokens,
                    f'The text is full: {self.max_tokens} tokens fit.')
            self.generator = torch.Generator().manual_seed(seed)
            self.prompt = text + END_OF_TEXT if self.model.config.turns else text
            self.drawn = []
        logits = self.trace.logits[:, -1, :self.V]
        token = sample_next_token(logits, temperature, k, p, generator=self.generator).tolist()
        require_drawn(token)
        answer = self.analyze([*self.ids, *token])
        is_end = bool(self.model.config.turns) and token[0] == self.model.config.eot_token
        if not is_end:
            self.drawn += token
        is_over = is_end or len(self.ids) >= self.max_tokens
        return {**answer, 'text': self.prompt + self.tokenizer.decode(self.drawn),
                'isOver': is_over}

    # Activation patching: web/patch.js ------------------------------------------------------------

    def patch(self, clean, corrupted, tokens, changes, frozen):
        ids = [self.encode(text) for text in (clean, corrupted)]
        a, b = map(len, ids)
        require(a == b, f'{a} and {b} tokens: both texts need the same number.')
        require(a <= self.max_tokens, f'Only {self.max_tokens} tokens fit.')
        self.change(changes, frozen)
        with self.changed():
            self.runs = [interpret.run(self.model, torch.tensor([x])) for x in ids]
        ends = torch.stack([trace.logits[0, -1, :self.V] for trace in self.runs])
        best = ends.topk(min(10, self.V)).indices.tolist()
        candidates = list(dict.fromkeys(best[0] + best[1]))
        defaults = [best[0][0], best[1][0]]
        if defaults[0] == defaults[1]:
            p, q = ends.softmax(dim=-1)
            by_rise = sorted(candidates, key=lambda i: (q[i] - p[i]).item())
            defaults = [by_rise[0], by_rise[-1]]
        self.pair = [default if i < 0 else i for i, default in zip(tokens, defaults)]
        end, self.start = (ends[:, self.pair[0]] - ends[:, self.pair[1]]).tolist()
        self.done = 0
        return {'ids': ids, 'tokens': self.pair, 'candidates': candidates, 'start': self.start,
                'range': end - self.start, 'size': (len(self.model.transformer.h) + 1) * a}

    def patchMore(self):
        """The answers of the next cells (depth, position), row by row."""
        clean, corrupted = (trace.residual[:, 0] for trace in self.runs)  # (L + 1, T, C)
        depths, T, _ = clean.shape
        end = time.monotonic() + SECONDS
        answers = []
        while self.done < depths * T and (not answers or time.monotonic() < end):
            depth, t = divmod(self.done, T)
            places = range(t, min(T, t + max(1, self.batch_tokens // T)))
            answers.append(self.patched(clean[depth], corrupted[depth], depth, places))
            self.done += len(places)
        return torch.cat(answers)

    def patched(self, clean, corrupted, depth, places):
        """The answer with the clean vector (C,) at each of the places: (n,)"""
        rows = torch.arange(len(places))
        x = corrupted.repeat(len(places), 1, 1)  # (n, T, C)
        x[rows, places] = clean[places]
        mask = self.runs[1].mask[0][None, None]
        with self.changed():
            rotary = self.model.rotary(torch.arange(len(corrupted)))
            for block in self.model.transformer.h[depth:]:
                x = block(x, rotary, mask)
        logits = self.model.to_logits(self.model.transformer.ln_f(x[:, -1]))
        return logits[:, self.pair[0]] - logits[:, self.pair[1]]


LAZY = {
    'lensAt': Answers.lens, 'attribution': Answers.attribution, 'promoted': Answers.promoted,
    'bySource': Answers.by_source, 'pattern': Answers.pattern, 'neurons': Answers.neurons,
    'neuronTokens': Answers.neuron_tokens, 'neighbors': Answers.neighbors,
    'bigrams': Answers.bigrams, 'circuits': Answers.circuits,
}
