// The charts of all shown runs, and the controls of their axes.

import {choice, content, figure, h, set, state, watch} from '../core.js';
import {X_NAMES, baseline, curveOf, difference, shownRuns, smoothed} from './data.js';
import {curveChart, zoomBack, zoomOut, zoomRange} from './chart.js';

const ratioChart = (group, title) => ({
  name: `ratio-${group}`,
  title,
  source: 'curves',
  key: `update_ratio_${group}`,
  note: 'Norm of the step divided by the norm of the weights that it changes.'
});
const CHARTS = [
  {name: 'val-loss', title: 'Val loss', source: 'evaluations', key: 'val_loss', height: 340},
  {name: 'train-loss', title: 'Train loss', source: 'curves', key: 'loss'},
  {name: 'train-evaluated', title: 'Train loss at evaluations', source: 'evaluations',
    key: 'train_loss'},
  {name: 'bits', title: 'Bits per byte', source: 'evaluations', key: 'val_bits_per_byte'},
  {name: 'lr', title: 'Learning rate', source: 'curves', key: 'lr', zero: true},
  {name: 'grad-norm', title: 'Gradient norm', source: 'curves', key: 'grad_norm'},
  {name: 'speed', title: 'Tokens per second', source: 'curves', key: 'tokens_per_second',
    zero: true},
  {name: 'noise-scale', title: 'Gradient noise scale', source: 'curves', key: 'noise_scale',
    note: 'The batch, in tokens, whose gradient is as much noise as signal: much smaller batches ' +
      'need few more tokens, much larger ones few fewer steps (McCandlish et al. 2018).'},
  ratioChart('muon', "Update ratio of the blocks' matrices (Muon)"),
  ratioChart('adamw', 'Update ratio of matrices and embeddings (AdamW)'),
  ratioChart('embeddings', 'Update ratio of embeddings'),
  ratioChart('gains', 'Update ratio of gains and biases'),
  {name: 'memory', title: 'Peak memory', source: 'curves', key: 'peak_memory', zero: true,
    note: 'Bytes: allocated on a GPU, else resident in the main process.'}
];
// what changes the curves of all charts
const CURVE_KEYS = ['x', 'logx', 'logy', 'smooth', 'show', 'zoom', 'base', 'hidden', 'filter',
  'theme'];

const comparing = () => state.show === 'difference' && baseline() !== undefined;

/** {curves, raw} of a chart: as drawn, and before smoothing. */
function chartCurves({source, key}) {
  let raw = shownRuns().map(run => curveOf(run, source, key));
  if (comparing()) {
    const base = curveOf(baseline(), source, key);
    raw = raw.map(curve => difference(curve, base));
  }
  raw = raw.filter(curve => curve.x.length);
  const smooth = source === 'curves' && key !== 'lr' && state.smooth;
  if (!smooth) return {curves: raw, raw};
  return {curves: raw.map(curve => ({...curve, y: smoothed(curve.y, state.smooth)})), raw};
}

function buildChart(chart) {
  const table = () => {
    const rowsOf = ({run, x, y}) => x.map((value, i) => [run.name, value, y[i]]);
    return [['run', X_NAMES[state.x], chart.title], chartCurves(chart).raw.flatMap(rowsOf)];
  };
  const note = chart.note && h('p', {class: 'note'}, chart.note);
  const element = figure(chart.name, chart.title, table, note);
  watch(CURVE_KEYS, () => {
    const {curves, raw} = chartCurves(chart);
    const title = comparing() ? `${chart.title} minus that of ${baseline().name}` : chart.title;
    element.heading.textContent = title;
    element.hidden = note && !raw.length; // not every run has it
    curveChart(element, curves, raw, {
      label: `${title} against ${X_NAMES[state.x]}`,
      height: chart.height ?? 240,
      log: state.logy === 1 && !comparing(),
      zero: chart.zero ?? false
    });
  });
  return element;
}

function smoothing() {
  const output = h('output', {});
  const slider = h('input', {
    type: 'range',
    class: 'short',
    id: 'smooth',
    min: 0,
    max: 0.99,
    step: 0.01,
    oninput: () => set({smooth: Number(slider.value)})
  });
  watch(['smooth'], () => {
    slider.value = state.smooth;
    output.textContent = state.smooth.toFixed(2);
  });
  return [h('label', {for: 'smooth'}, 'Smoothing'), slider, output];
}

function zoomButtons() {
  const back = h('button', {type: 'button', onclick: zoomBack}, 'Zoom back');
  const whole = h('button', {type: 'button', onclick: zoomOut}, 'Whole range');
  watch(['zoom', 'x'], () => (back.disabled = whole.disabled = !zoomRange()));
  return [back, whole];
}

export function buildCurves() {
  const xChoices = {
    step: 'Steps', tokens: 'Tokens', epoch: 'Epochs', seconds: 'Time', flops: 'FLOPs'
  };
  const hint = h('p', {class: 'note'});
  watch(['show', 'base'], () => {
    const needsBase = state.show === 'difference' && !baseline();
    hint.textContent = needsBase ? 'Pin a run in the table: it is the baseline.' : '';
    hint.hidden = !needsBase;
  });
  content('curves').append(
    h(
      'div',
      {class: 'controls'},
      choice('x', xChoices, 'Horizontal axis'),
      choice('logx', {0: 'Linear x', 1: 'Log x'}, 'Scale of the horizontal axis'),
      choice('logy', {0: 'Linear y', 1: 'Log y'}, 'Scale of the vertical axes'),
      choice('show', {value: 'Values', difference: 'Minus baseline'}, 'Values or differences'),
      h('div', {class: 'controls'}, smoothing()),
      h('div', {class: 'controls'}, zoomButtons())
    ),
    hint,
    h('div', {class: 'columns charts'}, CHARTS.map(buildChart))
  );
}
