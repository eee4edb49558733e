// The "Two checkpoints" panel; figures of two predictions of a text, for the training step too.

import {bars, headGrid, matrix} from './charts.js';
import {
  content,
  diverging,
  figure,
  fixed,
  h,
  integer,
  maxAbs,
  percent,
  range,
  sequential,
  set,
  signed,
  state,
  sum,
  tableOf,
  watch
} from './core.js';
import {
  H,
  L,
  T,
  facts,
  hasNext,
  headName,
  isOriginal,
  onlyWhenWritten,
  row,
  targetAt,
  tokenLabel,
  tokenQuoted,
  tokenText
} from './model.js';
import {SCORES} from './heads.js';

/**
 * Numbers of each prediction, one row per kind and one column per position. rows: [{name, values:
 * T numbers, NaN for none, ownScale}], on one scale of colors from 0, or on one of their own around
 * 0; note: on the colors.
 */
export function predictionStrip(name, title, rows, note) {
  const next = t => (hasNext(t) ? tokenText(facts.ids[t + 1]) : '');
  const headings = ['position', 'token', 'next token', ...rows.map(line => line.name)];
  const cells = line => t => (Number.isFinite(line.values[t]) ? line.values[t].toFixed(4) : '');
  const chart = figure(name, title, () => [
    headings,
    range(T, t => [t, tokenText(facts.ids[t]), next(t), ...rows.map(line => cells(line)(t))])
  ]);
  const shared = rows.filter(line => !line.ownScale);
  const reachOf = line =>
    maxAbs((line.ownScale ? [line] : shared).flatMap(x => [...x.values].filter(isFinite)));
  const reach = rows.map(reachOf);
  const cellColor = (i, t) => {
    const value = rows[i].values[t];
    if (!Number.isFinite(value)) return null;
    return (rows[i].ownScale ? diverging : sequential)(value / reach[i]);
  };
  const describe = (i, t) => {
    const place = `position ${t}, after ${tokenQuoted(facts.ids[t])}`;
    const number = line => `${line.name} ${cells(line)(t) || 'none'}`;
    const after = hasNext(t) ? `next token ${tokenQuoted(facts.ids[t + 1])}` : 'end of the text';
    return [place, after, ...rows.map(number)].join('\n');
  };
  watch(['t', 'theme'], () =>
    matrix(chart, {
      rows: rows.length,
      columns: T,
      cellColor,
      describe,
      onPick: (i, t) => set({t, source: -1}),
      isSelected: (i, t) => t === state.t,
      rowName: i => rows[i].name,
      columnName: t => (hasNext(t) ? tokenLabel(facts.ids[t + 1], 8) : ''),
      columnAxis: 'next token',
      cellHeight: 24,
      maxSize: 1200,
      label: title
    })
  );
  chart.setReadout(note);
  return chart;
}

/**
 * The likely tokens at the selected position by the probabilities `side` of an array (2, T, n),
 * those of the other side as outlines; ids: the name of their array.
 */
export function likelyFigure(name, title, ids, probs, side) {
  const now = () => {
    const values = row(probs, side, state.t);
    const others = row(probs, 1 - side, state.t);
    const all = Array.from(row(ids, state.t), (id, i) => ({id, p: values[i], other: others[i]}));
    return all.sort((a, b) => b.p - a.p);
  };
  const chart = figure(name, title, () => [
    ['token', 'id', 'probability', 'probability of the other'],
    now().map(({id, p, other}) => [tokenText(id), id, p.toExponential(4), other.toExponential(4)])
  ]);
  const isNext = id => hasNext(state.t) && id === targetAt(state.t);
  const bar = ({id, p, other}) => ({
    label: tokenLabel(id),
    value: p,
    outline: other,
    text: percent(p),
    bold: isNext(id),
    tip: `${tokenQuoted(id)}\nprobability ${p.toFixed(5)}\nof the other ${other.toFixed(5)}`
  });
  watch(['t', 'theme'], () => bars(chart, now().map(bar), title, {low: 0}));
  return chart;
}

export const likelyNote = () =>
  h(
    'p',
    {class: 'note'},
    'Outline: probability in the other figure. Bold: the token that comes next in the text.'
  );

const mean = values => sum([...values]) / values.length;
/** The loss at each position, NaN at the last one, which has no next token. */
export const withoutLast = losses => [...losses, NaN];

