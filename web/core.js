// Shared by all panels: data, state, DOM helpers, number and token formatting, colors, figures.

export const facts = JSON.parse(document.getElementById('facts').textContent);
export const arrays = {}; // name -> {data: typed array, shape}
export const T = facts.ids.length; // tokens
export const L = facts.model.n_layer; // layers
export const H = facts.model.n_head; // heads per layer
export const HS = facts.head_size;

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
  const text = atob(document.getElementById('arrays').textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
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
  document.getElementById('arrays').remove();
  readMask();
  facts.vocabulary = JSON.parse(new TextDecoder().decode(row('vocabulary')));
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
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

/** [f(0), ..., f(n - 1)] */
export const range = (n, f) => Array.from({length: n}, (_, i) => f(i));
export const sum = values => values.reduce((total, x) => total + x, 0);
export const argmax = values => values.indexOf(Math.max(...values));
/** The largest magnitude, at least 1e-9 so that it can be divided by. */
export const maxAbs = values => values.reduce((max, x) => Math.max(max, Math.abs(x)), 1e-9);
export const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

// State -------------------------------------------------------------------------------------------

/** Initial state; the URL hash stores the values that differ from it. */
export const DEFAULTS = {
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
  tour: 0, // step, 0: closed
  theme: '' // '': as the system
};
/** Valid ranges [low, high] of numeric keys in the URL hash. */
export const LIMITS = {
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
};
/** Valid values of the other keys; choice() adds those of its buttons. */
const CHOICES = {theme: ['light', 'dark']};
export const state = {};
let watchers = [];
let currentSection = null;
let timer = 0;

/** Call draw once, and again whenever one of the state keys changes. Visible panels come first. */
export function watch(keys, draw) {
  watchers.push({keys, draw, section: currentSection, due: true});
}

/** Run build; its watchers belong to the section with this id. If build or one of them throws, the
 * section shows the error, and the others go on. */
export function inSection(id, build) {
  currentSection = document.getElementById(id);
  attempt(build, currentSection);
  currentSection = null;
}

function attempt(action, section) {
  try {
    action();
  } catch (error) {
    if (!section) throw error;
    watchers.filter(watcher => watcher.section === section).forEach(x => (x.due = false));
    watchers = watchers.filter(watcher => watcher.section !== section);
    showError(section, error);
  }
}

/** Replace what a section shows by an error: half of a panel would be taken for all of it. */
export function showError(section, error) {
  const box = section.querySelector(':scope > .content') ?? section;
  const summary = h('summary', {}, `This cannot be shown: ${error.message}`);
  box.replaceChildren(h('details', {class: 'failure'}, summary, h('pre', {}, error.stack)));
}

function draw(watcher) {
  watcher.due = false;
  attempt(watcher.draw, watcher.section);
}

function isVisible(section) {
  const {top, bottom} = section.getBoundingClientRect();
  return top < innerHeight + 100 && bottom > -100;
}

function drawDue() {
  for (const watcher of watchers) {
    if (watcher.due && (!watcher.section || isVisible(watcher.section))) draw(watcher);
  }
  document.documentElement.removeAttribute('data-settled');
  timer ||= setTimeout(drawRest);
}

/** Draw what is off screen in slices of 12 ms, so that the page stays responsive. */
function drawRest() {
  const end = performance.now() + 12;
  let next = watchers.find(watcher => watcher.due);
  while (next && performance.now() < end) {
    draw(next);
    next = watchers.find(watcher => watcher.due);
  }
  timer = next ? setTimeout(drawRest) : 0;
  if (!next) writeHash();
  document.documentElement.toggleAttribute('data-settled', !next);
}

export function set(changes) {
  const changed = Object.keys(changes).filter(key => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const watcher of watchers) {
    if (watcher.keys.some(key => changed.includes(key))) watcher.due = true;
  }
  drawDue();
}

export function redraw() {
  for (const watcher of watchers) watcher.due = true;
  drawDue();
}

/** Store the state in the URL, once all is drawn: browsers limit how often it may change. */
function writeHash() {
  const hash = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value !== DEFAULTS[key]) hash.set(key, value);
  }
  if (hash.toString() !== location.hash.slice(1)) history.replaceState(null, '', '#' + hash);
}

