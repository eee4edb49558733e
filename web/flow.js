// One position on its way through the model, and where it begins: token, position.

import {bars, drawing, matrix, write} from './charts.js';
import {
  L,
  T,
  arrays,
  colour,
  content,
  diverging,
  facts,
  figure,
  fixed,
  h,
  missing,
  percent,
  row,
  s,
  set,
  short,
  shown,
  state,
  watch
} from './core.js';

export function buildFlow() {
  const size = (name, t) => arrays['size_' + name].data[t];
  const at = (name, l, t) => row(name, l)[t];
  const chart = figure('flow', 'What each part writes', () => [
    ['part', 'length of what it writes', 'length of the stream behind it'],
    [
      ...facts.embeddings.map(name => [name, size(name, state.t).toFixed(4), '']),
      ['sum of these', '', at('size_stream', 0, state.t).toFixed(4)],
      ...Array.from({length: L}, (_, l) => [
        [`attention ${l}`, at('size_attn', l, state.t).toFixed(4), ''],
        [`MLP ${l}`, at('size_mlp', l, state.t).toFixed(4), at('size_stream', l + 1, state.t).toFixed(4)]
      ]).flat()
    ]
  ]);
  content('flow').append(chart);
  watch(['t', 'layer', 'theme'], () => {
    const {t} = state,
      width = Math.max(chart.width(), 190 + 74 * L),
      height = 268,
      y = 132,
      left = 104,
      right = 118;
    const block = (width - left - right) / L,
      streams = Array.from({length: L + 1}, (_, l) => at('size_stream', l, t));
    const writes = [
      ...facts.embeddings.map(name => size(name, t)),
      ...Array.from({length: L}, (_, l) => [at('size_attn', l, t), at('size_mlp', l, t)]).flat()
    ];
    const scale = 54 / Math.max(1e-9, ...streams, ...writes),
      w = v => Math.max(1, v * scale),
      x = l => left + l * block;
    const trunk = [
      [left - 22, w(streams[0])],
      [x(0), w(streams[0])],
      ...streams.slice(1).map((v, i) => [x(i + 1) - block * 0.1, w(v)]),
      [width - right + 14, w(streams[L])]
    ];
    const outline = [
      ...trunk.map(([a, b]) => `${a},${y - b / 2}`),
      ...trunk.toReversed().map(([a, b]) => `${a},${y + b / 2}`)
    ].join(' ');
    const part = (l, kind, value) => {
      const up = kind === 'Attention' ? -1 : 1,
        cx = x(l) + block * (kind === 'Attention' ? 0.34 : 0.6),
        by = y + up * 84,
        boxWidth = Math.min(66, block * 0.92);
      const open = () => {
        set({layer: l});
        document.getElementById(kind === 'Attention' ? 'head' : 'mlp').scrollIntoView();
      };
      const half = (w(streams[l]) + w(streams[l + 1])) / 4,
        into = y + up * Math.max(0, half - w(value) / 2); // it comes in along the edge
      const tone = kind === 'Attention' ? 'accent' : 'muted',
        near = Math.max(8, w(value) / 2 + 3);
      return s(
        'g',
        {
          role: 'button',
          tabindex: 0,
          style: 'cursor:pointer',
          'aria-label': `${kind} of layer ${l} writes ${fixed(value)}`,
          onclick: open,
          onkeydown: event => {
            if (event.key === 'Enter' || event.key === ' ') {
              event.preventDefault();
              open();
            }
          }
        },
        s('path', {
          d: `M${cx - near},${y} C${cx - near},${y + up * 30} ${cx - near},${y + up * 40} ${cx - near},${by - up * 12}`,
          fill: 'none',
          stroke: colour(tone),
          'stroke-opacity': 0.7,
          'stroke-dasharray': '2 3'
        }),
        s('path', {
          d: `M${cx},${by - up * 12} C${cx},${y + up * 24} ${cx + block * 0.06},${into} ${cx + block * 0.34},${into}`,
          fill: 'none',
          stroke: colour(tone),
          'stroke-width': w(value),
          'stroke-opacity': 0.55
        }),
        s('rect', {
          x: cx - boxWidth / 2,
          y: by - 13,
          width: boxWidth,
          height: 26,
          rx: 5,
          fill: colour('panel'),
          stroke: colour(l === state.layer ? 'ink' : tone),
          'stroke-width': l === state.layer ? 2 : 1
        }),
        write(cx, by, boxWidth < 60 ? kind.slice(0, 3) : kind, {'text-anchor': 'middle'}),
        write(cx, by + up * 24, fixed(value), {'text-anchor': 'middle', fill: colour('muted'), 'font-size': 11})
      );
    };
    const n = facts.embeddings.length;
    const best = Array.from(row('lens_ids', L, t)).slice(0, 4);
    const focused = [...chart.querySelectorAll('[role=button]')].indexOf(document.activeElement);
    drawing(
      chart,
      width,
      height,
      `How the stream at position ${t} is built up, from the embedding to the logits`,
      facts.embeddings.map((name, i) => {
        const ey = y + (i - (n - 1) / 2) * 62,
          value = size(name, t);
        return s(
          'g',
          {},
          s('path', {
            d: `M58,${ey} C80,${ey} ${left - 40},${y} ${left},${y}`,
            fill: 'none',
            stroke: colour('accent'),
            'stroke-width': w(value),
            'stroke-opacity': 0.35
          }),
          write(2, ey - 8, name === 'token' ? short(facts.ids[t], 7) : name, {class: name === 'token' ? 'mono' : ''}),
          write(2, ey + 8, fixed(value), {fill: colour('muted'), 'font-size': 11})
        );
      }),
      s('polygon', {points: outline, fill: colour('accent'), 'fill-opacity': 0.24}),
      Array.from({length: L}, (_, l) => [
        part(l, 'Attention', at('size_attn', l, t)),
        part(l, 'MLP', at('size_mlp', l, t)),
        write(x(l) + block * 0.45, 8, `layer ${l}`, {'text-anchor': 'middle', fill: colour('muted'), 'font-size': 11})
      ]),
      s('path', {
        d: `M${width - right + 14},${y - w(streams[L]) / 2} l10,${w(streams[L]) / 2} l-10,${w(streams[L]) / 2}`,
        fill: colour('accent'),
        'fill-opacity': 0.24
      }),
      write(width - right + 34, y - 50, 'norm, head', {fill: colour('muted'), 'font-size': 11}),
      best.map((id, r) => [
        write(width - right + 34, y - 30 + 20 * r, short(id, 6), {class: 'mono', 'font-weight': r ? 400 : 700}),
        write(width - 2, y - 30 + 20 * r, percent(row('lens', L, t)[r]), {'text-anchor': 'end', fill: colour('muted')})
      ])
    ).setAttribute('role', 'group');
    if (focused >= 0) chart.querySelectorAll('[role=button]')[focused].focus({preventScroll: true});
    chart.say(
      `The stream begins with length ${fixed(streams[0])} and ends with ${fixed(streams[L])}; dashed lines read it, ribbons write into it.`
    );
  });
}

