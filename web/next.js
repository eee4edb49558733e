// The token strip and the "Next token" panel.

import {bars} from './charts.js';
import {
  clamp,
  color,
  content,
  css,
  figure,
  fixed,
  h,
  integer,
  mix,
  percent,
  range,
  set,
  state,
  textOn,
  watch
} from './core.js';
import {
  T,
  arrays,
  facts,
  hasNext,
  isOriginal,
  isPredicted,
  row,
  sees,
  targetAt,
  tokenChip,
  tokenLabel,
  tokenName,
  tokenText
} from './model.js';
import {MersenneTwister, filtered, sampleIndex, softmax} from './sampling.js';

// Token strip -------------------------------------------------------------------------------------

/** Loss and rank of the token at position t > 0, predicted from t - 1. */
const lossOf = t => row('loss')[t - 1];
const rankOf = t => row('rank')[t - 1];
const isChanged = () => Boolean(arrays.logits_before); // the model: see changes.js
const lossBefore = t => (isChanged() ? ` (${fixed(row('loss_before')[t - 1])} before)` : '');
const vocabSize = integer(facts.vocab_size);

function stripButton(id, t) {
  const rank = t && integer(rankOf(t));
  const spoken = t ? `, loss ${fixed(lossOf(t))}, rank ${rank}` : '';
  const hover = t
    ? `loss ${fixed(lossOf(t))} nats${lossBefore(t)}, rank ${rank} of ${vocabSize}`
    : 'first token: not predicted';
  return h(
    'button',
    {
      type: 'button',
      onclick: () => set({t, source: -1}),
      'aria-label': `${tokenText(id)} (${tokenName(id)}), position ${t}${spoken}`,
      title: hover
    },
    tokenText(id)
  );
}

export function buildStrip() {
  const strip = document.getElementById('tokens');
  let shown = null; // ids
  let buttons = [];
  const move = step => set({t: clamp(state.t + step, 0, T - 1), source: -1});
  document.getElementById('back').addEventListener('click', () => move(-1));
  document.getElementById('forth').addEventListener('click', () => move(1));
  strip.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1, Home: -T, End: T}[event.key];
    if (!step) return;
    move(step);
    buttons[state.t].focus();
    event.preventDefault();
  });
  watch(['t', 'theme'], () => {
    if (shown !== facts.ids) {
      shown = facts.ids;
      buttons = shown.map(stripButton);
      strip.replaceChildren(...buttons);
    }
    buttons.forEach((button, t) => {
      const rgb = mix('soft', 'warm', isPredicted(t) ? Math.min(1, lossOf(t) / 8) : 0);
      button.style.background = css(rgb);
      button.style.color = textOn(rgb);
      button.setAttribute('aria-pressed', t === state.t);
      button.tabIndex = t === state.t ? 0 : -1;
    });
    requestAnimationFrame(() => scrollStripTo(strip, buttons[state.t])); // all is laid out once
    describePosition(state.t);
  });
}

function scrollStripTo(strip, button) {
  const line = button.offsetHeight + 2; // and the gap
  const top = button.offsetTop - strip.firstChild.offsetTop;
  const isAbove = top < strip.scrollTop;
  const isBelow = top + line > strip.scrollTop + strip.clientHeight;
  if (isAbove || isBelow) strip.scrollTop = Math.max(0, top - line); // whole lines
}

function describePosition(t) {
  const parts = [`Position ${t} (0 to ${T - 1}): `, tokenChip(facts.ids[t]), ' · '];
  if (hasNext(t)) {
    const probability = percent(Math.exp(-lossOf(t + 1)));
    const loss = fixed(lossOf(t + 1));
    const rank = integer(rankOf(t + 1));
    parts.push(
      'next token ',
      tokenChip(targetAt(t)),
      ` · probability ${probability} · loss ${loss} nats · rank ${rank} of ${vocabSize}`,
      sees(t, t + 1) ? ' · not a prediction: attention sees it' : ''
    );
  } else parts.push('end of the text · most likely next token ', tokenChip(targetAt(t)));
  document.getElementById('where').replaceChildren(...parts);
}

// Next token --------------------------------------------------------------------------------------

/** Logits at t, {logits, ids, tail}: ids null means all tokens in order; tail as in filtered(). */
export function logitsAt(t) {
  if (arrays.logits) return {logits: row('logits', t), ids: null, tail: []};
  if (t === T - 1) return {logits: row('last_logits'), ids: null, tail: []};
  const logits = row('top_logits', t);
  const tail = [];
  row('tail', t).forEach((count, bin) => {
    if (count) tail.push([logits[0] - (bin + 0.5) / facts.bins_per_nat, count]);
  });
  return {logits, ids: row('top_ids', t), tail};
}

