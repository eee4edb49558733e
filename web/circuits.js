// Properties of the weights alone: induction, composition, QK and OV circuits; and bigrams.

import {bars, drawing, faint, lines, matrix, points, reachable, svgText} from './charts.js';
import {
  choice,
  color,
  content,
  diverging,
  figure,
  fixed,
  h,
  integer,
  maxAbs,
  percent,
  range,
  s,
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
  arrays,
  facts,
  headName,
  missing,
  openHead,
  row,
  tokenLabel,
  tokenQuoted,
  tokenText
} from './model.js';
import {RANDOM_TOKENS_NOTE, score} from './heads.js';

const {position: positionKind, qk_norm: hasQkNorm} = facts.model;

export function buildCircuits() {
  const box = content('circuits');
  const note = text => h('p', {class: 'note'}, text);
  if (facts.n_kv_head !== H) {
    const group = H / facts.n_kv_head;
    box.append(note(`Grouped-query attention: ${group} query heads per key/value head.`));
  }
  box.append(repeatsFigure());
  if (facts.model.prefix_lm) box.append(note(RANDOM_TOKENS_NOTE));
  if (L === 1) box.append(note('Composition needs at least two layers.'));
  else if (!arrays.compositions) box.append(missing());
  else buildComposition(box);

  const heading = h('h3', {});
  const n = facts.circuit_ids.length;
  const tokens = n < facts.distinct.length ? `the first ${n} tokens` : 'the tokens';
  watch(['layer', 'head'], () => {
    const name = headName(state.layer, state.head);
    heading.textContent = `Head ${name} (selected above): circuits among ${tokens} of the text`;
  });
  box.append(
    h('div', {class: 'controls'}, heading),
    h('div', {class: 'columns'}, qkFigure(), ovFigure(), eigenvaluesFigure())
  );
}

// Induction ---------------------------------------------------------------------------------------

function repeatsFigure() {
  const losses = Array.from(row('repeat_losses')); // of tokens 1 to 2 length - 1
  if (!losses.length) {
    return h('p', {class: 'note'}, 'The context is too short for the repeated-token test.');
  }
  const length = (losses.length + 1) / 2;
  const mean = values => sum(values) / Math.max(1, values.length);
  const first = mean(losses.slice(0, length - 1));
  const second = mean(losses.slice(length));
  const title = `Loss on ${length} random tokens followed by the same ${length} again`;
  const chart = figure('repeats', title, () => [
    ['position', 'loss'],
    losses.map((loss, i) => [i + 1, loss.toFixed(4)])
  ]);
  const curve = losses.map((loss, i) => [i + 1, loss]);
  watch(['theme'], () =>
    lines(chart, [{points: curve, tone: 'accent', name: 'loss'}], title, {
      zero: true,
      xName: 'position',
      yName: 'nats',
      marks: [{x: length, label: 'repeat starts'}]
    })
  );
  chart.setReadout(
    `Mean loss ${fixed(first)} in the first half, ${fixed(second)} in the second: ` +
      inductionVerdict(first, second)
  );
  return chart;
}

function inductionVerdict(first, second) {
  if (second < first - 1) return 'the model does induction. Look for induction heads.';
  if (second < first - 0.1) return 'induction is beginning to form.';
  return 'no induction yet.';
}

// Composition -------------------------------------------------------------------------------------
// Heads are numbered through: n = layer * H + head.

const COMPOSITIONS = ['q', 'k', 'v']; // the first axis of `compositions`
const RANDOM_SCORE = 1 / Math.sqrt(facts.model.n_embd); // of random matrices
const EXCESS = 'K-composition above random';
const layerOf = n => Math.floor(n / H);
const nameOf = n => headName(layerOf(n), n % H);
const scoreOf = (name, n) => score(name, layerOf(n), n % H);
const composition = (kind, reader, writer) =>
  row('compositions', COMPOSITIONS.indexOf(kind), reader)[writer];

/** All pairs of heads in different layers and their scores above random, the strongest first. */
function compositionEdges(kind) {
  const edges = [];
  for (let reader = H; reader < L * H; reader++) {
    for (let writer = 0; writer < layerOf(reader) * H; writer++) {
      const value = composition(kind, reader, writer) - RANDOM_SCORE;
      edges.push({writer, reader, value});
    }
  }
  return edges.sort((a, b) => b.value - a.value);
}

