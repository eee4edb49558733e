// The strip of tokens, and the panel of the next token.

import {bars} from './charts.js';
import {
  T,
  arrays,
  chip,
  colour,
  content,
  css,
  facts,
  figure,
  fixed,
  grouped,
  h,
  known,
  mix,
  percent,
  row,
  set,
  short,
  shown,
  spoken,
  state,
  target,
  textOn,
  watch
} from './core.js';
import {Twister, drawn, filtered} from './sampling.js';

// The strip -------------------------------------------------------------------------------------------------------------------

export function buildStrip() {
  const strip = document.getElementById('tokens');
  const buttons = facts.ids.map((id, t) =>
    h(
      'button',
      {
        type: 'button',
        onclick: () => set({t, source: -1}),
        'aria-label':
          `${spoken(id) || JSON.stringify(facts.vocabulary[id])}, position ${t}` +
          (t ? `, loss ${fixed(row('loss')[t - 1])}, rank ${row('rank')[t - 1]}` : ''),
        title: t
          ? `loss ${fixed(row('loss')[t - 1])} nats, rank ${grouped(row('rank')[t - 1])} of ${grouped(facts.vocab_size)}`
          : 'the first token: nothing predicts it'
      },
      shown(id)
    )
  );
  strip.append(...buttons);
  const move = step => set({t: Math.max(0, Math.min(T - 1, state.t + step)), source: -1});
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
    buttons.forEach((button, t) => {
      const rgb = mix('soft', 'warm', t ? Math.min(1, row('loss')[t - 1] / 8) : 0);
      button.style.background = css(rgb);
      button.style.color = textOn(rgb);
      button.setAttribute('aria-pressed', t === state.t);
      button.tabIndex = t === state.t ? 0 : -1;
    });
    const button = buttons[state.t];
    if (button.offsetTop < strip.scrollTop || button.offsetTop + button.offsetHeight > strip.scrollTop + strip.clientHeight)
      strip.scrollTop = button.offsetTop - strip.offsetTop - 30;
    const {t} = state,
      says = document.getElementById('where');
    says.replaceChildren(
      `Position ${t} of 0 to ${T - 1}: `,
      chip(facts.ids[t]),
      known(t) ? ' next is ' : ' what comes next is not in the text; the likeliest is ',
      chip(target(t)),
      known(t)
        ? ` with ${percent(Math.exp(-row('loss')[t]))}, loss ${fixed(row('loss')[t])} nats, rank ${grouped(row('rank')[t])} of ${grouped(facts.vocab_size)}`
        : ''
    );
  });
}

// The next token ----------------------------------------------------------------------------------------------------------------

/** What is known of the logits at t: {logits, ids (null: 0, 1, ...), tail: [[logit, count]] of the others}. */
export function logitsAt(t) {
  if (arrays.logits) return {logits: row('logits', t), ids: null, tail: []};
  if (t === T - 1) return {logits: row('last_logits'), ids: null, tail: []};
  const logits = row('top_logits', t),
    tail = [];
  row('tail', t).forEach((count, bin) => {
    if (count) tail.push([logits[0] - (bin + 0.5) / facts.bins_per_nat, count]);
  });
  return {logits, ids: row('top_ids', t), tail};
}

const entropy = (p, tail = []) =>
  -p.reduce((sum, x) => (x > 0 ? sum + x * Math.log2(x) : sum), 0) -
  tail.reduce((sum, [x, count]) => sum + count * x * Math.log2(x), 0);

