// What explain.py has computed: facts, arrays, tokens; the state of its page.

import {DEFAULTS, LIMITS, h, inflate, range, set, takeBytes} from './core.js';

export const facts = JSON.parse(document.getElementById('facts').textContent);
export const arrays = {}; // name -> {data: typed array, shape}
export const T = facts.ids.length; // tokens
export const L = facts.model.n_layer; // layers
export const H = facts.model.n_head; // heads per layer
export const HS = facts.head_size;
export const isPostNorm = facts.model.norm_position === 'post';

// Data --------------------------------------------------------------------------------------------

const TYPES = {
  float32: Float32Array,
  float16: Uint16Array, // converted by fromHalf
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array
};

/** Fill `arrays`: the inverse of pack() in explain.py. */
export async function loadArrays() {
  const bytes = takeBytes('arrays');
  await Promise.all(
    Object.entries(facts.arrays).map(async ([name, {dtype, shape, start, end}]) => {
      try {
        const planes = await inflate(bytes.subarray(start, end));
        const data = new TYPES[dtype](joinPlanes(planes, TYPES[dtype].BYTES_PER_ELEMENT).buffer);
        arrays[name] = {data: dtype === 'float16' ? fromHalf(data) : data, shape};
      } catch (error) {
        arrays[name] = {error}; // for the panels that need it
      }
    })
  );
  readMask();
  facts.vocabulary = JSON.parse(new TextDecoder().decode(row('vocabulary')));
}

/** Byte planes (all first bytes, all second bytes, ...) -> numbers of `size` bytes each. */
function joinPlanes(planes, size) {
  const n = planes.length / size;
  const joined = new Uint8Array(planes.length);
  for (let b = 0; b < size; b++) {
    for (let i = 0; i < n; i++) joined[i * size + b] = planes[b * n + i];
  }
  return joined;
}

function fromHalf(halves) {
  const out = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) out[i] = halfValue(halves[i]);
  return out;
}

/** The value of an IEEE 754 half-precision number. */
function halfValue(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * 2 ** -24 * fraction;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

/** A view of an array at its leading indices: row('q', l, h, t) is a vector. */
export function row(name, ...index) {
  const {data, shape, error} = arrays[name] ?? {};
  if (!data) throw new Error(`the data of ${name} cannot be read: ${error ?? 'it is missing'}`);
  const length = shape.slice(index.length).reduce((a, b) => a * b, 1);
  const start = index.reduce((offset, i, d) => offset * shape[d] + i, 0) * length;
  return data.subarray(start, start + length);
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
export const missing = () =>
  h('p', {class: 'note'}, 'Left out to keep the page small. Try a shorter text.');

// State -------------------------------------------------------------------------------------------

Object.assign(DEFAULTS, {
  t: T - 1, // selected position
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
  tour: 0 // step, 0: closed
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

/** Select a head and scroll to its panel. */
export function openHead(layer, head) {
  set({layer, head, source: -1});
  document.getElementById('head').scrollIntoView();
}

/** Select a layer and scroll to its MLP. */
export function openMlp(layer) {
  set({layer});
  document.getElementById('mlp').scrollIntoView();
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

/** Whether the text has a token after position t. */
export const hasNext = t => t < T - 1;

/** The token after position t; at the end of the text, the most likely one. */
export const targetAt = t => row('part_tokens', t)[0];
