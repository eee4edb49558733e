// Activation patching (causal tracing: Meng et al. 2022, "Locating and Editing Factual Associations
// in GPT", section 2.1): which part of the residual stream carries the answer. It needs no page.

import {softmax} from './sampling.js';
import {largest} from './vectors.js';

/**
 * The residual stream of the run on the clean text, at one depth and position, is put into the run
 * on the corrupted text. The answer is the difference of two logits at the end of the text, of
 * tokens[0], by default the most likely after the clean text, minus tokens[1], of the corrupted. If
 * both are the same: the two whose probabilities the clean text raises and lowers most.
 */
export class PatchMap {
  /** clean, corrupted: token ids, equally many; hooks: of both runs, see Engine.run. */
  constructor(engine, vocabSize, {clean, corrupted, hooks, tokens}) {
    this.engine = engine;
    this.V = vocabSize;
    this.ids = corrupted;
    this.hooks = hooks;
    this.clean = engine.run(clean, hooks ?? {});
    this.corrupted = engine.run(corrupted, hooks ?? {});
    const ends = [this.clean, this.corrupted].map(trace => this.lastLogits(trace));
    const best = ends.map(logits => largest(logits, 10));
    this.candidates = [...new Set(best.flat())];
    let defaults = best.map(ids => ids[0]);
    if (defaults[0] === defaults[1]) {
      const [p, q] = ends.map(softmax);
      const raised = this.candidates.toSorted((a, b) => p[b] - q[b] - (p[a] - q[a]));
      defaults = [raised[0], raised.at(-1)];
    }
    this.tokens = tokens.map((id, i) => (id < 0 ? defaults[i] : id));
    this.start = this.answer(this.corrupted);
    this.range = this.answer(this.clean) - this.start;
    // without a look ahead, what comes before the patch stays
    this.isCausal = this.corrupted.mask.every((seen, i) => !seen || i % this.T <= i / this.T);
    this.done = 0; // cells, from the embeddings up
  }

  get T() {
    return this.ids.length;
  }

  get size() {
    return (this.engine.L + 1) * this.T;
  }

  lastLogits({logits, T}) {
    const start = (T - 1) * (logits.length / T);
    return logits.subarray(start, start + this.V);
  }

  answer(trace) {
    const logits = this.lastLogits(trace);
    return logits[this.tokens[0]] - logits[this.tokens[1]];
  }

  /** The answers of the next cells, row by row, for about `ms`. */
  more(ms) {
    const end = performance.now() + ms;
    const answers = [];
    while (this.done < this.size && (!answers.length || performance.now() < end)) {
      answers.push(this.patched(Math.floor(this.done / this.T), this.done % this.T));
      this.done++;
    }
    return Float32Array.from(answers);
  }

  /** The answer with the clean residual stream at a depth (0: embeddings) and position. */
  patched(depth, t) {
    const {C} = this.engine;
    const rowAt = trace => trace.residual[depth].subarray(t * C, (t + 1) * C);
    const [clean, before] = [rowAt(this.clean), rowAt(this.corrupted)];
    if (clean.every((x, c) => x === before[c])) return this.start;
    const residual = (layer, data) => layer === depth && data.set(clean, t * C);
    const hooks = Object.assign(Object.create(this.hooks), {residual});
    return this.answer(this.engine.run(this.ids, hooks, this.isCausal && [this.corrupted, t]));
  }
}
