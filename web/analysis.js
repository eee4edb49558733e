// What explain.py's collect_text computes, from a trace of the engine: facts and arrays of a text.
//
// What a panel shows for one selection only (a head, a position, a token) is computed when it is
// asked for: see LAZY in model.js. Post-norm: interpret/__init__.py names the same steps.

import {activation} from './engine.js';
import {softmax} from './sampling.js';
import {
  dotAt,
  largest,
  lengths,
  logSumExp,
  mostAndLeast,
  rowOf,
  take,
  timesTransposed,
  vectorDot
} from './vectors.js';
import {Weights} from './weights.js';

const TOP = 8; // neurons, neighbors, bigrams

/** Of an engine (see Weights); one text at a time. */
export class Analysis extends Weights {
  constructor(engine, vocabSize) {
    super(engine, vocabSize);
    this.same = 0; // tokens at the beginning of a text that were those of the text before
    this.lens = []; // [depth]: {ids, values}, rows of the texts before
    this.trace = null;
    this.changes = null;
    this.scratch = new Float32Array(this.F);
  }

  // A text ----------------------------------------------------------------------------------------

  /** (facts, arrays) of a text that all panels need; the rest comes from `more`. changes: the
   * Changes to the model, if any. */
  start(ids, changes = null) {
    const before = this.engine.run(ids);
    const trace = changes ? this.engine.run(ids, changes) : before;
    const {T} = trace;
    this.forgetText(trace, changes);
    this.changes = changes;
    this.trace = trace;
    this.distinct = [...new Set(ids)];
    const heads = this.L * this.H;
    const limit = Math.max(4, Math.min(32, Math.floor(Math.sqrt(40000 / heads))));
    this.circuitIds = this.distinct.slice(0, limit);
    this.pairs = []; // the places of visible pairs in a (T, T) matrix
    for (let i = 0; i < T * T; i++) if (trace.mask[i]) this.pairs.push(i);
    this.later = this.laterScales();
    const logits = this.withoutPadding(trace.logits, T);
    const facts = {
      ids: [...ids],
      distinct: this.distinct,
      circuit_ids: this.circuitIds,
      embeddings: Object.keys(trace.embeddings),
      parts: this.partNames(),
      gated: this.isGated,
      forced: changes ? this.forcedHeads(changes) : [],
      strongest: Math.min(TOP, this.F), // neurons shown
      neurons_in_a_layer: this.F
    };
    const entry = (data, ...shape) => ({data, shape});
    const arrays = {
      mask: entry(trace.mask, T, T),
      logits: entry(logits, T, this.V),
      ...this.losses(logits, ids, this.known),
      ...this.targets(logits, ids, facts.parts.length),
      ...this.stream(),
      ...this.embeddings(),
      ...this.attention()
    };
    if (changes) {
      const logitsBefore = this.withoutPadding(before.logits, T);
      arrays.logits_before = entry(logitsBefore, T, this.V);
      arrays.loss_before = this.losses(logitsBefore, ids).loss;
    }
    this.known = arrays;
    return {facts, arrays};
  }

  /** What a panel asks for: the arrays of LAZY in model.js with this group and key. */
  more(group, key) {
    return this[group](...key);
  }

  /** known: what this returned for the text before, to keep what is the same. */
  losses(logits, ids, known = null) {
    const n = ids.length - 1;
    const loss = new Float32Array(n);
    const rank = new Uint32Array(n);
    const from = known ? this.sameTargets : 0;
    if (from) {
      loss.set(known.loss.data.subarray(0, from));
      rank.set(known.rank.data.subarray(0, from));
    }
    for (let t = from; t < n; t++) {
      const x = rowOf(logits, t, this.V);
      const next = x[ids[t + 1]];
      let above = 0;
      for (let i = 0; i < x.length; i++) if (x[i] > next) above++;
      loss[t] = logSumExp(x) - next;
      rank[t] = 1 + above;
    }
    return {loss: {data: loss, shape: [n]}, rank: {data: rank, shape: [n]}};
  }

