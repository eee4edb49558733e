// What explain.py has computed: facts, arrays, tokens; the state of its page.

import {readArray} from './arrays.js';
import {
  DEFAULTS,
  LIMITS,
  Pending,
  TEXTS,
  h,
  range,
  scrollToElement,
  set,
  takeBytes
} from './core.js';

export const facts = JSON.parse(document.getElementById('facts').textContent);
export const arrays = {}; // name -> {data: typed array, shape}
export let T = facts.ids.length; // tokens
export const L = facts.model.n_layer; // layers
export const H = facts.model.n_head; // heads per layer
export const HS = facts.head_size;
export const isPostNorm = facts.model.norm_position === 'post';

// Data --------------------------------------------------------------------------------------------

/** Fill `arrays`: the inverse of pack() in explain.py. */
export async function loadArrays() {
  const bytes = takeBytes('arrays');
  await Promise.all(
    Object.entries(facts.arrays).map(async ([name, place]) => {
      try {
        arrays[name] = await readArray(bytes, place);
      } catch (error) {
        arrays[name] = {error}; // for the panels that need it
      }
    })
  );
  readMask();
  rememberOriginal();
  facts.vocabulary = JSON.parse(new TextDecoder().decode(row('vocabulary')));
}

/** A view of an array at its leading indices: row('q', l, h, t) is a vector. */
export function row(name, ...index) {
  if (arrays[name]?.rows) return lazyRow(name, index);
  const {data, shape, error} = arrays[name] ?? {};
  if (!data) throw new Error(`the data of ${name} cannot be read: ${error ?? 'it is missing'}`);
  const length = shape.slice(index.length).reduce((a, b) => a * b, 1);
  const start = index.reduce((offset, i, d) => offset * shape[d] + i, 0) * length;
  return data.subarray(start, start + length);
}

// A text that was typed --------------------------------------------------------------------------

const LAZY_GROUPS = {
  lensAt: {key: [0, 1], names: ['lens', 'lens_ids']},
  attribution: {key: [1, 2], names: ['parts']},
  promoted: {key: [0, 3], names: ['promoted', 'promoted_by']},
  bySource: {key: [0, 2], names: ['by_source']},
  pattern: {key: [0, 2], names: ['pattern']},
  neurons: {
    key: [0, 1],
    names: ['neurons', 'neuron_pre', 'neuron_post', 'neuron_gates', 'curve']
  },
  neuronTokens: {key: [0, 2], names: ['neuron_tokens']},
  neighbors: {key: [0, 1], names: ['near', 'cosines']},
  bigrams: {
    key: [0, 1],
    names: ['bigram_whole_ids', 'bigram_whole_p', 'bigram_direct_ids', 'bigram_direct_p']
  },
  circuits: {key: [0, 2], names: ['qk', 'ov']}
};
/** name -> {group, key: the indices of `row` that are its key}: methods of Analysis that compute
 * the arrays of a typed text when a panel asks for them. */
const LAZY = Object.fromEntries(
  Object.entries(LAZY_GROUPS).flatMap(([group, {key, names}]) =>
    names.map(name => [name, {group, key}])
  )
);
const original = {facts: {}, arrays: {}};
let typed = {facts: [], arrays: []}; // names of what a typed text has
let onWish = () => {};
let wanted = []; // [[group, key], ...], what panels have asked for
let hasOriginal = true;

/** Whether the page shows the text it was written with. */
export const isOriginal = () => hasOriginal;

/** Stands in for what typed texts lack. */
export const onlyWhenWritten = () =>
  h(
    'p',
    {class: 'note'},
    'This is computed when the page is written, for its own text only. To see it for this text, ' +
      (facts.server ? 'press Run.' : 'run explain.py with it as --start.')
  );

function rememberOriginal() {
  for (const name of facts.of_text.facts) original.facts[name] = facts[name];
  for (const name of facts.of_text.arrays) original.arrays[name] = arrays[name];
}

/** Add what the page left out of its own text, as the Worker has computed it; what panels ask for
 * one by one is lazy, as in typed texts. */