/** Composition, and next to it the induction circuits, if there are any. */
function buildComposition(box) {
  const pairs = inductionPairs();
  if (pairs.length) {
    const figures = [compositionFigure(), pairsFigure(pairs)];
    box.append(h('div', {class: 'columns wide-left'}, figures));
    return;
  }
  const text =
    'No candidate induction circuit: no previous-token head (score above 0.3) comes before an ' +
    'induction head (score above 0.3). Small models form them late in training, or never.';
  box.append(compositionFigure(), h('p', {class: 'note', id: 'no-pairs'}, text));
}

function compositionFigure() {
  const cache = {};
  const edges = () => {
    cache[state.kind] ||= compositionEdges(state.kind);
    return cache[state.kind];
  };
  const output = h('output');
  const slider = h('input', {
    type: 'range',
    class: 'short',
    min: 0,
    max: 1,
    step: 0.005,
    'aria-label': 'Threshold',
    oninput: event => set({threshold: Number(event.target.value)})
  });
  const chart = figure(
    'composition',
    'Composition',
    () => [
      ['writer', 'reader', 'score above random'],
      edges().map(edge => [nameOf(edge.writer), nameOf(edge.reader), edge.value.toFixed(5)])
    ],
    h(
      'div',
      {class: 'controls'},
      choice('kind', {k: 'K (keys)', q: 'Q (queries)', v: 'V (values)'}, 'Kind of composition'),
      h('span', {}, 'Threshold'),
      slider,
      output
    )
  );
  watch(['kind', 'threshold', 'layer', 'head', 'theme'], () => {
    const all = edges();
    const [strongest] = all;
    const largest = Math.max(1e-9, strongest.value);
    const threshold = state.threshold * largest;
    const maxEdges = state.threshold ? 400 : 40;
    const shown = all.slice(0, maxEdges).filter(edge => edge.value >= Math.max(1e-6, threshold));
    slider.value = state.threshold;
    output.textContent = state.threshold ? fixed(threshold, 3) : `top ${shown.length}`;
    drawComposition(chart, shown, largest);
    chart.heading.textContent = `${state.kind.toUpperCase()}-composition between heads`;
    chart.setReadout(describeComposition(strongest));
  });
  return chart;
}

function drawComposition(chart, edges, largest) {
  const width = chart.width();
  const left = 40;
  const columnGap = (width - left - 26) / Math.max(1, L - 1);
  const rowGap = Math.max(15, Math.min(34, 360 / H));
  const x = n => left + layerOf(n) * columnGap;
  const y = n => 34 + (n % H) * rowGap;
  const selected = state.layer * H + state.head;
  const drawEdge = ({writer, reader, value}) => {
    const bend = columnGap * 0.5;
    const from = `${x(writer)},${y(writer)}`;
    const to = `${x(reader)},${y(reader)}`;
    const curve = `${x(writer) + bend},${y(writer)} ${x(reader) - bend},${y(reader)}`;
    return s(
      'path',
      {
        d: `M${from} C${curve} ${to}`,
        fill: 'none',
        stroke: color('accent'),
        'stroke-width': 0.6 + (3 * value) / largest,
        'stroke-opacity': 0.2 + (0.7 * value) / largest
      }
    );
  };
  const drawHead = n =>
    s(
      'circle',
      {
        cx: x(n),
        cy: y(n),
        r: n === selected ? 6 : 4,
        fill: color(n === selected ? 'ink' : 'panel'),
        stroke: color(n === selected ? 'ink' : 'muted'),
        'stroke-width': 1.5
      }
    );
  const curves = edges.map(drawEdge);
  const dots = range(L * H, drawHead);
  const svg = drawing(
    chart,
    width,
    30 + rowGap * H,
    'Heads as dots, one column per layer; lines connect each writer to its reader',
    range(L, l => svgText(left + l * columnGap, 10, 'L' + l, faint('middle'))),
    range(H, k => svgText(2, 34 + k * rowGap, 'H' + k, faint('start'))),
    curves.toReversed(), // the strongest on top
    dots
  );
  reachable(chart, svg, [
    ...dots.map((element, n) => ({
      element,
      tip: `head ${nameOf(n)}`,
      onClick: () => set({layer: layerOf(n), head: n % H, source: -1})
    })),
    ...curves.map((element, i) => ({element, tip: describeEdge(edges[i])}))
  ]);
}