  /** The target of each position, the next token or else the most likely one, and its rivals. */
  targets(logits, ids, nParts) {
    const T = ids.length;
    const most = Math.max(2, Math.min(24, Math.floor(50000 / (T * nParts))));
    const K = 1 + Math.min(this.V - 1, most);
    const tokens = new Uint32Array(T * K);
    const from = K === this.K ? this.sameTargets : 0;
    if (from) tokens.set(this.tokens.subarray(0, from * K));
    for (let t = from; t < T; t++) {
      const best = largest(rowOf(logits, t, this.V), K);
      const target = ids[t + 1] ?? best[0];
      const rivals = best.filter(id => id !== target).slice(0, K - 1);
      tokens.set([target, ...rivals], t * K);
    }
    this.K = K;
    this.tokens = tokens;
    const values = Float32Array.from(tokens, (id, i) => logits[Math.floor(i / K) * this.V + id]);
    return {
      part_tokens: {data: tokens, shape: [T, K]},
      part_logits: {data: values, shape: [T, K]}
    };
  }

  /** The positions whose tokens and next tokens were those of the text before. */
  get sameTargets() {
    return Math.max(0, this.same - 1);
  }

  target(t) {
    return this.tokens[t * this.K];
  }

  stream() {
    const {trace, C} = this;
    const {T} = trace;
    const ofLayers = layers => {
      const data = new Float32Array(layers.length * T);
      layers.forEach((x, l) => data.set(lengths(x, C), l * T));
      return {data, shape: [layers.length, T]};
    };
    const arrays = {
      size_attn: ofLayers(trace.attn_out),
      size_mlp: ofLayers(trace.mlp_out),
      size_stream: ofLayers(trace.residual),
      size_middle: ofLayers(trace.middle)
    };
    for (const [name, x] of Object.entries(trace.embeddings)) {
      arrays['size_' + name] = {data: lengths(x, C), shape: [T]};
    }
    return arrays;
  }

  /** Trace.later_scale: [place][t], the place after the last norm included. */
  laterScales() {
    const {final_scale: last, scales} = this.trace;
    if (!this.isPost) return [last, last];
    const later = [last];
    for (const scale of scales.toReversed()) later.unshift(scale.map((x, t) => x * later[0][t]));
    return later;
  }

  embeddings() {
    const parts = Object.values(this.trace.embeddings);
    const {T} = this.trace;
    const data = new Float32Array(parts.length * T * this.C);
    parts.forEach((x, i) => data.set(x, i * T * this.C));
    const arrays = {embeddings: {data, shape: [parts.length, T, this.C]}};
    if (this.config.position === 'rope') arrays.rotary = this.rotary(T);
    return arrays;
  }

  rotary(T) {
    const half = this.HS / 2;
    const frequency = i => Math.fround(this.config.rope_theta ** (-i / half));
    const factor = this.changes?.rotation ?? 1;
    const angle = (t, i) => factor * Math.fround(t * frequency(i));
    const data = new Float32Array(T * half);
    for (let i = 0; i < data.length; i++) data[i] = Math.cos(angle(Math.floor(i / half), i % half));
    return {data, shape: [T, half]};
  }

  attention() {
    const {trace, pairs, L, H} = this;
    const n = pairs.length;
    const {T} = trace;
    const roots = new Uint8Array(L * H * n); // as root_in_8_bits in explain.py
    trace.attention.forEach((attention, l) => {
      for (let head = 0; head < H; head++) {
        const start = (l * H + head) * n;
        const offset = head * T * T;
        for (let i = 0; i < n; i++) {
          roots[start + i] = 255 * Math.sqrt(attention[offset + pairs[i]]) + 0.5; // rounded
        }
      }
    });
    const joined = layers => {
      const data = new Float32Array(L * layers[0].length);
      layers.forEach((x, l) => data.set(x, l * x.length));
      return data;
    };
    return {
      attention: {data: roots, shape: [L, H, n]},
      q: {data: joined(trace.q), shape: [L, H, T, this.HS]},
      k: {data: joined(trace.k), shape: [L, this.KV, T, this.HS]}
    };
  }

