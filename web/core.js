// Shared by both pages: state, DOM helpers, numbers, colors, figures.

// Data --------------------------------------------------------------------------------------------

/** The bytes that the page holds as base64 in the script with this id, which is removed. */
export function takeBytes(id) {
  const element = document.getElementById(id);
  const text = atob(element.textContent);
  element.remove();
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** [f(0), ..., f(n - 1)] */
export const range = (n, f) => Array.from({length: n}, (_, i) => f(i));
export const sum = values => values.reduce((total, x) => total + x, 0);
export const argmax = values => values.indexOf(Math.max(...values));
/** The largest magnitude, at least 1e-9 so that it can be divided by. */
export const maxAbs = values => values.reduce((max, x) => Math.max(max, Math.abs(x)), 1e-9);
export const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

// State -------------------------------------------------------------------------------------------

/** Initial state; the URL hash stores the values that differ from it. Each page adds its keys. */
export const DEFAULTS = {
  theme: '' // '': as the system
};
/** Valid ranges [low, high] of numeric keys in the URL hash. */
export const LIMITS = {};
/** Valid values of other keys; choice() adds those of its buttons. */
const CHOICES = {theme: ['light', 'dark']};
/** Patterns of the keys that hold text. */
export const TEXTS = {};
export const state = {};
let watchers = [];
const builders = []; // of panels
let currentSection = null;
let isPlanned = false; // drawRest() will be called
let held = 0; // see hold()
let lastChange = -Infinity; // of the URL, in ms

/** Call draw once, and again whenever one of the state keys changes. Visible panels come first. */
export function watch(keys, draw) {
  watchers.push({keys, draw, section: currentSection, due: true});
}

/** Run build; its watchers belong to the section with this id. If build or one of them throws, the
 * section shows the error, and the others go on. */
export function inSection(id, build) {
  currentSection = document.getElementById(id);
  attempt({draw: build, section: currentSection});
  currentSection = null;
}

/** A section that is built again for each new text; see rebuild(). */
export function panel(id, build) {
  const section = document.getElementById(id);
  builders.push({section, draw: build, due: false});
  inSection(id, build);
}

/** Thrown where data is missing that is being computed: what needs it is drawn after resume().
 * In a listener it has no effect: a picture that has not been drawn yet has nothing to say. */
export class Pending extends Error {}
addEventListener('error', event => {
  if (event.error instanceof Pending) event.preventDefault();
});

/** Draw a watcher or build a panel. */
function attempt(task) {
  task.due = false;
  task.isWaiting = false;
  try {
    task.draw();
  } catch (error) {
    const {section} = task;
    if (error instanceof Pending) {
      task.isWaiting = true;
      return;
    }
    if (!section) throw error;
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

/** Build a panel again: what depends on the text is not only in its pictures. Its height, its
 * focus and its open tables stay. */
function buildAgain(builder) {
  const {section} = builder;
  const controls = () => [...section.querySelectorAll('button, select, input, [tabindex]')];
  const focused = controls().indexOf(document.activeElement);
  section.style.minHeight = builder.height + 'px';
  section.querySelector('.content').replaceChildren();
  watchers = watchers.filter(watcher => watcher.section !== section);
  currentSection = section;
  attempt(builder);
  watch([], () => {
    for (const chart of section.querySelectorAll('figure')) chart.refresh();
    section.style.minHeight = '';
    if (focused >= 0) controls()[focused]?.focus({preventScroll: true});
  });
  currentSection = null;
}

function isVisible(section) {
  const {top, bottom} = section.getBoundingClientRect();
  return top < innerHeight + 100 && bottom > -100;
}

const isPanel = section => builders.some(builder => builder.section === section);
const isDue = watcher => watcher.due && !builders.some(x => x.due && x.section === watcher.section);

function drawDue() {
  // all places are read before anything is drawn: each change in between would cost a layout
  const visible = new Set(builders.map(({section}) => section).filter(isVisible));
  for (const builder of builders) {
    if (builder.due && visible.has(builder.section)) buildAgain(builder);
  }
  const isSeen = ({section}) => !section || visible.has(section) || !isPanel(section);
  for (const watcher of watchers) {
    if (isDue(watcher) && isSeen(watcher)) attempt(watcher);
  }
  document.documentElement.removeAttribute('data-settled');
  planRest();
}

function planRest() {
  if (!isPlanned) afterFrame(drawRest);
  isPlanned = true;
}

/** Call f when what is drawn now is on screen. */
export const afterFrame = f => requestAnimationFrame(() => setTimeout(f));

/** Draw what is off screen in slices of 12 ms, so that the page stays responsive. */
function drawRest() {
  const end = performance.now() + 12;
  const nextBuilder = () => builders.find(builder => builder.due);
  const next = () => nextBuilder() ?? watchers.find(isDue);
  while (next() && performance.now() < end) {
    if (nextBuilder()) buildAgain(nextBuilder());
    else attempt(next());
  }
  isPlanned = Boolean(next());
  if (isPlanned) setTimeout(drawRest);
  else updateHints();
  const isDone = !isPlanned && !held && ![...builders, ...watchers].some(task => task.isWaiting);
  document.documentElement.toggleAttribute('data-settled', isDone && writeHash());
}

const widths = new Map(); // of figures by their names: to read one costs a layout
const unmeasured = new Set(); // figures whose hint to scroll may be wrong

function updateHints() {
  const isCut = element => element && element.scrollWidth > element.clientWidth + 2;
  const places = [...unmeasured].map(({hint, picture}) => {
    const isWide = isCut(picture) || isCut(picture.querySelector(':scope > div'));
    return {hint, isWide};
  });
  for (const {hint, isWide} of places) hint.hidden = !isWide;
  unmeasured.clear();
}

/** The ids of the panels on screen. */
export const visiblePanels = () =>
  builders.map(({section}) => section).filter(isVisible).map(({id}) => id);

/** Whether all that is visible is drawn. */
export const isDrawn = () =>
  ![...builders, ...watchers].some(
    task => (task.due || task.isWaiting) && (!task.section || isVisible(task.section))
  );

/** The data that was pending is there: draw what waits for it. */
export function resume() {
  for (const task of [...builders, ...watchers]) task.due ||= task.isWaiting;
  drawDue();
}

/** More data will come (hold(1)) or has come (hold(-1)): until then the page is not settled. */
export function hold(change) {
  held += change;
  drawDue();
}

/** Scroll to an element. All is laid out for that, so that nothing moves on the way. */
export function scrollToElement(element) {
  document.documentElement.classList.remove('typed');
  element.scrollIntoView();
}

/** The text has changed: build all panels again. */
export function rebuild() {
  document.documentElement.classList.add('typed'); // see style.css
  for (const builder of builders) {
    builder.due = true;
    builder.height = builder.section.offsetHeight;
  }
  redraw();
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

/** Store the state in the URL, once all is drawn: browsers limit how often it changes. Whether it
 * is stored: if the last change was just now, it will be. */
function writeHash() {
  const hash = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value !== DEFAULTS[key]) hash.set(key, value);
  }
  if (hash.toString() === location.hash.slice(1)) return true;
  const wait = lastChange + 350 - performance.now(); // Safari: 100 changes in 30 s
  if (wait > 0) {
    setTimeout(() => isPlanned || drawRest(), wait);
    return false;
  }
  lastChange = performance.now();
  history.replaceState(null, '', '#' + hash);
  return true;
}

/** The state in a URL hash; invalid values are ignored. */
export function readHash(hash = location.hash) {
  const found = {...DEFAULTS};
  for (const [key, text] of new URLSearchParams(hash.slice(1))) {
    if (LIMITS[key]) {
      const [low, high] = LIMITS[key];
      const value = Number(text);
      if (text !== '' && value >= low && value <= high) found[key] = value;
    } else if (CHOICES[key]?.includes(text) || TEXTS[key]?.test(text)) found[key] = text;
  }
  return found;
}

/** Redraw when the page gets another width, and follow the URL. */
export function followWindow() {
  const main = document.querySelector('main');
  let drawnWidth = main.clientWidth;
  new ResizeObserver(() => {
    if (main.clientWidth === drawnWidth) return;
    drawnWidth = main.clientWidth;
    widths.clear();
    redraw();
  }).observe(main);
  addEventListener('hashchange', () => {
    if (location.hash.includes('=')) set(readHash());
  });
  addEventListener('scroll', hideTip, {passive: true});
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

// Numbers -----------------------------------------------------------------------------------------

export function fixed(x, digits = 2) {
  if (!Number.isFinite(x)) return 'n/a';
  const text = Math.abs(x).toFixed(digits);
  return (x < 0 && Number(text) > 0 ? '−' : '') + text;
}

export const signed = (x, digits = 2) => (x > 0 ? '+' : '') + fixed(x, digits);

export function percent(p) {
  if (p >= 0.0995) return (100 * p).toFixed(0) + '%';
  if (p >= 0.00095) return (100 * p).toFixed(1) + '%';
  return p > 0 ? '<0.1%' : '0%';
}

const INTEGERS = new Intl.NumberFormat('en-US'); // toLocaleString makes one at each call
export const integer = n => INTEGERS.format(Math.round(n));

/** About n round numbers from low to high, at least three. */
export function ticks(low, high, n = 4) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = [10, 5, 2, 1, 0.5, 0.2].map(x => x * power);
  const widest = steps.findLast(x => x >= rough * 0.999);
  const count = x => Math.floor(high / x + 1e-9) - Math.ceil(low / x - 1e-9) + 1;
  const step = steps.find(x => x <= widest && count(x) >= 3) ?? widest;
  const values = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) {
    values.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  }
  return values;
}

const UNITS = [
  [1e12, 'T'],
  [1e9, 'G'],
  [1e6, 'M']
];

/** A number in a few characters, for an axis. */
export function compact(x) {
  const size = Math.abs(x);
  if (x === 0) return '0';
  if (size >= 1e15) return x.toExponential(1).replace('e+', 'e');
  for (const [unit, letter] of UNITS) {
    if (size >= unit) return Number((x / unit).toPrecision(4)) + letter;
  }
  if (size >= 1e4) return Number((x / 1e3).toPrecision(4)) + 'k';
  if (size < 0.01) return x.toExponential(0).replace('e-', 'e−');
  return String(Number(x.toPrecision(4)));
}

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

/** The button that switches between light and dark mode. */
export function buildTheme() {
  const button = document.getElementById('theme');
  const system = matchMedia('(prefers-color-scheme: dark)');
  const isDark = () => (state.theme ? state.theme === 'dark' : system.matches);
  const apply = () => {
    const other = isDark() ? 'light' : 'dark';
    document.documentElement.dataset.theme = isDark() ? 'dark' : 'light';
    button.textContent = isDark() ? 'Light' : 'Dark';
    button.setAttribute('aria-label', `Switch to ${other} mode`);
    readColors();
  };
  watch(['theme'], apply);
  button.addEventListener('click', () => set({theme: isDark() ? 'light' : 'dark'}));
  system.addEventListener('change', () => {
    apply();
    redraw();
  });
}

// Figures -----------------------------------------------------------------------------------------

const openTables = new Set(); // names of figures

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
    hidden: !openTables.has(name)
  });
  const hint = h('p', {class: 'hint', 'aria-hidden': 'true'}, 'Scroll sideways to see all ↔');
  const place = {hint, picture};
  const refresh = () => {
    if (!dataTable.hidden) dataTable.replaceChildren(cappedTable(...table()));
    unmeasured.add(place);
    planRest();
  };
  const toggle = h(
    'button',
    {
      type: 'button',
      'aria-expanded': String(openTables.has(name)),
      'aria-label': `${title}: table`,
      onclick: () => {
        dataTable.hidden = !dataTable.hidden;
        toggle.setAttribute('aria-expanded', !dataTable.hidden);
        if (dataTable.hidden) openTables.delete(name);
        else openTables.add(name);
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
    hint,
    readout,
    dataTable
  );
  const setReadout = text => {
    readout.hidden = false;
    readout.textContent = text;
  };
  const width = () => {
    if (!widths.has(name)) widths.set(name, Math.max(220, picture.clientWidth));
    return widths.get(name);
  };
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

/** Save the SVG or canvas (which has a method toSvg) in a picture as a PNG or SVG file. */
async function savePicture(name, picture, format) {
  const canvas = picture.querySelector('canvas');
  const svg = picture.querySelector('svg');
  const savePng = element => element.toBlob(blob => download(name + '.png', blob));
  if (!canvas && !svg) return;
  if (!svg && format === 'png') return savePng(canvas);
  const text = svg ? standaloneSvg(svg) : canvas.toSvg();
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
