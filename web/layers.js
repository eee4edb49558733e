// MLP neurons, the logit lens, and direct logit attribution.

import {bars, drawing, faint, reachable, svgText} from './charts.js';
import {
  choice,
  clamp,
  color,
  content,
  css,
  figure,
  fixed,
  h,
  hideTip,
  integer,
  percent,
  range,
  s,
  sequential,
  set,
  showTip,
  signed,
  state,
  sum,
  tableOf,
  textOn,
  watch
} from './core.js';
import {neuronButton, offButton} from './switches.js';
import {
  L,
  T,
  arrays,
  facts,
  hasNext,
  headName,
  isOriginal,
  missing,
  openHead,
  openMlp,
  row,
  targetAt,
  tokenChip,
  tokenLabel,
  tokenQuoted,
  tokenText
} from './model.js';
import {neuronSnippets} from './snippets.js';

// MLP ---------------------------------------------------------------------------------------------

const preName = facts.gated ? 'gate' : 'pre';

/** The tokens that the i-th strongest neuron of a layer and position raises, then those it lowers.
 * As explain.py stores them, rows are grouped by layer. */
export function tokensOfNeuron(layer, t, i) {
  if (arrays.neuron_tokens.rows) return row('neuron_tokens', layer, t, i);
  const id = row('neurons', layer, t)[i];
  const start = sum(facts.neuron_ids.slice(0, layer).map(ids => ids.length));
  return row('neuron_tokens', start + facts.neuron_ids[layer].indexOf(id));
}

/** The strongest neurons of the selected layer and position. */
function strongestNeurons() {
  const {layer, t} = state;
  return Array.from(row('neurons', layer, t), (id, i) => {
    const tokens = Array.from(tokensOfNeuron(layer, t, i));
    const half = tokens.length / 2;
    return {
      id,
      pre: row('neuron_pre', layer, t)[i],
      post: row('neuron_post', layer, t)[i],
      activated: row(facts.gated ? 'neuron_gates' : 'neuron_post', layer, t)[i],
      raised: tokens.slice(0, half),
      lowered: tokens.slice(half)
    };
  });
}

export function buildMlp() {
  const box = content('mlp');
  if (!arrays.neurons) return box.append(missing());
  const layers = Object.fromEntries(range(L, l => [l, `layer ${l}`]));
  const list = figure(
    'neurons',
    'Strongest neurons',
    () => [
      ['neuron', preName, 'post', 'raises', 'lowers'],
      strongestNeurons().map(n => [
        n.id,
        n.pre.toFixed(4),
        n.post.toFixed(4),
        n.raised.map(tokenText).join(' '),
        n.lowered.map(tokenText).join(' ')
      ])
    ],
    h(
      'div',
      {class: 'controls'},
      choice('layer', layers, 'Layer'),
      offButton(() => `mlp${state.layer}`, 'layer')
    ),
    false
  );
  const plot = figure('activation', 'Activation function', () => [
    ['neuron', preName, 'post'],
    strongestNeurons().map(n => [n.id, n.pre.toFixed(4), n.post.toFixed(4)])
  ]);
  const gates = facts.gated ? ' at value 1' : '';
  plot.heading.textContent = `${facts.model.activation}${gates}, with these neurons`;
  box.append(h('div', {class: 'columns wide-left'}, list, plot), neuronSnippets());
  watch(['t', 'layer', 'theme'], () => {
    const neurons = strongestNeurons();
    drawNeuronList(list, neurons);
    drawActivation(plot, neurons);
  });
}

function drawNeuronList(list, neurons) {
  const total = integer(facts.neurons_in_a_layer);
  list.heading.textContent =
    `Layer ${state.layer}: the ${neurons.length} of ${total} neurons with the largest output ` +
    `at ${tokenQuoted(facts.ids[state.t])}`;
  const chips = ids => h('div', {class: 'list'}, ids.map(tokenChip));
  const headings = ['neuron', preName, 'post', 'raises', 'lowers'];
  const rows = neurons.map(n => [
    neuronCell(n.id),
    fixed(n.pre),
    fixed(n.post),
    chips(n.raised),
    chips(n.lowered)
  ]);
  const attributes = {class: 'rows neurons', 'aria-label': 'Strongest neurons'};
  list.picture.replaceChildren(tableOf(headings, rows, attributes));
  list.setReadout('If post is negative, raises and lowers are swapped.');
  list.readout.hidden = !neurons.some(n => n.post < 0);
  list.refresh();
}

