// The runs, which of them are shown, and the state of the page.

import {inflate} from '../arrays.js';
import {DEFAULTS, LIMITS, TEXTS, set, state, takeBytes} from '../core.js';

/** As read_run in tools/runs.py returns them. */
export const runs = [];
export const info = {keys: [], max_points: 0, version: 0};

/** The runs in the page. */
export async function loadRuns() {
  const bytes = await inflate(takeBytes('data'));
  takeData(JSON.parse(new TextDecoder().decode(bytes)));
}

/** Add runs or replace them by newer ones; data: as page_data in tools/runs.py returns it. */
export function takeData(data) {
  const byId = new Map(runs.map(run => [run.id, run]));
  for (const run of data.runs) byId.set(run.id, run);
  const ids = data.ids ?? [...byId.keys()]; // a served page: in the order of the folders
  runs.splice(0, runs.length, ...ids.map(id => byId.get(id)).filter(run => run));
  runs.forEach((run, i) => (run.number = i));
  Object.assign(info, data, {runs: null});
}

// State -------------------------------------------------------------------------------------------

Object.assign(DEFAULTS, {
  x: 'step', // of all charts
  logx: 0,
  logy: 0,
  smooth: 0, // weight of the moving average
  show: 'value', // or the difference to the baseline
  zoom: '', // 'axis:low:high', '': the whole range
  base: '', // id of the baseline
  run: '', // id of the selected run, '': the first one shown
  hidden: '', // ids, with commas
  filter: '',
  sort: '', // a column, with - for descending; '': as found
  sample: -1 // number of the evaluation, -1: the last one
});
Object.assign(LIMITS, {logx: [0, 1], logy: [0, 1], smooth: [0, 0.99], sample: [-1, 999]});
Object.assign(TEXTS, {
  zoom: /^[a-z]+:[\d.e+-]+:[\d.e+-]+$/,
  base: /^[0-9a-f]{8}$/,
  run: /^[0-9a-f]{8}$/,
  hidden: /^[0-9a-f]{8}(,[0-9a-f]{8})*$/,
  filter: /./,
  sort: /^-?.{1,60}$/
});

export const isHidden = run => state.hidden.includes(run.id);

/** Hide or show one run. */
export function toggle(run) {
  const ids = new Set(state.hidden ? state.hidden.split(',') : []);
  if (!ids.delete(run.id)) ids.add(run.id);
  set({hidden: [...ids].join(',')});
}

/** Whether each word of the filter is in the name, the status or a `key=value` of the run. */
export function matches(run) {
  if (!state.filter) return true;
  const pairs = info.keys.map(key => `${key}=${run.config[key] ?? ''}`);
  const text = [run.name, run.status, ...pairs].join(' ').toLowerCase();
  return state.filter
    .toLowerCase()
    .split(/\s+/)
    .every(word => text.includes(word));
}

export const shownRuns = () => runs.filter(run => matches(run) && !isHidden(run));
export const baseline = () => runs.find(run => run.id === state.base);
export const selectedRun = () =>
  runs.find(run => run.id === state.run) ?? shownRuns()[0] ?? runs[0];

// Curves ------------------------------------------------------------------------------------------

/** Names of the horizontal axes. */
export const X_NAMES = {
  step: 'step',
  tokens: 'tokens',
  epoch: 'epochs',
  seconds: 'training time (s)',
  flops: 'FLOPs'
};

/** x of the points of run[source] on the chosen axis, or null if the run does not know it. */
function xValues(run, source) {
  const curves = run[source];
  if (state.x !== 'flops') return curves[state.x] ?? null;
  if (!run.flops_per_token || !curves.tokens) return null;
  return curves.tokens.map(n => (n === null ? null : n * run.flops_per_token));
}

/** {x, y, low, high} of a curve, without points that have no value; low and high: if the points are
 * means of several lines. */
export function curveOf(run, source, key) {
  const x = xValues(run, source);
  const y = run[source][key];
  const curve = {run, x: [], y: [], low: [], high: []};
  if (!x || !y) return curve;
  const low = run[source][key + '_low'] ?? [];
  const high = run[source][key + '_high'] ?? [];
  for (let i = 0; i < y.length; i++) {
    if (y[i] === null || x[i] === null) continue;
    curve.x.push(x[i]);
    curve.y.push(y[i]);
    if (low.length) {
      curve.low.push(low[i]);
      curve.high.push(high[i]);
    }
  }
  return curve;
}

/** Index of the first x that is not below value; xs is sorted. */
export function firstAt(xs, value) {
  let [low, high] = [0, xs.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** y of a curve at x, between its points; null outside of them. */
export function valueAt(curve, x) {
  const i = firstAt(curve.x, x);
  if (i === curve.x.length || (i === 0 && curve.x[0] !== x)) return null;
  if (curve.x[i] === x) return curve.y[i];
  const share = (x - curve.x[i - 1]) / (curve.x[i] - curve.x[i - 1]);
  return curve.y[i - 1] + share * (curve.y[i] - curve.y[i - 1]);
}

/** Exponential moving average with the bias of its start removed (Kingma & Ba 2015, section 3). */
export function smoothed(values, weight) {
  let mean = 0;
  return values.map((value, i) => {
    mean = weight * mean + (1 - weight) * value;
    return mean / (1 - weight ** (i + 1));
  });
}

/** A curve minus the baseline's at the same x, where both have values. */
export function difference(curve, base) {
  const result = {run: curve.run, x: [], y: [], low: [], high: []};
  curve.x.forEach((x, i) => {
    const value = valueAt(base, x);
    if (value === null) return;
    result.x.push(x);
    result.y.push(curve.y[i] - value);
  });
  return result;
}
