// Matrix products in WebAssembly with 128-bit SIMD, or in plain JavaScript where there is none: a
// forward pass of the quickstart's model over 64 tokens takes 25 ms, or 175 ms without.
//
// A weight (out, in) is packed once into strips of 8 outputs, [out / 8][in][8]: the kernel keeps 4
// rows x 8 outputs in registers and reads each weight once per 4 rows.

const STRIP = 8;
const ROWS = 4;
const roundUp = (n, multiple) => Math.ceil(n / multiple) * multiple;

/** The bytes of a WebAssembly module: matmul(x, w, y, nIn, nRows, nStrips) on its memory. */
function assemble() {
  const unsigned = n => (n < 128 ? [n] : [(n & 127) | 128, ...unsigned(n >>> 7)]);
  const section = (id, body) => [id, ...unsigned(body.length), ...body];
  const name = text => [text.length, ...new TextEncoder().encode(text)];
  const [I32, V128, EMPTY] = [0x7f, 0x7b, 0x40];

  const get = i => [0x20, ...unsigned(i)];
  const put = i => [0x21, ...unsigned(i)];
  const constant = n => [0x41, ...unsigned(n)]; // 0 <= n < 64
  const add = 0x6a;
  const multiply = 0x6c;
  const shiftLeft = 0x74;
  const increase = (i, ...by) => [...get(i), ...by.flat(), add, ...put(i)];
  const loop = (counter, limit, ...body) => [
    ...[...constant(0), ...put(counter), 0x03, EMPTY],
    ...body.flat(),
    ...increase(counter, constant(1)),
    ...[...get(counter), ...get(limit), 0x49, 0x0d, 0, 0x0b] // branch back if counter < limit
  ];
  const simd = (code, ...rest) => [0xfd, ...unsigned(code), ...rest];
  const load = offset => simd(0, 4, ...unsigned(offset));
  const splat = simd(9, 2, 0); // one number in all four lanes
  const store = offset => simd(11, 4, ...unsigned(offset));
  const zero = simd(12, ...new Array(16).fill(0));
  const addVectors = simd(228);
  const multiplyVectors = simd(230);

  // parameters, then i32 locals, then v128 locals
  const [x, w, y, nIn, nGroups, nStrips] = [0, 1, 2, 3, 4, 5];
  const [i, group, strip, xRow, weight, out, width, stripStart] = [6, 7, 8, 9, 10, 11, 12, 13];
  const left = row => 14 + 2 * row; // outputs 0 to 3 of a row
  const right = row => 15 + 2 * row; // outputs 4 to 7
  const [wLeft, wRight, value] = [22, 23, 24];
  const rows = [0, 1, 2, 3];
  const address = row => [...get(xRow), ...get(width), ...constant(row), multiply, add];
  const inner = [
    [...get(weight), ...load(0), ...put(wLeft), ...get(weight), ...load(16), ...put(wRight)],
    ...rows.map(row => [
      ...[...address(row), ...splat, ...put(value)],
      ...[...get(left(row)), ...get(value), ...get(wLeft), ...multiplyVectors, ...addVectors],
      ...put(left(row)),
      ...[...get(right(row)), ...get(value), ...get(wRight), ...multiplyVectors, ...addVectors],
      ...put(right(row))
    ]),
    increase(weight, constant(32)),
    increase(xRow, constant(4))
  ];
  const stride = [...get(nStrips), ...constant(5), shiftLeft]; // bytes of a row of y
  const perGroup = [
    ...rows.map(row => [...zero, ...put(left(row)), ...zero, ...put(right(row))]),
    [...get(stripStart), ...put(weight)],
    loop(i, nIn, ...inner),
    ...rows.map(row => [
      ...[...get(out), ...get(left(row)), ...store(0), ...get(out), ...get(right(row))],
      ...store(16),
      ...increase(out, stride)
    ]),
    increase(xRow, get(width), constant(3), [multiply])
  ];
  const perStrip = [
    [...get(x), ...put(xRow)],
    [...get(y), ...get(strip), ...constant(5), shiftLeft, add, ...put(out)],
    loop(group, nGroups, ...perGroup),
    [...get(weight), ...put(stripStart)]
  ];
  const body = [
    ...[2, 8, I32, 11, V128],
    ...[...get(nIn), ...constant(2), shiftLeft, ...put(width)],
    ...[...get(w), ...put(stripStart)],
    ...loop(strip, nStrips, ...perStrip),
    0x0b
  ];
  return new Uint8Array([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, [1, 0x60, 6, I32, I32, I32, I32, I32, I32, 0]),
    ...section(2, [1, ...name('env'), ...name('memory'), 2, 0, 1]),
    ...section(3, [1, 0]),
    ...section(7, [1, ...name('matmul'), 0, 0]),
    ...section(10, [1, ...unsigned(body.length), ...body])
  ]);
}

