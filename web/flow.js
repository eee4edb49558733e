// The residual stream at one position, and its input: token embedding and position.

import {bars, drawing, faint, matrix, svgText} from './charts.js';
import {
  choice,
  color,
  content,
  diverging,
  figure,
  fixed,
  h,
  maxAbs,
  percent,
  range,
  s,
  scrollToElement,
  set,
  state,
  watch
} from './core.js';
import {
  L,
  T,
  arrays,
  facts,
  isPostNorm,
  missing,
  openMlp,
  row,
  tokenLabel,
  tokenQuoted,
  tokenText
} from './model.js';
import {hasModel} from './live-model.js';
import {offButton} from './switches.js';

// Flow --------------------------------------------------------------------------------------------

/** Norms at position t: of each embedding, and of the stream and each output in every layer. */
function normsAt(t) {
  return {
    embeddings: facts.embeddings.map(name => row('size_' + name)[t]),
    stream: range(L + 1, l => row('size_stream', l)[t]),
    middle: range(L, l => row('size_middle', l)[t]),
    attn: range(L, l => row('size_attn', l)[t]),
    mlp: range(L, l => row('size_mlp', l)[t])
  };
}

function flowTable() {
  const norms = normsAt(state.t);
  const digits = x => x.toFixed(4);
  return [
    ['part', 'norm of its output', 'norm of the stream after it'],
    [
      ...facts.embeddings.map((name, i) => [name, digits(norms.embeddings[i]), '']),
      ['sum of embeddings', '', digits(norms.stream[0])],
      ...range(L, l => [
        [`attention ${l}`, digits(norms.attn[l]), digits(norms.middle[l])],
        [`MLP ${l}`, digits(norms.mlp[l]), digits(norms.stream[l + 1])]
      ]).flat()
    ]
  ];
}

export function buildFlow() {
  const layers = Object.fromEntries(range(L, l => [l, `layer ${l}`]));
  const controls = h(
    'div',
    {class: 'controls'},
    choice('layer', layers, 'Layer'),
    offButton(() => `attn${state.layer}`, 'layer'),
    offButton(() => `mlp${state.layer}`, 'layer')
  );
  const chart = figure('flow', 'Residual stream', flowTable, hasModel && controls);
  content('flow').append(chart);
  watch(['t', 'layer', 'theme'], () => {
    const buttons = () => [...chart.querySelectorAll('[role=button]')];
    const focused = buttons().indexOf(document.activeElement);
    drawFlow(chart, state.t);
    if (focused >= 0) buttons()[focused].focus({preventScroll: true});
  });
}

function drawFlow(chart, t) {
  const norms = normsAt(t);
  const all = [...norms.stream, ...norms.middle, ...norms.embeddings, ...norms.attn, ...norms.mlp];
  const scale = 54 / maxAbs(all);
  const width = Math.max(chart.width(), 222 + (isPostNorm ? 130 : 74) * L);
  const left = 104;
  const right = width - 118;
  const block = (right - left) / L;
  const x = layer => left + layer * block;
  const layout = {
    width,
    left,
    right,
    middle: 132,
    block,
    thickness: norm => Math.max(1, norm * scale),
    x,
    normAt: (layer, i) => x(layer) + block * [0.5, 0.98][i] // post-norm: ln_1, ln_2
  };
  const svg = drawing(
    chart,
    width,
    268,
    `Residual stream at position ${t}, from the embeddings to the logits`,
    flowEmbeddings(layout, norms, t),
    flowTrunk(layout, norms),
    isPostNorm && flowNorms(layout, norms),
    range(L, l => [
      flowPart(layout, norms, l, 'Attention'),
      flowPart(layout, norms, l, 'MLP'),
      svgText(layout.x(l) + layout.block * 0.45, 8, `layer ${l}`, faint('middle'))
    ]),
    flowPrediction(layout, t)
  );
  svg.setAttribute('role', 'group');
  chart.heading.textContent = `Norms at position ${t}: stream, attention, MLP`;
  chart.setReadout(
    `Norm of the stream: ${fixed(norms.stream[0])} after the embeddings, ` +
      `${fixed(norms.stream[L])} at the end. Dashed lines read from it; solid bands write to it.` +
      (isPostNorm ? ' Post-norm: after each sum, a norm (bar) rescales the stream.' : '')
  );
}

