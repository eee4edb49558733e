// The table of runs: sort, filter, hide, select, pin a baseline.

import {
  compact,
  content,
  figure,
  fixed,
  h,
  integer,
  s,
  set,
  signed,
  state,
  watch
} from '../core.js';
import {baseline, info, isHidden, matches, runs, selectedRun, shownRuns, toggle} from './data.js';
import {lineStyle} from './chart.js';

/** 45 s, 3.2 min, 1.5 h, 2.1 d */
export function duration(seconds) {
  if (seconds === null) return 'n/a';
  const units = [['d', 86400], ['h', 3600], ['min', 60]];
  const [unit, size] = units.find(([, length]) => seconds >= 2 * length) ?? ['s', 1];
  return `${fixed(seconds / size, size === 1 ? 0 : 1)} ${unit}`;
}

const number = (name, value, text, more) => ({name, value, text, isNumber: true, ...more});
const loss = x => (x === null ? 'n/a' : fixed(x, 4));
const amount = x => (x === null ? 'n/a' : compact(Number(x.toPrecision(4))));
const flopsOf = run =>
  run.flops_per_token && run.tokens !== null ? run.flops_per_token * run.tokens : null;

const count = n => (n === null ? 'n/a' : integer(n));

/** Columns: the value sorts, the text is shown; smaller: whether the smaller value is better. */
const LOSSES = [
  {name: 'status', value: run => run.status, text: run => run.status},
  number('step', run => run.step, run => `${integer(run.step)} / ${count(run.max_iters)}`),
  number('val loss', run => run.val_loss, run => loss(run.val_loss), {smaller: true}),
  number('best val loss', run => run.best, run => loss(run.best), {smaller: true}),
  number('at step', run => run.best_step, run => count(run.best_step)),
  number('train loss', run => run.train_loss, run => loss(run.train_loss), {smaller: true})
];
const AMOUNTS = [
  number('bits per byte', run => run.bits, run => loss(run.bits), {smaller: true}),
  number('tokens', run => run.tokens, run => amount(run.tokens)),
  number('time', run => run.seconds, run => duration(run.seconds)),
  number('FLOPs', flopsOf, run => amount(flopsOf(run))),
  number('parameters', run => run.n_params, run => amount(run.n_params))
];

function keyColumn(key) {
  const texts = runs.map(run => run.config[key] ?? '');
  const isNumber = texts.every(text => text === '' || Number.isFinite(Number(text)));
  const value = run => {
    const text = run.config[key] ?? '';
    return isNumber && text !== '' ? Number(text) : text;
  };
  return {name: key, value, text: run => run.config[key] ?? '', isNumber};
}

const runColumn = {name: 'run', value: run => run.name, text: run => run.name};
const allColumns = () => [runColumn, ...LOSSES, ...info.keys.map(keyColumn), ...AMOUNTS];

/** The runs that match the filter, in the order of the table. */
function sortedRuns() {
  const found = runs.filter(matches);
  const descending = state.sort.startsWith('-');
  const column = allColumns().find(({name}) => name === state.sort.slice(descending ? 1 : 0));
  if (!column) return found;
  const valueOf = run => (column.value(run) === '' ? null : column.value(run));
  const compare = (a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (x === null || y === null) return (x === null) - (y === null); // runs without a value last
    const order = typeof x === 'string' ? x.localeCompare(y, 'en', {numeric: true}) : x - y;
    return descending ? -order : order;
  };
  return found.toSorted(compare);
}

function heading(column) {
  const {name, isNumber} = column;
  const direction = {[name]: 'ascending', ['-' + name]: 'descending'}[state.sort];
  const arrow = {ascending: ' ↑', descending: ' ↓'}[direction] ?? '';
  const sort = direction === 'ascending' ? '-' + name : direction ? '' : name;
  return h(
    'th',
    {scope: 'col', class: isNumber && 'number', 'aria-sort': direction},
    h('button', {type: 'button', 'data-focus': 'sort ' + name, onclick: () => set({sort})},
      name + arrow)
  );
}

/** A stroke as the run's lines have it. */
export function swatch(run) {
  const {stroke, dash} = lineStyle(run);
  const line = {x1: 0, x2: 22, y1: 4, y2: 4, stroke, 'stroke-width': 3};
  return s('svg', {class: 'swatch', viewBox: '0 0 22 8', 'aria-hidden': 'true'},
    s('line', {...line, 'stroke-dasharray': dash.join(' ') || null}));
}