  // What is asked for -----------------------------------------------------------------------------

  /** What the text before shares at its beginning stays: what is to the left decides it. */
  forgetText({ids}, changes) {
    const isComparable = !changes && !this.changes;
    const before = (isComparable && this.trace?.ids) || [];
    let same = 0;
    while (same < Math.min(ids.length, before.length) && ids[same] === before[same]) same++;
    this.same = this.config.prefix_lm ? 0 : same;
    this.lensBefore = this.lens;
    this.lens = [];
  }

  /** The ten most likely tokens at one depth, at each position. */
  lensAt(depth) {
    const {T} = this.trace;
    const n = Math.min(10, this.V);
    const ids = new Uint32Array(T * n);
    const p = new Float32Array(T * n);
    const same = this.lensBefore[depth] ? this.same : 0;
    if (same) {
      ids.set(this.lensBefore[depth].ids.subarray(0, same * n));
      p.set(this.lensBefore[depth].p.subarray(0, same * n));
    }
    const isLast = depth === this.L;
    const stream = this.trace.residual[depth].subarray(same * this.C);
    const logits = isLast
      ? this.withoutPadding(this.trace.logits, T).subarray(same * this.V)
      : this.toLogits(stream);
    for (let t = same; t < T; t++) {
      const x = rowOf(logits, t - same, this.V);
      const best = largest(x, n);
      const total = logSumExp(x);
      ids.set(best, t * n);
      p.set(take(x, best).map(logit => Math.exp(logit - total)), t * n);
    }
    this.lens[depth] = {ids, p};
    return {lens_ids: ids, lens: p};
  }

  partNames() {
    const names = Object.keys(this.trace.embeddings).map(kind => [kind, null, null]);
    for (let l = 0; l < this.L; l++) {
      for (let head = 0; head < this.H; head++) names.push(['head', l, head]);
      names.push(['mlp', l, null]);
    }
    if (this.config.bias) names.push(['bias', null, null]);
    if (this.config.logit_softcap) names.push(['softcap', null, null]);
    return names;
  }

  /** Direct logit attribution at one position, as interpret.attribute: (parts, K). */
  attribution(t) {
    const {trace, C, K} = this;
    const tokens = this.tokens.subarray(t * K, (t + 1) * K);
    const read = Array.from(tokens, id => rowOf(this.unembedding, id, C));
    const values = [];
    const effect = (vector, place) => {
      const arrived = this.carry(vector, place);
      return read.map(u => vectorDot(u, arrived) * this.later[place][t]);
    };
    for (const x of Object.values(trace.embeddings)) values.push(effect(rowOf(x, t, C), 0));
    let bias = Array.from(tokens, id => this.unembeddingBias[id]);
    const addBias = more => (bias = bias.map((x, i) => x + more[i]));
    for (let l = 0; l < this.L; l++) {
      const [attn, mlp] = [this.attentionPlace(l), this.mlpPlace(l)];
      for (let head = 0; head < this.H; head++) {
        values.push(effect(this.headOutput(l, head, t), attn));
      }
      const mlpBias = this.layerWeight(l, 'mlp.c_proj.bias');
      let written = rowOf(trace.mlp_out[l], t, C);
      if (mlpBias) {
        written = written.map((x, c) => x - mlpBias[c]);
        addBias(effect(mlpBias, mlp));
        addBias(effect(this.layerWeight(l, 'attn.c_proj.bias'), attn));
      }
      values.push(effect(written, mlp));
    }
    if (this.isPost) {
      this.norms.forEach((norm, i) => norm.bias && addBias(effect(norm.bias, i + 1)));
    }
    if (this.config.bias) values.push(bias);
    if (this.config.logit_softcap) {
      const width = trace.logits.length / trace.T;
      const logits = Array.from(tokens, id => trace.logits[t * width + id]);
      values.push(logits.map((x, i) => x - values.reduce((total, part) => total + part[i], 0)));
    }
    return {parts: Float32Array.from(values.flat())};
  }