/** The number of a neuron; in a page with the model, a button that switches it off. */
function neuronCell(id) {
  const button = neuronButton(state.layer, id);
  return button ? h('div', {class: 'list'}, String(id), button) : String(id);
}

function drawActivation(plot, neurons) {
  const width = plot.width();
  const height = 220;
  const [left, right, top, bottom] = [34, width - 10, 18, height - 28];
  const pre = neurons.map(n => n.pre);
  const xMin = 1.05 * Math.min(-3, ...pre);
  const xMax = 1.05 * Math.max(3, ...pre);
  const activations = row('curve', state.layer, 1);
  const curve = Array.from(row('curve', state.layer, 0), (v, i) => [v, activations[i]]).filter(
    ([v, y]) => v >= xMin && v <= xMax && Number.isFinite(y)
  );
  const ys = [...curve.map(point => point[1]), ...neurons.map(n => n.activated)];
  const yMin = Math.min(-0.3, ...ys);
  const yMax = Math.max(...ys);
  const x = v => left + ((v - xMin) / (xMax - xMin)) * (right - left);
  const y = v => bottom - ((v - yMin) / (yMax - yMin)) * (bottom - top);
  const dot = n =>
    s('circle', {
      cx: x(n.pre),
      cy: y(n.activated),
      r: 4.5,
      fill: color('accent'),
      'fill-opacity': 0.75
    });
  const dots = neurons.map(dot);
  const svg = drawing(
    plot,
    width,
    height,
    'The activation function, with the strongest neurons as dots',
    s('line', {x1: left, x2: right, y1: y(0), y2: y(0), stroke: color('line')}),
    s('line', {x1: x(0), x2: x(0), y1: top, y2: bottom, stroke: color('line')}),
    svgText(right, height - 12, facts.gated ? 'gate' : 'pre-activation', faint('end')),
    svgText(left + 4, 6, 'activation', faint('start')),
    svgText(left - 4, y(yMax), fixed(yMax, 1), faint('end')),
    svgText(left - 4, y(0), '0', faint('end')),
    svgText(x(0), height - 20, '0', faint('middle')),
    s('polyline', {
      points: curve.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' '),
      fill: 'none',
      stroke: color('muted'),
      'stroke-width': 1.5
    }),
    dots
  );
  const tip = n => `neuron ${n.id}: ${fixed(n.pre)} → ${fixed(n.activated)}`;
  const items = dots.map((element, i) => ({element, tip: tip(neurons[i])}));
  reachable(plot, svg, items);
}

// Logit lens --------------------------------------------------------------------------------------

/** The name of a depth: 0 is the embedding, l + 1 the stream after layer l. */
export function depthName(depth) {
  if (depth === 0) return 'embedding';
  return depth === L ? 'final' : 'layer ' + (depth - 1);
}

/** Top tokens at a depth and position: [{id, p}], most likely first. */
function lensTop(depth, t) {
  const probabilities = row('lens', depth, t);
  return Array.from(row('lens_ids', depth, t), (id, i) => ({id, p: probabilities[i]}));
}

export function buildLens() {
  content('lens').append(
    h('div', {class: 'columns wide-left'}, lensFigure(), lensTopFigure()),
    lensCourseFigure()
  );
}

