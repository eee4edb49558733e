// The "One training step" panel.

import {bars, matrix} from './charts.js';
import {
  content,
  figure,
  fixed,
  h,
  integer,
  maxAbs,
  range,
  sequential,
  set,
  signed,
  state,
  watch
} from './core.js';
import {H, L, facts, headName, isOriginal, onlyWhenWritten, row} from './model.js';
import {likelyFigure, likelyNote, predictionStrip, withoutLast} from './compare.js';

const WHY_PLAIN = {
  none: 'these weights come without the state of an optimizer',
  lora: 'the run trained only LoRA updates, and its optimizer state is theirs',
  misfit: 'the optimizer state in the checkpoint does not fit the weights'
};
const RATE_NAMES = {
  adamw: 'other matrices',
  gains: 'gains and biases',
  embeddings: 'embedding tables',
  muon: 'matrices in the layers'
};

export function buildStep() {
  const box = content('step');
  const {step} = facts;
  if (!isOriginal()) box.append(onlyWhenWritten());
  else if (step.skipped) box.append(h('p', {class: 'note'}, step.skipped));
  else buildStepFigures(box, step);
}

function buildStepFigures(box, step) {
  box.append(
    h('p', {class: 'note', id: 'step-method'}, methodOf(step)),
    h('div', {class: 'columns wide-left'}, stepLosses(), resultCard(step)),
    h(
      'div',
      {class: 'columns two'},
      likelyFigure('step-before', 'Next token: before the step', 'step_ids', 'step_probs', 0),
      likelyFigure('step-after', 'Next token: after the step', 'step_ids', 'step_probs', 1)
    ),
    likelyNote(),
    h('div', {class: 'columns two'}, gradientFigure(step), headGradientFigure())
  );
}

/** How the step was made, in plain words. */
function methodOf(step) {
  const untouched = 'Only a copy is trained: all other panels show the model before the step.';
  if (step.optimizer === 'sgd') {
    return (
      'Plain gradient descent: each weight moves against its gradient, times the learning rate. ' +
      `It is not the step of a run, for ${WHY_PLAIN[step.reason]}. ${untouched}`
    );
  }
  const name = step.optimizer === 'muon' ? 'Muon and AdamW' : 'AdamW';
  const when = step.is_over
    ? 'The run is over, so the learning rates are those of its peak.'
    : `The learning rates are those of the schedule at step ${integer(facts.run.step)}.`;
  const dropout = step.dropout ? `, without the dropout of ${step.dropout}` : '';
  return (
    `What train.py would do if this text were the whole batch: one step of ${name} from the ` +
    `optimizer state in the checkpoint, in float32${dropout}. ${when} ${untouched}`
  );
}

function resultCard(step) {
  const [before, after] = step.losses;
  const isClipped = step.clip && step.gradient > step.clip;
  const clip = isClipped ? `, scaled down to ${step.clip}` : '';
  const rates = Object.entries(step.rates);
  const isOneRate = new Set(Object.values(step.rates)).size === 1;
  const rateName = group => (isOneRate ? '' : `, ${RATE_NAMES[group]}`);
  const items = [
    ['Tokens to learn', integer(step.n_targets)],
    ['Mean loss before', fixed(before, 4)],
    ['Mean loss after', `${fixed(after, 4)} (${signed(after - before, 4)})`],
    step.smoothing && ['Label smoothing, in both', step.smoothing],
    ['Gradient norm', fixed(step.gradient, 4) + clip],
    ...(isOneRate ? rates.slice(0, 1) : rates).map(([group, rate]) => [
      `Learning rate${rateName(group)}`,
      Number(rate.toPrecision(3))
    ])
  ];
  const pair = ([name, value]) => [h('dt', {}, name), h('dd', {}, String(value))];
  const list = h('dl', {class: 'figures', id: 'step-result'}, items.filter(Boolean).map(pair));
  return h('div', {class: 'card'}, h('h3', {}, 'The step'), list);
}

function stepLosses() {
  const isTarget = row('is_target');
  const [before, after] = [0, 1].map(i =>
    withoutLast(Array.from(row('step_losses', i), (x, t) => (isTarget[t] ? x : NaN)))
  );
  return predictionStrip(
    'step-loss',
    'Loss at each token, before and after the step',
    [
      {name: 'before', values: before},
      {name: 'after', values: after},
      {name: 'after − before', values: before.map((x, t) => after[t] - x), ownScale: true}
    ],
    'In nats, without label smoothing. Difference: orange where the step lowered the loss, blue ' +
      'where it raised it. Empty: no target of training.'
  );
}

function gradientFigure({parts}) {
  const norms = row('gradients');
  const title = 'Gradient norm of each part';
  const chart = figure('gradients', title, () => [
    ['part', 'gradient norm'],
    parts.map((part, i) => [part, norms[i].toExponential(4)])
  ]);
  const bar = (part, i) => ({
    label: part,
    value: norms[i],
    plain: true,
    text: norms[i].toPrecision(3)
  });
  watch(['theme'], () => bars(chart, parts.map(bar), title));
  chart.setReadout('Their squares sum to the square of the gradient norm.');
  return chart;
}

function headGradientFigure() {
  const norm = (l, k) => row('head_gradients', l)[k];
  const title = 'Gradient norm of each head';
  const chart = figure('head-gradients', title, () => [
    ['head', 'gradient norm'],
    range(L * H, n => {
      const [l, k] = [Math.floor(n / H), n % H];
      return [headName(l, k), norm(l, k).toExponential(4)];
    })
  ]);
  const largest = maxAbs([...row('head_gradients')]);
  watch(['layer', 'head', 'theme'], () =>
    matrix(chart, {
      rows: L,
      columns: H,
      cellColor: (l, k) => sequential(norm(l, k) / largest),
      describe: (l, k) => `head ${headName(l, k)}\ngradient norm ${norm(l, k).toPrecision(3)}`,
      onPick: (layer, head) => set({layer, head, source: -1}),
      isSelected: (l, k) => l === state.layer && k === state.head,
      rowName: l => 'L' + l,
      columnName: k => 'H' + k,
      label: title
    })
  );
  chart.setReadout('Of the weights of queries, keys, values and outputs. Bluer: larger.');
  return chart;
}
