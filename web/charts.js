// Four kinds of pictures: bars, lines, points and matrices. Each draws itself into a figure's .picture, as wide as that is.

import {colour, css, diverging, fixed, h, hideTip, s, showTip, signed, textOn} from './core.js';

/** A drawing of this size in CSS pixels, put in the place of what was there. */
export function drawing(figure, width, height, label, ...children) {
  const svg = s(
    'svg',
    {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: 'img',
      'aria-label': label,
      'font-family': getComputedStyle(document.body).fontFamily,
      'font-size': 12
    },
    children
  );
  figure.picture.replaceChildren(svg);
  figure.refresh();
  return svg;
}

export const write = (x, y, text, attributes) =>
  s('text', {x, y, fill: colour('ink'), 'dominant-baseline': 'central', ...attributes}, text);

/** Horizontal bars. rows: [{label, value, text, ghost, from, mark, act, tip}], value and ghost (an outline) on one scale; from:
 *  where the bar begins, for a waterfall. Negative values go to the left of the zero. */
export function bars(figure, rows, label, {numbers = 64, step = 20, low, high} = {}) {
  const names = 108,
    width = figure.width(),
    plot = Math.max(40, width - names - numbers);
  const ends = rows.flatMap(row => [row.value + (row.from || 0), row.from || 0, row.ghost ?? 0]);
  low = low ?? Math.min(0, ...ends);
  high = high ?? Math.max(1e-9, ...ends);
  const largest = Math.max(...rows.map(row => Math.abs(row.value))),
    digits = largest < 0.095 ? 4 : largest < 0.95 ? 3 : 2;
  const x = value => names + ((value - low) / (high - low)) * plot;
  drawing(
    figure,
    width,
    Math.max(1, rows.length) * step + 4,
    label,
    low < 0 && s('line', {x1: x(0), x2: x(0), y1: 0, y2: rows.length * step, stroke: colour('line')}),
    rows.map((row, i) => {
      const from = row.from || 0,
        to = from + row.value,
        y = i * step + 2;
      const bar = [
        row.ghost !== undefined &&
          s('rect', {
            x: x(0),
            y: y + 1.5,
            width: Math.max(0, x(row.ghost) - x(0)),
            height: step - 7,
            fill: 'none',
            stroke: colour('muted'),
            'stroke-opacity': 0.6
          }),
        s('rect', {
          x: Math.min(x(from), x(to)),
          y: y + 1,
          width: Math.max(row.value ? 1 : 0, Math.abs(x(to) - x(from))),
          height: step - 6,
          rx: 1.5,
          fill: row.total ? colour('muted') : colour(row.value < 0 ? 'warm' : 'accent')
        }),
        write(names - 8, y + step / 2 - 2, row.label, {
          'text-anchor': 'end',
          class: row.plain ? '' : 'mono',
          'font-weight': row.mark ? 700 : 400
        }),
        write(width - 2, y + step / 2 - 2, row.text ?? signed(row.value, digits), {
          'text-anchor': 'end',
          fill: colour('muted'),
          'font-weight': row.mark ? 700 : 400
        })
      ];
      return s(
        'g',
        {
          style: row.act ? 'cursor:pointer' : '',
          onclick: row.act,
          onpointermove: row.tip && (event => showTip(event, row.tip)),
          onpointerleave: row.tip && hideTip
        },
        s('rect', {x: 0, y, width, height: step, fill: 'transparent'}),
        bar
      );
    })
  );
}

/** Round numbers from low to high, about n of them. */
function ticks(low, high, n = 4) {
  const rough = (high - low) / n || 1,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(f => f >= rough * 0.999),
    out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step)
    out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}
const compact = x =>
  x === 0
    ? '0'
    : Math.abs(x) >= 1e6
      ? x / 1e6 + 'M'
      : Math.abs(x) >= 1e4
        ? x / 1e3 + 'k'
        : Math.abs(x) < 0.01
          ? x.toExponential(0).replace('e-', 'e−')
          : String(Number(x.toPrecision(4)));

