// How the run went, and, with --checkpoints=all, how its heads came to be.

import {headGrid, lines} from './charts.js';
import {H, L, content, facts, figure, fixed, grouped, h, row, set, watch} from './core.js';
import {KINDS} from './heads.js';

export function buildTraining() {
  const box = content('training'),
    {curves} = facts.run,
    columns = h('div', {class: 'columns'});
  const chart = (name, title, series, options) => {
    const rows = () => series.flatMap(line => line.points.map(([step, value]) => [line.name || title, step, value]));
    const element = figure(name, title, () => [['curve', 'step', 'value'], rows()]);
    columns.append(element);
    watch(['theme'], () => lines(element, series, title, {xName: 'step', ...options}));
  };
  if (Object.values(curves).some(points => points.length)) {
    chart('loss-curve', 'Loss', [
      {name: 'training', points: curves.loss, tone: 'muted'},
      {name: 'validation', points: curves.val_loss, tone: 'accent'}
    ]);
    chart('lr-curve', 'Learning rate', [{points: curves.lr, tone: 'accent'}], {zero: true});
    chart('speed-curve', 'Tokens per second', [{points: curves.tokens_per_second, tone: 'accent'}], {zero: true});
  } else box.append(h('p', {class: 'note'}, 'These weights come without a log, so there are no training curves.'));
  box.append(columns);
  if (facts.history) buildHistory(box);
  else
    box.append(
      h(
        'p',
        {class: 'note'},
        'To see how the heads came to be, train with a larger --keep_last and run explain.py with ',
        h('code', {}, '--checkpoints=all'),
        '.'
      )
    );
}

function buildHistory(box) {
  const {steps, losses, val_losses, first_half, second_half} = facts.history,
    n = steps.length;
  if (!n) return box.append(h('p', {class: 'note'}, 'There are no checkpoints in this folder to compare.'));
  const columns = h('div', {class: 'columns two'}),
    names = facts.score_names,
    of = (i, name, l, k) => row('history', i, names.indexOf(name), l)[k];
  const curve = values => values.flatMap((v, i) => (v === null ? [] : [[steps[i], v]]));
  const add = (name, title, series, options, say) => {
    const element = figure(name, title, () => [
      ['curve', 'step', 'value'],
      series.flatMap(line => line.points.map(([step, v]) => [line.title || line.name || '', step, v]))
    ]);
    columns.append(element);
    watch(['theme'], () => lines(element, series, title, {xName: 'step', ...options}));
    if (say) element.say(say);
  };
  add('history-losses', 'Losses over the checkpoints', [
    {name: facts.live ? 'the first text' : 'this text', points: curve(losses), tone: 'muted'},
    {name: 'validation', points: curve(val_losses), tone: 'accent'}
  ]);
  add(
    'history-repeats',
    'Random tokens that come twice',
    [
      {name: 'first time', points: curve(first_half), tone: 'muted'},
      {name: 'second time', points: curve(second_half), tone: 'accent'}
    ],
    {zero: true}
  );
  for (const name of ['induction', 'previous']) {
    const heads = Array.from({length: L * H}, (_, i) => ({
      title: `${Math.floor(i / H)}.${i % H}`,
      points: steps.map((step, c) => [step, of(c, name, Math.floor(i / H), i % H)]).filter(p => Number.isFinite(p[1])),
      tone: 'accent',
      faint: true
    }));
    const last = line => line.points.at(-1)?.[1] ?? 0,
      best = heads.toSorted((a, b) => last(b) - last(a))[0];
    const when = best.points.find(p => p[1] > 0.3);
    add(
      'history-' + name,
      `${KINDS[name][0].toUpperCase()}${KINDS[name].slice(1)} score of every head`,
      [...heads, {...best, faint: false, name: `head ${best.title}`}],
      {zero: true, high: 1},
      when ? `Head ${best.title} passes 0.3 at step ${grouped(when[0])}.` : 'No head has passed 0.3.'
    );
  }
  box.append(columns);
  const chosen = [0, n - 1],
    sides = h('div', {class: 'columns two'});
  let by = 'induction';
  const draws = [];
  const kind = h(
    'select',
    {
      id: 'history-kind',
      onchange: event => {
        by = event.target.value;
        draws.forEach(draw => draw());
      }
    },
    names.map(name => h('option', {value: name, selected: name === by}, KINDS[name]))
  );
  [0, 1].forEach(side => {
    const select = h(
      'select',
      {
        'aria-label': `Checkpoint ${side + 1}`,
        onchange: event => {
          chosen[side] = Number(event.target.value);
          draws.forEach(draw => draw());
        }
      },
      steps.map((step, i) => h('option', {value: i, selected: i === chosen[side]}, `step ${grouped(step)}`))
    );
    const element = figure(
      'checkpoint-' + (side + 1),
      side ? 'and another' : 'One checkpoint',
      () => [
        ['head', by],
        Array.from({length: L * H}, (_, i) => [
          `${Math.floor(i / H)}.${i % H}`,
          of(chosen[side], by, Math.floor(i / H), i % H).toFixed(4)
        ])
      ],
      h('div', {class: 'controls'}, select),
      false
    );
    sides.append(element);
    const draw = () => {
      headGrid(
        element,
        L,
        H,
        (l, k) => of(chosen[side], by, l, k),
        `${KINDS[by]} scores at step ${steps[chosen[side]]}`,
        (l, k) => set({layer: l, head: k, source: -1})
      );
      element.say(
        `Loss of ${facts.live ? 'the first' : 'this'} text ${fixed(losses[chosen[side]], 3)}; repeated tokens ${fixed(first_half[chosen[side]], 2)}, then ${fixed(second_half[chosen[side]], 2)}.`
      );
    };
    draws.push(draw);
    watch(['theme'], draw);
  });
  box.append(h('div', {class: 'controls'}, h('label', {for: 'history-kind'}, 'Two checkpoints side by side, by'), kind), sides);
}
