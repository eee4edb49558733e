// A chart of many curves on a canvas: log axes, hover, zoom, keyboard.

import {
  clamp,
  color,
  compact,
  h,
  hideTip,
  integer,
  set,
  showTip,
  state,
  ticks
} from '../core.js';
import {svgOf} from '../svg.js';
import {X_NAMES, baseline, firstAt, valueAt} from './data.js';

const DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3]];
const N_COLORS = 8;
const strokes = []; // of the current theme

/** Read the colors of lines from runs/style.css. */
export function readStrokes() {
  const style = getComputedStyle(document.documentElement);
  for (let i = 0; i < N_COLORS; i++) strokes[i] = style.getPropertyValue(`--run-${i}`).trim();
}

/** The color and dashes of a run's lines: 32 runs look different. */
export const lineStyle = run => ({
  stroke: strokes[run.number % N_COLORS],
  dash: DASHES[Math.floor(run.number / N_COLORS) % DASHES.length]
});

// Zoom --------------------------------------------------------------------------------------------

const zooms = []; // earlier values of state.zoom

/** [low, high] of x, or null for the whole range. */
export function zoomRange() {
  const [axis, ...ends] = state.zoom.split(':');
  const [low, high] = ends.map(Number);
  return axis === state.x && low < high ? [low, high] : null;
}

export function zoomTo(low, high) {
  zooms.push(state.zoom);
  const ends = [low, high].map(x => Number(x.toPrecision(6)));
  set({zoom: low < high ? [state.x, ...ends].join(':') : ''});
}

export const zoomBack = () => set({zoom: zooms.pop() ?? ''});

export function zoomOut() {
  if (zoomRange()) zoomTo(0, 0);
}

// Axes --------------------------------------------------------------------------------------------

/** A map from values in [low, high] to pixels from start to end, linear or logarithmic. */
function scaleOf(low, high, start, end, log) {
  const f = log ? Math.log : x => x;
  const [from, to] = [f(low), f(high)];
  const span = to - from || 1;
  const at = value => start + ((f(value) - from) / span) * (end - start);
  const inverse = pixel => {
    const value = from + ((pixel - start) / (end - start)) * span;
    return log ? Math.exp(value) : value;
  };
  return {at, inverse, low, high, log};
}

/** Round numbers on an axis. */
function ticksOf({low, high, log}, n) {
  if (!log || high / low < 20) return ticks(low, high, n).filter(value => !log || value > 0);
  const decades = Math.log10(high / low);
  const digits = decades < n / 2 ? [1, 2, 5] : [1];
  const stride = Math.max(1, Math.ceil(decades / n));
  const values = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += stride) {
    values.push(...digits.map(digit => digit * 10 ** e));
  }
  return values.filter(value => value >= low * 0.999 && value <= high * 1.001);
}

/** The scales of a chart; null if there is nothing to draw. */
function scalesOf(curves, width, height, {log, zero}) {
  const box = {left: 52, right: width - 12, top: 10, bottom: height - 36};
  const zoom = zoomRange();
  let [xLow, xHigh] = zoom ?? [Infinity, -Infinity];
  if (state.logx) xLow = zoom && xLow > 0 ? xLow : Infinity;
  for (const {x} of zoom && xLow < Infinity ? [] : curves) {
    const first = state.logx ? firstAt(x, Number.MIN_VALUE) : 0;
    if (first < x.length) xLow = Math.min(xLow, x[first]);
    if (!zoom && x.length) xHigh = Math.max(xHigh, x.at(-1));
  }
  let [yLow, yHigh] = [Infinity, -Infinity];
  for (const {x, y} of curves) {
    for (let i = firstAt(x, xLow); i < x.length && x[i] <= xHigh; i++) {
      if (log && y[i] <= 0) continue;
      if (y[i] < yLow) yLow = y[i];
      if (y[i] > yHigh) yHigh = y[i];
    }
  }
  if (yLow > yHigh || xLow > xHigh) return null;
  if (zero && !log) yLow = Math.min(0, yLow);
  if (yLow === yHigh) {
    yLow -= log ? 0 : Math.abs(yLow) / 100 || 1;
    yHigh += Math.abs(yHigh) / 100 || 1;
  }
  if (xLow === xHigh) xHigh = xLow + 1;
  const margin = log ? 0 : (yHigh - yLow) * 0.03;
  return {
    box,
    x: scaleOf(xLow, xHigh, box.left, box.right, state.logx),
    y: scaleOf(yLow - (zero ? 0 : margin), yHigh + margin, box.bottom, box.top, log)
  };
}

