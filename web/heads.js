// All heads at a glance, and one of them: where it looks, what it writes.

import {bars, matrix} from './charts.js';
import {
  H,
  HS,
  L,
  T,
  arrays,
  choice,
  content,
  css,
  diverging,
  facts,
  figure,
  fixed,
  h,
  known,
  missing,
  mix,
  row,
  sequential,
  set,
  short,
  shown,
  signed,
  state,
  target,
  triangleRow,
  watch
} from './core.js';
import {softmax} from './sampling.js';

export const KINDS = {
  previous: 'previous token',
  induction: 'induction',
  duplicate: 'duplicate token',
  copying: 'copying',
  logit: 'logit'
};
const partOf = new Map(facts.parts.map(([kind, l, k], i) => [`${kind} ${l} ${k}`, i]));

/** How much head l.k has of a measure: scores from 0 to 1 (copying: -1 to 1), 'logit': what it adds to the next token's logit at t. */
export function score(by, l, k) {
  if (by === 'logit') return row('parts', partOf.get(`head ${l} ${k}`), state.t)[0];
  return row('scores', facts.score_names.indexOf(by), l)[k];
}

/** Attention of head l.k at t over 0..t: from queries and keys, or, if they were left out, from its root in 8 bits. */
export function attentionRow(l, k, t) {
  const exact = scores(l, k, t);
  if (exact) return softmax(exact.slice(0, t + 1).map(x => x / Math.sqrt(HS)));
  return Float64Array.from(triangleRow(row('attention', l, k), t), root => (root / 255) ** 2);
}

/** q . k of head l.k at t for all T keys, those behind t too. */
export function scores(l, k, t) {
  if (!arrays.q) return null;
  const q = row('q', l, k, t),
    out = new Float64Array(T);
  for (let s = 0; s < T; s++) {
    const key = row('k', l, Math.floor((k * facts.n_kv_head) / H), s);
    for (let d = 0; d < HS; d++) out[s] += q[d] * key[d];
  }
  return out;
}

