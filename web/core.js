// What all panels share: the data, the state that they follow, elements, colours, numbers, tokens, saving.

export const facts = JSON.parse(document.getElementById('facts').textContent);
export const arrays = {}; // name -> {data: typed array, shape}
export const T = facts.ids.length,
  L = facts.model.n_layer,
  H = facts.model.n_head,
  HS = facts.model.n_embd / H;

// Data ------------------------------------------------------------------------------------------------------------------------

const TYPES = {float32: Float32Array, float16: Uint16Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array};

/** Fill `arrays` from the base64 text of explain.py's pack: a deflate stream for each, in planes of bytes. */
export async function loadArrays() {
  const text = atob(document.getElementById('arrays').textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  await Promise.all(
    Object.entries(facts.arrays).map(async ([name, {dtype, shape, start, end}]) => {
      const stream = new Blob([bytes.subarray(start, end)]).stream().pipeThrough(new DecompressionStream('deflate'));
      const planes = new Uint8Array(await new Response(stream).arrayBuffer());
      const size = TYPES[dtype].BYTES_PER_ELEMENT,
        n = planes.length / size,
        whole = new Uint8Array(planes.length);
      for (let b = 0; b < size; b++) for (let i = 0; i < n; i++) whole[i * size + b] = planes[b * n + i];
      const data = new TYPES[dtype](whole.buffer);
      arrays[name] = {data: dtype === 'float16' ? fromHalf(data) : data, shape};
    })
  );
  document.getElementById('arrays').remove();
  facts.vocabulary = JSON.parse(new TextDecoder().decode(arrays.vocabulary.data));
}

function fromHalf(half) {
  const out = new Float32Array(half.length);
  for (let i = 0; i < half.length; i++) {
    const sign = half[i] & 0x8000 ? -1 : 1,
      exponent = (half[i] >> 10) & 31,
      fraction = half[i] & 1023;
    out[i] =
      exponent === 31
        ? fraction
          ? NaN
          : sign * Infinity
        : sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  }
  return out;
}

/** The part of an array at these first indices: row('q', l, h, t) is a vector. */
export function row(name, ...index) {
  const {data, shape} = arrays[name];
  const rest = shape.slice(index.length).reduce((a, b) => a * b, 1);
  const start = index.reduce((at, i, d) => at * shape[d] + i, 0) * rest;
  return data.subarray(start, start + rest);
}

/** Row t of a lower triangle that is stored row by row. */
export const triangleRow = (triangle, t) => triangle.subarray((t * (t + 1)) / 2, ((t + 1) * (t + 2)) / 2);

/** Stands where something was left out to keep the page below its largest size. */
export const missing = () =>
  h('p', {class: 'note'}, 'Left out, since the page would be too large. A shorter text brings it back.');

// State -----------------------------------------------------------------------------------------------------------------------

/** What the state is where the address says nothing. */
export const DEFAULTS = {
  t: T - 1,
  layer: 0,
  head: 0,
  temperature: 0.8,
  k: Math.min(200, facts.vocab_size),
  p: 1,
  seed: 1337,
  versus: -1,
  source: -1,
  by: 'previous',
  order: 'place',
  sort: 'place',
  kind: 'k',
  threshold: 0,
  lens: L,
  tour: 0,
  theme: ''
};
/** The values that a key of the address may have: [low, high] here; of a choice, those that its buttons have. */
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
const CHOICES = {theme: ['light', 'dark']};
export const state = {};
const watchers = [];
let building = null,
  waiting = 0;

/** Call draw at the start and whenever one of the keys changes: at once for what can be seen, a little later for the rest. */
export const watch = (keys, draw) => {
  watchers.push({keys, draw, section: building, due: true});
};

/** What build watches belongs to a section of the page. */
export function inSection(id, build) {
  building = document.getElementById(id);
  build();
  building = null;
}

function draw(watcher) {
  watcher.due = false;
  watcher.draw();
}

function drawDue() {
  for (const watcher of watchers) {
    const box = watcher.due && watcher.section?.getBoundingClientRect();
    if (watcher.due && (!box || (box.top < innerHeight + 100 && box.bottom > -100))) draw(watcher);
  }
  const rest = () => {
    const end = performance.now() + 12;
    let next;
    while ((next = watchers.find(watcher => watcher.due)) && performance.now() < end) draw(next);
    waiting = next ? setTimeout(rest) : 0;
    if (!next) writeHash();
    document.documentElement.toggleAttribute('data-settled', !next);
  };
  document.documentElement.removeAttribute('data-settled');
  waiting ||= setTimeout(rest);
}

export function set(changes) {
  const changed = Object.keys(changes).filter(key => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const watcher of watchers) if (watcher.keys.some(key => changed.includes(key))) watcher.due = true;
  drawDue();
}

/** The state as the page's address, once all is drawn: browsers do not like it to change at every move of a slider. */
function writeHash() {
  const hash = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== DEFAULTS[key]) hash.set(key, value);
  if (hash.toString() !== location.hash.slice(1)) history.replaceState(null, '', '#' + hash);
}

