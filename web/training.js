// Training curves and, with --checkpoints=all, losses and head scores over the checkpoints.

import {headGrid, lines} from './charts.js';
import {content, figure, fixed, h, integer, range, set, watch} from './core.js';
import {H, L, facts, headName, isOriginal, row} from './model.js';
import {SCORES} from './heads.js';

/** A figure of curves over training steps; series as in lines(), tableName for the data table. */
function curvesFigure(name, title, series, options) {
  const rowsOf = line => {
    const curve = line.tableName || line.name || title;
    return line.points.map(([step, value]) => [curve, step, value]);
  };
  const chart = figure(name, title, () => [['curve', 'step', 'value'], series.flatMap(rowsOf)]);
  watch(['theme'], () => lines(chart, series, title, {xName: 'step', ...options}));
  return chart;
}

export function buildTraining() {
  const box = content('training');
  const {curves} = facts.run;
  const hasCurves = Object.values(curves).some(points => points.length);
  if (hasCurves) box.append(runCurves(curves));
  else box.append(h('p', {class: 'note'}, 'No training log comes with these weights.'));
  if (!facts.history) box.append(historyHint());
  else if (facts.history.steps.length) buildHistory(box);
  else box.append(h('p', {class: 'note'}, 'This folder has no checkpoints to compare.'));
}

function runCurves(curves) {
  const loss = [
    {name: 'train', points: curves.loss, tone: 'muted'},
    {name: 'val', points: curves.val_loss, tone: 'accent'}
  ];
  const lr = [{points: curves.lr, tone: 'accent'}];
  const speed = [{points: curves.tokens_per_second, tone: 'accent'}];
  return h(
    'div',
    {class: 'columns'},
    curvesFigure('loss-curve', 'Loss', loss, {yName: 'nats'}),
    curvesFigure('lr-curve', 'Learning rate', lr, {zero: true}),
    curvesFigure('speed-curve', 'Tokens per second', speed, {zero: true})
  );
}

function historyHint() {
  return h(
    'p',
    {class: 'note'},
    'To see how the heads developed, train with a larger ',
    h('code', {}, '--keep_last'),
    ' and run explain.py with ',
    h('code', {}, '--checkpoints=all'),
    '.'
  );
}

// Checkpoints -------------------------------------------------------------------------------------

/** A score of head l.k at checkpoint i. */
const historyScore = (i, name, l, k) => row('history', i, facts.score_names.indexOf(name), l)[k];

/** [[step, value], ...] without missing values. */
const historyCurve = values =>
  values.map((value, i) => [facts.history.steps[i], value]).filter(point => point[1] !== null);

// served pages keep the history of the text they started with
const historyText = () => (facts.live || !isOriginal() ? 'the initial text' : 'this text');

function buildHistory(box) {
  const {losses, val_losses, first_half, second_half} = facts.history;
  const textLosses = [
    {name: historyText(), points: historyCurve(losses), tone: 'muted'},
    {name: 'val', points: historyCurve(val_losses), tone: 'accent'}
  ];
  const repeatLosses = [
    {name: 'first half', points: historyCurve(first_half), tone: 'muted'},
    {name: 'second half', points: historyCurve(second_half), tone: 'accent'}
  ];
  const repeatTitle = 'Loss on repeated random tokens';
  box.append(
    h(
      'div',
      {class: 'columns two'},
      curvesFigure('history-losses', 'Loss by checkpoint', textLosses, {yName: 'nats'}),
      curvesFigure('history-repeats', repeatTitle, repeatLosses, {zero: true, yName: 'nats'}),
      scoreHistoryFigure('induction'),
      scoreHistoryFigure('previous')
    )
  );
  buildComparison(box);
}

/** One score of every head over the checkpoints, with the best head at the end highlighted. */
function scoreHistoryFigure(name) {
  const curveOf = n => {
    const l = Math.floor(n / H);
    const k = n % H;
    const points = facts.history.steps.map((step, i) => [step, historyScore(i, name, l, k)]);
    return {
      tableName: headName(l, k),
      points: points.filter(point => Number.isFinite(point[1])),
      tone: 'accent',
      faint: true
    };
  };
  const heads = range(L * H, curveOf);
  const last = curve => curve.points.at(-1)?.[1] ?? 0;
  const [best] = heads.toSorted((a, b) => last(b) - last(a));
  const highlighted = {...best, faint: false, name: `head ${best.tableName}`};
  const chart = curvesFigure(
    'history-' + name,
    `Scores of all heads: ${SCORES[name]}`,
    [...heads, highlighted],
    {zero: true, high: 1}
  );
  const first = best.points.find(([, value]) => value > 0.3);
  chart.setReadout(
    first
      ? `Head ${best.tableName} exceeds 0.3 at step ${integer(first[0])}.`
      : 'No head exceeds 0.3.'
  );
  return chart;
}

/** Two grids of head scores, each at a checkpoint of the reader's choice. */
function buildComparison(box) {
  const {steps, losses, first_half, second_half} = facts.history;
  const chosen = [0, steps.length - 1];
  let name = 'induction';
  const draws = [];
  const drawAll = () => draws.forEach(draw => draw());
  const scoreSelect = h(
    'select',
    {
      id: 'history-kind',
      onchange: event => {
        name = event.target.value;
        drawAll();
      }
    },
    facts.score_names.map(key => h('option', {value: key, selected: key === name}, SCORES[key]))
  );

  const checkpointFigure = side => {
    const option = (step, i) =>
      h('option', {value: i, selected: i === chosen[side]}, `step ${integer(step)}`);
    const select = h(
      'select',
      {
        'aria-label': `Checkpoint ${side + 1}`,
        onchange: event => {
          chosen[side] = Number(event.target.value);
          drawAll();
        }
      },
      steps.map(option)
    );
    const value = (l, k) => historyScore(chosen[side], name, l, k);
    const tableRow = n => {
      const l = Math.floor(n / H);
      const k = n % H;
      return [headName(l, k), value(l, k).toFixed(4)];
    };
    const chart = figure(
      `checkpoint-${side + 1}`,
      side ? 'Second checkpoint' : 'First checkpoint',
      () => [['head', name], range(L * H, tableRow)],
      h('div', {class: 'controls'}, select),
      false
    );
    const draw = () => {
      const i = chosen[side];
      const label = `${SCORES[name]} scores at step ${steps[i]}`;
      const select = (layer, head) => set({layer, head, source: -1});
      headGrid(chart, L, H, value, label, select);
      chart.setReadout(
        `Loss on ${historyText()} ${fixed(losses[i], 3)}; ` +
          `on repeated tokens ${fixed(first_half[i])} in the first half, ` +
          `${fixed(second_half[i])} in the second.`
      );
    };
    draws.push(draw);
    watch(['theme'], draw);
    return chart;
  };

  const label = h('label', {for: 'history-kind'}, 'Compare two checkpoints by');
  box.append(
    h('div', {class: 'controls'}, label, scoreSelect),
    h('div', {class: 'columns two'}, checkpointFigure(0), checkpointFigure(1))
  );
}