export function buildCompare() {
  const box = content('compare');
  if (!facts.other) {
    const command = h('code', {}, '--compare=out-other');
    const note = 'To see another checkpoint on the same text, run explain.py with ';
    box.append(h('p', {class: 'note'}, note, command, ', a run’s folder or a file.'));
    return;
  }
  if (isOriginal()) {
    box.append(
      h('div', {class: 'columns wide-left'}, lossFigure(), summaryTable()),
      h(
        'div',
        {class: 'columns two'},
        likelyFigure('compare-this', 'Next token: this checkpoint', 'both_ids', 'both_probs', 0),
        likelyFigure('compare-other', 'Next token: the other', 'both_ids', 'both_probs', 1)
      ),
      likelyNote()
    );
  } else box.append(onlyWhenWritten());
  buildScores(box);
}

function lossFigure() {
  const ours = withoutLast(row('loss'));
  const theirs = withoutLast(row('other_loss'));
  return predictionStrip(
    'compare-loss',
    'Loss of both at each token',
    [
      {name: 'this: loss', values: ours},
      {name: 'other: loss', values: theirs},
      {name: 'other − this', values: ours.map((x, t) => theirs[t] - x), ownScale: true},
      {name: 'KL', values: row('kl'), ownScale: true}
    ],
    'In nats. Difference: blue where the loss of the other is higher, orange where it is lower. ' +
      'KL divergence: how far its probabilities of all tokens are from those of this one; 0 if ' +
      'they are the same.'
  );
}

function summaryTable() {
  const {run, model, other} = facts;
  const loss = name => (T > 1 ? fixed(mean(row(name)), 4) : 'n/a');
  const valLoss = x => (x === null ? 'n/a' : fixed(x, 4));
  const rows = [
    ['file', run.path, other.path],
    ['step', integer(run.step), integer(other.step)],
    ['parameters', integer(facts.parameters), integer(other.parameters)],
    ['layers × heads', `${model.n_layer} × ${model.n_head}`, `${other.n_layer} × ${other.n_head}`],
    ['val loss', valLoss(run.val_loss), valLoss(other.val_loss)],
    ['mean loss here', loss('loss'), loss('other_loss')],
    ['mean KL', '', fixed(mean(row('kl')), 4)]
  ];
  return h(
    'div',
    {class: 'card'},
    h('h3', {}, 'Summary'),
    tableOf(['checkpoint', 'this', 'other'], rows, {id: 'compare-summary'})
  );
}

/** Scores of all heads of both, and their differences where both have the same heads. */
function buildScores(box) {
  const {n_layer: layers, n_head: heads} = facts.other;
  const isPaired = layers === L && heads === H;
  let kind = 'previous';
  const draws = [];
  const select = h(
    'select',
    {
      id: 'compare-kind',
      onchange: event => {
        kind = event.target.value;
        draws.forEach(draw => draw());
      }
    },
    facts.score_names.map(key => h('option', {value: key, selected: key === kind}, SCORES[key]))
  );
  const label = h('label', {for: 'compare-kind'}, 'Score of the heads');
  const scoreOf = name => (l, k) => row(name, facts.score_names.indexOf(kind), l)[k];
  const ours = scoreOf('scores');
  const theirs = scoreOf('other_scores');
  const pick = (layer, head) => set({layer, head, source: -1});
  const grid = (name, title, nLayers, nHeads, value, onPick) => {
    const tableRow = n => {
      const l = Math.floor(n / nHeads);
      const k = n % nHeads;
      return [headName(l, k), value(l, k).toFixed(4)];
    };
    const table = () => [['head', kind], range(nLayers * nHeads, tableRow)];
    const chart = figure(name, title, table, null, false);
    const draw = () =>
      headGrid(chart, nLayers, nHeads, value, `${title}: ${SCORES[kind]} scores`, onPick);
    draws.push(draw);
    watch(['theme'], draw);
    return chart;
  };
  const difference = (l, k) => theirs(l, k) - ours(l, k);
  box.append(
    h('div', {class: 'controls'}, label, select),
    h(
      'div',
      {class: 'columns'},
      grid('compare-scores-this', 'Heads: this checkpoint', L, H, ours, pick),
      grid('compare-scores-other', 'Heads: the other', layers, heads, theirs),
      isPaired && grid('compare-scores-difference', 'Heads: other − this', L, H, difference, pick)
    )
  );
  if (!isPaired) {
    const note = 'The two have other numbers of layers or heads, so there are no pairs of heads.';
    box.append(h('p', {class: 'note'}, note));
  }
}