/** Entropy in bits; tail: [[probability of one token, count], ...]. */
function entropyOf(p, tail) {
  let bits = 0;
  for (const x of p) if (x > 0) bits -= x * Math.log2(x);
  for (const [x, count] of tail) if (x > 0) bits -= count * x * Math.log2(x);
  return bits;
}

/** The distribution at t before (base) and after (p) temperature, top-k and top-p. */
function distributionAt(t) {
  const {logits, ids, tail} = logitsAt(t);
  const idOf = i => (ids ? ids[i] : i);
  const before = isChanged() ? softmax(row('logits_before', t)) : null;
  const max = logits.reduce((a, b) => Math.max(a, b));
  let total = 0;
  for (const [logit, count] of tail) total += count * Math.exp(logit - max);
  for (const logit of logits) total += Math.exp(logit - max);
  const probability = logit => Math.exp(logit - max) / total;
  const base = Float64Array.from(logits, probability);
  const baseTail = tail.map(([logit, count]) => [probability(logit), count]);
  const after = filtered(logits, state.temperature, state.k, state.p, tail);
  const order = range(logits.length, i => i).sort((a, b) => logits[b] - logits[a]);
  let keptMass = 0;
  base.forEach((x, i) => {
    if (after.p[i] > 0) keptMass += x;
  });
  for (const [, count, logit] of after.rest) keptMass += count * probability(logit);
  return {
    ...after,
    logits,
    ids,
    idOf,
    order,
    base,
    before,
    keptMass,
    baseEntropy: entropyOf(base, baseTail),
    entropy: entropyOf(after.p, after.rest)
  };
}

/** Ten indices sampled as sample.py does: in order of token ids, -1 for the tail. */
function sampleTen({p, ids, tail}) {
  const byId = range(p.length, i => i);
  if (ids) byId.sort((a, b) => ids[a] - ids[b]);
  const sorted = byId.map(i => p[i]);
  const random = new MersenneTwister(state.seed);
  return range(10, () => {
    const u = state.temperature === 0 ? 0 : random.uniform();
    const i = sampleIndex(sorted, u, tail);
    return i < 0 ? i : byId[i];
  });
}

/** A slider for a state key; toValue and toPosition convert between the slider and the value. */
function slider(key, label, {min, max, step, describe, toValue = x => x, toPosition = x => x}) {
  const output = h('output');
  const input = h('input', {
    type: 'range',
    min,
    max,
    step,
    'aria-label': label,
    oninput: event => set({[key]: toValue(Number(event.target.value))})
  });
  watch([key], () => {
    const text = describe(state[key]);
    input.value = toPosition(state[key]);
    input.setAttribute('aria-valuetext', text);
    output.textContent = text;
  });
  return h('label', {}, label, output, input);
}

function samplingSliders() {
  const V = facts.vocab_size;
  const log2V = Math.log2(V);
  return [
    slider('temperature', 'Temperature', {
      min: 0,
      max: 2,
      step: 0.05,
      describe: x => (x === 0 ? '0 (greedy)' : x.toFixed(2))
    }),
    slider('k', 'Top-k', {
      min: 0,
      max: 1,
      step: 0.001,
      describe: k => (k >= V ? 'all' : integer(k)),
      toValue: x => Math.max(1, Math.round(2 ** (x * log2V))),
      toPosition: k => Math.log2(k) / log2V
    }),
    slider('p', 'Top-p', {
      min: 0.05,
      max: 1,
      step: 0.01,
      describe: p => (p >= 1 ? 'all' : p.toFixed(2))
    })
  ];
}

function seedInput() {
  const maxSeed = 2 ** 32 - 1;
  return h('input', {
    type: 'number',
    min: 0,
    max: maxSeed,
    step: 1,
    id: 'seed',
    onchange: event => {
      const seed = Math.round(Number(event.target.value)) || 0;
      set({seed: clamp(seed, 0, maxSeed)});
      event.target.value = state.seed;
    }
  });
}

