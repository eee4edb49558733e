// All attention heads at a glance, and one head in detail.

import {bars, matrix} from './charts.js';
import {
  argmax,
  choice,
  content,
  css,
  diverging,
  figure,
  fixed,
  h,
  maxAbs,
  mix,
  range,
  sequential,
  set,
  signed,
  state,
  sum,
  watch
} from './core.js';
import {
  H,
  HS,
  L,
  T,
  arrays,
  facts,
  hasNext,
  headName,
  missing,
  row,
  rowOfPairs,
  sees,
  targetAt,
  tokenLabel,
  tokenQuoted,
  tokenText,
  visibleKeys,
  whyHidden
} from './model.js';
import {hasModel} from './live-model.js';
import {softmax} from './sampling.js';
import {headSnippets} from './snippets.js';
import {freezeButton, lookButton, offButton} from './switches.js';

/** Scores of a head: key of the state -> name. */
export const SCORES = {
  previous: 'previous token',
  induction: 'induction',
  duplicate: 'duplicate token',
  copying: 'copying',
  logit: 'logit'
};
const SCORE_NOTES = {
  previous: 'Mean attention to the previous token, on random tokens.',
  induction:
    'On random tokens followed by the same tokens again: mean attention to the token after the ' +
    'first occurrence of the current one, which is the token to predict (Olsson et al. 2022).',
  duplicate:
    'On random tokens followed by the same tokens again: mean attention to the first occurrence ' +
    'of the current token.',
  copying:
    'From the eigenvalues of the OV circuit: 1 if the head raises the tokens it attends to, ' +
    '−1 if it lowers them (Elhage et al. 2021).',
  logit: 'Direct contribution to the logit of the next token at the selected position.'
};
/** For models with prefix_lm. */
export const RANDOM_TOKENS_NOTE =
  'In sources of this model attention is bidirectional. Random tokens are not a source: on them, ' +
  'attention is causal.';
let partIndex; // 'head,layer,head' -> index in facts.parts

/** A score of head l.k: in [0, 1], copying in [-1, 1]; 'logit' depends on the position. */
export function score(name, l, k) {
  if (name === 'logit') {
    partIndex ??= new Map(facts.parts.map((part, i) => [String(part), i]));
    return row('parts', partIndex.get(`head,${l},${k}`), state.t)[0];
  }
  return row('scores', facts.score_names.indexOf(name), l)[k];
}

/** Attention of head l.k at t over all T keys: exact, or from 8 bits if q and k were left out. */
export function attentionRow(l, k, t) {
  if (isForced(l, k)) return rowOfPairs(row('pattern', l, k), t);
  const dots = queryKeyDots(l, k, t);
  if (dots) return softmax(dots.map((dot, s) => (sees(t, s) ? dot / Math.sqrt(HS) : -Infinity)));
  return rowOfPairs(row('attention', l, k), t).map(root => (root / 255) ** 2);
}

/** Whether the pattern of a head was frozen or set by hand: queries and keys do not give it. */
const isForced = (l, k) => facts.forced?.includes(`${l}.${k}`);

/** The key vector of head l.k at s; groups of query heads share one. */
const keyAt = (l, k, s) => row('k', l, Math.floor((k * facts.n_kv_head) / H), s);

/** q·k of head l.k at t with all T keys, masked ones included; null if q was left out. */
export function queryKeyDots(l, k, t) {
  if (!arrays.q) return null;
  const q = row('q', l, k, t);
  const dots = new Float64Array(T);
  for (let s = 0; s < T; s++) {
    const key = keyAt(l, k, s);
    for (let d = 0; d < HS; d++) dots[s] += q[d] * key[d];
  }
  return dots;
}

// All heads ---------------------------------------------------------------------------------------

/** They stay: a new canvas takes longer than what is painted on it. */
const canvases = range(L * H, () => h('canvas', {'aria-hidden': 'true'}));

