"""An attribution graph: by which paths the tokens of a text raise and lower one logit.

Ameisen et al. 2025, Circuit Tracing, with the model's own neurons as features, and heads as nodes
of their own (Elhage et al. 2021: with fixed attention, a head is a linear map from each source).
Everything that is not linear keeps its value from the forward pass: attention patterns, the
divisors of norms, and the slope of each neuron, activation / pre-activation (1 for an active ReLU,
the gate for SwiGLU). What is left is linear, so the logit is a sum over paths, and every edge
carries a number of logits:

    edge from j to i = (what j writes) . (direction that i reads) * (what i's output is worth)

What an active ReLU^2 neuron is worth is thus taken at its slope, not at its derivative, which is
twice that: only so do the edges into a node add up to what the node carries. Switching an edge off
in the frozen model, at i's input alone, lowers the logit by its number.
"""
import bisect
from dataclasses import dataclass

import torch

import interpret
from interpret import fold, norm_scale, per_head, stream_norms
from lib.page import to_half

EXPANDED = 5e-4  # influence from which a node's own inputs are looked at
SHARE = 0.8  # of the influence of all nodes that a graph keeps
EDGE_SHARE = 0.95  # of the influence of all edges between them
MAX_NODES = 500
MAX_TARGETS = 8  # positions of a page whose logit gets a graph: the last ones
MAX_FLOPS = 2e11  # of all graphs of a page: a few seconds on two CPU cores
TYPICAL_READS = 500  # nodes of a graph whose inputs are looked at


