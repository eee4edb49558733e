// The forward pass of model.py's GPT, with every activation kept. It needs no page: it runs in a
// Worker. Names and shapes are those of interpret.Trace; T tokens, C = n_embd, V = vocab_size.

import {Matmul} from './matmul.js';

const PRIME = 2147483647n; // of lib/ngram.py

const ERF_TERMS = [
  -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
  -0.82215223, 0.17087277
];

/** The error function, |error| < 1.2e-7 (Press et al. 1992, Numerical Recipes, erfcc). */
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x));
  let polynomial = 0;
  for (let i = ERF_TERMS.length - 1; i >= 0; i--) polynomial = polynomial * t + ERF_TERMS[i];
  const result = 1 - t * Math.exp(-x * x + polynomial);
  return x < 0 ? -result : result;
}

const ACTIVATIONS = {
  gelu: x => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_tanh: x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  relu: x => Math.max(0, x),
  relu2: x => Math.max(0, x) ** 2,
  swiglu: x => x / (1 + Math.exp(-x)) // of the gate
};

/** position_angles of model.py, which rounds to float32: (T, dim / 2) in a row. */
function positionAngles(T, dim, theta) {
  const half = dim / 2;
  const angles = new Float32Array(T * half);
  for (let i = 0; i < half; i++) {
    const frequency = Math.fround(theta ** -Math.fround((2 * i) / dim));
    for (let t = 0; t < T; t++) angles[t * half + i] = t * frequency;
  }
  return angles;
}

/** The activation function by its name; for swiglu, what the value is multiplied by. */
export function activation(name) {
  if (!ACTIVATIONS[name]) throw Error(`activation = ${name} is not in web/engine.js`);
  return ACTIVATIONS[name];
}

// Documents (lib/pairs.py) ------------------------------------------------------------------------

/** The number of each token's document. */
function documentNumbers(ids, eot, turns) {
  let document = 0;
  return ids.map((id, t) => {
    const starts = id === eot && (!turns || t === 0 || ids[t - 1] === eot);
    if (starts) document++;
    return document;
  });
}

/** Which part of a row of pairs each token belongs to, and whether that is a source. */
function sourceParts(ids, eot) {
  const documents = documentNumbers(ids, eot, 1);
  let part = 0;
  return ids.map((id, t) => {
    if (id === eot) part++;
    const isSource = (part + documents[t]) % 2 === 0 && documents[t] > 0;
    return {part, isSource};
  });
}

/** 1 where a query (row) sees a key (column): model.attention_mask. (T, T)
 * seesFuture: also keys that come after the query. */
export function attentionMask(ids, config, seesFuture = false) {
  const {eot_token: eot, turns, prefix_lm: prefixLm} = config;
  const T = ids.length;
  const documents = eot === null ? null : documentNumbers(ids, eot, turns);
  const parts = prefixLm ? sourceParts(ids, eot) : null;
  const mask = new Uint8Array(T * T);
  for (let t = 0; t < T; t++) {
    for (let s = 0; s < T; s++) {
      let sees = s <= t || seesFuture;
      if (parts && parts[t].isSource && parts[t].part === parts[s].part) sees = true;
      if (documents && documents[t] !== documents[s]) sees = false;
      mask[t * T + s] = sees ? 1 : 0;
    }
  }
  return mask;
}

// The model ---------------------------------------------------------------------------------------

