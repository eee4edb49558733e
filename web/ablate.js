// Ablations of a typed text, as `ablate` in interpret/causal.py computes them. It needs no page.

import {logSumExp, rowOf} from './vectors.js';

/** What changes in a text if one head or one MLP is set to zero or to its mean over the text. */
export class AblationMap {
  /** Of an Analysis that has started a text. */
  constructor(analysis) {
    const {engine, trace, changes, V} = analysis;
    Object.assign(this, {engine, trace, changes, V});
    this.targets = Array.from({length: trace.T}, (_, t) => analysis.target(t));
    this.before = this.measure(trace);
    this.parts = engine.H + 1; // of a layer: the heads and the MLP
    this.size = 2 * engine.L * this.parts;
  }

  /** {loss, logit} of the target at each position. */
  measure({logits, T}) {
    const width = logits.length / T;
    const measured = {loss: new Float32Array(T), logit: new Float32Array(T)};
    this.targets.forEach((id, t) => {
      const x = rowOf(logits, t, width).subarray(0, this.V);
      measured.logit[t] = x[id];
      measured.loss[t] = logSumExp(x) - x[id];
    });
    return measured;
  }

  /** The effects of ablations from number `start` on, for about `ms`: each {loss, logit}. They are
   * in the order of the arrays (2, L, H + 1, T). */
  more(start, ms) {
    const end = performance.now() + ms;
    const effects = [];
    for (let i = start; i < this.size; i++) {
      if (effects.length && performance.now() > end) break;
      effects.push(this.effect(i));
    }
    return effects;
  }

  effect(i) {
    const {engine, parts} = this;
    const part = i % parts;
    const layer = Math.floor(i / parts) % engine.L;
    const isMean = i >= this.size / 2;
    const isMlp = part === engine.H;
    const name = isMlp ? 'post' : 'mixed';
    const replace = (l, data) => {
      this.changes?.[name](l, data);
      if (l !== layer) return;
      const size = isMlp ? data.length : data.length / engine.H;
      const start = isMlp ? 0 : part * size;
      replaceRows(data.subarray(start, start + size), this.trace.T, isMean);
    };
    const hooks = Object.assign(Object.create(this.changes), {[name]: replace});
    const {loss, logit} = this.measure(engine.run(this.trace.ids, hooks));
    return {
      loss: loss.map((x, t) => x - this.before.loss[t]),
      logit: logit.map((x, t) => x - this.before.logit[t])
    };
  }
}

/** Set the T rows of a matrix to zero, or to their mean. */
function replaceRows(data, T, isMean) {
  const width = data.length / T;
  const mean = new Float64Array(width);
  for (let i = 0; isMean && i < data.length; i++) mean[i % width] += data[i] / T;
  for (let t = 0; t < T; t++) data.set(mean, t * width);
}