export function redraw() {
  for (const watcher of watchers) watcher.due = true;
  drawDue();
}

/** The state that the page's address asks for; what is not a value that can be is as if it were not there. */
export function readHash() {
  const found = {...DEFAULTS};
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    const [low, high] = LIMITS[key] || [];
    if (LIMITS[key] ? text !== '' && Number(text) >= low && Number(text) <= high : CHOICES[key]?.includes(text))
      found[key] = LIMITS[key] ? Number(text) : text;
  }
  return found;
}

// Elements --------------------------------------------------------------------------------------------------------------------

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}
export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const s = (tag, attributes, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
export const content = id => document.querySelector(`#${id} .content`);

/** Buttons of which one is pressed: choices {value: label}, bound to a key of the state. */
export function choice(key, choices, label) {
  const number = typeof DEFAULTS[key] === 'number';
  if (!number) CHOICES[key] = Object.keys(choices);
  const box = h(
    'div',
    {class: 'choice', role: 'group', 'aria-label': label},
    Object.entries(choices).map(([value, text]) =>
      h('button', {type: 'button', 'data-value': value, onclick: () => set({[key]: number ? Number(value) : value})}, text)
    )
  );
  watch([key], () => {
    for (const button of box.children) button.setAttribute('aria-pressed', button.dataset.value === String(state[key]));
  });
  return box;
}

const tip = document.getElementById('tip');
export function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4)) + 'px';
  tip.style.top = (event.clientY + 16 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 16) + 'px';
}
export const hideTip = () => {
  tip.hidden = true;
};

// Numbers and tokens ----------------------------------------------------------------------------------------------------------

export const fixed = (x, digits = 2) => (Number.isFinite(x) ? (x < 0 ? '−' : '') + Math.abs(x).toFixed(digits) : 'n/a');
export const signed = (x, digits = 2) => (x > 0 ? '+' : '') + fixed(x, digits);
export const percent = p =>
  p >= 0.0995 ? (100 * p).toFixed(0) + '%' : p >= 0.00095 ? (100 * p).toFixed(1) + '%' : p > 0 ? '<0.1%' : '0%';
export const grouped = n => Math.round(n).toLocaleString('en-US');

/** A token as it is shown: blanks become visible. */
export const shown = id =>
  (facts.vocabulary[id] ?? '?')
    .replaceAll(' ', '·')
    .replaceAll('\n', '↵')
    .replaceAll('\t', '→')
    .replace(/[\p{Cc}\p{Cf}]/gu, c => `⟨${c.codePointAt(0).toString(16)}⟩`) || '∅';
export const short = (id, n = 12) => {
  const text = [...shown(id)];
  return text.length > n ? text.slice(0, n - 1).join('') + '…' : text.join('');
};
export const spoken = id => {
  const text = facts.vocabulary[id] ?? '';
  return {' ': 'space', '\n': 'new line', '\t': 'tab'}[text] ?? text.trim() ?? '';
};
export const chip = id => h('span', {class: 'token', title: JSON.stringify(facts.vocabulary[id])}, shown(id));
/** The token that comes next at t; behind the text the likeliest. */
export const target = t => row('part_tokens', t)[0];
export const known = t => t < T - 1;

// Colours ---------------------------------------------------------------------------------------------------------------------

const palette = {};
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ['ink', 'paper', 'panel', 'muted', 'line', 'soft', 'accent', 'warm', 'none']) {
    const hex = style.getPropertyValue('--' + name).trim();
    palette[name] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
  }
}
export const mix = (from, to, x) =>
  palette[from].map((a, i) => Math.round(a + (palette[to][i] - a) * Math.min(1, Math.max(0, x))));
