// Chart types: bars, lines, points, matrix, head grid. Each fills a figure's .picture.

import {
  clamp,
  color,
  compact,
  css,
  diverging,
  fixed,
  h,
  hideTip,
  maxAbs,
  range,
  s,
  showTip,
  signed,
  textOn,
  ticks
} from './core.js';
import {headName} from './model.js';
import {svgOf} from './svg.js';

/** Replace the picture of a figure with an SVG of this size in CSS pixels. */
export function drawing(figure, width, height, label, ...children) {
  const svg = s(
    'svg',
    {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: 'img',
      'aria-label': label,
      'font-size': 12
    },
    children
  );
  figure.hadFocus = figure.picture.contains(document.activeElement);
  figure.picture.replaceChildren(svg);
  figure.refresh();
  return svg;
}

export const svgText = (x, y, text, attributes) =>
  s('text', {x, y, fill: color('ink'), 'dominant-baseline': 'central', ...attributes}, text);

/** Attributes of small gray text. */
export const faint = anchor => ({
  'text-anchor': anchor,
  fill: color('muted'),
  'font-size': 11
});

/**
 * Let the keyboard reach elements of a drawing: one tab stop, arrow keys move from one to the next,
 * and each shows its tip. items: [{element, name: its text, if any, tip, onClick}]; those with
 * onClick are buttons. The focus stays where it was when the figure is drawn again.
 */
export function reachable(figure, svg, items) {
  if (!items.length) return;
  svg.setAttribute('role', 'group'); // the children of an image would be hidden
  const elements = items.map(({element}) => element);
  const stopAt = i => {
    figure.stop = i;
    elements.forEach((element, j) => element.setAttribute('tabindex', j === i ? 0 : -1));
  };
  items.forEach(({element, name, tip, onClick}, i) => {
    element.setAttribute('role', onClick ? 'button' : 'img');
    element.setAttribute('aria-label', name ?? tip.replaceAll('\n', ', '));
    if (onClick) element.style.cursor = 'pointer';
    const show = event => showTip(event, tip);
    const showHere = () => {
      const {left, bottom} = element.getBoundingClientRect();
      showTip({clientX: left, clientY: bottom - 8}, tip);
    };
    const keydown = event => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (step) {
        stopAt(clamp(i + step, 0, elements.length - 1));
        elements[figure.stop].focus();
      } else if (onClick && (event.key === 'Enter' || event.key === ' ')) onClick();
      else return;
      event.preventDefault();
    };
    const focus = () => {
      stopAt(i); // a click focuses too
      showHere();
    };
    const listeners = {focus, blur: hideTip, pointermove: show, pointerleave: hideTip};
    if (onClick) listeners.click = onClick;
    for (const [type, listener] of Object.entries({...listeners, keydown})) {
      element.addEventListener(type, listener);
    }
  });
  stopAt(clamp(figure.stop ?? 0, 0, elements.length - 1));
  if (figure.hadFocus) elements[figure.stop].focus({preventScroll: true});
}

// Bars --------------------------------------------------------------------------------------------

const LABEL_WIDTH = 108;

/**
 * Horizontal bars. rows: [{label, value, ...}] with optional
 *   text: instead of the value;  outline: a second value, drawn as an outline;
 *   from: start of the bar, for waterfalls;  bold;  plain: label not in monospace;
 *   total: a gray bar;  tip: tooltip;  onClick: needs a tip, which is its name.
 */