function paintAxes(pen, {box, x, y}, width, height) {
  pen.fillStyle = color('panel'); // saved pictures need a background
  pen.fillRect(0, 0, width, height);
  pen.font = '11px ' + getComputedStyle(document.body).fontFamily;
  pen.textBaseline = 'middle';
  pen.lineWidth = 1;
  pen.strokeStyle = color('line');
  pen.fillStyle = color('muted');
  pen.textAlign = 'right';
  for (const value of ticksOf(y, 5)) {
    const at = Math.round(y.at(value)) + 0.5;
    pen.beginPath();
    pen.moveTo(box.left, at);
    pen.lineTo(box.right, at);
    pen.stroke();
    pen.fillText(compact(value), box.left - 7, at);
  }
  pen.textAlign = 'center';
  for (const value of ticksOf(x, Math.max(3, Math.floor(width / 110)))) {
    const at = Math.min(x.at(value), box.right - 12);
    pen.fillText(compact(value), at, box.bottom + 13);
  }
  pen.textAlign = 'right';
  pen.fillText(X_NAMES[state.x], box.right, height - 7);
}

// Lines -------------------------------------------------------------------------------------------

function clipTo(pen, {left, right, top, bottom}) {
  pen.beginPath();
  pen.rect(left, top - 4, right - left + 4, bottom - top + 8);
  pen.clip();
}

function trace(pen, xs, ys, {x, y}) {
  pen.beginPath();
  const from = Math.max(0, firstAt(xs, x.low) - 1);
  const to = Math.min(xs.length, firstAt(xs, x.high) + 1);
  for (let i = from; i < to; i++) {
    if ((x.log && xs[i] <= 0) || (y.log && ys[i] <= 0)) continue;
    pen.lineTo(x.at(xs[i]), y.at(ys[i]));
  }
}

function paintLine(pen, curve, scales, {width, alpha = 1}) {
  const {stroke, dash} = lineStyle(curve.run);
  pen.globalAlpha = alpha;
  pen.strokeStyle = stroke;
  pen.fillStyle = stroke;
  pen.lineWidth = width;
  pen.lineJoin = 'bevel';
  pen.setLineDash(dash);
  trace(pen, curve.x, curve.y, scales);
  pen.stroke();
  if (curve.x.length === 1) {
    pen.beginPath();
    pen.arc(scales.x.at(curve.x[0]), scales.y.at(curve.y[0]), 3, 0, 7);
    pen.fill();
  }
  pen.setLineDash([]);
  pen.globalAlpha = 1;
}

/** The range from low to high of points that are means. */
function paintBand(pen, curve, scales) {
  pen.fillStyle = lineStyle(curve.run).stroke;
  pen.globalAlpha = 0.14;
  const xs = [...curve.x, ...curve.x.toReversed()];
  const ys = [...curve.high, ...curve.low.toReversed()];
  pen.beginPath();
  xs.forEach((value, i) => {
    if ((scales.x.log && value <= 0) || (scales.y.log && ys[i] <= 0)) return;
    pen.lineTo(scales.x.at(value), scales.y.at(ys[i]));
  });
  pen.fill();
  pen.globalAlpha = 1;
}

function paintCurves(pen, curves, raw, scales) {
  pen.save();
  clipTo(pen, scales.box);
  const few = curves.length <= 8;
  if (few) raw.forEach(curve => curve.low.length && paintBand(pen, curve, scales));
  for (const curve of few && state.smooth ? raw : []) {
    paintLine(pen, curve, scales, {width: 1, alpha: 0.3});
  }
  const width = curves.length > 20 ? 1 : 1.75;
  for (const curve of curves) {
    if (curve.run !== baseline()) paintLine(pen, curve, scales, {width});
  }
  for (const curve of curves) {
    if (curve.run === baseline()) paintLine(pen, curve, scales, {width: 3.5});
  }
  pen.restore();
}

