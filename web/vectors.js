// Vectors and matrices, row by row in a Float32Array.

/** a (n, C) times the transpose of b (m, C). (n, m) */
export function timesTransposed(a, b, C) {
  const n = a.length / C;
  const m = b.length / C;
  const out = new Float32Array(n * m);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) out[i * m + j] = dotAt(a, i * C, b, j * C, C);
  }
  return out;
}

export function dotAt(a, i, b, j, n) {
  let [s0, s1, s2, s3] = [0, 0, 0, 0];
  let d = 0;
  for (; d + 4 <= n; d += 4) {
    s0 += a[i + d] * b[j + d];
    s1 += a[i + d + 1] * b[j + d + 1];
    s2 += a[i + d + 2] * b[j + d + 2];
    s3 += a[i + d + 3] * b[j + d + 3];
  }
  for (; d < n; d++) s0 += a[i + d] * b[j + d];
  return s0 + s1 + s2 + s3;
}

export const vectorDot = (a, b) => dotAt(a, 0, b, 0, a.length);

/** Row i of a matrix with C columns. */
export const rowOf = (matrix, i, C) => matrix.subarray(i * C, (i + 1) * C);

/** The norms of n vectors of C numbers. */
export function lengths(vectors, C) {
  const n = vectors.length / C;
  return Float32Array.from({length: n}, (_, i) => {
    const x = rowOf(vectors, i, C);
    return Math.sqrt(vectorDot(x, x));
  });
}

/** The indices of the n largest numbers, largest first; of equal ones the first. */
export function largest(values, n) {
  const best = [];
  const size = Math.min(n, values.length);
  for (let i = 0; i < values.length; i++) {
    const x = values[i];
    if (best.length === size && x <= values[best[size - 1]]) continue;
    let place = Math.min(best.length, size - 1);
    while (place > 0 && values[best[place - 1]] < x) {
      best[place] = best[place - 1];
      place--;
    }
    best[place] = i;
  }
  return best;
}

/** The n largest, then the n smallest, both ends with the most extreme first. */
export function mostAndLeast(values, n) {
  return [...largest(values, n), ...largest(values.map(x => -x), n)];
}

export const take = (values, indices) => Float32Array.from(indices, i => values[i]);

/** log of the sum of e^x: a logit minus this is the log of its probability. */
export function logSumExp(x) {
  let max = -Infinity;
  for (let i = 0; i < x.length; i++) max = Math.max(max, x[i]);
  let total = 0;
  for (let i = 0; i < x.length; i++) total += Math.exp(x[i] - max);
  return Math.log(total) + max;
}

export function centered(x) {
  const mean = x.reduce((a, b) => a + b, 0) / x.length;
  return x.map(value => value - mean);
}