/** The state in the URL hash; invalid values are ignored. */
export function readHash() {
  const found = {...DEFAULTS};
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    if (LIMITS[key]) {
      const [low, high] = LIMITS[key];
      const value = Number(text);
      if (text !== '' && value >= low && value <= high) found[key] = value;
    } else if (CHOICES[key]?.includes(text)) found[key] = text;
  }
  return found;
}

// DOM ---------------------------------------------------------------------------------------------

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? '' : value);
  }
  const skipped = [null, undefined, false];
  element.append(...children.flat(Infinity).filter(child => !skipped.includes(child)));
  return element;
}

/** An HTML element. Attributes that start with "on" are event listeners. */
export const h = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const s = (tag, attributes, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);

export const content = id => document.querySelector(`#${id} .content`);

/** A table: headings (text), and rows of cells (text, elements, or whole td elements). */
export function tableOf(headings, rows, attributes) {
  const cell = value => (value instanceof HTMLTableCellElement ? value : h('td', {}, value));
  return h(
    'table',
    attributes,
    h(
      'thead',
      {},
      h(
        'tr',
        {},
        headings.map(text => h('th', {scope: 'col'}, text))
      )
    ),
    h(
      'tbody',
      {},
      rows.map(cells => h('tr', {}, cells.map(cell)))
    )
  );
}

/** Toggle buttons for one state key: choices {value: label}. */
export function choice(key, choices, label) {
  const isNumber = typeof DEFAULTS[key] === 'number';
  if (!isNumber) CHOICES[key] = Object.keys(choices);
  const button = ([value, text]) =>
    h(
      'button',
      {
        type: 'button',
        'data-value': value,
        onclick: () => set({[key]: isNumber ? Number(value) : value})
      },
      text
    );
  const buttons = Object.entries(choices).map(button);
  watch([key], () => {
    for (const element of buttons) {
      element.setAttribute('aria-pressed', element.dataset.value === String(state[key]));
    }
  });
  return h('div', {class: 'choice', role: 'group', 'aria-label': label}, buttons);
}

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

const tip = document.getElementById('tip');

/** Show a tooltip at the pointer, inside the window. */
export function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  const below = event.clientY + 16;
  const above = event.clientY - height - 10;
  tip.style.left = clamp(event.clientX + 14, 4, Math.max(4, innerWidth - width - 4)) + 'px';
  tip.style.top = (below + height > innerHeight ? above : below) + 'px';
}

export function hideTip() {
  tip.hidden = true;
}

// Numbers and tokens ------------------------------------------------------------------------------

export function fixed(x, digits = 2) {
  if (!Number.isFinite(x)) return 'n/a';
  return (x < 0 ? '−' : '') + Math.abs(x).toFixed(digits);
}

export const signed = (x, digits = 2) => (x > 0 ? '+' : '') + fixed(x, digits);

export function percent(p) {
  if (p >= 0.0995) return (100 * p).toFixed(0) + '%';
  if (p >= 0.00095) return (100 * p).toFixed(1) + '%';
  return p > 0 ? '<0.1%' : '0%';
}

export const integer = n => Math.round(n).toLocaleString('en-US');
export const headName = (layer, head) => `${layer}.${head}`;

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

// Colors ------------------------------------------------------------------------------------------

const palette = {};
const PALETTE = ['ink', 'paper', 'panel', 'muted', 'line', 'soft', 'accent', 'warm', 'none'];

/** Read the colors of the current theme from style.css. */
export function readColors() {
  const style = getComputedStyle(document.documentElement);
  for (const name of PALETTE) {
    const hex = style.getPropertyValue('--' + name).trim();
    palette[name] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
  }
}

export const mix = (from, to, x) =>
  palette[from].map((a, i) => Math.round(a + (palette[to][i] - a) * clamp(x, 0, 1)));
export const css = rgb => `rgb(${rgb.join(' ')})`;
export const color = name => css(palette[name]);

/** Color scale from 0 (background) to 1 (blue). */
export const sequential = x => mix('none', 'accent', x);
/** Color scale from -1 (orange) through 0 (background) to 1 (blue). */
export const diverging = x => (x < 0 ? mix('none', 'warm', -x) : mix('none', 'accent', x));