function lensFigure() {
  const lensRow = (depth, t) => {
    const [{id, p}] = lensTop(depth, t);
    return [depthName(depth), t, tokenText(facts.ids[t]), tokenText(id), p.toFixed(5)];
  };
  const chart = figure(
    'logit-lens',
    'Most likely next token after each layer',
    () => [
      ['after', 'position', 'token', 'prediction', 'probability'],
      range(L + 1, depth => range(T, t => lensRow(depth, t))).flat()
    ],
    null,
    false
  );
  const select = (depth, t) => set({lens: depth, t, source: -1});
  const lensCell = (depth, t) => {
    const [{id}] = lensTop(depth, t);
    const isCorrect = hasNext(t) && id === facts.ids[t + 1];
    const style = isCorrect ? 'font-weight:700' : '';
    const onclick = () => select(depth, t);
    return h('td', {class: 'mono', style, onclick}, tokenLabel(id, 8));
  };
  const cells = range(L + 1, depth => range(T, t => lensCell(depth, t))); // [depth][t]
  const tokenHeading = id =>
    h('th', {scope: 'col', class: 'mono token-heading'}, tokenLabel(id, 8));
  const depthRow = depth => h('tr', {}, h('th', {scope: 'row'}, depthName(depth)), cells[depth]);
  const scroller = h(
    'div',
    {
      class: 'lens',
      tabindex: 0,
      role: 'region',
      'aria-label': 'Logit lens: select a layer and a position with the arrow keys'
    },
    h(
      'table',
      {},
      h('thead', {}, h('tr', {}, h('th', {scope: 'col'}, 'after'), facts.ids.map(tokenHeading))),
      h('tbody', {}, range(L + 1, depthRow).toReversed())
    )
  );
  chart.picture.append(scroller);
  chart.setReadout('Bold: the token that comes next in the text.');

  scroller.addEventListener('pointermove', event => {
    const cell = event.target.closest('td');
    const depth = cell ? cells.findIndex(line => line.includes(cell)) : -1;
    if (depth < 0) return hideTip();
    const t = cells[depth].indexOf(cell);
    const lines = lensTop(depth, t).map(({id, p}) => `${tokenText(id)}  ${percent(p)}`);
    const heading = `${depthName(depth)}, at ${tokenQuoted(facts.ids[t])} (${t})`;
    showTip(event, [heading, ...lines].join('\n'));
  });
  scroller.addEventListener('pointerleave', hideTip);
  const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]};
  scroller.addEventListener('keydown', event => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    select(clamp(state.lens + move[0], 0, L), clamp(state.t + move[1], 0, T - 1));
  });
  watch(['theme'], () => {
    cells.forEach((line, depth) =>
      line.forEach((cell, t) => {
        const rgb = sequential(lensTop(depth, t)[0].p);
        cell.style.background = css(rgb);
        cell.style.color = textOn(rgb);
      })
    );
  });
  let selected = null;
  watch(['t', 'lens', 'theme'], () => {
    const cell = cells[state.lens][state.t];
    selected?.classList.remove('chosen');
    cell.classList.add('chosen');
    // at first: the beginning; of a text that was typed, its end
    const isMoved = selected ? cell !== selected : !isOriginal();
    if (isMoved) requestAnimationFrame(() => scrollLensTo(scroller, cell));
    selected = cell;
    chart.refresh();
  });
  return chart;
}

function scrollLensTo(scroller, cell) {
  const maxScroll = cell.offsetLeft - 90; // the row names cover 90 pixels
  const minScroll = cell.offsetLeft + cell.offsetWidth + 20 - scroller.clientWidth;
  if (scroller.scrollLeft > maxScroll || scroller.scrollLeft < minScroll) {
    scroller.scrollLeft = Math.max(0, maxScroll - scroller.clientWidth / 2);
  }
}

function lensTopFigure() {
  const chart = figure('lens-top', 'Top 10', () => [
    ['token', 'probability'],
    lensTop(state.lens, state.t).map(({id, p}) => [tokenText(id), p.toFixed(5)])
  ]);
  watch(['t', 'lens', 'theme'], () => {
    const rows = lensTop(state.lens, state.t).map(({id, p}) => ({
      label: tokenLabel(id),
      value: p,
      text: percent(p),
      bold: hasNext(state.t) && id === facts.ids[state.t + 1]
    }));
    bars(chart, rows, 'Most likely next tokens', {low: 0});
    const depth = state.lens === L ? 'the last layer' : depthName(state.lens);
    chart.heading.textContent = `After ${depth}, at ${tokenQuoted(facts.ids[state.t])}`;
  });
  return chart;
}

function lensCourseFigure() {
  const course = () =>
    range(L + 1, depth => {
      const found = lensTop(depth, state.t).find(({id}) => id === targetAt(state.t));
      return {name: depthName(depth), p: found ? found.p : 0};
    });
  const outside = 'not in the top 10';
  const chart = figure('lens-course', 'Probability of the next token by layer', () => [
    ['after', 'probability'],
    course().map(({name, p}) => [name, p ? p.toFixed(5) : outside])
  ]);
  watch(['t', 'theme'], () => {
    const rows = course().map(({name, p}) => ({
      label: name,
      value: p,
      text: p ? percent(p) : outside,
      plain: true
    }));
    const options = {low: 0, numberWidth: 110};
    bars(chart, rows, 'Probability of the next token after each layer', options);
    chart.heading.textContent = `Probability of ${tokenQuoted(targetAt(state.t))} by layer`;
  });
  return chart;
}

// Direct logit attribution ------------------------------------------------------------------------

const MAX_PARTS = 26;

function partName([kind, layer, head]) {
  if (kind === 'head') return `head ${headName(layer, head)}`;
  if (kind === 'mlp') return `MLP ${layer}`;
  return kind === 'bias' ? 'biases' : kind;
}