function cell(run, column) {
  const {text, value, isNumber, smaller} = column;
  const base = baseline();
  const difference = smaller && base && base !== run && value(run) !== null && value(base) !== null
    ? value(run) - value(base) : null;
  const tone = difference < 0 ? 'better' : 'worse';
  return h(
    'td',
    {
      class: [isNumber && 'number', column.name === 'status' && `status-${run.status}`]
        .filter(Boolean).join(' ') || null,
      title: isNumber && value(run) !== null ? String(value(run)) : null
    },
    text(run),
    difference !== null && h('span', {class: tone}, ` (${signed(difference, 4)})`)
  );
}

function tableRow(run, columns) {
  const shown = h('input', {
    type: 'checkbox',
    checked: !isHidden(run),
    'aria-label': `Show ${run.name}`,
    'data-focus': 'show ' + run.id,
    onchange: () => toggle(run)
  });
  const name = h(
    'button',
    {
      type: 'button',
      class: 'name',
      'aria-pressed': String(run === selectedRun()),
      'data-focus': 'run ' + run.id,
      onclick: () => set({run: run.id, sample: -1})
    },
    run.name
  );
  const pinned = run === baseline();
  const pin = h(
    'button',
    {
      type: 'button',
      class: 'pin',
      'aria-pressed': String(pinned),
      'aria-label': `Pin ${run.name} as the baseline`,
      'data-focus': 'pin ' + run.id,
      onclick: () => set({base: pinned ? '' : run.id})
    },
    pinned ? 'Baseline' : 'Pin'
  );
  return h(
    'tr',
    {class: isHidden(run) && 'off'},
    h('td', {}, h('label', {}, shown, swatch(run))),
    h('th', {scope: 'row'}, name),
    h('td', {}, pin),
    columns.slice(1).map(column => cell(run, column))
  );
}

/** Replace what an element holds; the control that had the focus gets it back. */
function renew(element, ...children) {
  const key = element.contains(document.activeElement) && document.activeElement.dataset.focus;
  const [left, top] = [element.scrollLeft, element.scrollTop];
  element.replaceChildren(...children);
  if (left || top) element.scrollTo(left, top);
  if (key) {
    const same = [...element.querySelectorAll('[data-focus]')].find(x => x.dataset.focus === key);
    same?.focus({preventScroll: true});
  }
}

/** All numbers in full, for the CSV. */
function csvRows() {
  const columns = allColumns();
  const names = columns.map(({name}) => name);
  return [names, sortedRuns().map(run => columns.map(({value}) => value(run) ?? ''))];
}

function showOnly(ids) {
  const hidden = runs.filter(run => matches(run) && !ids.has(run.id)).map(run => run.id);
  set({hidden: hidden.join(',')});
}

export function buildTable() {
  const filter = h('input', {
    type: 'search',
    id: 'filter',
    autocomplete: 'off',
    spellcheck: 'false',
    placeholder: 'name, status, key=value',
    oninput: () => set({filter: filter.value})
  });
  const note = h('span', {class: 'note', 'aria-live': 'polite'});
  const button = (text, onclick) => h('button', {type: 'button', onclick}, text);
  const best = () => {
    const ranked = runs.filter(run => matches(run) && run.best !== null);
    ranked.sort((a, b) => a.best - b.best);
    showOnly(new Set(ranked.slice(0, 10).map(run => run.id)));
  };
  const controls = h(
    'div',
    {class: 'controls'},
    h('label', {for: 'filter'}, 'Filter'),
    filter,
    button('Show all', () => set({hidden: ''})),
    button('Hide all', () => showOnly(new Set())),
    button('Show the best 10', best),
    note
  );
  const element = figure('runs', 'All runs', csvRows, controls, false);
  const box = h('div', {class: 'run-table', tabindex: 0, role: 'region', 'aria-label': 'Runs'});
  element.picture.append(box);
  watch(['sort', 'filter', 'hidden', 'base', 'run', 'theme'], () => {
    if (filter.value !== state.filter) filter.value = state.filter;
    note.textContent = `${shownRuns().length} of ${runs.length} shown`;
    const corner = h('th', {scope: 'col'}, 'show');
    const columns = allColumns();
    const headings = columns.map(heading);
    const head = h('tr', {}, corner, headings[0], h('th', {scope: 'col'}, 'baseline'),
      headings.slice(1));
    const rows = sortedRuns().map(run => tableRow(run, columns));
    renew(box, h('table', {}, h('thead', {}, head), h('tbody', {}, rows)));
  });
  content('table').append(element);
}