  /** What a head writes at t, without bias. (C) */
  headOutput(l, head, t) {
    const {HS} = this;
    const mixed = this.trace.mixed[l];
    return this.throughHead(l, head, mixed, (head * this.trace.T + t) * HS);
  }

  promoted(l, head, t) {
    const place = this.attentionPlace(l);
    const scale = this.later[place][t];
    const effect = this.effectOnLogits(this.headOutput(l, head, t), place);
    const ids = mostAndLeast(effect, this.ends);
    return {promoted: Uint32Array.from(ids), promoted_by: take(effect, ids).map(x => x * scale)};
  }

  /** The heads whose patterns their queries and keys do not give: ['layer.head', ...]. */
  forcedHeads(changes) {
    const heads = Array.from({length: this.L * this.H}, (_, i) => [
      Math.floor(i / this.H),
      i % this.H
    ]);
    return heads.filter(([l, head]) => changes.forces(l, head)).map(([l, head]) => `${l}.${head}`);
  }

  /** The attention of a head whose queries and keys do not give it, for all visible pairs. */
  pattern(l, head) {
    const {T, attention} = this.trace;
    const weights = attention[l].subarray(head * T * T, (head + 1) * T * T);
    return {pattern: take(weights, this.pairs)};
  }

  /** The effect of a head on the logit of each target, by source token, for all visible pairs. */
  bySource(l, head) {
    const {trace, C, HS, H, KV, pairs} = this;
    const {T} = trace;
    const place = this.attentionPlace(l);
    const W = this.layerWeight(l, 'attn.c_proj.weight');
    const group = Math.floor((head * KV) / H);
    const v = trace.v[l].subarray(group * T * HS, (group + 1) * T * HS);
    const directions = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const u = rowOf(this.unembedding, this.target(t), C);
      directions.set(this.carryBack(u, place), t * C);
    }
    const {matmul} = this.engine;
    const read = new Float32Array(T * HS); // by the head's output weights
    const output = matmul.packBriefly(W.subarray(head * HS), HS, C, 1, H * HS);
    matmul.multiply(directions, output, read, T);
    const effects = new Float32Array(T * T);
    for (let t = 0; t < T; t++) {
      const scale = this.later[place][t] * (this.changes?.headFactor(l, head) ?? 1);
      for (let s = 0; s < T; s++) {
        const attention = trace.attention[l][(head * T + t) * T + s];
        effects[t * T + s] = attention * scale * dotAt(read, t * HS, v, s * HS, HS);
      }
    }
    return {by_source: take(effects, pairs)};
  }

  /** The strongest neurons of a layer at each position, and the activation function. */
  neurons(l) {
    const {trace, F} = this;
    const {T} = trace;
    const n = Math.min(TOP, F);
    const ids = new Uint32Array(T * n);
    const [pre, post] = [0, 1].map(() => new Float32Array(T * n));
    for (let t = 0; t < T; t++) {
      const best = this.strongest(l, t);
      ids.set(best, t * n);
      post.set(take(rowOf(trace.post[l], t, F), best), t * n);
      pre.set(take(rowOf(trace.pre[l], t, F), best), t * n);
    }
    const activate = activation(this.config.activation);
    return {
      neurons: ids,
      neuron_pre: pre,
      neuron_post: post,
      neuron_gates: pre.map(activate),
      curve: Float32Array.from(activationCurve(pre, activate))
    };
  }

  /** The tokens that the strongest neurons of a layer and position raise and lower: (n, 10). */
  neuronTokens(l, t) {
    const W = this.layerWeight(l, 'mlp.c_proj.weight');
    const tokensOf = neuron =>
      this.once(`neuron ${l} ${neuron}`, () => {
        const output = Float32Array.from({length: this.C}, (_, c) => W[c * this.F + neuron]);
        return mostAndLeast(this.effectOnLogits(output, this.mlpPlace(l)), this.ends);
      });
    const tokens = Array.from(this.strongest(l, t), tokensOf);
    return {neuron_tokens: Uint32Array.from(tokens.flat())};
  }

  /** The neurons that write the longest vectors. */
  strongest(l, t) {
    const {F} = this;
    const post = this.trace.post[l];
    const norms = this.writes[l];
    for (let i = 0; i < F; i++) this.scratch[i] = Math.abs(post[t * F + i]) * norms[i];
    return largest(this.scratch, TOP);
  }

  /** The tokens whose embeddings are most similar to that of distinct token i. */
  neighbors(i) {
    const id = this.distinct[i];
    return this.once(`neighbors ${id}`, () => {
      const E = this.wte.subarray(0, this.V * this.C);
      this.embeddingNorms ??= lengths(E, this.C);
      const norms = this.embeddingNorms;
      const divisor = j => Math.max(norms[j], 1e-12);
      const cosines = timesTransposed(rowOf(E, id, this.C), E, this.C);
      for (let j = 0; j < this.V; j++) cosines[j] /= divisor(j) * divisor(id);
      cosines[id] = -Infinity;
      const best = largest(cosines, Math.min(TOP, this.V - 1));
      return {near: Uint32Array.from(best), cosines: take(cosines, best)};
    });
  }

  /** The most likely tokens after distinct token i alone. */
  bigrams(i) {
    const id = this.distinct[i];
    return this.once(`bigrams ${id}`, () => {
      const direct = softmax(this.toLogits(this.silentStream(id, this.L)));
      const {logits} = this.engine.run([id], {}); // with hooks: the text before is not forgotten
      const whole = softmax(this.withoutPadding(logits, 1));
      const arrays = {};
      for (const [name, p] of Object.entries({whole, direct})) {
        const best = largest(p, TOP);
        arrays[`bigram_${name}_ids`] = Uint32Array.from(best);
        arrays[`bigram_${name}_p`] = take(p, best);
      }
      return arrays;
    });
  }

  /** QK and OV circuits of a head among circuitIds, as interpret.token_circuits: (N, N) each. */
  circuits(l, head) {
    const {C, HS, H, KV} = this;
    const ids = this.circuitIds;
    const N = ids.length;
    const group = Math.floor((head * KV) / H);
    const qs = new Float32Array(N * HS);
    const ks = new Float32Array(N * HS);
    const out = new Float32Array(N * C);
    const place = this.attentionPlace(l);
    ids.forEach((id, i) => {
      const stream = this.silentStream(id, l);
      const x = this.isPost ? stream : this.applyNorm(this.norm(`h.${l}.ln_1`), stream);
      qs.set(this.headInput(l, 'q', head, x), i * HS);
      ks.set(this.headInput(l, 'k', H + group, x), i * HS);
      const v = this.headInput(l, 'v', H + KV + group, x);
      out.set(this.carry(this.throughHead(l, head, v, 0), place), i * C);
    });
    const U = new Float32Array(N * C);
    ids.forEach((id, i) => U.set(rowOf(this.unembedding, id, C), i * C));
    const scale = this.later[place].reduce((a, b) => a + b, 0) / this.trace.T;
    const mean = timesTransposed(out, this.meanUnembedding(), C); // (N, 1)
    const ov = timesTransposed(out, U, C).map((x, i) => scale * (x - mean[Math.floor(i / N)]));
    return {qk: timesTransposed(qs, ks, HS).map(x => x / Math.sqrt(HS)), ov};
  }
}

/** Pre-activations and activations over the range of those shown, as in collect_neurons. */
function activationCurve(shown, activate) {
  let [low, high] = [-3, 3];
  for (const x of shown) {
    low = Math.min(low, x);
    high = Math.max(high, x);
  }
  const points = [];
  for (let i = 0; i <= 80; i++) {
    points.push(-4 + i / 10, 1.05 * (low + ((high - low) * i) / 80));
  }
  const grid = Float32Array.from(points).sort();
  return [...grid, ...grid.map(activate)];
}