export function buildHeads() {
  const box = content('heads');
  const controls = h(
    'div',
    {class: 'controls'},
    h('span', {}, 'Measure'),
    choice('by', KINDS, 'Measure of the heads'),
    h('span', {}, 'Order'),
    choice('order', {place: 'by layer', score: 'by measure'}, 'Order of the heads')
  );
  let layers = Math.max(1, Math.floor(12 / H)); // in one row, if they fill the rows
  while (L % layers) layers--;
  const meaning = h('p', {class: 'note'}),
    grid = h('div', {class: 'thumbs', style: `--n:${H * layers}`});
  const side = Math.min(T, 64),
    step = T / side;
  const thumbs = Array.from({length: L * H}, (_, n) => {
    const l = Math.floor(n / H),
      k = n % H;
    const canvas = h('canvas', {width: side, height: side, 'aria-hidden': 'true'}),
      name = h('span', {class: 'name'}),
      bar = h('i');
    return {
      l,
      k,
      canvas,
      name,
      bar,
      button: h(
        'button',
        {type: 'button', 'data-head': `${l}.${k}`, onclick: () => set({layer: l, head: k, source: -1})},
        arrays.attention && canvas,
        name,
        h('span', {class: 'meter'}, bar)
      )
    };
  });
  const list = figure(
    'heads',
    `${L} layers with ${H} heads each`,
    () => [
      ['layer', 'head', ...Object.values(KINDS)],
      thumbs.map(({l, k}) => [l, k, ...Object.keys(KINDS).map(by => score(by, l, k).toFixed(4))])
    ],
    [controls, meaning],
    false
  );
  list.picture.append(grid);
  box.append(list);
  if (!arrays.attention) box.append(missing());
  watch(['theme'], () => {
    if (arrays.attention)
      for (const {l, k, canvas} of thumbs) {
        const image = new ImageData(side, side),
          triangle = row('attention', l, k);
        const most = new Float32Array(side * side); // of a large matrix, the largest of each block
        for (let t = 0; t < T; t++)
          for (let s = 0; s <= t; s++) {
            const at = Math.floor(t / step) * side + Math.floor(s / step);
            most[at] = Math.max(most[at], triangle[(t * (t + 1)) / 2 + s] / 255);
          }
        for (let t = 0; t < side; t++)
          for (let s = 0; s < side; s++)
            image.data.set(
              [...(s <= t ? sequential(most[t * side + s]) : [128, 128, 128]), s <= t ? 255 : 22],
              4 * (t * side + s)
            );
        canvas.getContext('2d').putImageData(image, 0, 0);
      }
  });
  const meanings = {
    previous: 'Attention to the token before, on random tokens.',
    induction:
      'On random tokens that come twice: attention to the token behind the earlier occurrence, which is the one to predict.',
    duplicate: 'On random tokens that come twice: attention to the same token.',
    copying: 'Eigenvalues of the OV circuit: 1 if the head only raises the tokens it looks at, −1 if it only lowers them.',
    logit: 'What the head adds to the logit of the next token at the chosen position, in nats.'
  };
  watch(['by', 'order', 't', 'layer', 'head', 'theme'], () => {
    const value = ({l, k}) => score(state.by, l, k);
    const most = state.by === 'logit' ? Math.max(1e-9, ...thumbs.map(x => Math.abs(value(x)))) : 1;
    const sorted = state.order === 'score' ? thumbs.toSorted((a, b) => value(b) - value(a)) : thumbs;
    grid.classList.toggle('in-rows', state.order !== 'score' && H <= 12);
    if (sorted.some((x, i) => grid.children[i] !== x.button)) grid.replaceChildren(...sorted.map(x => x.button));
    for (const thumb of thumbs) {
      const v = value(thumb);
      thumb.name.replaceChildren(h('span', {}, `${thumb.l}.${thumb.k}`), h('span', {}, fixed(v)));
      thumb.bar.style.width = 100 * Math.min(1, Math.abs(v || 0) / most) + '%';
      thumb.bar.className = v < 0 ? 'minus' : '';
      thumb.button.style.background = css(mix('panel', v < 0 ? 'warm' : 'accent', 0.22 * Math.min(1, Math.abs(v || 0) / most)));
      thumb.button.setAttribute('aria-pressed', thumb.l === state.layer && thumb.k === state.head);
      thumb.button.setAttribute('aria-label', `Head ${thumb.l}.${thumb.k}, ${KINDS[state.by]} ${fixed(v)}`);
    }
    meaning.textContent = meanings[state.by];
    list.refresh();
  });
}