// The chart ---------------------------------------------------------------------------------------

const X_TEXTS = {flops: x => x.toExponential(3).replace('e+', 'e'), epoch: x => x.toPrecision(4)};
const xText = x => (X_TEXTS[state.x] ?? integer)(x);
const yText = y => (Math.abs(y) >= 1000 || y === 0 ? integer(y) : y.toPrecision(5));

/** The values of up to 8 curves at x, the smallest first; the picked one is marked. */
function tipText(curves, picked, i) {
  const x = picked.x[i];
  const values = curves
    .map(curve => [curve === picked ? picked.y[i] : valueAt(curve, x), curve])
    .filter(([y]) => y !== null)
    .toSorted((a, b) => a[0] - b[0]);
  const at = values.findIndex(([, curve]) => curve === picked);
  const start = clamp(at - 3, 0, Math.max(0, values.length - 8));
  const lines = values
    .slice(start, start + 8)
    .map(([y, curve]) => `${curve === picked ? '▸ ' : ''}${yText(y)}  ${curve.run.name}`);
  return [`${X_NAMES[state.x]} ${xText(x)}`, ...lines].join('\n');
}

/**
 * Draw curves into a figure. curves: as drawn; raw: before smoothing; options: label, height, log
 * (the y axis), zero (is on the y axis). Arrow keys and the pointer read out points.
 */
export function curveChart(figure, curves, raw, options) {
  const width = figure.width();
  const {height, label} = options;
  const scales = scalesOf([...curves, ...(curves.length <= 8 ? raw : [])], width, height, options);
  if (!scales) {
    figure.picture.replaceChildren(h('p', {class: 'note'}, 'No data for the runs shown here.'));
    figure.refresh();
    return;
  }
  const ratio = window.devicePixelRatio || 1;
  const size = {width: Math.round(width * ratio), height: Math.round(height * ratio)};
  const canvas = h('canvas', {
    ...size,
    class: 'curve',
    style: `width:${width}px;height:${height}px`,
    tabindex: 0,
    role: 'img',
    'aria-label': label + '. Arrow keys move along a curve and between runs.'
  });
  const base = h('canvas', size); // all curves, under what follows the pointer
  const paint = pen => {
    paintAxes(pen, scales, width, height);
    paintCurves(pen, curves, raw, scales);
  };
  const pen = base.getContext('2d');
  pen.scale(ratio, ratio);
  paint(pen);
  canvas.toSvg = () => svgOf(width, height, paint);
  const view = {canvas, base, figure, curves, scales, ratio, width, height, point: null};
  paintView(view);
  listen(view);
  const hadFocus = figure.picture.contains(document.activeElement);
  figure.picture.replaceChildren(canvas);
  if (hadFocus) canvas.focus({preventScroll: true});
  figure.refresh();
}

/** The curves, the picked point with its curve, and the range that is being dragged. */
function paintView({canvas, base, scales, ratio, width, height, point, drag}) {
  const pen = canvas.getContext('2d');
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.drawImage(base, 0, 0);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const {box} = scales;
  if (drag) {
    pen.fillStyle = color('accent');
    pen.globalAlpha = 0.15;
    pen.fillRect(drag[0], box.top, drag[1] - drag[0], box.bottom - box.top);
    pen.globalAlpha = 1;
  }
  if (!point) return;
  const [curve, i] = point;
  pen.save();
  clipTo(pen, box);
  pen.globalAlpha = 0.6;
  pen.fillStyle = color('panel');
  pen.fillRect(0, 0, width, height);
  paintLine(pen, curve, scales, {width: 2.5});
  pen.restore();
  const x = scales.x.at(curve.x[i]);
  pen.strokeStyle = color('muted');
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x, box.top);
  pen.lineTo(x, box.bottom);
  pen.stroke();
  pen.fillStyle = lineStyle(curve.run).stroke;
  pen.beginPath();
  pen.arc(x, scales.y.at(curve.y[i]), 4, 0, 7);
  pen.fill();
}