function flowEmbeddings({left, middle, thickness}, norms, t) {
  const names = facts.embeddings;
  return names.map((name, i) => {
    const y = middle + (i - (names.length - 1) / 2) * 62;
    const isToken = name === 'token';
    const label = isToken ? tokenLabel(facts.ids[t], 7) : name;
    return s(
      'g',
      {},
      s('path', {
        d: `M58,${y} C80,${y} ${left - 40},${middle} ${left},${middle}`,
        fill: 'none',
        stroke: color('accent'),
        'stroke-width': thickness(norms.embeddings[i]),
        'stroke-opacity': 0.35
      }),
      svgText(2, y - 8, label, {class: isToken ? 'mono' : ''}),
      svgText(2, y + 8, fixed(norms.embeddings[i]), faint('start'))
    );
  });
}

/** The stream itself, with an arrow at its end. */
function flowTrunk({left, right, middle, block, thickness, x, normAt}, norms) {
  const {stream} = norms;
  const end = right + 14;
  const profile = [
    [left - 22, thickness(stream[0])],
    [left, thickness(stream[0])],
    ...range(L, l => [
      isPostNorm && [normAt(l, 0), thickness(stream[l])],
      [isPostNorm ? normAt(l, 0) : x(l) + block * 0.66, thickness(norms.middle[l])],
      isPostNorm && [normAt(l, 1), thickness(norms.middle[l])],
      [isPostNorm ? normAt(l, 1) : x(l + 1) - block * 0.1, thickness(stream[l + 1])]
    ]).flat(),
    [end, thickness(stream[L])]
  ];
  const edge = profile.filter(Boolean);
  const top = edge.map(([px, height]) => `${px},${middle - height / 2}`);
  const bottom = edge.toReversed().map(([px, height]) => `${px},${middle + height / 2}`);
  const half = thickness(stream[L]) / 2;
  const fill = {fill: color('accent'), 'fill-opacity': 0.24};
  return [
    s('polygon', {points: [...top, ...bottom].join(' '), ...fill}),
    s('path', {d: `M${end},${middle - half} l10,${half} l-10,${half}`, ...fill})
  ];
}

/** Post-norm: a bar across the stream after each sum. */
function flowNorms({middle, thickness, normAt}, norms) {
  const bar = (px, norm) => {
    const half = thickness(norm) / 2 + 6;
    const ends = {x1: px, x2: px, y1: middle - half, y2: middle + half};
    return s('line', {...ends, stroke: color('ink'), 'stroke-width': 2});
  };
  return range(L, l => [
    bar(normAt(l, 0), norms.middle[l]),
    bar(normAt(l, 1), norms.stream[l + 1])
  ]);
}