class Frozen:
    """The linear model that is left of one text, b of a trace.

    A place is where a layer writes into the residual stream: 2 l is the attention of layer l,
    2 l + 1 its MLP. Flat ids number all nodes: first (part, position) of the embeddings, the last
    part being biases; then place by place (head, position, source) or (position, neuron).
    """

    def __init__(self, model, trace, b=0):
        self.model, self.trace, self.b = model, trace, b
        self.T = trace.idx.size(1)
        self.embeddings = torch.stack([x[b] for x in trace.embeddings.values()])  # (n, T, C)
        self.norms = stream_norms(model)
        later = trace.later_scale[:, b]
        self.scale = later[:-1] / later[1:]  # (2 L, T) of the norm after each place
        self.write, self.read, self.read_scale, self.slope = [], [], [], []
        for layer, block in enumerate(model.transformer.h):
            pre_norm = not block.post_norm
            n_q, n_v = model.config.n_head, block.attn.n_kv_head
            W_V = block.attn.c_attn.weight.unflatten(0, (-1, block.attn.head_size))[-n_v:]
            W_V = per_head(model, W_V)  # (nh, hs, C)
            F = block.mlp.c_proj.weight.size(1)
            W_in = block.mlp.c_fc.weight[-F:]  # (F, C); for SwiGLU, the values
            for weight, norm, x in ((W_V, block.ln_1, trace.residual[layer, b]),
                                    (W_in, block.ln_2, trace.middle[layer, b])):
                self.read.append(fold(norm, weight) if pre_norm else weight)
                scale = norm_scale(norm, x) if pre_norm else torch.ones_like(x[:, 0])
                self.read_scale.append(scale)  # (T,)
            W_O = block.attn.c_proj.weight.T.unflatten(0, (n_q, -1))  # (nh, hs, C)
            self.write.append(W_O * trace.head_factors[layer])
            self.write.append(block.mlp.c_proj.weight.T)  # (F, C)
            self.slope.append(self.slopes(block.mlp, layer))
        sizes = [(len(self.embeddings) + 1) * self.T]
        for place, weight in enumerate(self.write):
            sizes.append(self.T * len(weight) * (1 if place % 2 else self.T))
        self.starts = torch.tensor([0, *sizes]).cumsum(0).tolist()

    def slopes(self, mlp, layer):
        """Activation over pre-activation of each neuron, 0 where both are. (T, F)"""
        pre, post = self.trace.pre[layer, self.b], self.trace.post[layer, self.b]
        if interpret.is_gated(self.model):
            return mlp.activate(torch.cat((pre, torch.ones_like(pre)), dim=-1))
        return (post / pre).where(pre.abs() > 1e-9, 0)

    def before(self, place, g, position):
        """A gradient g (n, C) in the stream after a place and its norm, if any -> before it."""
        if not self.norms:
            return g
        return fold(self.norms[place], g) * self.scale[place, position][:, None]

    def values(self, layer):
        """What each head mixes. (nh, T, hs)"""
        return per_head(self.model, self.trace.v[layer, self.b])

    def gradients(self, t, direction):
        """The gradient of the logit at t, of direction (C,) in the last stream, where each place
        writes, and last where the embeddings enter: 2 L + 1 times (T, C)."""
        g = direction.new_zeros(self.T, direction.size(0))
        g[t] = direction
        everywhere = torch.arange(self.T, device=g.device)
        gradients = [None] * len(self.write)
        for place in reversed(range(len(self.write))):
            layer, is_mlp = divmod(place, 2)
            gradients[place] = g = self.before(place, g, everywhere)
            if is_mlp:
                worth = (g @ self.write[place].T) * self.slope[layer]  # (T, F)
                back = worth @ self.read[place]
            else:
                z = torch.einsum('tc,hdc->htd', g, self.write[place])
                attention = self.trace.attention[layer, self.b]  # (nh, T, S)
                back = torch.einsum('hts,htd,hdc->sc', attention, z, self.read[place])
            g = g + back * self.read_scale[place][:, None]
        return [*gradients, g]

    def nodes_at(self, place, gradient, ids):
        """What nodes at a place carry and read, from their flat ids (n,).

        Returns (logits (n,), directions in the stream (n, C), where they read it: positions (n,)).
        """
        layer, is_mlp = divmod(place, 2)
        ids = ids - self.starts[place + 1]
        if is_mlp:
            position, neuron = ids // len(self.write[place]), ids % len(self.write[place])
            worth = (gradient[position] * self.write[place][neuron]).sum(dim=1)
            logits = worth * self.trace.post[layer, self.b, position, neuron]
            worth = worth * self.slope[layer][position, neuron]
            read = worth[:, None] * self.read[place][neuron]
        else:
            head, query, position = ids // self.T**2, ids // self.T % self.T, ids % self.T
            worth = torch.einsum('nc,ndc->nd', gradient[query], self.write[place][head])
            worth = worth * self.trace.attention[layer, self.b, head, query, position][:, None]
            logits = (worth * self.values(layer)[head, position]).sum(dim=1)
            read = torch.einsum('nd,ndc->nc', worth, self.read[place][head])
        return logits, read * self.read_scale[place][position][:, None], position

    def edges(self, logits, read, position, end):
        """The edges into nodes that read the stream before place `end`, as `nodes_at` says.

        Returns (flat ids (n, k), logits (n, k)) of all that has been written at that position; the
        last column are biases, so that the rest of logits (n,) is accounted for.
        """
        ids, values = [], []
        rows = torch.arange(self.T, device=read.device)
        for place in reversed(range(end)):
            layer, is_mlp = divmod(place, 2)
            read = self.before(place, read, position)
            start, weight = self.starts[place + 1], self.write[place]
            if is_mlp:
                values.append((read @ weight.T) * self.trace.post[layer, self.b, position])
                column = torch.arange(len(weight), device=read.device)
                ids.append(start + position[:, None] * len(weight) + column)
            else:
                z = torch.einsum('nc,hdc->hnd', read, weight)
                attention = self.trace.attention[layer, self.b, :, position]  # (nh, n, S)
                by_source = attention * (z @ self.values(layer).transpose(1, 2))
                values.append(by_source.transpose(0, 1).flatten(1))
                head = torch.arange(len(weight), device=read.device)[:, None] * self.T
                source = (head + position[:, None, None]) * self.T + rows  # (n, nh, S)
                ids.append(start + source.flatten(1))
        values.append(torch.einsum('nc,enc->ne', read, self.embeddings[:, position]))
        values.append((logits - torch.cat(values, dim=1).sum(dim=1))[:, None])
        part = torch.arange(len(self.embeddings) + 1, device=read.device)
        ids.append(part * self.T + position[:, None])
        return torch.cat(ids, dim=1), torch.cat(values, dim=1)

    def describe(self, ids):
        """What `collect_graphs` says of nodes, from their flat ids (N,). (N, 5)"""
        rows = []
        for id_ in ids.tolist():
            place = bisect.bisect_right(self.starts, id_) - 2
            id_ -= self.starts[place + 1]
            layer, is_mlp = divmod(place, 2)
            if place < 0:
                rows.append((0, 0, id_ // self.T, id_ % self.T, 0))
            elif is_mlp:
                neurons = len(self.write[place])
                rows.append((2, layer, id_ % neurons, id_ // neurons, 0))
            else:
                head, position, source = id_ // self.T**2, id_ // self.T % self.T, id_ % self.T
                rows.append((1, layer, head, position, source))
        return torch.tensor(rows).view(-1, 5)


@dataclass
class Graph:
    """The N nodes with the most influence on a logit, in falling order, and E edges among them."""
    ids: torch.Tensor  # (N,) flat, as Frozen says; the logit itself has none
    logits: torch.Tensor  # (N,) what a node adds to the logit over all paths
    influence: torch.Tensor  # (N,) share of the paths to the logit that pass it, from 0 to 1
    total: float  # influence of all nodes
    edges: torch.Tensor  # (E, 2) writer, reader: rows of ids; the reader -1 is the logit
    edge_logits: torch.Tensor  # (E,)


@torch.no_grad()
def attribution_graph(frozen, t, token):
    """The Graph of the logit (before any softcap) of a token at position t.

    Influence is that of Ameisen et al. 2025 ("Graph Pruning"): the edges into a node share its
    influence in proportion to their magnitudes, starting with 1 at the logit. Kept are the nodes
    with the most of it, until they have SHARE of the influence of all, at most MAX_NODES; and of
    the edges among them likewise, EDGE_SHARE. Of biases, the logits are those of their edges that
    were looked at.
    """
    trace, b, end = frozen.trace, frozen.b, len(frozen.write)
    U, b_U = interpret.unembedding(frozen.model)
    direction = U[token] * trace.final_scale[b, t]  # (C,)
    gradients = frozen.gradients(t, direction)
    n_leaves = frozen.starts[1]
    influence = direction.new_zeros(frozen.starts[-1])
    flow = direction.new_zeros(frozen.starts[-1])
    found = []  # (readers (n,), writers (n, k), logits (n, k), influence (n, k))

    def expand(readers, weight, logits, read, position, place):
        writers, values = frozen.edges(logits, read, position, place)
        size = values.abs()
        size = size * (weight / size.sum(dim=1).clamp(min=1e-30))[:, None]
        influence.index_add_(0, writers.flatten(), size.flatten())
        flow.index_add_(0, writers.flatten(), values.flatten())
        found.append((readers, writers, values, size))

    here = torch.tensor([t], device=direction.device)
    logit = trace.residual[-1, b, t] @ direction + b_U[token]
    expand(here.new_tensor([-1]), direction.new_ones(1), logit[None], direction[None], here, end)
    for place in reversed(range(end)):
        start, stop = frozen.starts[place + 1:place + 3]
        readers = start + (influence[start:stop] >= EXPANDED).nonzero()[:, 0]
        logits, read, position = frozen.nodes_at(place, gradients[place], readers)
        flow[readers] = logits
        expand(readers, influence[readers], logits, read, position, place)
    embedded = (frozen.embeddings * gradients[-1]).sum(dim=-1)  # (n, T)
    flow[:embedded.numel()] = embedded.flatten()

    known = influence >= EXPANDED
    known[:n_leaves] = influence[:n_leaves] > 0
    total = influence.sum().item()
    ids = largest(influence * known, SHARE * total)[:MAX_NODES]
    row_of = torch.full_like(influence, -1, dtype=torch.long)
    row_of[ids] = torch.arange(len(ids), device=ids.device)
    edges, values, sizes = [], [], []
    for readers, writers, logits, size in found:
        row = torch.where(readers < 0, -1, row_of[readers])[:, None].expand_as(writers)
        is_shown = (row_of[writers] >= 0) & ((row >= 0) | (readers[:, None] < 0)) & (size > 0)
        edges.append(torch.stack((row_of[writers][is_shown], row[is_shown]), dim=1))
        values.append(logits[is_shown])
        sizes.append(size[is_shown])
    sizes = torch.cat(sizes)
    kept = largest(sizes, EDGE_SHARE * sizes.sum())
    return Graph(ids, flow[ids], influence[ids], total, torch.cat(edges)[kept],
                 torch.cat(values)[kept])


def largest(sizes, enough):
    """Indices of the fewest of sizes (n,) that add up to `enough`, the largest first."""
    indices = sizes.nonzero()[:, 0]  # sorting fewer is faster
    ordered = sizes[indices].sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    return indices[ordered.indices[before < enough]]


def collect_graphs(model, trace, target):
    """(facts, arrays) for web/graph.js: the graphs of target[t] for the last positions t.

    facts: graphs, [{'t', 'logit', 'total', 'nodes', 'edges'}]: position, logit before any softcap,
    influence of all nodes, and where the rows of the next graph begin. arrays: graph_nodes (N, 5),
    with kind (0 embedding, 1 head, 2 neuron), layer, index (part of the embeddings, head or
    neuron), position, source (of a head, else 0); graph_logits, graph_influence (N,); graph_edges
    (E, 2), writer and reader as 1 + row within the graph, 0 for the logit; graph_edge_logits (E,).
    """
    frozen = Frozen(model, trace)
    cost = 2 * (frozen.T + TYPICAL_READS) * model.num_matmul_params()
    n = min(frozen.T, MAX_TARGETS, max(4, int(MAX_FLOPS / cost)))
    facts = []
    graphs = []
    U, b_U = interpret.unembedding(model)
    for t in range(frozen.T - n, frozen.T):
        graph = attribution_graph(frozen, t, target[t])
        graphs.append(graph)
        read = U[target[t]] * trace.final_scale[0, t]
        logit = (trace.residual[-1, 0, t] @ read + b_U[target[t]]).item()
        facts.append({
            't': t,
            'logit': logit,
            'total': graph.total,
            'nodes': sum(len(each.ids) for each in graphs),
            'edges': sum(len(each.edges) for each in graphs),
        })
    arrays = {
        'graph_nodes': frozen.describe(torch.cat([graph.ids for graph in graphs])),
        'graph_logits': to_half(torch.cat([graph.logits for graph in graphs])),
        'graph_influence': to_half(torch.cat([graph.influence for graph in graphs])),
        'graph_edges': 1 + torch.cat([graph.edges for graph in graphs]),
        'graph_edge_logits': to_half(torch.cat([graph.edge_logits for graph in graphs])),
    }
    return {'graphs': facts}, arrays