/** Lines. series: [{name, points: [[x, y]], tone, faint}]; y from 0 if `zero`; marks: [{x, label}] are vertical lines. */
export function lines(figure, series, label, {zero = false, high, xName = '', marks = []} = {}) {
  const width = figure.width(),
    height = 190,
    left = 44,
    right = 10,
    top = 22,
    bottom = 34;
  const all = series.flatMap(line => line.points);
  if (!all.length) return figure.picture.replaceChildren(h('p', {class: 'note'}, 'There is nothing to show.'));
  const xs = all.map(p => p[0]),
    ys = all.map(p => p[1]);
  const x0 = Math.min(...xs),
    x1 = Math.max(...xs, x0 + 1e-9),
    y0 = zero ? Math.min(0, ...ys) : Math.min(...ys),
    y1 = high ?? Math.max(...ys, y0 + 1e-9);
  const x = v => left + ((v - x0) / (x1 - x0)) * (width - left - right),
    y = v => top + ((y1 - v) / (y1 - y0)) * (height - top - bottom);
  let at = left;
  drawing(
    figure,
    width,
    height,
    label,
    ticks(y0, y1).map(v => [
      s('line', {x1: left, x2: width - right, y1: y(v), y2: y(v), stroke: colour('line')}),
      write(left - 6, y(v), compact(v), {'text-anchor': 'end', fill: colour('muted'), 'font-size': 11})
    ]),
    ticks(x0, x1, Math.max(3, Math.floor(width / 110))).map(v =>
      write(x(v), height - bottom + 12, compact(v), {'text-anchor': 'middle', fill: colour('muted'), 'font-size': 11})
    ),
    write(width - right, height - 8, xName, {'text-anchor': 'end', fill: colour('muted'), 'font-size': 11}),
    marks.map(mark => [
      s('line', {x1: x(mark.x), x2: x(mark.x), y1: 4, y2: height - bottom, stroke: colour('muted'), 'stroke-dasharray': '2 3'}),
      write(x(mark.x) + 4, 9, mark.label, {fill: colour('muted'), 'font-size': 11})
    ]),
    series.map(line =>
      line.points.length > 1
        ? s('polyline', {
            points: line.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' '),
            fill: 'none',
            stroke: colour(line.tone),
            'stroke-width': line.faint ? 1 : 1.75,
            'stroke-opacity': line.faint ? 0.3 : 1,
            'stroke-linejoin': 'round'
          })
        : line.points.map(([a, b]) => s('circle', {cx: x(a), cy: y(b), r: 3, fill: colour(line.tone)}))
    ),
    series
      .filter(line => line.name)
      .map(line => {
        const key = [
          s('line', {x1: at, x2: at + 16, y1: 9, y2: 9, stroke: colour(line.tone), 'stroke-width': 2}),
          write(at + 21, 9, line.name, {fill: colour('muted')})
        ];
        at += 38 + 6.4 * line.name.length;
        return key;
      })
  );
}

/** A matrix on a canvas, a cell for each number.
 *  rows, columns: how many; at(i, j): an [r, g, b], or null for nothing; tell(i, j): what a cell says in words.
 *  pick(i, j): a click or Enter on it; chosen(i, j): whether it is framed; rowNames, columnNames: label of i or j.
 *  Arrow keys move over it and say where they are. */