export function buildNext() {
  const V = facts.vocab_size;
  let now; // {ids, base, p, kept, tail}
  const table = () => [
    ['token', 'id', 'logit', 'probability', 'after temperature, top-k, top-p'],
    Array.from(now.order, i => [
      shown(now.id(i)),
      now.id(i),
      now.logits[i].toFixed(4),
      now.base[i].toExponential(4),
      now.p[i].toExponential(4)
    ])
  ];
  const chart = figure('next-token', 'The likeliest tokens', table);
  chart.say("Outline: the model's probability. Bar and number: the probability in the draw.");
  const slider = (key, label, low, high, step, tell, of = x => x, from = x => x) => {
    const output = h('output'),
      input = h('input', {
        type: 'range',
        min: low,
        max: high,
        step,
        'aria-label': label,
        oninput: event => set({[key]: of(Number(event.target.value))})
      });
    watch([key], () => {
      input.value = from(state[key]);
      output.textContent = tell(state[key]);
      input.setAttribute('aria-valuetext', tell(state[key]));
    });
    return h('label', {}, label, output, input);
  };
  const most = Math.log2(V);
  const numbers = h('dl', {class: 'figures'}),
    drawn10 = h('div', {class: 'list', id: 'draws', 'aria-live': 'polite'});
  const seed = h('input', {
    type: 'number',
    min: 0,
    max: 2 ** 32 - 1,
    step: 1,
    id: 'seed',
    onchange: event => {
      set({seed: Math.max(0, Math.min(2 ** 32 - 1, Math.round(Number(event.target.value)) || 0))});
      seed.value = state.seed;
    }
  });
  const panel = h(
    'div',
    {class: 'card'},
    h('h3', {}, 'Choose'),
    h(
      'div',
      {class: 'sliders'},
      slider('temperature', 'Temperature', 0, 2, 0.05, x => (x === 0 ? '0: always the likeliest' : x.toFixed(2))),
      slider(
        'k',
        'Top-k',
        0,
        1,
        0.001,
        k => (k >= V ? 'all' : grouped(k)),
        x => Math.max(1, Math.round(2 ** (x * most))),
        k => Math.log2(k) / most
      ),
      slider('p', 'Top-p', 0.05, 1, 0.01, p => (p >= 1 ? 'all' : p.toFixed(2)))
    ),
    numbers,
    h(
      'div',
      {class: 'controls'},
      h('label', {for: 'seed'}, 'Seed'),
      seed,
      h('button', {type: 'button', id: 'again', onclick: () => set({seed: (state.seed + 1) % 2 ** 32})}, 'Draw again')
    ),
    drawn10,
    h('p', {class: 'note', id: 'same-as'})
  );
  content('next').append(h('div', {class: 'columns wide-left'}, chart, panel));

  watch(['t', 'temperature', 'k', 'p', 'seed', 'theme'], () => {
    const {logits, ids, tail} = logitsAt(state.t),
      id = i => (ids ? ids[i] : i);
    const max = logits.reduce((a, b) => Math.max(a, b)),
      count = logits.length;
    let total = tail.reduce((sum, [x, n]) => sum + n * Math.exp(x - max), 0);
    for (const x of logits) total += Math.exp(x - max);
    const base = Float64Array.from(logits, x => Math.exp(x - max) / total);
    const result = filtered(logits, state.temperature, state.k, state.p, tail);
    const order = Array.from({length: count}, (_, i) => i).sort((a, b) => logits[b] - logits[a]);
    now = {...result, base, logits, id, order};
    const top = order.slice(0, 16),
      true_ = known(state.t) ? order.find(i => id(i) === target(state.t)) : undefined;
    if (true_ !== undefined && !top.includes(true_)) top.push(true_);
    bars(
      chart,
      top.map(i => ({
        label: short(id(i)),
        value: result.p[i],
        ghost: base[i],
        text: percent(result.p[i]),
        mark: i === true_,
        tip: `${shown(id(i))} (id ${id(i)})\nlogit ${fixed(logits[i], 3)}\nprobability ${base[i].toFixed(5)}\nto draw from ${result.p[i].toFixed(5)}`
      })),
      'The likeliest next tokens with their probabilities',
      {low: 0}
    );
    const keptMass =
      result.p.reduce((sum, x, i) => (x > 0 ? sum + base[i] : sum), 0) +
      result.rest.reduce((sum, [, n, x]) => sum + (n * Math.exp(x - max)) / total, 0);
    const fact = (name, value, key) => [h('dt', {}, name), h('dd', {id: key}, value)];
    numbers.replaceChildren(
      ...[
        fact('Tokens kept', `${grouped(result.kept)} of ${grouped(V)}`, 'kept'),
        fact('Mass kept', (100 * keptMass).toFixed(2) + '%', 'mass'),
        fact(
          'Entropy of the model',
          entropy(
            base,
            tail.map(([x, n]) => [Math.exp(x - max) / total, n])
          ).toFixed(3) + ' bits',
          'entropy'
        ),
        fact('Entropy of the draw', entropy(result.p, result.rest).toFixed(3) + ' bits', 'entropy-left')
      ].flat()
    );
    if (document.activeElement !== seed) seed.value = state.seed;
    const random = new Twister(state.seed),
      byId = Array.from({length: count}, (_, i) => i);
    if (ids) byId.sort((a, b) => ids[a] - ids[b]); // as sample.py: a token is drawn at the first sum, in the order of ids, that is above the number
    const p = byId.map(i => result.p[i]),
      draw = u => {
        const i = drawn(p, u, result.tail);
        return i < 0 ? i : byId[i];
      };
    drawn10.replaceChildren(
      ...Array.from({length: 10}, () => draw(state.temperature === 0 ? 0 : random.uniform())).map(i =>
        i < 0
          ? h('span', {class: 'token'}, 'one of the others')
          : Object.assign(chip(id(i)), {
              style: id(i) === target(state.t) && known(state.t) ? `outline:1.5px solid ${colour('accent')}` : ''
            })
      )
    );
    document.getElementById('same-as').textContent = result.tail
      ? `Ten draws. Tokens beyond the ${count} likeliest, which these values let through, are counted together here.`
      : 'Ten draws: the first tokens of sample.py --dtype=float32 --num_samples=10 with this text up to here, this seed and these values.';
  });
}