export function buildEmbedding() {
  const C = facts.model.n_embd,
    names = facts.embeddings,
    box = content('embedding');
  const note = {
    learned: 'Positions are learned: one row for each place.',
    sinusoidal: 'Positions are sines and cosines of falling frequency (Vaswani et al. 2017, section 3.5).',
    rope: 'Positions are rotary: nothing is added; in each head, pairs of numbers of queries and keys are turned by an angle that grows with the place, fast for some pairs and slowly for others (Su et al. 2021). The picture shows the cosine of these angles.',
    none: 'This model has no positions: only the causal mask tells what came before.'
  }[facts.model.position];
  if (arrays.embeddings) {
    const vector = (i, t) => row('embeddings', i, t);
    const total = t => {
      const out = new Float32Array(C);
      for (let i = 0; i < names.length; i++)
        vector(i, t).forEach((v, d) => {
          out[d] += v;
        });
      return out;
    };
    const rowNames = [...names, 'sum'];
    const all = t => (names.length > 1 ? [...names.map((_, i) => vector(i, t)), total(t)] : [vector(0, t)]);
    const strips = figure('embedding', 'The rows that are added', () => [
      ['dimension', ...rowNames.slice(0, all(state.t).length)],
      Array.from({length: C}, (_, d) => [d, ...all(state.t).map(v => v[d].toFixed(4))])
    ]);
    box.append(strips);
    watch(['t', 'theme'], () => {
      const rows = all(state.t),
        most = Math.max(1e-9, ...rows.map(v => v.reduce((a, b) => Math.max(a, Math.abs(b)), 0)));
      matrix(strips, {
        rows: rows.length,
        columns: C,
        at: (i, d) => diverging(rows[i][d] / most),
        tell: (i, d) => `${rowNames[i]}, dimension ${d}: ${fixed(rows[i][d], 4)}`,
        rowNames: i => rowNames[i],
        cellHeight: 30,
        most: 4000,
        label: `Embedding rows of position ${state.t}`
      });
      strips.heading.textContent = `The rows that are added at position ${state.t}: ${C} numbers each, orange below 0, blue above`;
    });
  } else box.append(missing());
  const near = figure('neighbours', 'Nearest tokens', () => [
    ['token', 'cosine'],
    neighbours().map(({id, value}) => [shown(id), value.toFixed(4)])
  ]);
  const neighbours = () => {
    const i = facts.distinct.indexOf(facts.ids[state.t]);
    return Array.from(row('near', i), (id, j) => ({id, value: row('cosines', i)[j]}));
  };
  watch(['t', 'theme'], () =>
    bars(
      near,
      neighbours().map(({id, value}) => ({label: short(id), value, text: fixed(value)})),
      'Nearest tokens by cosine',
      {low: Math.min(0, ...neighbours().map(x => x.value)), high: 1}
    )
  );
  watch(['t'], () => {
    near.heading.textContent = `Tokens whose embeddings are nearest to ${shown(facts.ids[state.t])}, by cosine`;
  });
  const place = names.indexOf('position'),
    rope = arrays.rotary;
  let picture = h('div', {class: 'card'}, h('h3', {}, 'Positions'), h('p', {}, note));
  if (rope || (place >= 0 && arrays.embeddings)) {
    const columns = rope ? rope.shape[1] : C,
      value = (t, d) => (rope ? rope.data[t * columns + d] : row('embeddings', place, t)[d]);
    picture = figure('positions', rope ? 'Positions: cosines of the angles' : 'Positions', () => [
      ['position', ...Array.from({length: columns}, (_, d) => d)],
      Array.from({length: T}, (_, t) => [t, ...Array.from({length: columns}, (_, d) => value(t, d).toFixed(4))])
    ]);
    const most = rope
      ? 1
      : Math.max(
          1e-9,
          row('embeddings', place).reduce((a, b) => Math.max(a, Math.abs(b)), 0)
        );
    watch(['theme'], () =>
      matrix(picture, {
        rows: T,
        columns,
        at: (t, d) => diverging(value(t, d) / most),
        tell: (t, d) => `position ${t}, ${rope ? 'pair' : 'dimension'} ${d}: ${fixed(value(t, d), 3)}`,
        label: 'Positions (rows) and their numbers (columns)',
        cellHeight: Math.max(2, Math.min(12, 240 / T)),
        most: 4000,
        pick: t => set({t})
      })
    );
    picture.append(h('p', {class: 'note'}, note));
  }
  box.append(h('div', {class: 'columns'}, near, picture));
}
