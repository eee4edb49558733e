// What the Worker answers to the page: a text and what follows from it, piece by piece.

import {AblationMap} from './ablate.js';
import {Changes, describeModel, parseChanges} from './changes.js';
import {PatchMap} from './patch.js';
import {MersenneTwister, filtered, sampleIndex} from './sampling.js';
import {END_OF_TEXT} from './tokenizer.js';

/** What a panel asks for (LAZY_GROUPS in model.js): an answer that brings it saves a question. */
const ASKED_BY = {
  embedding: ['neighbors'],
  heads: ['attribution'],
  head: ['attribution', 'bySource', 'promoted'],
  mlp: ['neurons', 'neuronTokens'],
  why: ['attribution'],
  circuits: ['circuits'],
  bigrams: ['bigrams']
};
const SLICE = 25; // ms of computing for one answer, so that a new text never waits long

/** Of an Analysis and a PageTokenizer. */
export class Answers {
  constructor(analysis, tokenizer) {
    this.analysis = analysis;
    this.tokenizer = tokenizer;
    this.config = analysis.config;
    this.maxTokens = Math.min(256, this.config.block_size); // as in explain.py
    this.ids = [];
    this.random = null;
    this.changes = null;
    this.ablations = null;
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

  /** {facts, arrays, found}: `found` answers what the visible panels will ask for. */
  analyze(ids, leftOut, {layer, head, panels}) {
    this.ids = ids;
    this.ablations = null;
    const {facts, arrays} = this.analysis.start(ids, this.changes);
    const t = ids.length - 1;
    const distinct = facts.distinct.indexOf(ids[t]);
    const depths = Array.from({length: this.analysis.L + 1}, (_, depth) => ['lensAt', [depth]]);
    const keys = {
      attribution: [t],
      promoted: [layer, head, t],
      bySource: [layer, head],
      neurons: [layer],
      neuronTokens: [layer, t],
      neighbors: [distinct],
      bigrams: [distinct],
      circuits: [layer, head]
    };
    const wishesOf = panel =>
      panel === 'lens' ? depths : (ASKED_BY[panel] ?? []).map(group => [group, keys[group]]);
    const wishes = panels.flatMap(wishesOf);
    if (panels.includes('flow')) wishes.push(depths.at(-1));
    return {facts, arrays, leftOut, found: this.answersTo(wishes)};
  }

  /** The next ablations of the text, see AblationMap; size: how many there are. */
  ablate({start}) {
    this.ablations ??= new AblationMap(this.analysis);
    return {effects: this.ablations.more(start, SLICE), size: this.ablations.size};
  }

  /** Begin a map of activation patching, see PatchMap, from one text into another: {problem: a
   * sentence}, or what the panel says about it. */
  patch({clean, corrupted, tokens, changes, frozen}) {
    let texts;
    try {
      texts = [clean, corrupted].map(text => this.encode(text));
      this.change(changes, frozen);
    } catch (error) {
      return {problem: error.message};
    }
    const [a, b] = texts.map(ids => ids.length);
    if (a !== b) return {problem: `${a} and ${b} tokens: both texts need the same number.`};
    if (a > this.maxTokens) return {problem: `Only ${this.maxTokens} tokens fit.`};
    const {engine, V} = this.analysis;
    const options = {clean: texts[0], corrupted: texts[1], hooks: this.changes, tokens};
    this.map = new PatchMap(engine, V, options);
    const {tokens: chosen, candidates, start, range: difference, size} = this.map;
    return {ids: texts, tokens: chosen, candidates, start, range: difference, size};
  }

  /** The next answers of the map. */
  patchMore() {
    return this.map.more(SLICE);
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
  draw({seed, text, temperature, k, p, selection, ...changes}) {
    if (seed !== undefined) {
      const problem = this.begin(text, seed, changes);
      if (problem) return {problem, isOver: true};
    }
    const {vocab_size: width, turns, eot_token: eot} = this.config;
    const {V, trace} = this.analysis;
    const start = (trace.T - 1) * width;
    const kept = filtered(trace.logits.subarray(start, start + V), temperature, k, p).p;
    const id = sampleIndex(kept, temperature === 0 ? 0 : this.random.uniform());
    const shown = this.analyze([...this.ids, id], 0, selection);
    const isEnd = Boolean(turns) && id === eot;
    if (!isEnd) this.drawn.push(id);
    const whole = this.prompt + this.tokenizer.decode(this.drawn);
    return {...shown, text: whole, isOver: isEnd || this.ids.length >= this.maxTokens};
  }

  /** Begin to continue a text; a sentence if it cannot be continued. */
  begin(text, seed, changes) {
    const shown = this.show({text, selection: {panels: []}, ...changes});
    if (shown.problem) return shown.problem;
    if (this.ids.length >= this.maxTokens) return `The text is full: ${this.maxTokens} tokens fit.`;
    this.random = new MersenneTwister(seed);
    this.prompt = this.config.turns ? text + END_OF_TEXT : text;
    this.drawn = [];
    return null;
  }
}
