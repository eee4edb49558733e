// What the weights say without a text: composition, copying, repetition; and bigrams.

import {bars, drawing, lines, matrix, points, write} from './charts.js';
import {
  H,
  L,
  arrays,
  choice,
  colour,
  content,
  diverging,
  facts,
  figure,
  fixed,
  grouped,
  h,
  missing,
  percent,
  row,
  s,
  sequential,
  set,
  short,
  shown,
  state,
  watch
} from './core.js';
import {score} from './heads.js';

const BASE = 1 / Math.sqrt(facts.model.n_embd),
  COMPOSITIONS = ['q', 'k', 'v'];

export function buildCircuits() {
  const box = content('circuits'),
    inexact = [facts.model.position === 'rope' && 'rotary positions', facts.model.qk_norm && 'the norm of queries and keys']
      .filter(Boolean)
      .join(' and ');
  if (facts.n_kv_head !== H)
    box.append(h('p', {class: 'note'}, `${H / facts.n_kv_head} query heads share each key and value head.`));
  buildRepeats(box);
  if (L > 1 && !arrays.compositions) box.append(missing());
  else if (L > 1) buildComposition(box, inexact);
  else box.append(h('p', {class: 'note'}, 'With one layer no head can read what another wrote.'));

  const eigen = figure('eigenvalues', 'OV eigenvalues', () => [
    ['real', 'imaginary'],
    values().map(p => [p.x.toFixed(4), p.y.toFixed(4)])
  ]);
  const values = () => {
    const data = row('eigenvalues', state.layer, state.head);
    return Array.from({length: data.length / 2}, (_, i) => ({x: data[2 * i], y: data[2 * i + 1]}));
  };
  const few = facts.circuit_ids,
    n = few.length,
    names = i => short(few[i], 8);
  const circuit = (key, title) => {
    const get = () => row(key, state.layer, state.head);
    const chart = figure(key, title, () => [
      [key === 'qk' ? 'query' : 'source', key === 'qk' ? 'key' : 'output', 'value'],
      Array.from(get(), (v, i) => [shown(few[Math.floor(i / n)]), shown(few[i % n]), v.toFixed(4)])
    ]);
    watch(['layer', 'head', 'theme'], () => {
      const data = get(),
        most = Math.max(
          1e-9,
          data.reduce((a, b) => Math.max(a, Math.abs(b)), 0)
        );
      matrix(chart, {
        rows: n,
        columns: n,
        most: 330,
        at: (i, j) => diverging(data[i * n + j] / most),
        rowNames: Object.assign(names, {mono: true}),
        columnNames: names,
        tell: (i, j) =>
          (key === 'qk'
            ? `${shown(few[i])} looks for ${shown(few[j])}: score `
            : `looking at ${shown(few[i])} moves the logit of ${shown(few[j])} by `) + fixed(data[i * n + j], 3),
        label: title
      });
    });
    return chart;
  };
  const qk = circuit('qk', 'QK: who looks for whom'),
    ov = circuit('ov', 'OV: who raises whom');
  const heading = h('h3', {});
  box.append(h('div', {class: 'controls'}, heading), h('div', {class: 'columns'}, qk, ov, eigen));
  watch(['layer', 'head', 'theme'], () => {
    heading.textContent = `Head ${state.layer}.${state.head} (chosen above), by its weights alone, for ${n < facts.distinct.length ? 'the first ' + n : 'the'} tokens of the text`;
    points(
      eigen,
      values().map(p => ({
        ...p,
        label: `${fixed(p.x, 3)} ${p.y < 0 ? '−' : '+'} ${fixed(Math.abs(p.y), 3)}i`,
        tone: p.x < 0 ? 'warm' : 'accent'
      })),
      'Eigenvalues of the OV circuit in the complex plane'
    );
    eigen.say(
      `Those right of the middle raise what they read, those left of it lower it. Copying score, their sum over the sum of their sizes: ${fixed(score('copying', state.layer, state.head), 3)}.`
    );
    qk.say(
      'Scores by embeddings alone, at one place' +
        (state.layer
          ? '; in this layer, what has been written since is not in it.'
          : facts.model.position === 'none' || facts.model.position === 'rope'
            ? '.'
            : '; positions are not in it.')
    );
    ov.say('In logits, against the mean of the vocabulary, at the mean scale of the final norm.');
  });
}