/** A button for each head: its attention pattern, name, score and a bar. */
function headThumb(l, k, side) {
  const canvas = canvases[l * H + k];
  if (canvas.width !== side) canvas.width = canvas.height = side; // clears it
  const name = h('span', {class: 'name'});
  const bar = h('i');
  const button = h(
    'button',
    {
      type: 'button',
      'data-head': headName(l, k),
      onclick: () => set({layer: l, head: k, source: -1})
    },
    arrays.attention && canvas,
    name,
    h('span', {class: 'meter'}, bar)
  );
  return {l, k, canvas, name, bar, button};
}

/** The pixels of what the mask hides, then of the 256 values in an attention pattern. */
function thumbColors() {
  const shown = range(256, root => [...sequential(root / 255), 255]);
  return new Uint32Array(Uint8ClampedArray.from([128, 128, 128, 22, ...shown.flat()]).buffer);
}

/** Paint an attention pattern; if it has more than one token per pixel, the maximum. */
function paintThumb({l, k, canvas}, side, colors) {
  const step = T / side;
  const pairs = row('attention', l, k);
  const largest = new Uint16Array(side * side); // indices in colors
  let i = 0;
  visibleKeys.forEach((keys, t) => {
    const start = Math.floor(t / step) * side;
    for (const s of keys) {
      const pixel = start + Math.floor(s / step);
      largest[pixel] = Math.max(largest[pixel], 1 + pairs[i++]);
    }
  });
  const image = new ImageData(side, side);
  new Uint32Array(image.data.buffer).set(Uint32Array.from(largest, x => colors[x]));
  canvas.getContext('2d').putImageData(image, 0, 0);
}

function updateThumb(thumb, value, max) {
  const {l, k, name, bar, button} = thumb;
  const share = Math.min(1, Math.abs(value || 0) / max);
  name.replaceChildren(h('span', {}, headName(l, k)), ' ', h('span', {}, fixed(value)));
  bar.style.width = 100 * share + '%';
  bar.className = value < 0 ? 'minus' : '';
  button.style.background = css(mix('panel', value < 0 ? 'warm' : 'accent', 0.22 * share));
  button.setAttribute('aria-pressed', l === state.layer && k === state.head);
  const label = `${headName(l, k)} ${fixed(value)}: head, ${SCORES[state.measure]}`;
  button.setAttribute('aria-label', label);
}

export function buildHeads() {
  const box = content('heads');
  const controls = h(
    'div',
    {class: 'controls'},
    h('span', {}, 'Score'),
    choice('measure', SCORES, 'Head score'),
    h('span', {}, 'Order'),
    choice('order', {layer: 'by layer', score: 'by score'}, 'Order of the heads'),
    offButton(() => 'mask'),
    freezeButton()
  );
  const note = h('p', {class: 'note'});
  const side = Math.min(T, 64);
  const thumbs = range(L * H, n => headThumb(Math.floor(n / H), n % H, side));
  const grid = h('div', {class: 'thumb-rows'});
  const list = figure(
    'heads',
    `${L} layer${L > 1 ? 's' : ''} × ${H} head${H > 1 ? 's' : ''}`,
    () => [
      ['layer', 'head', ...Object.values(SCORES)],
      thumbs.map(({l, k}) => {
        const scores = Object.keys(SCORES).map(name => score(name, l, k).toFixed(4));
        return [l, k, ...scores];
      })
    ],
    [controls, note],
    false
  );
  list.picture.append(grid);
  box.append(list);
  if (facts.model.prefix_lm) box.append(h('p', {class: 'note'}, RANDOM_TOKENS_NOTE));
  if (!arrays.attention) box.append(missing());
  watch(['theme'], () => {
    const colors = thumbColors();
    if (arrays.attention) thumbs.forEach(thumb => paintThumb(thumb, side, colors));
  });
  watch(['measure', 'order', 't', 'layer', 'head', 'theme'], () => {
    const byScore = state.order === 'score';
    const value = ({l, k}) => score(state.measure, l, k);
    const max = state.measure === 'logit' ? maxAbs(thumbs.map(value)) : 1;
    const sorted = byScore ? thumbs.toSorted((a, b) => value(b) - value(a)) : thumbs;
    const shown = [...grid.querySelectorAll('button')];
    const isReordered = sorted.some((thumb, i) => shown[i] !== thumb.button);
    if (isReordered || grid.dataset.order !== state.order) {
      grid.replaceChildren(...thumbRows(sorted, byScore ? L * H : H));
    }
    grid.dataset.order = state.order;
    for (const thumb of thumbs) updateThumb(thumb, value(thumb), max);
    note.textContent = SCORE_NOTES[state.measure];
    list.refresh();
  });
}

