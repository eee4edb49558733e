// What follows from the weights of an engine alone: norms, unembedding, single heads.

import {centered, dotAt, rowOf, vectorDot} from './vectors.js';

/** engine: has config, weights and run(ids); vocabSize: without the padding of the vocabulary. */
export class Weights {
  constructor(engine, vocabSize) {
    const {config, weights} = engine;
    this.engine = engine;
    this.config = config;
    this.V = vocabSize;
    this.L = engine.L;
    this.H = engine.H;
    this.HS = engine.hs;
    this.KV = engine.KV;
    this.C = engine.C;
    this.F = engine.neurons;
    this.isPost = engine.isPost;
    this.isGated = config.activation === 'swiglu';
    this.weight = name => weights['transformer.' + name]?.data;
    this.layerWeight = (l, name) => this.weight(`h.${l}.${name}`);
    this.wte = this.weight('wte.weight');
    this.unembedding = weights[engine.head].data.subarray(0, this.V * this.C);
    // the norms that a vector in the stream passes on its way to the logits
    const inLayer = l => ['ln_1', 'ln_2'].map(name => this.norm(`h.${l}.${name}`));
    const layers = Array.from({length: this.L}, (_, l) => inLayer(l));
    this.norms = this.isPost ? layers.flat() : [this.norm('ln_f')];
    this.writes = Array.from({length: this.L}, (_, l) => this.outputNorms(l));
    this.unembeddingBias = this.biasOfLogits();
    this.ofToken = new Map(); // what depends on one token and the weights only
  }

  norm(name) {
    return {gain: this.weight(name + '.weight'), bias: this.weight(name + '.bias')};
  }

  /** The norm of each neuron's output weights. (F) */
  outputNorms(l) {
    const W = this.layerWeight(l, 'mlp.c_proj.weight');
    const squares = new Float64Array(this.F);
    for (let i = 0; i < W.length; i++) squares[i % this.F] += W[i] * W[i];
    return squares.map(Math.sqrt);
  }

  /** W_U times the bias of the final norm. (V) */
  biasOfLogits() {
    const {bias} = this.isPost ? {} : this.norms[0];
    return bias ? this.unembed(bias) : new Float32Array(this.V);
  }

  get isCentering() {
    return this.config.norm === 'layernorm';
  }

  /** 1 / the divisor of a norm at x. */
  scaleOf(x) {
    const y = this.isCentering ? centered(x) : x;
    return 1 / Math.sqrt(vectorDot(y, y) / this.C + this.config.norm_eps);
  }

  /** x after the linear part, centering and gain, of the norms from `place` to `end`. */
  carry(x, place, end = this.norms.length) {
    let y = x;
    for (const {gain} of this.norms.slice(place, end)) {
      const z = this.isCentering ? centered(y) : y;
      y = z.map((value, c) => value * gain[c]);
    }
    return y;
  }

  /** The transpose of carry: the direction at `place` that arrives as u at the end. */
  carryBack(u, place) {
    let y = u;
    for (const {gain} of this.norms.slice(place).toReversed()) {
      const z = y.map((value, c) => value * gain[c]);
      y = this.isCentering ? centered(z) : z;
    }
    return y;
  }

  /** A norm as the model applies it. */
  applyNorm({gain, bias}, x) {
    const y = this.isCentering ? centered(x) : x;
    const scale = this.scaleOf(x);
    return y.map((value, c) => value * scale * gain[c] + (bias ? bias[c] : 0));
  }

  /** Where the output of the attention of layer l enters the stream: an index in norms. */
  attentionPlace(l) {
    return this.isPost ? 2 * l : 0;
  }

  mlpPlace(l) {
    return this.isPost ? 2 * l + 1 : 0;
  }

  softcap(logits) {
    const cap = this.config.logit_softcap;
    return cap ? logits.map(x => cap * Math.tanh(x / cap)) : logits;
  }

  /** Logits of vectors (n, C) of the stream, as model.to_logits(ln_f(x)). (n, V) */
  toLogits(vectors) {
    let normed = vectors;
    if (!this.isPost) {
      normed = new Float32Array(vectors.length);
      for (let i = 0; i < vectors.length; i += this.C) {
        const x = vectors.subarray(i, i + this.C);
        normed.set(this.applyNorm(this.norms[0], x), i);
      }
    }
    return this.softcap(this.unembed(normed));
  }

  /** Vectors (n, C) times the unembedding. (n, V) */
  unembed(vectors) {
    const {engine, config, C} = this;
    const n = vectors.length / C;
    const logits = new Float32Array(n * config.vocab_size);
    engine.matmul.multiply(vectors, engine.packed[engine.head], logits, n);
    return this.withoutPadding(logits, n);
  }

  /** Logits (n, vocab_size of the model), without the padding of the vocabulary. (n, V) */
  withoutPadding(logits, n) {
    const width = logits.length / n;
    if (width === this.V) return logits;
    const out = new Float32Array(n * this.V);
    for (let i = 0; i < n; i++) out.set(logits.subarray(i * width, i * width + this.V), i * this.V);
    return out;
  }

  /** W_O of a head times the hs numbers of x from `start`. (C) */
  throughHead(l, head, x, start) {
    const W = this.layerWeight(l, 'attn.c_proj.weight');
    const width = this.H * this.HS;
    const out = new Float32Array(this.C);
    for (let c = 0; c < this.C; c++) {
      out[c] = dotAt(W, c * width + head * this.HS, x, start, this.HS);
    }
    return out;
  }

  /** The logits that a vector written at `place` adds, relative to their mean. (V) */
  effectOnLogits(vector, place) {
    return centered(this.unembed(this.carry(vector, place)));
  }

  get ends() {
    return Math.min(5, Math.floor(this.V / 2));
  }

  /** compute(), remembered under a name: it depends on the weights only. */
  once(name, compute) {
    if (!this.ofToken.has(name)) this.ofToken.set(name, compute());
    return this.ofToken.get(name);
  }

  /** The embedding of a token at each depth if no attention and no MLP adds to it. */
  silentStream(id, depth) {
    const size = this.config.position === 'sinusoidal' ? Math.sqrt(this.C) : 1;
    let x = rowOf(this.wte, id, this.C).map(value => value * size);
    if (this.isPost) for (const norm of this.norms.slice(0, 2 * depth)) x = this.applyNorm(norm, x);
    return x;
  }

  meanUnembedding() {
    return this.once('mean', () => {
      const mean = new Float64Array(this.C);
      this.unembedding.forEach((x, i) => (mean[i % this.C] += x / this.V));
      return Float32Array.from(mean);
    });
  }

  /** Query, key or value of x, without RoPE; head: among all those of c_attn. (hs) */
  headInput(l, kind, head, x) {
    const {C, HS} = this;
    const W = this.layerWeight(l, 'attn.c_attn.weight');
    const bias = this.layerWeight(l, 'attn.c_attn.bias');
    const y = new Float32Array(HS);
    for (let d = 0; d < HS; d++) {
      const i = head * HS + d;
      y[d] = dotAt(W, i * C, x, 0, C) + (bias ? bias[i] : 0);
    }
    if (kind === 'v' || !this.config.qk_norm) return y;
    const scale = 1 / Math.sqrt(vectorDot(y, y) / HS + this.config.norm_eps);
    const gain = this.layerWeight(l, `attn.${kind}_norm.weight`);
    return y.map((value, d) => value * scale * (gain ? gain[d] : 1));
  }
}