/** The attention (above the stream) or MLP (below) of a layer, as a button that opens its panel. */
function flowPart({middle, block, thickness, x, normAt}, norms, layer, kind) {
  const isAttention = kind === 'Attention';
  const norm = isAttention ? norms.attn[layer] : norms.mlp[layer];
  const side = isAttention ? -1 : 1;
  const joins = isPostNorm ? 0.22 : 0.34; // so far right of its box
  const places = isPostNorm ? [0.22, 0.72] : [0.34, 0.6];
  const centerX = x(layer) + block * places[isAttention ? 0 : 1];
  const centerY = middle + side * 84;
  const edgeY = centerY - side * 12; // of the box, towards the stream
  const boxWidth = Math.min(66, block * 0.92);
  const tone = color(isAttention ? 'accent' : 'muted');
  const isSelected = layer === state.layer;
  const open = () => {
    if (!isAttention) return openMlp(layer);
    set({layer});
    scrollToElement(document.getElementById('head'));
  };

  const [before, after] = isAttention
    ? [norms.stream[layer], norms.middle[layer]]
    : [norms.middle[layer], norms.stream[layer + 1]];
  const streamHalf = (thickness(before) + thickness(after)) / 4;
  const joinY = middle + side * Math.max(0, streamHalf - thickness(norm) / 2);
  const joinX = centerX + block * joins;
  const leftOfBand = centerX - Math.max(8, thickness(norm) / 2 + 3);
  const isBehindNorm = isPostNorm && !isAttention;
  const readX = isBehindNorm ? Math.max(leftOfBand, normAt(layer, 0) + 4) : leftOfBand;
  const readPath = `M${readX},${middle} L${readX},${edgeY}`;
  const writePath =
    `M${centerX},${edgeY} C${centerX},${middle + side * 24} ` +
    `${centerX + block * 0.06},${joinY} ${joinX},${joinY}`;
  const label = boxWidth < 60 && isAttention ? 'Attn' : kind;
  return s(
    'g',
    {
      role: 'button',
      tabindex: 0,
      style: 'cursor:pointer',
      'aria-label': `${label} ${fixed(norm)}: ${kind} of layer ${layer}, norm of its output`,
      onclick: open,
      onkeydown: event => {
        if (event.key !== 'Enter' && event.key !== ' ') return;
        event.preventDefault();
        open();
      }
    },
    s('path', {
      d: readPath,
      fill: 'none',
      stroke: tone,
      'stroke-opacity': 0.7,
      'stroke-dasharray': '2 3'
    }),
    s('path', {
      d: writePath,
      fill: 'none',
      stroke: tone,
      'stroke-width': thickness(norm),
      'stroke-opacity': 0.55
    }),
    s('rect', {
      x: centerX - boxWidth / 2,
      y: centerY - 13,
      width: boxWidth,
      height: 26,
      rx: 5,
      fill: color('panel'),
      stroke: isSelected ? color('ink') : tone,
      'stroke-width': isSelected ? 2 : 1
    }),
    svgText(centerX, centerY, label, {'text-anchor': 'middle'}),
    ' ', // between the words of its name
    svgText(centerX, centerY + side * 24, fixed(norm), faint('middle'))
  );
}

/** The most likely next tokens, right of the stream. */
function flowPrediction({width, right, middle}, t) {
  const x = right + 34;
  const ids = Array.from(row('lens_ids', L, t)).slice(0, 4);
  return [
    svgText(x, middle - 50, isPostNorm ? 'lm_head' : 'norm, lm_head', faint('start')),
    ids.map((id, rank) => {
      const y = middle - 30 + 20 * rank;
      const probability = percent(row('lens', L, t)[rank]);
      return [
        svgText(x, y, tokenLabel(id, 6), {class: 'mono', 'font-weight': rank ? 400 : 700}),
        svgText(width - 2, y, probability, {'text-anchor': 'end', fill: color('muted')})
      ];
    })
  ];
}

// Embedding and positions -------------------------------------------------------------------------

const POSITION_NOTES = {
  learned: 'Learned positional embeddings: one vector per position, as in GPT-2.',
  sinusoidal:
    'Sinusoidal positional encoding: sines and cosines of decreasing frequency ' +
    '(Vaswani et al. 2017, section 3.5).',
  rope:
    'Rotary position embedding (RoPE, Su et al. 2021): nothing is added to the token embedding. ' +
    'In each head, pairs of dimensions of queries and keys are rotated by an angle proportional ' +
    'to the position, fast in the first pairs, slowly in the last. The plot shows the cosine of ' +
    'each angle.',
  none: 'No positional encoding: only the attention mask tells the model what came before.'
};

export function buildEmbedding() {
  const box = content('embedding');
  box.append(arrays.embeddings ? embeddingFigure() : missing());
  box.append(h('div', {class: 'columns'}, neighborsFigure(), positionsFigure()));
}