function buildRepeats(box) {
  const losses = Array.from(row('repeat_losses')),
    length = (losses.length + 1) / 2;
  if (!losses.length) return box.append(h('p', {class: 'note'}, 'The context is too short for the test of repeated tokens.'));
  const mean = part => part.reduce((a, b) => a + b, 0) / Math.max(1, part.length);
  const first = mean(losses.slice(0, length - 1)),
    second = mean(losses.slice(length));
  const chart = figure('repeats', `${length} random tokens, twice: can it repeat what it has seen once?`, () => [
    ['position predicted', 'loss'],
    losses.map((x, i) => [i + 1, x.toFixed(4)])
  ]);
  box.append(chart);
  watch(['theme'], () =>
    lines(
      chart,
      [{points: losses.map((x, i) => [i + 1, x]), tone: 'accent', name: 'loss'}],
      'Loss by position on repeated random tokens',
      {zero: true, xName: 'position', marks: [{x: length, label: 'the repetition begins'}]}
    )
  );
  chart.say(
    `Mean loss ${fixed(first)} in the first half, ${fixed(second)} in the second: ` +
      (second < first - 1
        ? 'the model repeats. Look for induction heads.'
        : second < first - 0.1
          ? 'the model has begun to repeat.'
          : 'the model does not repeat yet.')
  );
}

/** Pairs of a head that looks at the token before and a later one that does induction, the strongest first. */
function inductionPairs() {
  const pairs = [];
  for (let a = 0; a < L * H; a++)
    for (let b = (Math.floor(a / H) + 1) * H; b < L * H; b++) {
      const before = score('previous', Math.floor(a / H), a % H),
        induction = score('induction', Math.floor(b / H), b % H);
      if (before > 0.3 && induction > 0.3)
        pairs.push({writer: a, reader: b, strength: before * induction, k: row('compositions', 1, b)[a]});
    }
  return pairs.sort((a, b) => b.strength - a.strength || b.k - a.k);
}
const headName = n => `${Math.floor(n / H)}.${n % H}`;

function buildComposition(box, inexact) {
  const known = {};
  const edges = () =>
    (known[state.kind] ||= (() => {
      const all = [],
        kind = COMPOSITIONS.indexOf(state.kind);
      for (let b = H; b < L * H; b++)
        for (let a = 0; a < Math.floor(b / H) * H; a++)
          all.push({writer: a, reader: b, value: row('compositions', kind, b)[a] - BASE});
      return all.sort((x, y) => y.value - x.value);
    })());
  const output = h('output'),
    slider = h('input', {
      type: 'range',
      min: 0,
      max: 1,
      step: 0.005,
      'aria-label': 'Threshold',
      style: 'width:140px',
      oninput: event => set({threshold: Number(event.target.value)})
    });
  const chart = figure(
    'composition',
    'Composition',
    () => [
      ['writer', 'reader', 'score above chance'],
      edges().map(x => [headName(x.writer), headName(x.reader), x.value.toFixed(5)])
    ],
    h(
      'div',
      {class: 'controls'},
      choice('kind', {k: 'keys (K)', q: 'queries (Q)', v: 'values (V)'}, 'Kind of composition'),
      h('span', {}, 'above'),
      slider,
      output
    )
  );
  const pairs = inductionPairs(),
    list = figure(
      'pairs',
      'Induction pairs found',
      () => [
        ['previous-token head', 'induction head', 'previous', 'induction', 'K-composition above chance'],
        pairs.map(x => [
          headName(x.writer),
          headName(x.reader),
          score('previous', Math.floor(x.writer / H), x.writer % H).toFixed(4),
          score('induction', Math.floor(x.reader / H), x.reader % H).toFixed(4),
          (x.k - BASE).toFixed(4)
        ])
      ],
      null,
      false
    );
  box.append(h('div', {class: 'columns wide-left'}, chart, list));
  list.picture.append(
    pairs.length
      ? h(
          'table',
          {class: 'rows', 'aria-label': 'Induction pairs'},
          h(
            'thead',
            {},
            h(
              'tr',
              {},
              ['looks back', 'repeats', 'K-composition'].map(text => h('th', {scope: 'col'}, text))
            )
          ),
          h(
            'tbody',
            {},
            pairs.slice(0, 8).map(x =>
              h(
                'tr',
                {},
                [x.writer, x.reader].map((n, i) =>
                  h(
                    'td',
                    {},
                    h(
                      'button',
                      {
                        type: 'button',
                        onclick: () => {
                          set({layer: Math.floor(n / H), head: n % H, source: -1});
                          document.getElementById('head').scrollIntoView();
                        }
                      },
                      `${headName(n)} (${fixed(score(i ? 'induction' : 'previous', Math.floor(n / H), n % H))})`
                    )
                  )
                ),
                h('td', {}, (x.k > BASE ? '+' : '') + fixed(x.k - BASE, 3))
              )
            )
          )
        )
      : h(
          'p',
          {class: 'note'},
          'None: no head with a previous-token score above 0.3 comes before one with an induction score above 0.3. Small models learn this late, or never.'
        )
  );
  watch(['kind', 'threshold', 'layer', 'head', 'theme'], () => {
    const all = edges(),
      most = Math.max(1e-9, all[0]?.value ?? 0),
      shownEdges = all.filter((x, i) => x.value >= Math.max(1e-6, state.threshold * most) && i < (state.threshold ? 400 : 40));
    slider.value = state.threshold;
    output.textContent = state.threshold ? fixed(state.threshold * most, 3) : 'the 40 strongest';
    const width = chart.width(),
      left = 26,
      gap = (width - left - 26) / Math.max(1, L - 1),
      tall = Math.max(15, Math.min(34, 360 / H)),
      height = 30 + tall * H;
    const x = n => left + Math.floor(n / H) * gap,
      y = n => 34 + (n % H) * tall;
    drawing(
      chart,
      width,
      height,
      'Heads as points, a layer in each column; lines lead from the head that writes to the one that reads',
      Array.from({length: L}, (_, l) =>
        write(left + l * gap, 10, 'L' + l, {'text-anchor': 'middle', fill: colour('muted'), 'font-size': 11})
      ),
      shownEdges
        .toReversed()
        .map(edge =>
          s(
            'path',
            {
              d: `M${x(edge.writer)},${y(edge.writer)} C${x(edge.writer) + gap * 0.5},${y(edge.writer)} ${x(edge.reader) - gap * 0.5},${y(edge.reader)} ${x(edge.reader)},${y(edge.reader)}`,
              fill: 'none',
              stroke: colour('accent'),
              'stroke-width': 0.6 + (3 * edge.value) / most,
              'stroke-opacity': 0.2 + (0.7 * edge.value) / most
            },
            s('title', {}, `${headName(edge.reader)} reads ${headName(edge.writer)}: ${fixed(edge.value, 4)} above chance`)
          )
        ),
      Array.from({length: L * H}, (_, n) => {
        const me = n === state.layer * H + state.head;
        return s(
          'circle',
          {
            cx: x(n),
            cy: y(n),
            r: me ? 6 : 4,
            fill: colour(me ? 'ink' : 'panel'),
            stroke: colour(me ? 'ink' : 'muted'),
            'stroke-width': 1.5,
            style: 'cursor:pointer',
            onclick: () => set({layer: Math.floor(n / H), head: n % H, source: -1})
          },
          s('title', {}, `head ${headName(n)}`)
        );
      })
    );
    chart.heading.textContent = `${state.kind.toUpperCase()}-composition: who reads what an earlier head wrote`;
    chart.say(
      (all[0]
        ? `Strongest: ${headName(all[0].reader)} reads ${headName(all[0].writer)}, ${fixed(all[0].value + BASE, 3)}; matrices at random have 1/√${facts.model.n_embd} = ${fixed(BASE, 3)}, which is taken off.`
        : '') + (inexact ? ` Not exact: ${inexact} are left out.` : '')
    );
  });
}

