// What the Worker answers to the page: a text and what follows from it, piece by piece.

import {Changes, describeModel, parseChanges} from './changes.js';
import {MersenneTwister, filtered, sampleIndex} from './sampling.js';
import {END_OF_TEXT} from './tokenizer.js';

const SLICE = 25; // ms of computing for one answer, so that a new text never waits long

/** Of an Analysis and a PageTokenizer. */
export class Answers {
  constructor(analysis, tokenizer) {
    this.analysis = analysis;
    this.tokenizer = tokenizer;
    this.config = analysis.config;
    this.maxTokens = Math.min(256, this.config.block_size);
    this.ids = [];
    this.random = null;
    this.changes = null;
  }

  /** {problem: a sentence}, or what `analyze` returns. selection: {layer, head}; changes, frozen:
   * of the page's state. */
  show({text, selection, changes, frozen}) {
    let ids;
    try {
      ids = this.encode(text);
      this.change(changes, frozen);
    } catch (error) {
      return {problem: error.message};
    }
    const excess = ids.length - this.maxTokens;
    if (excess > 0 && this.config.turns) {
      const count = `${ids.length} tokens, but only ${this.maxTokens} fit`;
      return {problem: `The text has ${count}: give a shorter source or target.`};
    }
    return this.analyze(ids.slice(-this.maxTokens), Math.max(0, excess), selection);
  }

  /** Change the model from now on. frozen: the text whose attention is kept, or ''. */
  change(changes, frozen) {
    const {engine} = this.analysis;
    const model = describeModel(engine);
    const parsed = parseChanges(changes, model);
    const kept = frozen ? engine.run(this.encode(frozen).slice(-this.maxTokens), {}) : null;
    this.changes = parsed.size || kept ? new Changes(parsed, model, kept) : null;
  }

  /** Token ids as --start gives them. */
  encode(text) {
    if (this.config.turns) return this.tokenizer.encodeTurns(text.split(END_OF_TEXT));
    return this.tokenizer.encodePrompt(text);
  }

  /** {facts, arrays, found}: `found` answers what the panels will ask for first. */
  analyze(ids, leftOut, {layer, head}) {
    this.ids = ids;
    const {analysis} = this;
    const {facts, arrays} = analysis.start(ids, this.changes);
    const t = ids.length - 1;
    const distinct = facts.distinct.indexOf(ids[t]);
    const wishes = [
      ['attribution', [t]],
      ['promoted', [layer, head, t]],
      ['bySource', [layer, head]],
      ['neuronTokens', [layer, t]],
      ['neighbors', [distinct]],
      ['bigrams', [distinct]],
      ['circuits', [layer, head]]
    ];
    for (let depth = analysis.L; depth >= 0; depth--) wishes.push(['lensAt', [depth]]);
    return {facts, arrays, leftOut, found: this.answersTo(wishes)};
  }

  more({wishes}) {
    return {found: this.answersTo(wishes)};
  }

  /** [[wish, arrays], ...] of the first wishes, as many as fit into a slice, at least one. */
  answersTo(wishes) {
    const end = performance.now() + SLICE;
    const found = [];
    for (const wish of wishes) {
      if (found.length && performance.now() > end) break;
      found.push([wish, this.answer(wish)]);
    }
    return found;
  }

  answer([group, key]) {
    try {
      return this.analysis.more(group, key);
    } catch (error) {
      return {error: error.message};
    }
  }

  /** One more token, drawn as sample.py does; seed: of the first one. `isOver`: it was the
   * last. text: of the ids so far, when it begins. */
  draw({seed, text, temperature, k, p, selection}) {
    if (seed !== undefined) {
      this.random = new MersenneTwister(seed);
      this.prompt = this.config.turns ? text + END_OF_TEXT : text;
      this.drawn = [];
    }
    const {V, trace} = this.analysis;
    const start = (trace.T - 1) * this.config.vocab_size;
    const kept = filtered(trace.logits.subarray(start, start + V), temperature, k, p).p;
    const id = sampleIndex(kept, temperature === 0 ? 0 : this.random.uniform());
    const shown = this.analyze([...this.ids, id], 0, selection);
    const isEnd = Boolean(this.config.turns) && id === this.config.eot_token;
    if (!isEnd) this.drawn.push(id);
    const whole = this.prompt + this.tokenizer.decode(this.drawn);
    return {...shown, text: whole, isOver: isEnd || this.ids.length >= this.maxTokens};
  }
}