const describeEdge = ({writer, reader, value}) =>
  `${nameOf(reader)} reads ${nameOf(writer)}: ${fixed(value, 4)} above random`;

function describeComposition({reader, writer, value}) {
  const ignored = [];
  if (positionKind === 'rope') ignored.push('RoPE');
  if (hasQkNorm) ignored.push('QK-norm');
  const total = fixed(value + RANDOM_SCORE, 3);
  const random = `1/√${facts.model.n_embd} = ${fixed(RANDOM_SCORE, 3)}`;
  const note = ignored.length ? ` Ignores ${ignored.join(' and ')}.` : '';
  return (
    `Strongest: ${nameOf(reader)} reads ${nameOf(writer)}, score ${total}. ` +
    `Random matrices score ${random}; lines show the excess.${note}`
  );
}

/** A previous-token head and a later induction head, the strongest pairs first. */
function inductionPairs() {
  const heads = range(L * H, n => n);
  const writers = heads.filter(n => scoreOf('previous', n) > 0.3);
  const readers = heads.filter(n => scoreOf('induction', n) > 0.3);
  const pair = (writer, reader) => ({
    writer,
    reader,
    previous: scoreOf('previous', writer),
    induction: scoreOf('induction', reader),
    excess: composition('k', reader, writer) - RANDOM_SCORE
  });
  const pairsOf = reader =>
    writers.filter(writer => layerOf(writer) < layerOf(reader)).map(writer => pair(writer, reader));
  return readers
    .flatMap(pairsOf)
    .sort((a, b) => b.previous * b.induction - a.previous * a.induction || b.excess - a.excess);
}

function pairsFigure(pairs) {
  const chart = figure(
    'pairs',
    'Candidate induction circuits',
    () => [
      ['previous-token head', 'induction head', 'previous', 'induction', EXCESS],
      pairs.map(pair => [
        nameOf(pair.writer),
        nameOf(pair.reader),
        pair.previous.toFixed(4),
        pair.induction.toFixed(4),
        pair.excess.toFixed(4)
      ])
    ],
    null,
    false
  );
  const headButton = (n, value) => {
    const onclick = () => openHead(layerOf(n), n % H);
    return h('button', {type: 'button', onclick}, `${nameOf(n)} (${fixed(value)})`);
  };
  const rows = pairs
    .slice(0, 8)
    .map(({writer, reader, previous, induction, excess}) => [
      headButton(writer, previous),
      headButton(reader, induction),
      signed(excess, 3)
    ]);
  const headings = ['previous token', 'induction', EXCESS];
  const attributes = {class: 'rows', 'aria-label': 'Candidate induction circuits'};
  chart.picture.append(tableOf(headings, rows, attributes));
  return chart;
}

// QK and OV circuits ------------------------------------------------------------------------------

/** An N x N circuit of the selected head among the tokens circuit_ids. */
function circuitFigure(name, title, axes, describe) {
  const ids = facts.circuit_ids;
  const n = ids.length;
  const label = i => tokenLabel(ids[i], 8);
  const values = () => row(name, state.layer, state.head);
  const chart = figure(name, title, () => [
    [...axes, 'value'],
    Array.from(values(), (value, i) => [
      tokenText(ids[Math.floor(i / n)]),
      tokenText(ids[i % n]),
      value.toFixed(4)
    ])
  ]);
  watch(['layer', 'head', 'theme'], () => {
    const data = values();
    const largest = maxAbs(data);
    matrix(chart, {
      rows: n,
      columns: n,
      maxSize: 330,
      cellColor: (i, j) => diverging(data[i * n + j] / largest),
      rowName: label,
      columnName: label,
      monoRows: true,
      rowAxis: axes[0],
      columnAxis: axes[1],
      describe: (i, j) =>
        describe(tokenQuoted(ids[i]), tokenQuoted(ids[j]), fixed(data[i * n + j], 3)),
      label: title
    });
  });
  return chart;
}

function qkFigure() {
  const chart = circuitFigure(
    'qk',
    'QK circuit',
    ['query', 'key'],
    (query, key, value) => `query ${query}, key ${key}: score ${value}`
  );
  watch(['layer'], () => {
    const also = state.layer ? ' What earlier layers add is left out.' : '';
    chart.setReadout(
      'How strongly the token of a row (query) attends to the token of a column (key): the ' +
        `attention score of their embeddings, without positions.${also}`
    );
  });
  return chart;
}