export const css = rgb => `rgb(${rgb.join(' ')})`;
export const colour = name => css(palette[name]);
/** 0 to 1: from nothing to the accent. -1 to 1: from orange through nothing to blue. */
export const sequential = x => mix('none', 'accent', x);
export const diverging = x => (x < 0 ? mix('none', 'warm', -x) : mix('none', 'accent', x));
const luminance = rgb =>
  rgb
    .map(v => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
/** Black or white, whichever reads better on a colour. */
export const textOn = rgb => (luminance(rgb) > 0.179 ? '#000000' : '#ffffff');

// Figures ---------------------------------------------------------------------------------------------------------------------

/** A picture with its title, a table behind it, and buttons that save it.
 *  table: () => [headings, rows]; drawn: whether the picture is an SVG or a canvas. Returns the figure; its .picture is where to draw, .readout where to say something. */
export function figure(name, title, table, extra, drawn = true) {
  const picture = h('div', {class: 'picture'}),
    readout = h('p', {class: 'readout'});
  const behind = h('div', {class: 'behind', tabindex: 0, role: 'region', 'aria-label': `${title}: table`, hidden: true});
  const heading = h('h3', {}, title);
  const showTable = () => {
    const [headings, rows] = table();
    behind.replaceChildren(
      h(
        'table',
        {},
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
          (rows.length > 2000 ? [...rows.slice(0, 2000), [`and ${rows.length - 2000} more: the CSV has them all`]] : rows).map(
            cells =>
              h(
                'tr',
                {},
                cells.map(cell => h('td', {class: 'mono'}, String(cell)))
              )
          )
        )
      )
    );
  };
  const open = h(
    'button',
    {
      type: 'button',
      'aria-expanded': 'false',
      'aria-label': `${title}: table`,
      onclick: () => {
        behind.hidden = !behind.hidden;
        open.setAttribute('aria-expanded', !behind.hidden);
        if (!behind.hidden) showTable();
      }
    },
    'Table'
  );
  const button = (text, action) => h('button', {type: 'button', 'aria-label': `${title}: save ${text}`, onclick: action}, text);
  const saves = h(
    'div',
    {class: 'saves'},
    open,
    button('CSV', () => saveTable(name, ...table())),
    drawn && [button('PNG', () => savePicture(name, picture, 'png')), button('SVG', () => savePicture(name, picture, 'svg'))]
  );
  const figure = h('figure', {id: 'figure-' + name}, h('figcaption', {}, heading, saves), extra, picture, readout, behind);
  return Object.assign(figure, {
    picture,
    readout: Object.assign(readout, {hidden: true}),
    heading,
    width: () => Math.max(220, picture.clientWidth),
    refresh: () => {
      if (!behind.hidden) showTable();
    },
    say: text => {
      readout.hidden = false;
      readout.textContent = text;
    }
  });
}

function download(name, blob) {
  const link = h('a', {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function saveTable(name, headings, rows) {
  const cell = value => (/[",\n\r]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  download(
    name + '.csv',
    new Blob([[headings, ...rows].map(cells => cells.map(cell).join(',')).join('\n') + '\n'], {type: 'text/csv'})
  );
}

/** The drawing in a picture as a file of its own: an SVG with its styles, a canvas as PNG (or as an image inside an SVG). */
async function savePicture(name, picture, format) {
  const canvas = picture.querySelector('canvas'),
    drawing = picture.querySelector('svg');
  let text;
  if (drawing) {
    const copy = drawing.cloneNode(true);
    const originals = [drawing, ...drawing.querySelectorAll('*')],
      copies = [copy, ...copy.querySelectorAll('*')];
    originals.forEach((element, i) => {
      const style = getComputedStyle(element);
      for (const key of ['fill', 'stroke', 'font-family', 'font-size', 'opacity'])
        copies[i].style.setProperty(key, style.getPropertyValue(key));
    });
    copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
    copy.style.background = colour('panel');
    text = new XMLSerializer().serializeToString(copy);
  } else if (canvas) {
    if (format === 'png') return canvas.toBlob(blob => download(name + '.png', blob));
    text = `<svg xmlns="http://www.w3.org/2000/svg" width="${canvas.width}" height="${canvas.height}"><image width="${canvas.width}" height="${canvas.height}" href="${canvas.toDataURL()}"/></svg>`;
  } else return;
  if (format === 'svg') return download(name + '.svg', new Blob([text], {type: 'image/svg+xml'}));
  const image = new Image();
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text);
  await image.decode();
  const target = h('canvas', {width: drawing.clientWidth * 2, height: drawing.clientHeight * 2});
  target.getContext('2d').drawImage(image, 0, 0, target.width, target.height);
  target.toBlob(blob => download(name + '.png', blob));
}
