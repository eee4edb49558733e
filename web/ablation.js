// What each head and each MLP is worth: the model run without it, by explain.py or the Worker.

import {matrix} from './charts.js';
import {
  DEFAULTS,
  choice,
  content,
  diverging,
  figure,
  fixed,
  h,
  maxAbs,
  range,
  set,
  state,
  sum,
  visiblePanels,
  watch
} from './core.js';
import {inBackground, wake} from './live.js';
import {ask, hasModel} from './live-model.js';
import {
  H,
  L,
  T,
  addToText,
  arrays,
  facts,
  hasNext,
  headName,
  isOriginal,
  measured,
  row,
  targetAt,
  tokenQuoted
} from './model.js';

const ABLATIONS = ['zero', 'mean']; // the first axis of the arrays
Object.assign(DEFAULTS, {ablation: 'zero', effect: 'loss'});

/** A part by its column: head k, or the MLP in the last one. */
const columnOf = k => (k === H ? 'MLP' : `H${k}`);
const partAt = (l, k) => (k === H ? `the MLP of L${l}` : headName(l, k));

/** Effect of an ablation of part k of layer l: on this token's loss or logit, or on the mean. */
function ablationEffect(kind, effect, l, k) {
  const name = effect === 'logit' ? 'ablation_logit' : 'ablation_loss';
  const changes = row(name, ABLATIONS.indexOf(kind), l, k);
  if (effect !== 'mean') return changes[state.t];
  const places = measured();
  return sum(places.map(t => changes[t])) / places.length;
}

// Ablations of a typed text: the Worker computes them one by one while the panel is visible.
const ablations = {mask: null, effects: [], size: 0, draw: () => {}};

function ablateNext() {
  const isMissing = !isOriginal() && !arrays.ablation_loss;
  return isMissing && visiblePanels().includes('ablation') ? ablateMore(arrays.mask) : null;
}

/** mask: a text has its own. */
async function ablateMore(mask) {
  if (ablations.mask !== mask) Object.assign(ablations, {mask, effects: []});
  const {effects, size} = await ask('ablate', {start: ablations.effects.length});
  ablations.effects.push(...effects);
  ablations.size = size;
  if (arrays.mask !== mask) return; // another text
  if (ablations.effects.length === size) {
    const shape = [ABLATIONS.length, L, H + 1, T];
    const join = name => {
      const data = Float32Array.from(ablations.effects.flatMap(effect => [...effect[name]]));
      return {data, shape};
    };
    const newArrays = {ablation_loss: join('loss'), ablation_logit: join('logit')};
    addToText({ablation_mean: 'text'}, newArrays);
  }
  ablations.draw();
}

if (hasModel) {
  inBackground(ablateNext);
  new IntersectionObserver(wake).observe(document.getElementById('ablation'));
}

function ablationTable() {
  if (!arrays.ablation_loss) return [['part'], []];
  const effects = ['loss', 'logit', 'mean'].filter(x => x !== 'mean' || measured().length);
  const columns = ABLATIONS.flatMap(kind => effects.map(effect => [kind, effect]));
  const names = {loss: 'loss', logit: 'logit', mean: 'mean loss'};
  const partRow = (l, k) => [
    partAt(l, k),
    ...columns.map(([kind, effect]) => ablationEffect(kind, effect, l, k).toFixed(5))
  ];
  return [
    ['part', ...columns.map(([kind, effect]) => `${names[effect]} (${kind})`)],
    range(L, l => range(H + 1, k => partRow(l, k))).flat()
  ];
}

export function buildAblation() {
  const controls = h(
    'div',
    {class: 'controls'},
    h('span', {}, 'Part'),
    choice('ablation', {zero: 'set to zero', mean: 'set to its mean'}, 'Kind of ablation'),
    h('span', {}, 'Effect on'),
    choice(
      'effect',
      {loss: 'loss of this token', logit: 'its logit', mean: 'mean loss of the text'},
      'Effect of an ablation on'
    )
  );
  const chart = figure('ablation', 'Effect of switching off each part', ablationTable, controls);
  const box = content('ablation');
  if (!arrays.ablation_loss && isOriginal()) {
    const text =
      'Left out: explain.py runs the model without each part when it writes the page, ' +
      'unless text and model are so large that it would take long.';
    return box.append(h('p', {class: 'note'}, text));
  }
  box.append(chart);
  ablations.draw = () => drawAblation(chart);
  watch(['t', 'layer', 'head', 'ablation', 'effect', 'theme'], ablations.draw);
}

function drawAblation(chart) {
  if (!arrays.ablation_loss) {
    const {effects, size} = ablations;
    const count = ablations.mask === arrays.mask && size ? ` ${effects.length} of ${size}.` : '';
    chart.picture.replaceChildren(h('p', {class: 'note'}, `Computing …${count}`));
    chart.readout.hidden = true;
    return;
  }
  const {ablation, effect, t} = state;
  const target = tokenQuoted(targetAt(t));
  const isLogit = effect === 'logit';
  if (effect === 'mean' && !measured().length) {
    chart.picture.replaceChildren(h('p', {class: 'note'}, 'This text has no next token.'));
    return;
  }
  const quantity = {
    loss: `the loss of ${target}`,
    logit: `the logit of ${target}`,
    mean: 'the mean loss of the text'
  }[effect];
  const values = range(L, l => range(H + 1, k => ablationEffect(ablation, effect, l, k)));
  const largest = maxAbs(values.flat());
  const unit = isLogit ? '' : ' nats';
  const action = part =>
    ablation === 'zero' ? `Switching off ${part}` : `Setting ${part} to its mean`;
  const sentence = (l, k) => {
    const value = values[l][k];
    const change = `${value < 0 ? 'lowers' : 'raises'} ${quantity} by ${fixed(Math.abs(value), 3)}`;
    return `${action(partAt(l, k))} ${change}${unit}`;
  };
  matrix(chart, {
    rows: L,
    columns: H + 1,
    cellHeight: 26,
    rowName: l => `L${l}`,
    columnName: columnOf,
    rowAxis: 'layer',
    columnAxis: 'heads, then the MLP',
    cellColor: (l, k) => {
      const worth = ((isLogit ? 1 : -1) * values[l][k]) / largest;
      return diverging(Math.sign(worth) * Math.sqrt(Math.abs(worth))); // small ones show too
    },
    describe: sentence,
    onPick: (l, k) => set(k === H ? {layer: l} : {layer: l, head: k, source: -1}),
    isSelected: (l, k) => l === state.layer && k === state.head,
    label: `Effect of each head and MLP on ${quantity}`
  });
  chart.heading.textContent = `What each head and MLP is worth for ${quantity}`;
  const parts = range(L, l => range(H + 1, k => ({l, k, value: values[l][k]}))).flat();
  const best = parts.reduce((a, b) => (Math.abs(b.value) > Math.abs(a.value) ? b : a));
  const isLast = effect !== 'mean' && !hasNext(t);
  const end = isLast ? ` The text ends here: ${target} is the most likely token.` : '';
  chart.setReadout(
    `${sentence(best.l, best.k)}, more than any other part. Orange: ${quantity} ` +
      `${isLogit ? 'falls' : 'rises'} without the part; blue: it ${isLogit ? 'rises' : 'falls'}. ` +
      `Colors follow the square root of the effect.${meanNote()}${end}`
  );
}

function meanNote() {
  if (state.ablation === 'zero') return '';
  const isText = facts.ablation_mean === 'text';
  return ` Means are over ${isText ? 'this text' : 'a sample of the validation data'}.`;
}