export function bars(figure, rows, label, {numberWidth = 64, step = 20, low, high} = {}) {
  const width = figure.width();
  const plotWidth = Math.max(40, width - LABEL_WIDTH - numberWidth);
  const ends = rows.flatMap(row => {
    const from = row.from || 0;
    return [from, from + row.value, row.outline ?? 0];
  });
  const min = low ?? Math.min(0, ...ends);
  const max = high ?? Math.max(1e-9, ...ends);
  const x = value => LABEL_WIDTH + ((value - min) / (max - min)) * plotWidth;
  const digits = digitsFor(maxAbs(rows.map(row => row.value)));
  const height = Math.max(1, rows.length) * step + 4;
  const zeroLine = s('line', {
    x1: x(0),
    x2: x(0),
    y1: 0,
    y2: rows.length * step,
    stroke: color('line')
  });
  const drawRow = (row, i) => {
    const y = i * step + 2;
    const text = row.text ?? signed(row.value, digits);
    return s(
      'g',
      {},
      s('rect', {x: 0, y, width, height: step, fill: 'transparent'}), // the whole row is clickable
      row.outline !== undefined && outlineOf(row, x, y, step),
      barOf(row, x, y, step),
      svgText(LABEL_WIDTH - 8, y + step / 2 - 2, row.label, {
        'text-anchor': 'end',
        class: row.plain ? '' : 'mono',
        'font-weight': row.bold ? 700 : 400
      }),
      ' ', // between the words of its name
      svgText(width - 2, y + step / 2 - 2, text, {
        'text-anchor': 'end',
        fill: color('muted'),
        'font-weight': row.bold ? 700 : 400
      })
    );
  };
  const drawn = rows.map(drawRow);
  const svg = drawing(figure, width, height, label, min < 0 && zeroLine, drawn);
  const items = rows.map(({tip, onClick}, i) => {
    const name = Array.from(drawn[i].querySelectorAll('text'), text => text.textContent).join(' ');
    return {element: drawn[i], name, tip, onClick};
  });
  reachable(
    figure,
    svg,
    items.filter(item => item.tip)
  );
}

function digitsFor(largest) {
  if (largest < 0.095) return 4;
  return largest < 0.95 ? 3 : 2;
}

function barOf(row, x, y, step) {
  const start = x(row.from || 0);
  const end = x((row.from || 0) + row.value);
  const tone = row.value < 0 ? 'warm' : 'accent';
  return s('rect', {
    x: Math.min(start, end),
    y: y + 1,
    width: Math.max(row.value ? 1 : 0, Math.abs(end - start)),
    height: step - 6,
    rx: 1.5,
    fill: color(row.total ? 'muted' : tone)
  });
}

function outlineOf(row, x, y, step) {
  return s('rect', {
    x: x(0),
    y: y + 1.5,
    width: Math.max(0, x(row.outline) - x(0)),
    height: step - 7,
    fill: 'none',
    stroke: color('muted'),
    'stroke-opacity': 0.6
  });
}

// Lines -------------------------------------------------------------------------------------------

/**
 * Line chart. series: [{name, points: [[x, y], ...], tone, faint}]; zero: include 0 on the y axis;
 * high: top of the y axis; marks: [{x, label}], vertical lines; xName, yName: of the axes.
 */
export function lines(figure, series, label, options = {}) {
  const {zero = false, high, xName = '', yName = '', marks = []} = options;
  const all = series.flatMap(line => line.points);
  if (!all.length) {
    figure.picture.replaceChildren(h('p', {class: 'note'}, 'No data.'));
    return;
  }
  const width = figure.width();
  const height = 190;
  const [left, right, top, bottom] = [44, width - 10, 22, height - 34];
  const xs = all.map(point => point[0]);
  const ys = all.map(point => point[1]);
  const xMin = Math.min(...xs);
  const xMax = Math.max(...xs, xMin + 1e-9);
  const yMin = zero ? Math.min(0, ...ys) : Math.min(...ys);
  const yMax = high ?? Math.max(...ys, yMin + 1e-9);
  const x = value => left + ((value - xMin) / (xMax - xMin)) * (right - left);
  const y = value => bottom - ((value - yMin) / (yMax - yMin)) * (bottom - top);

  const yTick = value => [
    s('line', {x1: left, x2: right, y1: y(value), y2: y(value), stroke: color('line')}),
    svgText(left - 6, y(value), compact(value), faint('end'))
  ];
  const xTick = value => svgText(x(value), bottom + 12, compact(value), faint('middle'));
  const drawMark = mark => [
    s('line', {
      x1: x(mark.x),
      x2: x(mark.x),
      y1: 4,
      y2: bottom,
      stroke: color('muted'),
      'stroke-dasharray': '2 3'
    }),
    svgText(x(mark.x) + 4, 9, mark.label, faint('start'))
  ];
  const drawLine = line => {
    if (line.points.length === 1) {
      const [[px, py]] = line.points;
      return s('circle', {cx: x(px), cy: y(py), r: 3, fill: color(line.tone)});
    }
    return s('polyline', {
      points: line.points.map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(' '),
      fill: 'none',
      stroke: color(line.tone),
      'stroke-width': line.faint ? 1 : 1.75,
      'stroke-opacity': line.faint ? 0.3 : 1,
      'stroke-linejoin': 'round'
    });
  };
  let legendX = left;
  const legend = series
    .filter(line => line.name)
    .map(line => {
      const start = legendX;
      legendX += 38 + 6.4 * line.name.length;
      return [
        s('line', {
          x1: start,
          x2: start + 16,
          y1: 9,
          y2: 9,
          stroke: color(line.tone),
          'stroke-width': 2
        }),
        svgText(start + 21, 9, line.name, {fill: color('muted')})
      ];
    });
  drawing(
    figure,
    width,
    height,
    label,
    ticks(yMin, yMax).map(yTick),
    ticks(xMin, xMax, Math.max(3, Math.floor(width / 110))).map(xTick),
    svgText(right, height - 8, xName, faint('end')),
    svgText(right, 9, yName, faint('end')),
    marks.map(drawMark),
    series.map(drawLine),
    legend
  );
}