/** Rows of n thumbs: those of a layer, or all of them. */
function thumbRows(thumbs, n) {
  return range(thumbs.length / n, i => {
    const buttons = thumbs.slice(i * n, (i + 1) * n).map(thumb => thumb.button);
    return h('div', {class: 'thumbs', style: `--n:${n}`}, buttons);
  });
}

// One head ----------------------------------------------------------------------------------------

const FOLLOW = ['t', 'layer', 'head', 'source', 'theme'];
const axisName = t => tokenLabel(facts.ids[t], 8);
const textAt = t => tokenText(facts.ids[t]);
const placeOf = t => `${tokenQuoted(facts.ids[t])} (${t})`;
const thisHead = () => headName(state.layer, state.head);

/** The selected key; by default the one with the most attention. */
function sourceKey() {
  if (state.source >= 0) return state.source;
  return argmax(attentionRow(state.layer, state.head, state.t));
}

export function buildHead() {
  const box = content('head');
  const summary = h('p', {class: 'note'});
  const selects = [headSelect('layer', L, 'Layer'), headSelect('head', H, 'Head')];
  const off = offButton(() => `L${state.layer}.H${state.head}`, 'layer', 'head');
  box.append(h('div', {class: 'controls'}, selects, off, summary));
  watch(['layer', 'head', 't'], () => {
    const texts = Object.entries(SCORES).map(
      ([key, name]) => `${name} ${fixed(score(key, state.layer, state.head))}`
    );
    summary.textContent = texts.join(' · ');
  });
  if (arrays.attention) {
    const output = h('div', {class: 'stack'});
    box.append(h('div', {class: 'columns'}, attentionFigure(), output));
    if (arrays.promoted) output.append(promotedFigure());
    output.append(arrays.by_source ? bySourceFigure() : missing());
  } else box.append(missing());
  if (arrays.q) box.append(scoresFigure(), termsFigure());
  else box.append(missing());
  box.append(headSnippets());
}

function headSelect(key, n, label) {
  const options = range(n, i => h('option', {value: i}, `${label} ${i}`));
  const onchange = event => set({[key]: Number(event.target.value), source: -1});
  const select = h('select', {'aria-label': label, onchange}, options);
  watch([key], () => {
    select.value = state[key];
  });
  return select;
}

function attentionFigure() {
  const rowsOf = t => {
    const p = attentionRow(state.layer, state.head, t);
    return visibleKeys[t].map(s => [`${t} ${textAt(t)}`, `${s} ${textAt(s)}`, p[s].toFixed(5)]);
  };
  const chart = figure('attention', 'Attention pattern', () => [
    ['query', 'key', 'attention'],
    range(T, rowsOf).flat()
  ], hasModel && h('div', {class: 'controls'}, lookButton(sourceKey)));
  const describe = (t, s) => {
    if (!sees(t, s)) return `${placeOf(t)} cannot attend to ${placeOf(s)}: masked`;
    const p = attentionRow(state.layer, state.head, t)[s];
    return `${placeOf(t)} attends to ${placeOf(s)}\nattention ${p.toFixed(4)}`;
  };
  watch(FOLLOW, () => {
    const pairs = row('attention', state.layer, state.head);
    const roots = range(T, t => rowOfPairs(pairs, t));
    const selected = sourceKey();
    matrix(chart, {
      rows: T,
      columns: T,
      cellColor: (t, s) => (sees(t, s) ? sequential(roots[t][s] / 255) : null),
      rowName: axisName,
      columnName: axisName,
      monoRows: true,
      rowAxis: 'query',
      columnAxis: 'key',
      maxSize: 500,
      describe,
      onPick: (t, s) => set({t, source: sees(t, s) ? s : -1}),
      isSelected: (t, s) => t === state.t && s === selected,
      label: `Attention of head ${thisHead()}: rows are queries, columns are keys`
    });
    chart.heading.textContent = `Head ${thisHead()}: rows are queries, columns are keys`;
  });
  return chart;
}