export function buildHead() {
  const box = content('head');
  const select = (key, n, label) => {
    const element = h(
      'select',
      {'aria-label': label, onchange: event => set({[key]: Number(event.target.value), source: -1})},
      Array.from({length: n}, (_, i) => h('option', {value: i}, `${label} ${i}`))
    );
    watch([key], () => {
      element.value = state[key];
    });
    return element;
  };
  const about = h('p', {class: 'note'});
  box.append(h('div', {class: 'controls'}, select('layer', L, 'Layer'), select('head', H, 'Head'), about));
  watch(['layer', 'head', 't'], () => {
    about.textContent = Object.entries(KINDS)
      .map(([by, name]) => `${name} ${fixed(score(by, state.layer, state.head))}`)
      .join(' · ');
  });

  const follow = ['t', 'layer', 'head', 'source', 'theme'],
    names = i => short(facts.ids[i], 8);
  const source = () => {
    if (state.source >= 0) return state.source;
    const p = attentionRow(state.layer, state.head, state.t);
    return p.indexOf(Math.max(...p));
  };
  if (arrays.attention) {
    const pattern = figure('attention', 'Attention', () => [
      ['query', 'key', 'attention'],
      Array.from({length: T}, (_, t) =>
        Array.from(attentionRow(state.layer, state.head, t), (p, s) => [
          `${t} ${shown(facts.ids[t])}`,
          `${s} ${shown(facts.ids[s])}`,
          p.toFixed(5)
        ])
      ).flat()
    ]);
    const writes = h('div', {class: 'stack'});
    box.append(h('div', {class: 'columns'}, pattern, writes));
    watch(follow, () => {
      const triangle = row('attention', state.layer, state.head),
        value = (t, s) => triangle[(t * (t + 1)) / 2 + s] / 255;
      matrix(pattern, {
        rows: T,
        columns: T,
        at: (t, s) => (s <= t ? sequential(value(t, s)) : null),
        rowNames: Object.assign(names, {mono: true}),
        columnNames: names,
        most: 500,
        tell: (t, s) =>
          s > t
            ? `${shown(facts.ids[t])} cannot see ${shown(facts.ids[s])}: it comes later`
            : `${shown(facts.ids[t])} (${t}) looks at ${shown(facts.ids[s])} (${s})\nattention ${attentionRow(state.layer, state.head, t)[s].toFixed(4)}`,
        pick: (t, s) => set({t, source: s <= t ? s : -1}),
        chosen: (t, s) => t === state.t && s === source(),
        label: `Attention of head ${state.layer}.${state.head}, queries in rows, keys in columns`
      });
      pattern.heading.textContent = `Head ${state.layer}.${state.head}: rows look at columns`;
    });
    buildWrites(writes, follow, names);
  } else box.append(missing());
  if (!arrays.q) return box.append(missing());

  const steps = figure('scores', 'From q·k to attention', () => [
    ['key', 'q·k', 'divided', 'after the mask', 'softmax'],
    rows().map((v, s) => [`${s} ${shown(facts.ids[s])}`, ...v.map(x => x.toFixed(4))])
  ]);
  const rows = () => {
    const raw = scores(state.layer, state.head, state.t),
      p = attentionRow(state.layer, state.head, state.t);
    return Array.from(raw, (x, s) => [
      x,
      x / Math.sqrt(HS),
      s <= state.t ? x / Math.sqrt(HS) : -Infinity,
      s <= state.t ? p[s] : 0
    ]);
  };
  const terms = figure('terms', 'Term by term', () => [
    ['dimension', 'q', 'k', 'q × k'],
    Array.from({length: HS}, (_, d) => [d, ...parts().map(v => v[d].toFixed(4))])
  ]);
  const keyOf = s => row('k', state.layer, Math.floor((state.head * facts.n_kv_head) / H), s);
  const largestTerms = s => {
    const q = row('q', state.layer, state.head, state.t),
      k = keyOf(s),
      order = Array.from(q.keys()).sort((a, b) => Math.abs(q[b] * k[b]) - Math.abs(q[a] * k[a]));
    return [
      '',
      'largest terms:',
      ...order.slice(0, 5).map(d => `${fixed(q[d])} × ${fixed(k[d])} = ${signed(q[d] * k[d])}   (dimension ${d})`),
      `… ${Math.max(0, HS - 5)} more; a click shows all`
    ].join('\n');
  };
  const parts = () => {
    const q = row('q', state.layer, state.head, state.t),
      k = keyOf(source());
    return [q, k, q.map((x, d) => x * k[d])];
  };
  box.append(steps, terms);
  const stepNames = ['q·k', `÷ √${HS}`, 'mask', 'softmax'];
  watch(follow, () => {
    const values = rows(),
      most = Math.max(1e-9, ...values.map(v => Math.abs(v[0]))),
      most2 = most / Math.sqrt(HS);
    matrix(steps, {
      rows: 4,
      columns: T,
      cellHeight: 26,
      most: 4000,
      rowNames: i => stepNames[i],
      columnNames: names,
      at: (i, s) =>
        i === 3
          ? s <= state.t
            ? sequential(Math.sqrt(values[s][3]))
            : null
          : i === 2 && s > state.t
            ? null
            : diverging(values[s][i] / (i ? most2 : most)),
      tell: (i, s) =>
        `${shown(facts.ids[state.t])} at ${state.t} and ${shown(facts.ids[s])} at ${s}\nq·k ${fixed(values[s][0], 3)}\n÷ √${HS}: ${fixed(values[s][1], 3)}\n${s > state.t ? 'masked: it comes later' : 'softmax ' + values[s][3].toFixed(4)}\n${largestTerms(s)}`,
      pick: (i, s) => set({source: s}),
      chosen: (i, s) => s === source(),
      label: `Scores of position ${state.t} with every key, in four steps`
    });
    steps.heading.textContent = `Where ${shown(facts.ids[state.t])} looks: from q·k to attention`;
    const s = source(),
      v = values[s],
      [q, k, product] = parts(),
      largest = [q, k, product].map(x => Math.max(1e-9, ...x.map(Math.abs)));
    matrix(terms, {
      rows: 3,
      columns: HS,
      cellHeight: 26,
      most: 4000,
      rowNames: i => ['q', 'k', 'q × k'][i],
      at: (i, d) => diverging([q, k, product][i][d] / largest[i]),
      tell: (i, d) => `dimension ${d}\n${fixed(q[d], 3)} × ${fixed(k[d], 3)} = ${fixed(product[d], 3)}`,
      label: `Query and key, dimension by dimension`
    });
    terms.heading.textContent = `Term by term: query ${shown(facts.ids[state.t])} (${state.t}) with key ${shown(facts.ids[s])} (${s})`;
    terms.say(
      `The products sum to ${fixed(v[0], 3)}; divided by √${HS} that is ${fixed(v[1], 3)}; ` +
        (s > state.t
          ? 'masked, since the key comes later.'
          : `the softmax over ${state.t + 1} key${state.t ? 's' : ''} makes it ${v[3].toFixed(4)}.`) +
        (facts.model.position === 'rope' ? ' Queries and keys are shown as turned by their positions.' : '') +
        (facts.model.qk_norm ? ' Both are normalised.' : '')
    );
  });
}