// Matrix ------------------------------------------------------------------------------------------

const ARROWS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
const TEXT_FONT = '11px ' + getComputedStyle(document.body).fontFamily;
const MONO_FONT = '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';

/**
 * A matrix on a canvas, one cell per number. Options:
 *   rows, columns: size;  cellColor(i, j): [r, g, b], or null to leave the cell empty;
 *   describe(i, j): text for the tooltip and the readout;
 *   onPick(i, j): click or Enter;  isSelected(i, j): cells to frame;
 *   rowName(i), columnName(j): labels, if the cells are large enough;  monoRows: row labels in
 *   monospace;  rowAxis, columnAxis: what rows and columns are;  cellHeight: of cells that are not
 *   square;  maxSize: of the matrix, in CSS pixels.
 * Arrow keys move a cursor that reads out the cells.
 */
export function matrix(figure, options) {
  const {rows, columns, describe, onPick} = options;
  const layout = matrixLayout(figure.width(), options);
  const ratio = window.devicePixelRatio || 1;
  const canvas = h('canvas', {
    width: Math.round(layout.width * ratio),
    height: Math.round(layout.height * ratio),
    style: `width:${layout.width}px;height:${layout.height}px`,
    tabindex: 0,
    role: 'img',
    'aria-label': options.label + '. Arrow keys move from cell to cell.'
  });
  const pen = canvas.getContext('2d', {willReadFrequently: true}); // by the CPU: starts faster
  let cursor = figure.cursor || null; // kept when the matrix is drawn again
  canvas.toSvg = () =>
    svgOf(layout.width, layout.height, svgPen => paintMatrix(svgPen, layout, options, null));
  const paint = () => {
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    paintMatrix(pen, layout, options, cursor);
  };
  const cellAt = event => {
    const box = canvas.getBoundingClientRect();
    const i = Math.floor((event.clientY - box.top - layout.top) / layout.rowHeight);
    const j = Math.floor((event.clientX - box.left - layout.left) / layout.cell);
    return i >= 0 && i < rows && j >= 0 && j < columns ? [i, j] : null;
  };
  const readOut = cell => figure.setReadout(describe(...cell).replaceAll('\n', ', '));
  canvas.addEventListener('pointermove', event => {
    const cell = cellAt(event);
    if (cell) showTip(event, describe(...cell));
    else hideTip();
    canvas.style.cursor = cell && onPick ? 'pointer' : '';
  });
  canvas.addEventListener('pointerleave', hideTip);
  canvas.addEventListener('click', event => {
    const cell = cellAt(event);
    if (!cell) return;
    if (onPick) onPick(...cell);
    readOut(cell); // touch screens have no hover
  });
  canvas.addEventListener('keydown', event => {
    const move = ARROWS[event.key];
    if (move) {
      const [i, j] = cursor || [0, -1];
      cursor = [clamp(i + move[0], 0, rows - 1), clamp(j + move[1], 0, columns - 1)];
      figure.cursor = cursor;
      figure.readout.setAttribute('aria-live', 'polite');
      readOut(cursor);
      paint();
      event.preventDefault();
    } else if (event.key === 'Enter' && cursor && onPick) onPick(...cursor);
  });
  canvas.addEventListener('blur', () => {
    if (!canvas.isConnected) return; // replaced by a new drawing
    cursor = null;
    figure.cursor = null;
    paint();
  });
  const active = document.activeElement;
  const hadFocus = active.tagName === 'CANVAS' && figure.picture.contains(active);
  figure.picture.replaceChildren(canvas);
  paint();
  if (hadFocus) canvas.focus({preventScroll: true});
  figure.refresh();
}