// Bigrams -----------------------------------------------------------------------------------------------------------------------

export function buildBigrams() {
  const box = content('bigrams'),
    V = facts.vocab_size;
  const top = name => {
    const i = facts.distinct.indexOf(facts.ids[state.t]);
    return Array.from(row(`bigram_${name}_ids`, i), (id, j) => ({id, p: row(`bigram_${name}_p`, i)[j]}));
  };
  const lists = [
    ['whole', 'the whole model'],
    ['direct', 'the direct path']
  ].map(([name, title]) => {
    const chart = figure('bigram-' + name, title, () => [
      ['token', 'probability'],
      top(name).map(x => [shown(x.id), x.p.toFixed(5)])
    ]);
    watch(['t', 'theme'], () => {
      bars(
        chart,
        top(name).map(x => ({label: short(x.id), value: x.p, text: percent(x.p)})),
        `After ${shown(facts.ids[state.t])} alone, by ${title}`,
        {low: 0, high: 1}
      );
      chart.heading.textContent = `After ${shown(facts.ids[state.t])} alone, by ${title}`;
    });
    return chart;
  });
  box.append(h('div', {class: 'columns'}, lists));
  if (!arrays.bigrams_whole)
    return box.append(
      h('p', {class: 'note'}, `The full table is shown for vocabularies up to 512; this one has ${grouped(V)} tokens.`)
    );
  const tables = [
    ['whole', 'The whole model'],
    ['direct', 'The direct path']
  ].map(([name, title]) => {
    const data = arrays['bigrams_' + name].data;
    const chart = figure('bigrams-' + name, `${title}, all ${V} × ${V}: a token (row) and the next (column)`, () => [
      ['token', 'next', 'probability'],
      Array.from({length: V * V}, (_, i) => [shown(Math.floor(i / V)), shown(i % V), ((data[i] / 255) ** 2).toFixed(4)])
    ]);
    watch(['theme'], () =>
      matrix(chart, {
        rows: V,
        columns: V,
        at: (i, j) => sequential(data[i * V + j] / 255),
        tell: (i, j) => `after ${shown(i)} comes ${shown(j)}: ${percent((data[i * V + j] / 255) ** 2)}`,
        label: `${title}: probability of each next token (columns) after each token (rows)`,
        most: Math.max(470, V * 1.2),
        rowNames: V <= 48 ? Object.assign(i => shown(i), {mono: true}) : undefined
      })
    );
    return chart;
  });
  box.append(h('div', {class: 'columns'}, tables));
}