function ovFigure() {
  const chart = circuitFigure(
    'ov',
    'OV circuit',
    ['source', 'output'],
    (source, output, value) => `attending to ${source} changes the logit of ${output} by ${value}`
  );
  chart.setReadout(
    'If the head attends to the token of a row (source), the logit of the token of a column ' +
      '(output) changes by this much more than that of the average token.'
  );
  return chart;
}

function eigenvaluesFigure() {
  const eigenvalues = () => {
    const data = row('eigenvalues', state.layer, state.head);
    return range(data.length / 2, i => ({x: data[2 * i], y: data[2 * i + 1]}));
  };
  const chart = figure('eigenvalues', 'OV eigenvalues', () => [
    ['real', 'imaginary'],
    eigenvalues().map(({x, y}) => [x.toFixed(4), y.toFixed(4)])
  ]);
  const complex = ({x, y}) => `${fixed(x, 3)} ${y < 0 ? '−' : '+'} ${fixed(Math.abs(y), 3)}i`;
  const dot = value => ({
    ...value,
    label: complex(value),
    tone: value.x < 0 ? 'warm' : 'accent'
  });
  watch(['layer', 'head', 'theme'], () => {
    const label = 'OV eigenvalues in the complex plane';
    points(chart, eigenvalues().map(dot), label, 'real', 'imaginary');
    const copying = fixed(score('copying', state.layer, state.head), 3);
    chart.setReadout(
      'Positive real part (right): raises the tokens it attends to. Negative: lowers them. ' +
        `Copying score, sum / sum of magnitudes: ${copying}.`
    );
  });
  return chart;
}

// Bigrams -----------------------------------------------------------------------------------------

const PATHS = {whole: 'full model', direct: 'direct path'};

export function buildBigrams() {
  const box = content('bigrams');
  const names = Object.keys(PATHS);
  box.append(h('div', {class: 'columns'}, names.map(nextTokensFigure)));
  if (arrays.bigrams_whole) {
    box.append(h('div', {class: 'columns'}, names.map(bigramTableFigure)));
    return;
  }
  const size = integer(facts.vocab_size);
  const text = `The full table needs a vocabulary of at most 512 tokens; this one has ${size}.`;
  box.append(h('p', {class: 'note'}, text));
}

function nextTokensFigure(name) {
  const top = () => {
    const i = facts.distinct.indexOf(facts.ids[state.t]);
    const probabilities = row(`bigram_${name}_p`, i);
    return Array.from(row(`bigram_${name}_ids`, i), (id, j) => ({id, p: probabilities[j]}));
  };
  const chart = figure('bigram-' + name, PATHS[name], () => [
    ['token', 'probability'],
    top().map(({id, p}) => [tokenText(id), p.toFixed(5)])
  ]);
  watch(['t', 'theme'], () => {
    const title = `After ${tokenQuoted(facts.ids[state.t])} alone: ${PATHS[name]}`;
    const rows = top().map(({id, p}) => ({label: tokenLabel(id), value: p, text: percent(p)}));
    bars(chart, rows, title, {low: 0});
    chart.heading.textContent = title;
  });
  chart.setReadout('The longest bar is the most likely token.');
  return chart;
}

function bigramTableFigure(name) {
  const V = facts.vocab_size;
  const data = row('bigrams_' + name);
  const root = (i, j) => data[i * V + j] / 255;
  const title = `All bigrams, ${PATHS[name]}: token (row), next token (column)`;
  const chart = figure('bigrams-' + name, title, () => {
    const rowsOf = i => range(V, j => [tokenText(i), tokenText(j), (root(i, j) ** 2).toFixed(4)]);
    return [['token', 'next', 'probability'], range(V, rowsOf).flat()];
  });
  watch(['theme'], () =>
    matrix(chart, {
      rows: V,
      columns: V,
      cellColor: (i, j) => sequential(root(i, j)),
      describe: (i, j) => `${tokenQuoted(i)} → ${tokenQuoted(j)}: ${percent(root(i, j) ** 2)}`,
      label: title,
      maxSize: Math.max(470, V * 1.2),
      rowAxis: 'token',
      columnAxis: 'next token',
      rowName: V <= 48 ? tokenText : undefined,
      monoRows: true
    })
  );
  return chart;
}