const AXIS = 16; // room for the name of an axis

/** Sizes in CSS pixels: labels are left out where the cells are too small for them. */
function matrixLayout(room, options) {
  const {rows, columns, rowName, columnName, rowAxis, columnAxis, cellHeight} = options;
  const {maxSize = 480} = options;
  const longSide = Math.max(columns, cellHeight ? 1 : rows);
  const maxCell = clamp(480 / longSide, 26, 72);
  const cellFor = margin => {
    const fitting = Math.min(maxSize / Math.max(rows, columns), (room - margin) / columns);
    return Math.max(1.2, Math.min(fitting, maxCell));
  };
  const axis = rowAxis ? AXIS : 0;
  let left = axis + (rowName ? Math.min(cellHeight ? 96 : 66, room * 0.3) : 0);
  if (!cellHeight && cellFor(left) < 10) left = axis;
  const cell = cellFor(left);
  const rowHeight = cellHeight || cell;
  let below = 0;
  if (columnName && cell >= 10) {
    const longest = Math.max(...range(columns, j => [...columnName(j)].length));
    below = longest ? 10 + 7 * longest : 0;
  }
  const top = columnAxis ? AXIS : 0;
  const minWidth = columnAxis ? 7 * columnAxis.length : 0;
  const width = left + Math.max(cell * columns, minWidth);
  const height = top + rowHeight * rows + below;
  return {left, top, axis, below, cell, rowHeight, width, height};
}

function paintMatrix(pen, layout, options, cursor) {
  const {rows, columns, cellColor, isSelected} = options;
  const {left, top, axis, below, cell, rowHeight, width, height} = layout;
  pen.fillStyle = color('panel'); // saved pictures need a background
  pen.fillRect(0, 0, width, height);
  const columnGap = cell >= 7 ? 1 : 0;
  const rowGap = rowHeight >= 7 ? 1 : -0.3; // small cells overlap, so that no seams show
  const paintedWidth = cell - (columnGap || -0.3);
  for (let i = 0; i < rows; i++) {
    const colors = range(columns, j => cellColor(i, j)).map(rgb => rgb && css(rgb));
    let start = 0;
    for (let j = 1; j <= columns; j++) {
      if (!columnGap && j < columns && colors[j] === colors[start]) continue; // one wide cell
      if (colors[start]) {
        pen.fillStyle = colors[start];
        const paintedTo = (j - 1) * cell + paintedWidth;
        const y = top + i * rowHeight;
        pen.fillRect(left + start * cell, y, paintedTo - start * cell, rowHeight - rowGap);
      }
      start = j;
    }
  }
  pen.fillStyle = color('muted');
  pen.textBaseline = 'middle';
  pen.textAlign = 'right';
  if (left > axis) paintRowNames(pen, layout, options);
  if (below) paintColumnNames(pen, layout, options);
  paintAxisNames(pen, layout, options);

  pen.strokeStyle = color('ink');
  pen.lineWidth = 1.5;
  for (let i = 0; isSelected && i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      if (!isSelected(i, j)) continue;
      const x = left + j * cell;
      const y = top + i * rowHeight;
      pen.strokeRect(x, y, Math.max(cell - columnGap, 2), Math.max(rowHeight - columnGap, 2));
      if (rows <= 4) continue;
      pen.globalAlpha = 0.4; // its row and column
      pen.strokeRect(left, y, cell * columns, rowHeight);
      pen.strokeRect(x, top, cell, rowHeight * rows);
      pen.globalAlpha = 1;
    }
  }
  if (cursor) {
    const [i, j] = cursor;
    pen.strokeRect(left + j * cell, top + i * rowHeight, cell, rowHeight);
  }
}