/** [q·k, scaled, masked, softmax] for each key. */
function scoreSteps() {
  const p = attentionRow(state.layer, state.head, state.t);
  const dots = queryKeyDots(state.layer, state.head, state.t);
  return Array.from(dots, (dot, s) => {
    const scaled = dot / Math.sqrt(HS);
    return [dot, scaled, sees(state.t, s) ? scaled : -Infinity, p[s]];
  });
}

function largestTerms(s) {
  const q = row('q', state.layer, state.head, state.t);
  const k = keyAt(state.layer, state.head, s);
  const size = d => Math.abs(q[d] * k[d]);
  const order = range(HS, d => d).sort((a, b) => size(b) - size(a));
  const term = d => `${fixed(q[d])} × ${fixed(k[d])} = ${signed(q[d] * k[d])}   (dimension ${d})`;
  return [
    '',
    'largest terms:',
    ...order.slice(0, 5).map(term),
    `… and ${Math.max(0, HS - 5)} more; click to see all`
  ];
}

function scoresFigure() {
  const chart = figure('scores', 'Attention scores', () => [
    ['key', 'q·k', 'scaled', 'masked', 'softmax'],
    scoreSteps().map((values, s) => [`${s} ${textAt(s)}`, ...values.map(x => x.toFixed(4))])
  ]);
  const last = () => (isForced(state.layer, state.head) ? 'as set' : 'softmax');
  const stepNames = () => ['q·k', `÷ √${HS}`, 'mask', last()];
  watch(FOLLOW, () => {
    const steps = scoreSteps();
    const largest = maxAbs(steps.map(values => values[0]));
    const cellColor = (i, s) => {
      if (i >= 2 && !sees(state.t, s)) return null;
      if (i === 3) return sequential(Math.sqrt(steps[s][3]));
      return diverging(steps[s][i] / (i === 0 ? largest : largest / Math.sqrt(HS)));
    };
    const describe = (i, s) => {
      const [dot, scaled, , p] = steps[s];
      return [
        `query ${placeOf(state.t)}, key ${placeOf(s)}`,
        `q·k ${fixed(dot, 3)}`,
        `÷ √${HS}: ${fixed(scaled, 3)}`,
        sees(state.t, s) ? `${last()} ${p.toFixed(4)}` : `masked: ${whyHidden(state.t, s)}`,
        ...largestTerms(s)
      ].join('\n');
    };
    const selected = sourceKey();
    matrix(chart, {
      rows: 4,
      columns: T,
      cellHeight: 26,
      maxSize: 4000,
      rowName: i => stepNames()[i],
      columnAxis: 'key',
      columnName: axisName,
      cellColor,
      describe,
      onPick: (i, s) => set({source: s}),
      isSelected: (i, s) => s === selected,
      label: `Attention scores of position ${state.t} for every key, in four steps`
    });
    const query = placeOf(state.t);
    chart.heading.textContent = `Attention scores of query ${query}: from q·k to softmax`;
  });
  return chart;
}