function embeddingFigure() {
  const C = facts.model.n_embd;
  const names = [...facts.embeddings];
  if (names.length > 1) names.push('sum');
  const vectorsAt = t => {
    const vectors = facts.embeddings.map((_, i) => row('embeddings', i, t));
    if (vectors.length === 1) return vectors;
    const total = new Float32Array(C);
    for (const vector of vectors) vector.forEach((x, d) => (total[d] += x));
    return [...vectors, total];
  };
  const hasPositions = facts.model.position !== 'none';
  const switches = [
    facts.embeddings.includes('n-grams') && offButton(() => 'ngrams'),
    hasPositions && offButton(() => 'positions')
  ];
  const controls = hasModel && h('div', {class: 'controls'}, switches);
  const table = () => {
    const vectors = vectorsAt(state.t);
    const rows = range(C, d => [d, ...vectors.map(vector => vector[d].toFixed(4))]);
    return [['dimension', ...names], rows];
  };
  const chart = figure('embedding', 'Embedding vectors', table, controls);
  chart.setReadout(`${C} dimensions. Blue: positive, orange: negative.`);
  watch(['t', 'theme'], () => {
    const vectors = vectorsAt(state.t);
    const largest = Math.max(...vectors.map(maxAbs));
    matrix(chart, {
      rows: vectors.length,
      columns: C,
      cellColor: (i, d) => diverging(vectors[i][d] / largest),
      describe: (i, d) => `${names[i]}, dimension ${d}: ${fixed(vectors[i][d], 4)}`,
      rowName: i => names[i],
      columnAxis: `dimension, 0 to ${C - 1}`,
      cellHeight: 30,
      maxSize: 4000,
      label: `Embedding vectors at position ${state.t}`
    });
    chart.heading.textContent = `Embedding at position ${state.t}`;
  });
  return chart;
}

function neighborsFigure() {
  const neighbors = () => {
    const i = facts.distinct.indexOf(facts.ids[state.t]);
    return Array.from(row('near', i), (id, j) => ({id, cosine: row('cosines', i)[j]}));
  };
  const chart = figure('neighbors', 'Nearest tokens', () => [
    ['token', 'cosine similarity'],
    neighbors().map(({id, cosine}) => [tokenText(id), cosine.toFixed(4)])
  ]);
  watch(['t', 'theme'], () => {
    const all = neighbors();
    const rows = all.map(({id, cosine}) => ({
      label: tokenLabel(id),
      value: cosine,
      text: fixed(cosine)
    }));
    const low = Math.min(0, ...all.map(x => x.cosine));
    bars(chart, rows, 'Nearest tokens by cosine similarity', {low, high: 1});
    const token = tokenQuoted(facts.ids[state.t]);
    chart.heading.textContent = `Nearest tokens to ${token} by cosine similarity`;
  });
  return chart;
}

function positionsFigure() {
  const note = POSITION_NOTES[facts.model.position] ?? `position = ${facts.model.position}`;
  const rotary = arrays.rotary;
  const index = facts.embeddings.indexOf('position');
  if (!rotary && (index < 0 || !arrays.embeddings)) {
    return h('div', {class: 'card'}, h('h3', {}, 'Positions'), h('p', {}, note));
  }
  const columns = rotary ? rotary.shape[1] : facts.model.n_embd;
  const vectorAt = t => (rotary ? row('rotary', t) : row('embeddings', index, t));
  const largest = rotary ? 1 : maxAbs(row('embeddings', index));
  const title = rotary ? 'RoPE: cosines of the angles' : 'Positional embeddings';
  const chart = figure('positions', title, () => [
    ['position', ...range(columns, d => d)],
    range(T, t => [t, ...Array.from(vectorAt(t), x => x.toFixed(4))])
  ]);
  const columnKind = rotary ? 'pair' : 'dimension';
  watch(['theme'], () =>
    matrix(chart, {
      rows: T,
      columns,
      cellColor: (t, d) => diverging(vectorAt(t)[d] / largest),
      describe: (t, d) => `position ${t}, ${columnKind} ${d}: ${fixed(vectorAt(t)[d], 3)}`,
      rowAxis: 'position',
      columnAxis: `${columnKind}, 0 to ${columns - 1}`,
      label: `${title}: rows are positions, columns ${columnKind}s`,
      cellHeight: Math.max(2, Math.min(12, 240 / T)),
      maxSize: 4000,
      onPick: t => set({t})
    })
  );
  chart.append(h('p', {class: 'note'}, note));
  return chart;
}