function paintRowNames(pen, {left, top, axis, rowHeight}, {rows, rowName, monoRows}) {
  pen.font = monoRows ? MONO_FONT : TEXT_FONT;
  for (let i = 0; i < rows; i++) {
    pen.fillText(rowName(i), left - 6, top + (i + 0.5) * rowHeight, left - axis - 8);
  }
}

/** What columns are, above them, and what rows are, along the left edge. */
function paintAxisNames(pen, {left, top}, {rowAxis, columnAxis}) {
  pen.font = TEXT_FONT;
  pen.textAlign = 'left';
  if (columnAxis) pen.fillText(`${columnAxis} →`, left, top / 2 - 1);
  if (!rowAxis) return;
  pen.save();
  pen.translate(7, top);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = 'right';
  pen.fillText(`← ${rowAxis}`, 0, 0);
  pen.restore();
}

function paintColumnNames(pen, {left, top, below, cell, rowHeight}, {rows, columns, columnName}) {
  pen.font = MONO_FONT;
  for (let j = 0; j < columns; j++) {
    pen.save();
    pen.translate(left + (j + 0.5) * cell, top + rows * rowHeight + 5);
    pen.rotate(-Math.PI / 2);
    pen.fillText(columnName(j), 0, 0, below - 6);
    pen.restore();
  }
}

// Points and head grid ----------------------------------------------------------------------------

/**
 * Scatter plot around the origin, both axes on the same scale. all: [{x, y, label, tone}];
 * xName, yName: of the axes.
 */
export function points(figure, all, label, xName, yName) {
  const height = 240;
  const width = Math.min(figure.width(), 420);
  const reach = 1.1 * maxAbs(all.flatMap(point => [point.x, point.y]));
  const radius = Math.min(width, height) / 2 - 14;
  const x = value => width / 2 + (value / reach) * radius;
  const y = value => height / 2 - (value / reach) * radius;
  const axis = (x1, y1, x2, y2) => s('line', {x1, y1, x2, y2, stroke: color('line')});
  const drawPoint = point =>
    s('circle', {
      cx: x(point.x),
      cy: y(point.y),
      r: 3.5,
      fill: color(point.tone || 'accent'),
      'fill-opacity': 0.75
    });
  const drawn = all.map(drawPoint);
  const marks = ticks(-reach / 1.1, reach / 1.1).filter(value => value !== 0);
  const svg = drawing(
    figure,
    width,
    height,
    label,
    axis(x(-reach), y(0), x(reach), y(0)),
    axis(x(0), y(-reach), x(0), y(reach)),
    marks.map(value => [
      svgText(x(value), y(0) + 10, compact(value), faint('middle')),
      svgText(x(0) - 5, y(value), compact(value), faint('end'))
    ]),
    svgText(x(reach) + 4, y(0), xName, faint('start')),
    svgText(x(0) + 6, y(reach) + 4, yName, faint('start')),
    drawn
  );
  const items = all.map((point, i) => ({element: drawn[i], tip: point.label}));
  reachable(figure, svg, items);
}

/** A table of heads shaded by value(layer, head) in [-1, 1]; onPick(layer, head), if any, on
 * click. */
export function headGrid(figure, layers, heads, value, label, onPick) {
  const cell = (layer, head) => {
    const rgb = diverging(value(layer, head));
    const number = fixed(value(layer, head), 2);
    return h(
      'td',
      {
        class: onPick && 'head-cell',
        style: `background:${css(rgb)};color:${textOn(rgb)}`
      },
      onPick
        ? h(
            'button',
            {
              type: 'button',
              title: `head ${headName(layer, head)}`,
              onclick: () => onPick(layer, head)
            },
            number
          )
        : number
    );
  };
  const gridRow = layer =>
    h(
      'tr',
      {},
      h('th', {scope: 'row'}, 'L' + layer),
      range(heads, head => cell(layer, head))
    );
  const headings = range(heads, head => h('th', {scope: 'col'}, 'H' + head));
  const grid = h(
    'table',
    {'aria-label': label},
    h('thead', {}, h('tr', {}, h('td', {}), headings)),
    h('tbody', {}, range(layers, gridRow))
  );
  figure.picture.replaceChildren(grid);
  figure.refresh();
}