function termsFigure() {
  const terms = () => {
    const q = row('q', state.layer, state.head, state.t);
    const k = keyAt(state.layer, state.head, sourceKey());
    return [q, k, q.map((x, d) => x * k[d])];
  };
  const chart = figure('terms', 'Dot product q·k, term by term', () => {
    const [q, k, product] = terms().map(vector => Array.from(vector, x => x.toFixed(4)));
    return [['dimension', 'q', 'k', 'q × k'], range(HS, d => [d, q[d], k[d], product[d]])];
  });
  watch(FOLLOW, () => {
    const vectors = terms();
    const [q, k, product] = vectors;
    const largest = vectors.map(vector => maxAbs(vector));
    const values = d => `${fixed(q[d], 3)} × ${fixed(k[d], 3)} = ${fixed(product[d], 3)}`;
    matrix(chart, {
      rows: 3,
      columns: HS,
      cellHeight: 26,
      maxSize: 4000,
      rowName: i => ['q', 'k', 'q × k'][i],
      columnAxis: `dimension, 0 to ${HS - 1}`,
      cellColor: (i, d) => diverging(vectors[i][d] / largest[i]),
      describe: (i, d) => `dimension ${d}\n${values(d)}`,
      label: 'Query and key, dimension by dimension'
    });
    const s = sourceKey();
    chart.heading.textContent = `q·k term by term: query ${placeOf(state.t)}, key ${placeOf(s)}`;
    chart.setReadout(termsSummary(s));
  });
  return chart;
}

function termsSummary(s) {
  const [dot, scaled, , p] = scoreSteps()[s];
  const n = visibleKeys[state.t].length;
  const from = isForced(state.layer, state.head)
    ? 'The pattern is set to'
    : `Softmax over ${n} key${n > 1 ? 's' : ''} gives`;
  const result = sees(state.t, s)
    ? `${from} ${p.toFixed(4)}.`
    : `Masked: ${whyHidden(state.t, s)}.`;
  const applied = [];
  if (facts.model.position === 'rope') applied.push('RoPE');
  if (facts.model.qk_norm) applied.push('QK-norm');
  const note = applied.length ? ` Queries and keys are shown after ${applied.join(' and ')}.` : '';
  return `Sum ${fixed(dot, 3)}, divided by √${HS}: ${fixed(scaled, 3)}. ${result}${note}`;
}

function promotedFigure() {
  const tokens = () => {
    const values = row('promoted_by', state.layer, state.head, state.t);
    const ids = row('promoted', state.layer, state.head, state.t);
    return Array.from(ids, (id, i) => ({id, value: values[i]}));
  };
  const chart = figure('promoted', 'Tokens raised and lowered', () => [
    ['token', 'logit'],
    tokens().map(({id, value}) => [tokenText(id), value.toFixed(4)])
  ]);
  watch(FOLLOW, () => {
    const all = tokens();
    const half = all.length / 2;
    const ordered = [...all.slice(0, half), ...all.slice(half).toReversed()];
    const rows = ordered.map(({id, value}) => ({label: tokenLabel(id), value}));
    bars(chart, rows, 'Tokens raised and lowered');
    const isOff = all.every(({value}) => value === 0);
    const what = isOff ? 'none, the head is off' : 'tokens raised and lowered';
    chart.heading.textContent = `Output at ${placeOf(state.t)}: ${what}`;
  });
  return chart;
}

function bySourceFigure() {
  const effects = () => {
    const values = rowOfPairs(row('by_source', state.layer, state.head), state.t);
    return visibleKeys[state.t].map(s => ({s, value: values[s]}));
  };
  const chart = figure('by-source', 'Contribution by source token', () => [
    ['source', 'logit'],
    effects().map(({s, value}) => [`${s} ${textAt(s)}`, value.toFixed(4)])
  ]);
  watch(FOLLOW, () => {
    const all = effects();
    const largest = all.toSorted((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 8);
    const rows = largest
      .sort((a, b) => a.s - b.s)
      .map(({s, value}) => ({
        label: `${axisName(s)} ${s}`,
        value,
        bold: s === state.source,
        tip: `${placeOf(s)}: ${signed(value, 4)}`,
        onClick: () => set({source: s})
      }));
    bars(chart, rows, 'Contribution by source token');
    const target = tokenQuoted(targetAt(state.t));
    const total = signed(sum(all.map(x => x.value)), 3);
    const shown = all.length > 8 ? `The 8 largest of ${all.length}. ` : '';
    const end = hasNext(state.t) ? '' : ` The text ends here: ${target} is the most likely token.`;
    chart.heading.textContent = `Contribution to the logit of ${target}, by source token`;
    chart.setReadout(`${shown}All source tokens sum to ${total}.${end}`);
  });
  return chart;
}