export function completeText({facts: newFacts, arrays: newArrays}) {
  const isLeftOut = name => facts.of_text.arrays.includes(name) && !arrays[name];
  for (const {names} of Object.values(LAZY_GROUPS)) {
    if (!names.some(isLeftOut)) continue;
    for (const name of names) arrays[name] = {rows: new Map()};
  }
  for (const name of facts.of_text.arrays) arrays[name] ??= newArrays[name];
  facts.strongest = newFacts.strongest;
  rememberOriginal();
  original.facts.strongest = newFacts.strongest;
}

/** Show another text: its facts and arrays, or none for the text that the page was written with. */
export function setText(newFacts, newArrays) {
  const isTyped = Boolean(newFacts);
  for (const name of [...facts.of_text.facts, ...typed.facts]) delete facts[name];
  for (const name of [...facts.of_text.arrays, ...typed.arrays]) delete arrays[name];
  Object.assign(facts, isTyped ? newFacts : original.facts);
  Object.assign(arrays, isTyped ? newArrays : original.arrays);
  typed = {facts: Object.keys(newFacts ?? {}), arrays: Object.keys(newArrays ?? {})};
  if (isTyped) for (const name of Object.keys(LAZY)) arrays[name] = {rows: new Map()};
  hasOriginal = !isTyped;
  wanted = [];
  T = facts.ids.length;
  visibleKeys.length = rowStarts.length = 0;
  readMask();
  DEFAULTS.t = startAt();
  LIMITS.t = [0, T - 1];
  LIMITS.source = [-1, T - 1];
}

/** Add facts and arrays that a typed text did not have at first. */
export function addToText(newFacts, newArrays) {
  Object.assign(facts, newFacts);
  Object.assign(arrays, newArrays);
  typed.facts.push(...Object.keys(newFacts));
  typed.arrays.push(...Object.keys(newArrays));
}

function lazyRow(name, index) {
  const {group, key} = LAZY[name];
  const wish = index.slice(...key);
  const found = arrays[name].rows.get(String(wish));
  if (found?.error) throw new Error(found.error);
  if (!found) {
    const isKnown = wanted.some(([g, k]) => g === group && String(k) === String(wish));
    if (!isKnown) wanted.push([group, wish]);
    onWish();
    throw new Pending(name);
  }
  const rest = [...index.slice(0, key[0]), ...index.slice(key[1])];
  return rest.length ? found.subarray(...span(found.length, name, rest)) : found;
}

/** Where the numbers at the leading indices `rest` of a lazy array's row are. */
function span(length, name, [i]) {
  const counts = {parts: facts.parts.length, curve: 2, neuron_tokens: facts.strongest};
  const size = length / (counts[name] ?? T);
  return [i * size, (i + 1) * size];
}

/** What panels wait for, [[group, key], ...], the first one asked for first. */
export const nextWishes = () => wanted;

/** Call f when a panel asks for something. */
export const whenAsked = f => (onWish = f);

/** Answer a wish with arrays {name: numbers}, or with the message of an error. */
export function fulfil([group, key], found) {
  wanted = wanted.filter(([g, k]) => g !== group || String(k) !== String(key));
  for (const name of LAZY_GROUPS[group].names) {
    arrays[name].rows.set(String(key), found.error ? found : found[name]);
  }
}

/** Whether the query at t sees the key at s: the mask of model.attention_mask. */
export const sees = (t, s) => arrays.mask.data[t * T + s] === 1;

/** visibleKeys[t]: the keys that the query at t sees, in order. */
export const visibleKeys = [];
const rowStarts = []; // of an array of all visible pairs

function readMask() {
  const mask = row('mask');
  let start = 0;
  for (let t = 0; t < T; t++) {
    visibleKeys.push(range(T, s => s).filter(s => mask[t * T + s]));
    rowStarts.push(start);
    start += visibleKeys[t].length;
  }
}

/** Row t of an array of all visible pairs, stored row by row: T numbers, 0 for hidden keys. */
export function rowOfPairs(pairs, t) {
  const numbers = new Float64Array(T);
  visibleKeys[t].forEach((s, i) => (numbers[s] = pairs[rowStarts[t] + i]));
  return numbers;
}

/** Why the query at t does not see the key at s. */
export const whyHidden = (t, s) =>
  s > t ? 'the key comes after the query' : 'the key is in another document';

