// What is drawn on a canvas, as an SVG of shapes: for saving it.

const round = x => Number(x.toFixed(2));
const escaped = text =>
  String(text).replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;');
const ANCHORS = {center: 'middle', right: 'end'};

/** The part of CanvasRenderingContext2D that our charts use; parts collects the elements. */
class SvgPen {
  parts = [];
  groups = 0; // that are open
  clips = 0;
  saved = [];
  path = '';
  dash = '';
  fillStyle = '#000';
  strokeStyle = '#000';
  lineWidth = 1;
  lineJoin = 'miter';
  globalAlpha = 1;
  font = '10px sans-serif';
  textAlign = 'left';
  textBaseline = 'alphabetic';

  open(attributes) {
    this.parts.push(`<g ${attributes}>`);
    this.groups++;
  }
  save() {
    const {groups, fillStyle, strokeStyle, globalAlpha} = this;
    this.saved.push({groups, fillStyle, strokeStyle, globalAlpha});
  }
  restore() {
    const {groups, ...styles} = this.saved.pop();
    this.parts.push('</g>'.repeat(this.groups - groups));
    Object.assign(this, styles, {groups});
  }
  translate(x, y) {
    this.open(`transform="translate(${round(x)} ${round(y)})"`);
  }
  rotate(angle) {
    this.open(`transform="rotate(${round((angle * 180) / Math.PI)})"`);
  }
  clip() {
    const id = `clip-${this.clips++}`;
    this.parts.push(`<clipPath id="${id}"><path d="${this.path}"/></clipPath>`);
    this.open(`clip-path="url(#${id})"`);
  }
  setLineDash(lengths) {
    this.dash = lengths.join(' ');
  }
  beginPath() {
    this.path = '';
  }
  moveTo(x, y) {
    this.path += `M${round(x)} ${round(y)}`;
  }
  lineTo(x, y) {
    this.path += `${this.path ? 'L' : 'M'}${round(x)} ${round(y)}`;
  }
  rect(x, y, width, height) {
    const [w, h] = [round(width), round(height)];
    this.path += `M${round(x)} ${round(y)}h${w}v${h}h${-w}z`;
  }
  /** A whole circle. */
  arc(x, y, radius) {
    const r = round(radius);
    this.path += `M${round(x - radius)} ${round(y)}a${r} ${r} 0 1 0 ${2 * r} 0`;
    this.path += `a${r} ${r} 0 1 0 ${-2 * r} 0`;
  }
  fill() {
    this.parts.push(`<path d="${this.path}" ${this.filled()}/>`);
  }
  stroke() {
    this.parts.push(`<path d="${this.path}" ${this.stroked()}/>`);
  }
  fillRect(x, y, width, height) {
    this.parts.push(`<rect ${this.box(x, y, width, height)} ${this.filled()}/>`);
  }
  strokeRect(x, y, width, height) {
    this.parts.push(`<rect ${this.box(x, y, width, height)} ${this.stroked()}/>`);
  }
  fillText(text, x, y) {
    const anchor = `text-anchor="${ANCHORS[this.textAlign] ?? 'start'}"`;
    const baseline = this.textBaseline === 'middle' ? 'dominant-baseline="central"' : '';
    const place = `x="${round(x)}" y="${round(y)}" style="font:${escaped(this.font)}"`;
    this.parts.push(
      `<text ${place} ${anchor} ${baseline} ${this.filled()}>${escaped(text)}</text>`
    );
  }

  box(x, y, width, height) {
    const [w, h] = [round(width), round(height)];
    return `x="${round(x)}" y="${round(y)}" width="${w}" height="${h}"`;
  }
  opacity() {
    return this.globalAlpha === 1 ? '' : ` opacity="${this.globalAlpha}"`;
  }
  filled() {
    return `fill="${this.fillStyle}"${this.opacity()}`;
  }
  stroked() {
    const width = `stroke-width="${this.lineWidth}" stroke-linejoin="${this.lineJoin}"`;
    const dash = this.dash && ` stroke-dasharray="${this.dash}"`;
    return `fill="none" stroke="${this.strokeStyle}" ${width}${dash}${this.opacity()}`;
  }
}

/** The source of an SVG of this size in CSS pixels; paint(pen) draws as on a canvas. */
export function svgOf(width, height, paint) {
  const pen = new SvgPen();
  paint(pen);
  const size = `width="${round(width)}" height="${round(height)}"`;
  const box = `viewBox="0 0 ${round(width)} ${round(height)}"`;
  return `<svg xmlns="http://www.w3.org/2000/svg" ${size} ${box}>${pen.parts.join('')}</svg>`;
}