export function buildNext() {
  let now; // distributionAt(state.t)
  const columns = ['token', 'id', 'logit', 'probability', 'after temperature, top-k, top-p'];
  const chart = figure('next-token', 'Most likely next tokens', () => [
    now.before ? [...columns, 'before the changes'] : columns,
    now.order.map(i => [
      tokenText(now.idOf(i)),
      now.idOf(i),
      now.logits[i].toFixed(4),
      now.base[i].toExponential(4),
      now.p[i].toExponential(4),
      ...(now.before ? [now.before[i].toExponential(4)] : [])
    ])
  ]);
  const stats = h('dl', {class: 'figures'});
  const samples = h('div', {class: 'list', id: 'draws', 'aria-live': 'polite'});
  const note = h('p', {class: 'note'});
  const seed = seedInput();
  const nextSeed = () => set({seed: (state.seed + 1) % 2 ** 32});
  const panel = h(
    'div',
    {class: 'card'},
    h('h3', {}, 'Sampling'),
    h('div', {class: 'sliders'}, samplingSliders()),
    stats,
    h(
      'div',
      {class: 'controls'},
      h('label', {for: 'seed'}, 'Seed'),
      seed,
      h('button', {type: 'button', id: 'again', onclick: nextSeed}, 'Next seed')
    ),
    samples,
    note
  );
  content('next').append(h('div', {class: 'columns wide-left'}, chart, panel));

  watch(['t', 'temperature', 'k', 'p', 'seed', 'theme'], () => {
    now = distributionAt(state.t);
    drawNextTokens(chart, now);
    chart.setReadout(
      `Outline: probability ${now.before ? 'before the changes' : 'under the model'}. ` +
        'Bar and number: after temperature, top-k and top-p.'
    );
    stats.replaceChildren(...statistics(now));
    if (document.activeElement !== seed) seed.value = state.seed;
    samples.replaceChildren(...sampleTen(now).map(i => sampleChip(now, i)));
    note.replaceChildren(...(now.tail ? histogramNote(now) : reproduceNote()));
  });
}

function drawNextTokens(chart, {order, idOf, logits, base, before, p}) {
  const top = order.slice(0, 16);
  const isTarget = i => hasNext(state.t) && idOf(i) === targetAt(state.t);
  const target = order.find(isTarget);
  const firstBefore = before ? before.indexOf(Math.max(...before)) : undefined;
  for (const i of [target, firstBefore]) {
    if (i !== undefined && !top.includes(i)) top.push(i);
  }
  const bar = i => ({
    label: tokenLabel(idOf(i)),
    value: p[i],
    outline: (before ?? base)[i],
    text: percent(p[i]),
    bold: i === target,
    tip: [
      `${tokenText(idOf(i))} (id ${idOf(i)})`,
      `logit ${fixed(logits[i], 3)}`,
      `probability ${base[i].toFixed(5)}`,
      ...(before ? [`before the changes ${before[i].toFixed(5)}`] : []),
      `after temperature, top-k, top-p ${p[i].toFixed(5)}`
    ].join('\n')
  });
  bars(chart, top.map(bar), 'Most likely next tokens and their probabilities', {low: 0});
}

function statistics({kept, keptMass, baseEntropy, entropy}) {
  const items = [
    ['kept', 'Tokens kept', `${integer(kept)} of ${vocabSize}`],
    ['mass', 'Probability kept', (100 * keptMass).toFixed(2) + '%'],
    ['entropy', 'Entropy of the model', baseEntropy.toFixed(3) + ' bits'],
    ['entropy-left', 'Entropy after filtering', entropy.toFixed(3) + ' bits']
  ];
  return items.flatMap(([id, name, value]) => [h('dt', {}, name), h('dd', {id}, value)]);
}

function histogramNote({p}) {
  const text =
    `Ten samples. These settings keep tokens outside the top ${p.length}; ` +
    'the page stores only a histogram of their logits.';
  return [text];
}

function reproduceNote() {
  if (!isOriginal()) return ['Ten samples of these probabilities.'];
  const {turns, eot_token: eot} = facts.model;
  if (turns && state.t !== facts.ids.indexOf(eot, 1)) {
    return ['Ten samples. sample.py can draw them at the end of the first source only.'];
  }
  const code = text => h('code', {}, text);
  return [
    'Ten samples, equal to the first tokens of ',
    code('sample.py'),
    ' ',
    code('--dtype=float32'),
    ' ',
    code('--num_samples=10'),
    ` with this ${turns ? 'source' : 'prefix'}, seed and settings.`
  ];
}

function sampleChip({idOf}, i) {
  if (i < 0) return h('span', {class: 'token'}, 'another token');
  const chip = tokenChip(idOf(i));
  const isTarget = hasNext(state.t) && idOf(i) === targetAt(state.t);
  if (isTarget) chip.style.outline = `1.5px solid ${color('accent')}`;
  return chip;
}