/** Stands in for a figure whose data was dropped to keep the page small. */
export function missing() {
  const text = facts.engine || facts.server
    ? 'This is being computed.' // see completeText
    : 'Left out to keep the page small. Try a shorter text.';
  return h('p', {class: 'note'}, text);
}

// State -------------------------------------------------------------------------------------------

Object.assign(DEFAULTS, {
  t: startAt(), // selected position
  layer: 0,
  head: 0,
  temperature: 0.8,
  k: Math.min(200, facts.vocab_size),
  p: 1,
  seed: 1337,
  versus: -1, // token to compare with in "Why this token?", -1: none
  source: -1, // selected key, -1: the one with the most attention
  measure: 'previous', // of the heads
  order: 'layer', // of the heads
  sort: 'layer', // of the contributions
  kind: 'k', // of composition
  threshold: 0, // of composition
  lens: L, // depth in the logit lens
  tour: 0, // step, 0: closed
  text: facts.text,
  changes: '', // of the model: see changes.js
  frozen: '' // the text whose attention is kept
});
Object.assign(LIMITS, {
  t: [0, T - 1],
  layer: [0, L - 1],
  head: [0, H - 1],
  temperature: [0, 2],
  k: [1, facts.vocab_size],
  p: [0.05, 1],
  lens: [0, L],
  versus: [-1, facts.vocab_size - 1],
  source: [-1, T - 1],
  seed: [0, 2 ** 32 - 1],
  threshold: [0, 1]
});

TEXTS.text = /^[^]{0,20000}$/;
if (facts.engine || facts.server) Object.assign(TEXTS, {changes: TEXTS.text, frozen: TEXTS.text});

/** Select a head and scroll to its panel. */
export function openHead(layer, head) {
  set({layer, head, source: -1});
  scrollToElement(document.getElementById('head'));
}

/** Select a layer and scroll to its MLP. */
export function openMlp(layer) {
  set({layer});
  scrollToElement(document.getElementById('mlp'));
}

// Tokens ------------------------------------------------------------------------------------------

export const headName = (layer, head) => `L${layer}·H${head}`;

/** The text of a token with whitespace and control characters made visible. */
export function tokenText(id) {
  const text = (facts.vocabulary[id] ?? '?')
    .replaceAll(' ', '·')
    .replaceAll('\n', '↵')
    .replaceAll('\t', '→')
    .replace(/[\p{Cc}\p{Cf}]/gu, c => `⟨${c.codePointAt(0).toString(16)}⟩`);
  return text || '∅';
}

/** The same, truncated to n characters. */
export function tokenLabel(id, n = 12) {
  const characters = [...tokenText(id)];
  if (characters.length <= n) return characters.join('');
  return characters.slice(0, n - 1).join('') + '…';
}

export const tokenQuoted = id => `“${tokenText(id)}”`;

/** A token for a screen reader. */
export function tokenName(id) {
  const text = facts.vocabulary[id] ?? '';
  const names = {' ': 'space', '\n': 'new line', '\t': 'tab'};
  return names[text] || text.trim() || JSON.stringify(text);
}

export const tokenChip = id =>
  h('span', {class: 'token', title: JSON.stringify(facts.vocabulary[id])}, tokenText(id));

/** Whether the token at t is predicted: not the first one, nor a source that is read in both
 * directions. */
export function isPredicted(t) {
  const {prefix_lm: isPrefix, eot_token: eot} = facts.model;
  const sourceEnd = isPrefix ? facts.ids.indexOf(eot, 1) : 0;
  return t > 0 && sourceEnd >= 0 && t > sourceEnd;
}

/** Positions whose next token is predicted. */
export const measured = () => range(T - 1, t => t).filter(t => isPredicted(t + 1));

/** The position to begin with: the last one, but not after the end of a target. */
function startAt() {
  const {turns, eot_token: eot} = facts.model;
  const isOver = turns && facts.ids.filter(id => id === eot).length % 2 === 1;
  return Math.max(0, T - 1 - isOver);
}

/** Whether the text has a token after position t. */
export const hasNext = t => t < T - 1;

/** The token after position t; at the end of the text, the most likely one. */
export const targetAt = t => row('part_tokens', t)[0];