function buildWrites(box, follow, names) {
  if (arrays.promoted) {
    const lists = () =>
      Array.from(row('promoted', state.layer, state.head, state.t), (id, i) => ({
        id,
        value: row('promoted_by', state.layer, state.head, state.t)[i]
      }));
    const chart = figure('promoted', 'What it writes', () => [
      ['token', 'logit'],
      lists().map(({id, value}) => [shown(id), value.toFixed(4)])
    ]);
    box.append(chart);
    watch(follow, () => {
      const all = lists(),
        half = all.length / 2;
      bars(
        chart,
        [...all.slice(0, half), ...all.slice(half).toReversed()].map(({id, value}) => ({label: short(id), value})),
        'Tokens promoted and suppressed'
      );
      chart.heading.textContent = `What it writes at ${shown(facts.ids[state.t])}: tokens raised and lowered`;
    });
  }
  if (!arrays.by_source) return box.append(missing());
  const effects = () => Array.from(triangleRow(row('by_source', state.layer, state.head), state.t), (value, s) => ({s, value}));
  const chart = figure('by-source', 'By source', () => [
    ['source', 'logit'],
    effects().map(({s, value}) => [`${s} ${shown(facts.ids[s])}`, value.toFixed(4)])
  ]);
  box.append(chart);
  watch(follow, () => {
    const all = effects(),
      top = all
        .toSorted((a, b) => Math.abs(b.value) - Math.abs(a.value))
        .slice(0, 8)
        .sort((a, b) => a.s - b.s);
    bars(
      chart,
      top.map(({s, value}) => ({label: `${names(s)} ${s}`, value, mark: s === state.source, act: () => set({source: s})})),
      'Contribution by source token'
    );
    chart.heading.textContent = `What it adds to the logit of ${shown(target(state.t))}, by the token it looks at`;
    chart.say(
      `${all.length > 8 ? 'The eight largest of ' + all.length + '; all' : 'All'} together ${signed(
        all.reduce((sum, x) => sum + x.value, 0),
        3
      )}${known(state.t) ? '' : '; the text ends here, so this is the likeliest token'}.`
    );
  });
}