/** WCAG relative luminance. */
function luminance(rgb) {
  const [r, g, b] = rgb.map(value => {
    const x = value / 255;
    return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Black or white, whichever has more contrast with a background. */
export const textOn = rgb => (luminance(rgb) > 0.179 ? '#000000' : '#ffffff');

// Figures -----------------------------------------------------------------------------------------

/**
 * A figure with a title, a data table, and buttons to save it.
 *
 * table: () => [headings, rows]; controls: elements above the picture; drawn: whether the picture
 * is an SVG or a canvas that can be saved. Draw into .picture; setReadout(text) shows a line of
 * text below it.
 */
export function figure(name, title, table, controls, drawn = true) {
  const picture = h('div', {class: 'picture'});
  const readout = h('p', {class: 'readout', hidden: true});
  const heading = h('h3', {}, title);
  const dataTable = h('div', {
    class: 'data-table',
    tabindex: 0,
    role: 'region',
    'aria-label': `${title}: table`,
    hidden: true
  });
  const refresh = () => {
    if (!dataTable.hidden) dataTable.replaceChildren(cappedTable(...table()));
  };
  const toggle = h(
    'button',
    {
      type: 'button',
      'aria-expanded': 'false',
      'aria-label': `${title}: table`,
      onclick: () => {
        dataTable.hidden = !dataTable.hidden;
        toggle.setAttribute('aria-expanded', !dataTable.hidden);
        refresh();
      }
    },
    'Table'
  );
  const saveButton = (format, save) =>
    h('button', {type: 'button', 'aria-label': `${title}: save ${format}`, onclick: save}, format);
  const saves = h(
    'div',
    {class: 'saves'},
    toggle,
    saveButton('CSV', () => saveTable(name, ...table())),
    drawn && saveButton('PNG', () => savePicture(name, picture, 'png')),
    drawn && saveButton('SVG', () => savePicture(name, picture, 'svg'))
  );
  const caption = h('figcaption', {}, heading, saves);
  const element = h(
    'figure',
    {id: 'figure-' + name},
    caption,
    controls,
    picture,
    readout,
    dataTable
  );
  const setReadout = text => {
    readout.hidden = false;
    readout.textContent = text;
  };
  const width = () => Math.max(220, picture.clientWidth);
  return Object.assign(element, {picture, readout, heading, width, refresh, setReadout});
}

function cappedTable(headings, rows, limit = 2000) {
  const mono = value => h('td', {class: 'mono'}, String(value));
  const shown = rows.slice(0, limit);
  if (rows.length > limit) shown.push([`${rows.length - limit} more rows: save the CSV`]);
  return tableOf(
    headings,
    shown.map(cells => cells.map(mono))
  );
}

function download(name, blob) {
  const link = h('a', {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function saveTable(name, headings, rows) {
  const quoted = value => {
    const text = String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [headings, ...rows].map(cells => cells.map(quoted).join(',') + '\n');
  download(name + '.csv', new Blob(lines, {type: 'text/csv'}));
}

/** Save the SVG or canvas in a picture as a PNG or SVG file. */
async function savePicture(name, picture, format) {
  const canvas = picture.querySelector('canvas');
  const svg = picture.querySelector('svg');
  const savePng = element => element.toBlob(blob => download(name + '.png', blob));
  if (!canvas && !svg) return;
  if (!svg && format === 'png') return savePng(canvas);
  const text = svg ? standaloneSvg(svg) : svgOfCanvas(canvas);
  if (format === 'svg') return download(name + '.svg', new Blob([text], {type: 'image/svg+xml'}));
  const image = new Image();
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text);
  await image.decode();
  const copy = h('canvas', {width: svg.clientWidth * 2, height: svg.clientHeight * 2});
  copy.getContext('2d').drawImage(image, 0, 0, copy.width, copy.height);
  savePng(copy);
}

/** The source of an SVG with its computed styles inlined. */
function standaloneSvg(svg) {
  const copy = svg.cloneNode(true);
  const originals = [svg, ...svg.querySelectorAll('*')];
  const copies = [copy, ...copy.querySelectorAll('*')];
  originals.forEach((element, i) => {
    const style = getComputedStyle(element);
    for (const key of ['fill', 'stroke', 'font-family', 'font-size', 'opacity']) {
      copies[i].style.setProperty(key, style.getPropertyValue(key));
    }
  });
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  copy.style.background = color('panel');
  return new XMLSerializer().serializeToString(copy);
}

function svgOfCanvas(canvas) {
  const size = `width="${canvas.width}" height="${canvas.height}"`;
  const image = `<image ${size} href="${canvas.toDataURL()}"/>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" ${size}>${image}</svg>`;
}