export function matrix(figure, {rows, columns, at, tell, pick, chosen, rowNames, columnNames, label, cellHeight, most = 480}) {
  const cap = Math.max(26, Math.min(72, 480 / Math.max(columns, cellHeight ? 1 : rows))); // few cells may be large
  const room = figure.width(),
    fit = margin => Math.max(1.2, Math.min(most / Math.max(rows, columns), (room - margin) / columns, cap));
  let left = rowNames ? Math.min(cellHeight ? 96 : 66, room * 0.3) : 0;
  if (!cellHeight && fit(left) < 10) left = 0; // too small for names
  const cell = fit(left),
    tall = cellHeight || cell,
    longest = columnNames && cell >= 10 ? Math.max(...Array.from({length: columns}, (_, j) => [...columnNames(j)].length)) : 0,
    below = longest && 10 + 7 * longest;
  const width = left + cell * columns,
    height = tall * rows + below,
    ratio = window.devicePixelRatio || 1;
  const canvas = h('canvas', {
    width: Math.round(width * ratio),
    height: Math.round(height * ratio),
    style: `width:${width}px;height:${height}px`,
    tabindex: 0,
    role: 'img',
    'aria-label': label + '. Arrow keys read it cell by cell.'
  });
  const pen = canvas.getContext('2d');
  let cursor = figure.cursor || null; // it outlives a new drawing
  const paint = () => {
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = colour('panel'); // a picture that is saved has it too
    pen.fillRect(0, 0, width, height);
    const gap = cell >= 7 ? 1 : 0;
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < columns; j++) {
        const rgb = at(i, j);
        if (!rgb) continue;
        pen.fillStyle = css(rgb);
        pen.fillRect(left + j * cell, i * tall, cell - gap + (gap ? 0 : 0.3), tall - (tall >= 7 ? 1 : -0.3));
      }
    pen.font = '11px ' + getComputedStyle(document.body).fontFamily;
    pen.fillStyle = colour('muted');
    pen.textBaseline = 'middle';
    const mono = '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
    if (left)
      for (let i = 0; i < rows; i++) {
        pen.textAlign = 'right';
        pen.font = rowNames.mono ? mono : pen.font;
        pen.fillText(rowNames(i), left - 6, (i + 0.5) * tall, left - 8);
      }
    if (below)
      for (let j = 0; j < columns; j++) {
        pen.save();
        pen.font = mono;
        pen.translate(left + (j + 0.5) * cell, rows * tall + 5);
        pen.rotate(-Math.PI / 2);
        pen.textAlign = 'right';
        pen.fillText(columnNames(j), 0, 0, below - 6);
        pen.restore();
      }
    pen.strokeStyle = colour('ink');
    pen.lineWidth = 1.5;
    if (chosen)
      for (let i = 0; i < rows; i++)
        for (let j = 0; j < columns; j++)
          if (chosen(i, j)) {
            pen.strokeRect(left + j * cell, i * tall, Math.max(cell - gap, 2), Math.max(tall - gap, 2));
            pen.globalAlpha = 0.4; // and its row and column
            if (rows > 4) pen.strokeRect(left, i * tall, cell * columns, tall);
            if (rows > 4) pen.strokeRect(left + j * cell, 0, cell, tall * rows);
            pen.globalAlpha = 1;
          }
    if (cursor) pen.strokeRect(left + cursor[1] * cell, cursor[0] * tall, cell, tall);
  };
  const where = event => {
    const box = canvas.getBoundingClientRect();
    const i = Math.floor((event.clientY - box.top) / tall),
      j = Math.floor((event.clientX - box.left - left) / cell);
    return i >= 0 && i < rows && j >= 0 && j < columns ? [i, j] : null;
  };
  canvas.addEventListener('pointermove', event => {
    const found = where(event);
    if (found) showTip(event, tell(...found));
    else hideTip();
    canvas.style.cursor = found && pick ? 'pointer' : '';
  });
  canvas.addEventListener('pointerleave', hideTip);
  canvas.addEventListener('click', event => {
    const found = where(event);
    if (!found) return;
    if (pick) pick(...found);
    figure.say(tell(...found).replaceAll('\n', ', ')); // a finger has no hover
  });
  canvas.addEventListener('keydown', event => {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (move) {
      const [i, j] = cursor || [0, -1];
      cursor = [Math.max(0, Math.min(rows - 1, i + move[0])), Math.max(0, Math.min(columns - 1, j + move[1]))];
      figure.cursor = cursor;
      figure.readout.setAttribute('aria-live', 'polite');
      figure.say(tell(...cursor).replaceAll('\n', ', '));
      paint();
      event.preventDefault();
    } else if (event.key === 'Enter' && cursor && pick) pick(...cursor);
  });
  canvas.addEventListener('blur', () => {
    if (canvas.isConnected) {
      cursor = figure.cursor = null;
      paint();
    }
  });
  const focused = figure.picture.contains(document.activeElement) && document.activeElement.tagName === 'CANVAS';
  figure.picture.replaceChildren(canvas);
  paint();
  if (focused) canvas.focus({preventScroll: true});
  figure.refresh();
}

/** Points in a plane: [{x, y, label, tone}], axes through 0, the same scale on both. */
export function points(figure, all, label) {
  const height = 240,
    width = Math.min(figure.width(), 420),
    reach = Math.max(1e-9, ...all.flatMap(p => [Math.abs(p.x), Math.abs(p.y)])) * 1.1;
  const half = Math.min(width, height) / 2 - 8,
    x = v => width / 2 + (v / reach) * half,
    y = v => height / 2 - (v / reach) * half;
  drawing(
    figure,
    width,
    height,
    label,
    s('line', {x1: x(-reach), x2: x(reach), y1: y(0), y2: y(0), stroke: colour('line')}),
    s('line', {x1: x(0), x2: x(0), y1: y(-reach), y2: y(reach), stroke: colour('line')}),
    all.map(p =>
      s('circle', {
        cx: x(p.x),
        cy: y(p.y),
        r: 3.5,
        fill: colour(p.tone || 'accent'),
        'fill-opacity': 0.75,
        onpointermove: event => showTip(event, p.label),
        onpointerleave: hideTip
      })
    )
  );
}

/** A small L x H grid of cells, shaded by value(l, h) from 0 to 1 (or -1 to 1): pick(l, h) on a click. */
export function headGrid(figure, layers, heads, value, label, pick) {
  const grid = h(
    'table',
    {'aria-label': label},
    h(
      'tbody',
      {},
      Array.from({length: layers}, (_, l) =>
        h(
          'tr',
          {},
          h('th', {scope: 'row'}, 'L' + l),
          Array.from({length: heads}, (_, k) => {
            const v = value(l, k),
              rgb = diverging(v);
            return h(
              'td',
              {
                style: `background:${css(rgb)};color:${textOn(rgb)};padding:3px 6px;text-align:center;cursor:pointer`,
                title: `head ${l}.${k}`,
                onclick: () => pick(l, k)
              },
              fixed(v, 2)
            );
          })
        )
      )
    )
  );
  figure.picture.replaceChildren(grid);
  figure.refresh();
}