/** [curve, index] of the point nearest to a pixel. */
function nearestPoint({curves, scales}, left, top) {
  let best = null;
  let least = Infinity;
  for (const curve of curves) {
    const i = firstAt(curve.x, scales.x.inverse(left));
    for (const j of [i - 1, i]) {
      if (!(j in curve.x) || curve.x[j] < scales.x.low || curve.x[j] > scales.x.high) continue;
      const dx = scales.x.at(curve.x[j]) - left;
      const dy = scales.y.at(curve.y[j]) - top;
      const distance = dx * dx + dy * dy;
      if (distance < least) [least, best] = [distance, [curve, j]];
    }
  }
  return best;
}

function pick(view, point) {
  view.point = point;
  paintView(view);
}

function listen(view) {
  const {canvas, curves, scales, figure} = view;
  const pixel = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const readOut = ([curve, i]) =>
    figure.setReadout(
      `${curve.run.name}: ${yText(curve.y[i])} at ${X_NAMES[state.x]} ${xText(curve.x[i])}`
    );
  canvas.addEventListener('pointerdown', event => {
    if (event.button) return;
    view.from = pixel(event)[0];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', event => {
    const [left, top] = pixel(event);
    if (view.from !== undefined) {
      const ends = [view.from, clamp(left, scales.box.left, scales.box.right)];
      view.drag = ends.toSorted((a, b) => a - b);
      pick(view, null);
      hideTip();
      return;
    }
    const point = nearestPoint(view, left, top);
    pick(view, point);
    if (point) showTip(event, tipText(curves, ...point));
  });
  canvas.addEventListener('pointerup', event => {
    const [low, high] = (view.drag ?? [0, 0]).map(scales.x.inverse);
    const wide = view.drag && view.drag[1] - view.drag[0] > 5;
    view.drag = view.from = undefined;
    if (wide) return zoomTo(low, high);
    const point = nearestPoint(view, ...pixel(event)); // touch screens have no hover
    pick(view, point);
    if (point) readOut(point);
  });
  canvas.addEventListener('pointercancel', () => {
    view.drag = view.from = undefined;
    pick(view, null);
  });
  canvas.addEventListener('pointerleave', () => {
    hideTip();
    if (view.from === undefined) pick(view, null);
  });
  canvas.addEventListener('dblclick', zoomOut);
  canvas.addEventListener('blur', () => canvas.isConnected && pick(view, null));
  canvas.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const point = view.point ?? [curves[0], Math.max(0, firstAt(curves[0].x, scales.x.low) - 1)];
    const moved = movedPoint(curves, point, event.key);
    if (moved) {
      figure.readout.setAttribute('aria-live', 'polite');
      pick(view, moved);
      readOut(moved);
    } else if ('+='.includes(event.key)) zoomBy(scales.x, point, 0.5);
    else if ('-−'.includes(event.key)) zoomBy(scales.x, point, 2);
    else if (event.key === '0' || event.key === 'Escape') zoomOut();
    else if (event.key === 'Enter') set({run: point[0].run.id});
    else return;
    event.preventDefault();
  });
}

/** The point that an arrow key leads to, or null for other keys. */
function movedPoint(curves, [curve, i], key) {
  if (key === 'ArrowLeft') return [curve, Math.max(0, i - 1)];
  if (key === 'ArrowRight') return [curve, Math.min(curve.x.length - 1, i + 1)];
  const step = {ArrowUp: -1, ArrowDown: 1}[key];
  if (!step) return null;
  const filled = curves.filter(other => other.x.length);
  const other = filled[clamp(filled.indexOf(curve) + step, 0, filled.length - 1)];
  return [other, Math.min(other.x.length - 1, firstAt(other.x, curve.x[i]))];
}

/** Zoom by a factor around a point. */
function zoomBy({low, high}, [curve, i], factor) {
  const center = clamp(curve.x[i], low, high);
  const from = Math.max(0, center - (center - low) * factor);
  zoomTo(from, center + (high - center) * factor || from + 1);
}