/** Products with weights; `numbers`: room for all of them, in float32. */
export class Matmul {
  constructor(numbers, maxInputs, maxOutputs) {
    this.used = 0;
    this.rows = 256; // at once
    this.scratch = this.rows * (maxInputs + roundUp(maxOutputs, STRIP));
    const bytes = 4 * (numbers + this.scratch) + 65536;
    try {
      const memory = new WebAssembly.Memory({initial: Math.ceil(bytes / 65536)});
      const module = new WebAssembly.Module(assemble());
      const instance = new WebAssembly.Instance(module, {env: {memory}});
      this.kernel = instance.exports.matmul;
      this.memory = new Float32Array(memory.buffer);
    } catch {
      this.kernel = null; // no WebAssembly, no SIMD, or not enough memory
      this.memory = null;
    }
  }

  /** Numbers that a weight (nOut, nIn) takes when packed. */
  static packedSize(nOut, nIn) {
    return roundUp(nOut, STRIP) * nIn;
  }

  /** A weight (nOut, nIn), packed for good. */
  pack(data, nOut, nIn) {
    const weight = this.packBriefly(data, nOut, nIn);
    this.used += weight.packed.length;
    return weight;
  }

  /** The same, until the next one is packed. outStep, inStep: from a number to that of the next
   * output and of the next input. */
  packBriefly(data, nOut, nIn, outStep = nIn, inStep = 1) {
    const size = Matmul.packedSize(nOut, nIn);
    const start = this.scratch + this.used;
    const packed = this.kernel
      ? this.memory.subarray(start, start + size)
      : new Float32Array(size);
    for (let o = 0; o < nOut; o++) {
      const strip = (o - (o % STRIP)) * nIn + (o % STRIP);
      for (let i = 0; i < nIn; i++) {
        packed[strip + i * STRIP] = data[o * outStep + i * inStep];
      }
    }
    return {packed, start, nOut, nIn};
  }

  /** x (T, in) times the transpose of a packed weight -> y (T, out), rows `from` to T. */
  multiply(x, weight, y, T, from = 0) {
    for (let t = from; t < T; t += this.rows) {
      const n = Math.min(this.rows, T - t);
      if (this.kernel) this.multiplyInWasm(x, weight, y, t, n);
      else multiplyInScript(x, weight, y, t, n);
    }
  }

  multiplyInWasm(x, {start, nOut, nIn}, y, t, n) {
    const nStrips = roundUp(nOut, STRIP) / STRIP;
    const width = nStrips * STRIP;
    const yStart = this.rows * nIn;
    this.memory.set(x.subarray(t * nIn, (t + n) * nIn));
    this.kernel(0, 4 * start, 4 * yStart, nIn, Math.ceil(n / ROWS), nStrips);
    for (let i = 0; i < n; i++) {
      const row = yStart + i * width;
      y.set(this.memory.subarray(row, row + nOut), (t + i) * nOut);
    }
  }
}

/** The same in plain JavaScript. Sums in local variables: twice as fast as in an array. */
function multiplyInScript(x, {packed, nOut, nIn}, y, t, n) {
  const strip = new Float32Array(STRIP);
  for (let first = 0; first < nOut; first += STRIP) {
    const outputs = Math.min(STRIP, nOut - first);
    for (let row = t; row < t + n; row++) {
      let [a, b, c, d, e, f, g, h] = [0, 0, 0, 0, 0, 0, 0, 0];
      let w = first * nIn;
      for (let i = row * nIn; i < (row + 1) * nIn; i++) {
        const value = x[i];
        a += value * packed[w];
        b += value * packed[w + 1];
        c += value * packed[w + 2];
        d += value * packed[w + 3];
        e += value * packed[w + 4];
        f += value * packed[w + 5];
        g += value * packed[w + 6];
        h += value * packed[w + 7];
        w += STRIP;
      }
      strip.set([a, b, c, d, e, f, g, h]);
      for (let o = 0; o < outputs; o++) y[row * nOut + first + o] = strip[o];
    }
  }
}
