// MLP neurons, the logit lens, and the sum that a logit is.

import {bars, drawing, write} from './charts.js';
import {
  L,
  T,
  arrays,
  chip,
  choice,
  colour,
  content,
  css,
  facts,
  figure,
  fixed,
  grouped,
  h,
  hideTip,
  known,
  missing,
  percent,
  row,
  s,
  sequential,
  set,
  short,
  showTip,
  shown,
  signed,
  state,
  target,
  textOn,
  watch
} from './core.js';

// MLP ---------------------------------------------------------------------------------------------------------------------------

const ACTIVATIONS = {
  relu: x => Math.max(0, x),
  relu2: x => Math.max(0, x) ** 2,
  swiglu: x => x / (1 + Math.exp(-x)),
  gelu_tanh: x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu: x => 0.5 * x * (1 + erf(x / Math.SQRT2))
};
/** Abramowitz and Stegun 1964, 7.1.26: within 1.5e-7, for a drawn curve. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  return (
    Math.sign(x) *
    (1 - t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-x * x))
  );
}

export function buildMlp() {
  const box = content('mlp');
  if (!arrays.neurons) return box.append(missing());
  const starts = facts.neuron_ids.reduce((all, ids) => [...all, all.at(-1) + ids.length], [0]);
  const neurons = () =>
    Array.from(row('neurons', state.layer, state.t), (id, i) => {
      const tokens = Array.from(row('neuron_tokens', starts[state.layer] + facts.neuron_ids[state.layer].indexOf(id))),
        half = tokens.length / 2;
      return {
        id,
        pre: row('neuron_pre', state.layer, state.t)[i],
        post: row('neuron_post', state.layer, state.t)[i],
        up: tokens.slice(0, half),
        down: tokens.slice(half)
      };
    });
  const gated = facts.model.activation === 'swiglu',
    before = gated ? 'gate' : 'before',
    curve = ACTIVATIONS[facts.model.activation];
  const list = figure(
    'neurons',
    'Strongest neurons',
    () => [
      ['neuron', before, 'after', 'raises', 'lowers'],
      neurons().map(n => [n.id, n.pre.toFixed(4), n.post.toFixed(4), n.up.map(shown).join(' '), n.down.map(shown).join(' ')])
    ],
    h(
      'div',
      {class: 'controls'},
      choice('layer', Object.fromEntries(Array.from({length: L}, (_, l) => [l, `layer ${l}`])), 'Layer')
    ),
    false
  );
  const plot = figure('activation', 'The activation', () => [
    ['neuron', before, 'after'],
    neurons().map(n => [n.id, n.pre.toFixed(4), n.post.toFixed(4)])
  ]);
  box.append(h('div', {class: 'columns wide-left'}, list, plot));
  watch(['t', 'layer', 'theme'], () => {
    const all = neurons();
    list.heading.textContent = `Layer ${state.layer}: the ${all.length} of ${grouped(facts.neurons_in_a_layer)} neurons that write most at ${shown(facts.ids[state.t])}`;
    const heads = ['neuron', before, 'after', 'when it is on it raises', 'and lowers'];
    list.picture.replaceChildren(
      h(
        'table',
        {class: 'rows', 'aria-label': 'Strongest neurons'},
        h(
          'thead',
          {},
          h(
            'tr',
            {},
            heads.map(text => h('th', {scope: 'col'}, text))
          )
        ),
        h(
          'tbody',
          {},
          all.map(n =>
            h(
              'tr',
              {},
              h('td', {}, String(n.id)),
              h('td', {}, fixed(n.pre)),
              h('td', {}, fixed(n.post)),
              h('td', {}, h('div', {class: 'list'}, n.up.map(chip))),
              h('td', {}, h('div', {class: 'list'}, n.down.map(chip)))
            )
          )
        )
      )
    );
    if (all.some(n => n.post < 0)) list.say('A neuron whose value is below 0 does the opposite of what the last columns say.');
    else list.readout.hidden = true;
    list.refresh();
    const width = plot.width(),
      height = 220,
      xs = all.map(n => n.pre),
      low = Math.min(-3, ...xs) * 1.05,
      high = Math.max(3, ...xs) * 1.05;
    const line = Array.from({length: 101}, (_, i) => low + ((high - low) * i) / 100).map(x => [x, curve(x)]),
      ys = [...line.map(p => p[1]), ...(gated ? [] : all.map(n => n.post))];
    const bottom = Math.min(-0.3, ...ys),
      top = Math.max(...ys),
      x = v => 34 + ((v - low) / (high - low)) * (width - 44),
      y = v => 12 + ((top - v) / (top - bottom)) * (height - 40);
    drawing(
      plot,
      width,
      height,
      'The activation function and the strongest neurons on it',
      s('line', {x1: 34, x2: width - 10, y1: y(0), y2: y(0), stroke: colour('line')}),
      s('line', {x1: x(0), x2: x(0), y1: 12, y2: height - 28, stroke: colour('line')}),
      write(width - 10, height - 12, before === 'gate' ? 'gate' : 'before the activation', {
        'text-anchor': 'end',
        fill: colour('muted'),
        'font-size': 11
      }),
      write(30, y(top), fixed(top, 1), {'text-anchor': 'end', fill: colour('muted'), 'font-size': 11}),
      write(30, y(0), '0', {'text-anchor': 'end', fill: colour('muted'), 'font-size': 11}),
      write(x(0), height - 20, '0', {'text-anchor': 'middle', fill: colour('muted'), 'font-size': 11}),
      s('polyline', {
        points: line.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' '),
        fill: 'none',
        stroke: colour('muted'),
        'stroke-width': 1.5
      }),
      all.map(n =>
        s(
          'circle',
          {cx: x(n.pre), cy: y(curve(n.pre)), r: 4.5, fill: colour('accent'), 'fill-opacity': 0.75},
          s('title', {}, `neuron ${n.id}: ${fixed(n.pre)} becomes ${fixed(n.post)}`)
        )
      )
    );
    plot.heading.textContent =
      {gelu_tanh: 'GELU (tanh)', gelu: 'GELU', relu: 'ReLU', relu2: 'ReLU²', swiglu: 'SwiGLU: SiLU of the gate, times a value'}[
        facts.model.activation
      ] + ', and these neurons on it';
  });
}

// The logit lens ------------------------------------------------------------------------------------------------------------------

export function buildLens() {
  const box = content('lens');
  const name = l => (l === 0 ? 'embedding' : l === L ? 'final' : 'layer ' + (l - 1));
  const lens = figure(
    'logit-lens',
    'Likeliest token after each layer',
    () => [
      ['after', 'position', 'token', 'likeliest', 'probability'],
      Array.from({length: L + 1}, (_, l) =>
        Array.from({length: T}, (_, t) => [
          name(l),
          t,
          shown(facts.ids[t]),
          shown(row('lens_ids', l, t)[0]),
          row('lens', l, t)[0].toFixed(5)
        ])
      ).flat()
    ],
    null,
    false
  );
  const top = figure('lens-top', 'Ten likeliest', () => [
    ['token', 'probability'],
    Array.from(row('lens_ids', state.lens, state.t), (id, i) => [shown(id), row('lens', state.lens, state.t)[i].toFixed(5)])
  ]);
  box.append(h('div', {class: 'columns wide-left'}, lens, top));
  const body = h('tbody'),
    holder = h(
      'div',
      {class: 'lens', tabindex: 0, role: 'region', 'aria-label': 'Logit lens: arrow keys choose a layer and a position'},
      h(
        'table',
        {},
        h(
          'thead',
          {},
          h(
            'tr',
            {},
            h('th', {scope: 'col'}, ''),
            facts.ids.map(id => h('th', {scope: 'col', class: 'mono', style: 'position:static;text-align:center'}, short(id, 8)))
          )
        ),
        body
      )
    );
  lens.picture.append(holder);
  const cells = Array.from({length: L + 1}, (_, l) =>
    Array.from({length: T}, (_, t) =>
      h('td', {class: 'mono', onclick: () => set({t, lens: l, source: -1})}, short(row('lens_ids', l, t)[0], 8))
    )
  );
  body.append(...cells.map((line, l) => h('tr', {}, h('th', {scope: 'row'}, name(l)), line)).toReversed());
  holder.addEventListener('pointermove', event => {
    const cell = event.target.closest('td'),
      l = cell ? cells.findIndex(line => line.includes(cell)) : -1;
    if (l < 0) return hideTip();
    const t = cells[l].indexOf(cell),
      p = row('lens', l, t);
    showTip(
      event,
      [
        `after ${name(l)}, at ${shown(facts.ids[t])} (${t})`,
        ...Array.from(row('lens_ids', l, t), (id, i) => `${shown(id)}  ${percent(p[i])}`)
      ].join('\n')
    );
  });
  holder.addEventListener('pointerleave', hideTip);
  holder.addEventListener('keydown', event => {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[event.key];
    if (!move) return;
    event.preventDefault();
    set({lens: Math.max(0, Math.min(L, state.lens + move[0])), t: Math.max(0, Math.min(T - 1, state.t + move[1])), source: -1});
  });
  watch(['theme'], () =>
    cells.forEach((line, l) =>
      line.forEach((cell, t) => {
        const rgb = sequential(row('lens', l, t)[0]);
        cell.style.background = css(rgb);
        cell.style.color = textOn(rgb);
        if (known(t) && row('lens_ids', l, t)[0] === facts.ids[t + 1]) cell.style.fontWeight = 700;
      })
    )
  );
  let last;
  watch(['t', 'lens', 'theme'], () => {
    last?.classList.remove('chosen');
    last = cells[state.lens][state.t];
    last.classList.add('chosen');
    const left = last.offsetLeft - 90,
      right = last.offsetLeft + last.offsetWidth + 20 - holder.clientWidth;
    if (holder.scrollLeft > left || holder.scrollLeft < right) holder.scrollLeft = Math.max(0, left - holder.clientWidth / 2);
    const ids = row('lens_ids', state.lens, state.t),
      p = row('lens', state.lens, state.t);
    bars(
      top,
      Array.from(ids, (id, i) => ({
        label: short(id),
        value: p[i],
        text: percent(p[i]),
        mark: known(state.t) && id === facts.ids[state.t + 1]
      })),
      'Ten likeliest tokens',
      {low: 0, high: 1}
    );
    top.heading.textContent = `After ${state.lens === L ? 'the final layer' : name(state.lens)}, at ${shown(facts.ids[state.t])}`;
  });
  lens.say('Bold: the token that really comes next.');
  const change = figure('lens-course', 'The probability of the next token, layer by layer', () => [
    ['after', 'probability'],
    course().map(([l, p]) => [name(l), p ? p.toFixed(5) : 'not in the top 10'])
  ]);
  const course = () =>
    Array.from({length: L + 1}, (_, l) => {
      const at = row('lens_ids', l, state.t).indexOf(target(state.t));
      return [l, at < 0 ? 0 : row('lens', l, state.t)[at]];
    });
  box.append(change);
  watch(['t', 'theme'], () => {
    bars(
      change,
      course().map(([l, p]) => ({label: name(l), value: p, text: p ? percent(p) : 'not in the top 10', plain: true})),
      'Probability of the next token after each layer',
      {low: 0, high: 1, numbers: 110}
    );
    change.heading.textContent = `The probability of ${shown(target(state.t))}, layer by layer`;
  });
}

// The sum that a logit is ---------------------------------------------------------------------------------------------------------

const partName = ([kind, l, k]) =>
  kind === 'head' ? `head ${l}.${k}` : kind === 'mlp' ? `MLP ${l}` : kind === 'bias' ? 'biases' : kind;

export function buildWhy() {
  const box = content('why'),
    MOST = 26;
  const tokens = () => Array.from(row('part_tokens', state.t));
  const shares = () => {
    const all = tokens(),
      other = all.indexOf(state.versus);
    return facts.parts.map((part, i) => ({
      name: partName(part),
      part,
      value: row('parts', i, state.t)[0] - (other > 0 ? row('parts', i, state.t)[other] : 0)
    }));
  };
  const select = h('select', {id: 'versus', onchange: event => set({versus: Number(event.target.value)})});
  const chart = figure(
    'why',
    'Parts of the logit',
    () => [
      ['part', 'share'],
      [
        ...shares().map(x => [x.name, x.value.toFixed(5)]),
        [
          'sum',
          shares()
            .reduce((sum, x) => sum + x.value, 0)
            .toFixed(5)
        ]
      ]
    ],
    h(
      'div',
      {class: 'controls'},
      h('label', {for: 'versus'}, 'Compare with'),
      select,
      h('span', {}, 'Order'),
      choice('sort', {place: 'by layer', size: 'by size'}, 'Order of the parts')
    )
  );
  box.append(chart);
  watch(['t', 'versus', 'sort', 'theme'], () => {
    const all = tokens(),
      other = all.indexOf(state.versus),
      logits = row('part_logits', state.t),
      main = all[0];
    select.replaceChildren(
      h('option', {value: -1}, 'nothing: the logit itself'),
      ...all.slice(1).map((id, i) => h('option', {value: id}, `${shown(id)}   (logit ${fixed(logits[i + 1])})`))
    );
    select.value = other > 0 ? state.versus : -1;
    const parts = shares(),
      sum = parts.reduce((total, x) => total + x.value, 0),
      logit = logits[0] - (other > 0 ? logits[other] : 0);
    const large = parts.toSorted((a, b) => Math.abs(b.value) - Math.abs(a.value)),
      top = large.slice(0, MOST),
      rest = large.slice(MOST);
    let from = 0;
    const rows = (state.sort === 'size' ? top : parts.filter(x => top.includes(x))).map(x => {
      const line = {
        label: x.name,
        value: x.value,
        from,
        plain: true,
        tip: `${x.name}: ${signed(x.value, 4)}\nsum so far: ${fixed(from + x.value, 4)}`,
        act:
          x.part[0] === 'head'
            ? () => {
                set({layer: x.part[1], head: x.part[2], source: -1});
                document.getElementById('head').scrollIntoView();
              }
            : x.part[0] === 'mlp'
              ? () => {
                  set({layer: x.part[1]});
                  document.getElementById('mlp').scrollIntoView();
                }
              : undefined
      };
      from += x.value;
      return line;
    });
    if (rest.length) {
      const value = rest.reduce((total, x) => total + x.value, 0);
      rows.push({label: `${rest.length} others`, value, from, plain: true});
      from += value;
    }
    rows.push({label: other > 0 ? 'difference' : 'logit', value: sum, text: fixed(sum, 3), total: true, mark: true, plain: true});
    bars(chart, rows, 'Waterfall: the parts of the logit, one after the other', {step: 19});
    chart.heading.textContent =
      other > 0
        ? `Why ${shown(main)} rather than ${shown(all[other])}, after ${shown(facts.ids[state.t])}`
        : `Why ${shown(main)} after ${shown(facts.ids[state.t])}: what its logit is made of`;
    chart.say(
      `The parts sum to ${fixed(sum, 5)}; the model's ${other > 0 ? 'difference of logits' : 'logit'} is ${fixed(logit, 5)}.` +
        (facts.model.bias ? ' Biases: those of all output projections and of the final norm.' : '') +
        (facts.model.logit_softcap ? ' Softcap: what the cap takes off.' : '') +
        (known(state.t) ? '' : ' The text ends here: this is the likeliest token.')
    );
  });
}