/** What a click on a part opens, if anything. */
function partAction([kind, layer, head]) {
  if (kind === 'head') return () => openHead(layer, head);
  if (kind === 'mlp') return () => openMlp(layer);
  return undefined;
}

/** The token compared with: its index in part_tokens, or 0 for none. */
function rivalIndex() {
  return Math.max(0, row('part_tokens', state.t).indexOf(state.versus));
}

/** Contribution of each part to the logit, or to the logit difference. */
function contributions() {
  const rival = rivalIndex();
  return facts.parts.map((part, i) => {
    const logits = row('parts', i, state.t);
    const value = rival ? logits[0] - logits[rival] : logits[0];
    return {part, name: partName(part), value};
  });
}

export function buildWhy() {
  const onchange = event => set({versus: Number(event.target.value)});
  const select = h('select', {id: 'versus', onchange});
  const chart = figure(
    'why',
    'Contributions to the logit',
    () => {
      const all = contributions();
      const total = sum(all.map(x => x.value));
      const rows = all.map(x => [x.name, x.value.toFixed(5)]);
      return [
        ['part', 'contribution'],
        [...rows, ['sum', total.toFixed(5)]]
      ];
    },
    h(
      'div',
      {class: 'controls'},
      h('label', {for: 'versus'}, 'Compare with'),
      select,
      h('span', {}, 'Order'),
      choice('sort', {layer: 'by layer', size: 'by size'}, 'Order of the contributions')
    )
  );
  content('why').append(chart);
  watch(['t', 'versus', 'sort', 'theme'], () => {
    const tokens = Array.from(row('part_tokens', state.t));
    const logits = row('part_logits', state.t);
    const option = (id, i) =>
      h('option', {value: id}, `${tokenText(id)}   (logit ${fixed(logits[i + 1])})`);
    select.replaceChildren(
      h('option', {value: -1}, 'no other token'),
      ...tokens.slice(1).map(option)
    );
    select.value = rivalIndex() ? state.versus : -1;
    drawWaterfall(chart);
    describeWaterfall(chart, tokens, logits);
  });
}

function drawWaterfall(chart) {
  const all = contributions();
  const bySize = all.toSorted((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const top = bySize.slice(0, MAX_PARTS);
  const others = bySize.slice(MAX_PARTS);
  const ordered = state.sort === 'size' ? top : all.filter(x => top.includes(x));
  const rows = [];
  let total = 0;
  for (const {part, name, value} of ordered) {
    const from = total;
    total += value;
    rows.push({
      label: name,
      value,
      from,
      plain: true,
      tip: `${name}: ${signed(value, 4)}\nrunning sum: ${fixed(total, 4)}`,
      onClick: partAction(part)
    });
  }
  if (others.length) {
    const value = sum(others.map(x => x.value));
    const name = `${others.length} others`;
    rows.push({label: name, value, from: total, plain: true, tip: `${name}: ${signed(value, 4)}`});
    total += value;
  }
  rows.push({
    label: rivalIndex() ? 'difference' : 'logit',
    value: total,
    text: fixed(total, 3),
    total: true,
    bold: true,
    plain: true
  });
  bars(chart, rows, 'Waterfall chart of the contributions to the logit', {step: 19});
}

function describeWaterfall(chart, tokens, logits) {
  const rival = rivalIndex();
  const target = tokenQuoted(tokens[0]);
  const here = tokenQuoted(facts.ids[state.t]);
  const total = sum(contributions().map(x => x.value));
  const logit = rival ? logits[0] - logits[rival] : logits[0];
  const quantity = rival ? 'logit difference' : 'logit';
  const question = rival
    ? `Why ${target} rather than ${tokenQuoted(tokens[rival])} after ${here}?`
    : `Why ${target} after ${here}?`;
  const notes = [
    `The contributions sum to ${fixed(total, 5)}; ` +
      `the ${quantity} of the model is ${fixed(logit, 5)}.`
  ];
  if (arrays.logits_before) {
    const before = row('logits_before', state.t);
    const value = before[tokens[0]] - (rival ? before[tokens[rival]] : 0);
    notes.push(`Before the changes it was ${fixed(value, 5)}.`);
  }
  if (facts.model.bias) notes.push('Biases: of all output projections and the norms after them.');
  if (facts.model.logit_softcap) notes.push('Softcap: capped minus uncapped logit.');
  if (!hasNext(state.t)) notes.push(`The text ends here: ${target} is the most likely token.`);
  chart.heading.textContent = `${question} Contributions to the ${quantity}`;
  chart.setReadout(notes.join(' '));
}