export class Engine {
  /**
   * config: the fields of GPTConfig; weights: {name in the state_dict: {data: Float32Array,
   * shape}}. The head of a model with tied weights is transformer.wte.weight.
   */
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.L = config.n_layer;
    this.C = config.n_embd;
    this.H = config.n_head;
    this.KV = config.n_kv_head ?? config.n_head;
    this.hs = config.head_size ?? this.C / this.H;
    this.V = config.vocab_size;
    this.isPost = config.norm_position === 'post';
    this.head = weights['lm_head.weight'] ? 'lm_head.weight' : 'transformer.wte.weight';
    const isMatrix = name => /c_attn|c_fc|c_proj/.test(name) && name.endsWith('.weight');
    const names = [...Object.keys(weights).filter(isMatrix), this.head];
    const shapes = names.map(name => weights[name].shape);
    const numbers = shapes.reduce((sum, [nOut, nIn]) => sum + Matmul.packedSize(nOut, nIn), 0);
    const longest = Math.max(config.block_size, this.C); // also of what is packed briefly
    const largest = dimension => Math.max(longest, ...shapes.map(shape => shape[dimension]));
    const brief = Matmul.packedSize(longest, Matmul.packedSize(this.hs, 1));
    this.matmul = new Matmul(numbers + brief, largest(1), largest(0));
    this.packed = {};
    for (const name of names) {
      const {data, shape} = weights[name];
      this.packed[name] = this.matmul.pack(data, ...shape);
    }
    this.neurons = weights['transformer.h.0.mlp.c_proj.weight'].shape[1];
    this.run(new Array(Math.min(64, config.block_size)).fill(0)); // so that all is compiled
    this.last = null; // the previous trace, whose beginning is used again
  }

  /**
   * The forward pass over ids, as a trace. hooks: functions that change activations in place before
   * they are used: mask(data, T), embedding(name, data), scores, attention, mixed, attnOut, post,
   * mlpOut and residual(layer, data). And seesFuture: see attentionMask; rotation: a factor of the
   * angles of RoPE. known: [a trace, n]: the first n tokens give what they gave there.
   */
  run(ids, hooks = null, known = null) {
    const T = ids.length;
    const {block_size: longest, position, rope_theta: theta} = this.config;
    if (!T || T > longest) throw new Error(`Give 1 to ${longest} tokens, not ${T}.`);
    const [old, from] = known || [this.last, hooks ? 0 : this.commonPrefix(ids)];
    const pass = {ids, T, from, old, hooks: hooks ?? {}};
    if (position === 'rope') {
      const factor = pass.hooks.rotation ?? 1;
      const angles = positionAngles(T, this.hs, theta).map(angle => factor * angle);
      pass.rotary = {cos: angles.map(Math.cos), sin: angles.map(Math.sin)};
    }
    const rows = (name, layer, width, heads = 1) => this.rows(pass, name, layer, width, heads);
    const {L, C, H, KV, hs, neurons: F, V} = this;
    const layers = name => (width, heads) =>
      Array.from({length: L}, (_, layer) => rows(name, layer, width, heads));
    const trace = {
      ids: [...ids],
      T,
      mask: attentionMask(ids, this.config, pass.hooks.seesFuture),
      embeddings: this.embed(pass),
      residual: Array.from({length: L + 1}, (_, layer) => rows('residual', layer, C)),
      middle: layers('middle')(C),
      q: layers('q')(hs, H),
      k: layers('k')(hs, KV),
      v: layers('v')(hs, KV),
      attention: Array.from({length: L}, () => new Float32Array(H * T * T)),
      mixed: layers('mixed')(hs, H),
      attn_out: layers('attn_out')(C),
      pre: layers('pre')(F),
      post: layers('post')(F),
      mlp_out: layers('mlp_out')(C),
      scales: Array.from({length: this.isPost ? 2 * L : 0}, (_, i) => rows('scales', i, 1)),
      final_scale: rows('final_scale', null, 1),
      logits: rows('logits', null, V)
    };
    pass.hooks.mask?.(trace.mask, T);
    this.addUp(trace, pass);
    const x = new Float32Array(T * C);
    for (let layer = 0; layer < L; layer++) this.block(trace, layer, pass, x);
    if (this.isPost) {
      trace.final_scale.fill(1);
      x.set(trace.residual[L]);
    } else this.norm('transformer.ln_f', trace.residual[L], x, pass, trace.final_scale);
    this.matmul.multiply(x, this.packed[this.head], trace.logits, T, pass.from);
    this.softcap(trace.logits, pass);
    if (!hooks) this.last = trace;
    return trace;
  }

  /** How many tokens at the beginning of ids give what they gave the last time. */
  commonPrefix(ids) {
    if (!this.last || this.config.prefix_lm) return 0;
    const old = this.last.ids;
    let n = 0;
    while (n < Math.min(old.length, ids.length) && old[n] === ids[n]) n++;
    return Math.min(n, ids.length - 1);
  }

  /** A (heads, T, width) array that starts with the rows of the unchanged prefix. */
  rows({T, from, old}, name, layer, width, heads) {
    const data = new Float32Array(heads * T * width);
    if (!from) return data;
    const before = layer === null ? old[name] : old[name][layer];
    for (let head = 0; head < heads; head++) {
      const start = head * old.T * width;
      data.set(before.subarray(start, start + from * width), head * T * width);
    }
    return data;
  }

  weight(name) {
    return this.weights[name]?.data;
  }

  // Embeddings

  embed(pass) {
    const {T, ids, hooks} = pass;
    const {C, config} = this;
    const parts = {token: new Float32Array(T * C)};
    const lookUp = (table, row, into, t) => {
      for (let c = 0; c < C; c++) into[t * C + c] += table[row * C + c];
    };
    const wte = this.weight('transformer.wte.weight');
    ids.forEach((id, t) => lookUp(wte, id, parts.token, t));
    if (config.ngram > 1) {
      parts['n-grams'] = new Float32Array(T * C);
      const tables = this.weight('transformer.ngram.tables.weight');
      this.ngramRows(ids).forEach((rows, t) =>
        rows.forEach(row => lookUp(tables, row, parts['n-grams'], t))
      );
    }
    if (config.position === 'learned') {
      parts.position = this.weight('transformer.wpe.weight').slice(0, T * C);
    } else if (config.position === 'sinusoidal') {
      const scale = Math.sqrt(C);
      for (const part of Object.values(parts)) part.forEach((x, i) => (part[i] = x * scale));
      parts.position = new Float32Array(T * C);
      positionAngles(T, C, 10000).forEach((angle, i) => {
        parts.position[2 * i] = Math.sin(angle);
        parts.position[2 * i + 1] = Math.cos(angle);
      });
    }
    for (const [name, part] of Object.entries(parts)) hooks.embedding?.(name, part);
    return parts;
  }

  /** The rows of the hash tables for each token: NgramEmbedding.hash. */
  ngramRows(ids) {
    const {ngram, ngram_rows: tableRows, vocab_size: V, eot_token: eot, turns} = this.config;
    const base = BigInt(V + 1);
    const documents = eot === null ? null : documentNumbers(ids, eot, turns);
    return ids.map((id, t) => {
      let number = BigInt(id);
      let power = 1n;
      let combinations = base; // of n tokens
      const rows = [];
      for (let n = 2; n <= ngram; n++) {
        const s = t - n + 1;
        const isThere = s >= 0 && (!documents || documents[s] === documents[t]);
        power = (power * base) % PRIME;
        combinations *= base;
        number = (number + BigInt(isThere ? ids[s] + 1 : 0) * power) % PRIME;
        const row =
          combinations <= BigInt(tableRows)
            ? number
            : ((number * 1181783497n) % PRIME) % BigInt(tableRows);
        rows.push(Number(row) + (n - 2) * tableRows);
      }
      return rows;
    });
  }

  addUp({embeddings, residual}, {from, hooks}) {
    const x = residual[0];
    const start = from * this.C;
    x.fill(0, start);
    for (const part of Object.values(embeddings)) add(x, x, part, start);
    hooks.residual?.(0, x);
  }

  // Blocks

  block(trace, layer, pass, x) {
    const {from, hooks} = pass;
    const {C, isPost} = this;
    const name = `transformer.h.${layer}`;
    const stream = trace.residual[layer];
    const middle = trace.middle[layer];
    const next = trace.residual[layer + 1];
    if (isPost) x.set(stream);
    else this.norm(`${name}.ln_1`, stream, x, pass);
    this.attention(trace, layer, pass, x);
    add(middle, stream, trace.attn_out[layer], from * C);
    if (isPost) this.norm(`${name}.ln_1`, middle, middle, pass, trace.scales[2 * layer]);

    if (isPost) x.set(middle);
    else this.norm(`${name}.ln_2`, middle, x, pass);
    this.mlp(trace, layer, pass, x);
    add(next, middle, trace.mlp_out[layer], from * C);
    if (isPost) this.norm(`${name}.ln_2`, next, next, pass, trace.scales[2 * layer + 1]);
    hooks.residual?.(layer + 1, next);
  }

  attention(trace, layer, pass, x) {
    const {T, from, hooks} = pass;
    const {H, KV, hs} = this;
    const name = `transformer.h.${layer}.attn`;
    const width = (H + 2 * KV) * hs;
    const projected = new Float32Array(T * width);
    this.linear(`${name}.c_attn`, x, projected, pass);
    const [q, k, v] = [trace.q[layer], trace.k[layer], trace.v[layer]];
    const split = (into, heads, start) => {
      for (let head = 0; head < heads; head++) {
        for (let t = from; t < T; t++) {
          const source = t * width + start + head * hs;
          into.set(projected.subarray(source, source + hs), (head * T + t) * hs);
        }
      }
    };
    split(q, H, 0);
    split(k, KV, H * hs);
    split(v, KV, (H + KV) * hs);
    if (this.config.qk_norm) {
      this.normHeads(q, H, this.weight(`${name}.q_norm.weight`), pass);
      this.normHeads(k, KV, this.weight(`${name}.k_norm.weight`), pass);
    }
    if (this.config.position === 'rope') {
      this.rotate(q, H, pass);
      this.rotate(k, KV, pass);
    }
    this.attend(trace, layer, pass);
    hooks.mixed?.(layer, trace.mixed[layer]);
    const joined = new Float32Array(T * H * hs);
    for (let head = 0; head < H; head++) {
      for (let t = from; t < T; t++) {
        const source = (head * T + t) * hs;
        joined.set(trace.mixed[layer].subarray(source, source + hs), (t * H + head) * hs);
      }
    }
    this.linear(`${name}.c_proj`, joined, trace.attn_out[layer], pass);
    hooks.attnOut?.(layer, trace.attn_out[layer]);
  }

  /** attention = softmax(q k^T / sqrt(hs)) over the mask; mixed = attention v */
  attend(trace, layer, {T, from, hooks, old}) {
    const {H, KV, hs} = this;
    const {mask} = trace;
    const [q, k, v] = [trace.q[layer], trace.k[layer], trace.v[layer]];
    const weights = trace.attention[layer];
    const scale = 1 / Math.sqrt(hs);
    const size = T * hs;
    const ofHead = (x, head) => x.subarray(head * size, (head + 1) * size);
    const group = head => Math.floor((head * KV) / H); // of queries that share keys and values
    for (let head = 0; head < H; head++) {
      const scores = weights.subarray(head * T * T, (head + 1) * T * T);
      const keys = this.matmul.packBriefly(ofHead(k, group(head)), T, hs);
      this.matmul.multiply(ofHead(q, head), keys, scores, T, from);
      for (let t = 0; t < from; t++) {
        const before = (head * old.T + t) * old.T;
        const row = old.attention[layer].subarray(before, before + Math.min(T, old.T));
        scores.set(row, t * T);
      }
      for (let i = from * T; i < T * T; i++) scores[i] = mask[i] ? scores[i] * scale : -Infinity;
    }
    hooks.scores?.(layer, weights);
    for (let row = 0; row < H * T; row++) {
      if (row % T >= from) softmaxInPlace(weights, row * T, (row + 1) * T);
    }
    hooks.attention?.(layer, weights);
    for (let head = 0; head < H; head++) {
      const values = this.matmul.packBriefly(ofHead(v, group(head)), hs, T, 1, hs);
      const pattern = weights.subarray(head * T * T, (head + 1) * T * T);
      this.matmul.multiply(pattern, values, ofHead(trace.mixed[layer], head), T, from);
    }
  }

  mlp(trace, layer, pass, x) {
    const {T, from, hooks} = pass;
    const F = this.neurons;
    const name = `transformer.h.${layer}.mlp`;
    const isGated = this.config.activation === 'swiglu';
    const width = isGated ? 2 * F : F;
    const hidden = new Float32Array(T * width);
    this.linear(`${name}.c_fc`, x, hidden, pass);
    const act = activation(this.config.activation);
    const [pre, post] = [trace.pre[layer], trace.post[layer]];
    for (let t = from; t < T; t++) {
      for (let f = 0; f < F; f++) {
        const gate = hidden[t * width + f];
        pre[t * F + f] = gate;
        post[t * F + f] = act(gate) * (isGated ? hidden[t * width + F + f] : 1);
      }
    }
    hooks.post?.(layer, post);
    this.linear(`${name}.c_proj`, post, trace.mlp_out[layer], pass);
    hooks.mlpOut?.(layer, trace.mlp_out[layer]);
  }

  // Parts

  /** y = x W^T + b */
  linear(name, x, y, {T, from}) {
    this.matmul.multiply(x, this.packed[`${name}.weight`], y, T, from);
    const bias = this.weight(`${name}.bias`);
    if (!bias) return;
    const n = bias.length;
    for (let t = from; t < T; t++) {
      for (let o = 0; o < n; o++) y[t * n + o] += bias[o];
    }
  }

  /** LayerNorm or RMSNorm of x (T, C) into y; scales (T): 1 / the divisors. */
  norm(name, x, y, {T, from}, scales = null) {
    const {C} = this;
    const gain = this.weight(`${name}.weight`);
    const bias = this.weight(`${name}.bias`);
    const centers = this.config.norm === 'layernorm';
    for (let t = from; t < T; t++) {
      const row = t * C;
      let mean = 0;
      if (centers) {
        for (let c = 0; c < C; c++) mean += x[row + c];
        mean /= C;
      }
      let square = 0;
      for (let c = 0; c < C; c++) square += (x[row + c] - mean) ** 2;
      const scale = 1 / Math.sqrt(square / C + this.config.norm_eps);
      for (let c = 0; c < C; c++) {
        y[row + c] = (x[row + c] - mean) * scale * gain[c] + (bias ? bias[c] : 0);
      }
      if (scales) scales[t] = scale;
    }
  }

  /** QK-norm: RMSNorm of each head's queries or keys. */
  normHeads(x, heads, gain, {T, from}) {
    const {hs} = this;
    for (let head = 0; head < heads; head++) {
      for (let t = from; t < T; t++) {
        const row = (head * T + t) * hs;
        let square = 0;
        for (let d = 0; d < hs; d++) square += x[row + d] ** 2;
        const scale = 1 / Math.sqrt(square / hs + this.config.norm_eps);
        for (let d = 0; d < hs; d++) x[row + d] *= scale * (gain ? gain[d] : 1);
      }
    }
  }

  /** RoPE: apply_rotary of model.py. */
  rotate(x, heads, {T, from, rotary}) {
    const {hs} = this;
    const half = hs / 2;
    for (let t = from; t < T; t++) {
      for (let i = 0; i < half; i++) {
        const cos = rotary.cos[t * half + i];
        const sin = rotary.sin[t * half + i];
        for (let head = 0; head < heads; head++) {
          const at = (head * T + t) * hs + i;
          const a = x[at];
          const b = x[at + half];
          x[at] = a * cos - b * sin;
          x[at + half] = a * sin + b * cos;
        }
      }
    }
  }

  softcap(logits, {from}) {
    const cap = this.config.logit_softcap;
    if (!cap) return;
    const start = from * this.V;
    for (let i = start; i < logits.length; i++) logits[i] = cap * Math.tanh(logits[i] / cap);
  }
}

function add(sum, a, b, start) {
  for (let i = start; i < sum.length; i++) sum[i] = a[i] + b[i];
}

function softmaxInPlace(x, start, end) {
  let max = -Infinity;
  for (let i = start; i < end; i++) max = Math.max(max, x[i]);
  let total = 0;
  for (let i = start; i < end; i++) {
    x[i] = Math.exp(x[i] - max);
    total += x[i];
  }
  for (let i = start; i < end; i++) x[i] /= total;
}
