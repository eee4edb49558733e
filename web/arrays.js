// Arrays in a page: the inverse of compress() in lib/page.py. It needs no page: also for a Worker.

const TYPES = {
  float32: Float32Array,
  float16: Uint16Array, // converted by fromHalf
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array
};

/** {data, shape} of the array at {dtype, shape, start, end} in bytes; float16 becomes float32. */
export async function readArray(bytes, {dtype, shape, start, end}) {
  const planes = await inflate(bytes.subarray(start, end));
  const data = new TYPES[dtype](joinPlanes(planes, TYPES[dtype].BYTES_PER_ELEMENT).buffer);
  return {data: dtype === 'float16' ? fromHalf(data) : data, shape};
}

export async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Byte planes (all first bytes, all second bytes, ...) -> numbers of `size` bytes each. */
function joinPlanes(planes, size) {
  const n = planes.length / size;
  const joined = new Uint8Array(planes.length);
  for (let b = 0; b < size; b++) {
    for (let i = 0; i < n; i++) joined[i * size + b] = planes[b * n + i];
  }
  return joined;
}

function fromHalf(halves) {
  const out = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) out[i] = halfValue(halves[i]);
  return out;
}

/** The value of an IEEE 754 half-precision number. */
function halfValue(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * 2 ** -24 * fraction;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}
