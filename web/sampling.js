// The choice of the next token: model.py's filter_logits and sample_next, with torch's random numbers. In the order of the
// original and, where it decides which tokens stay, with its float32 roundings.

const f = Math.fround;

/** softmax of logits (a typed array) in double precision; -Infinity becomes 0. */
export function softmax(logits) {
  let max = -Infinity,
    sum = 0;
  for (const x of logits) if (x > max) max = x;
  const p = new Float64Array(logits.length);
  for (let i = 0; i < p.length; i++) sum += p[i] = Math.exp(logits[i] - max);
  for (let i = 0; i < p.length; i++) p[i] /= sum;
  return p;
}

/** Probabilities after temperature (0: the likeliest alone), top-k (ties stay) and top-p.
 *  tail: [[logit, count], ...] of tokens that are less likely than all of logits: they count in sums, and are never in top-k. */
export function filtered(logits, temperature, k, p, tail = []) {
  const n = logits.length,
    scaled = new Float32Array(n);
  let max = -Infinity,
    best = 0;
  for (let i = 0; i < n; i++)
    if (logits[i] > max) {
      max = logits[i];
      best = i;
    }
  if (temperature === 0) {
    const one = new Float64Array(n);
    one[best] = 1;
    return {p: one, kept: 1, tail: 0, rest: []};
  }
  for (let i = 0; i < n; i++) scaled[i] = f(f(logits[i] - max) / f(temperature));
  let rest = tail.map(([logit, count]) => [(logit - max) / temperature, count]);
  if (k < n) {
    const kth = scaled.toSorted()[n - k];
    for (let i = 0; i < n; i++) if (scaled[i] < kth) scaled[i] = -Infinity;
  }
  let room = k - n; // how many of the tail are among the k likeliest
  rest = rest.flatMap(([logit, count]) => {
    const taken = Math.max(0, Math.min(count, room));
    room -= taken;
    return taken ? [[logit, taken]] : [];
  });
  const sumOf = items => items.reduce((sum, [logit, count]) => sum + count * Math.exp(logit), 0);
  if (p < 1) {
    let total = sumOf(rest),
      before = 0;
    for (const x of scaled) total += Math.exp(x);
    const order = Array.from(scaled.keys())
      .filter(i => scaled[i] > -Infinity)
      .sort((a, b) => scaled[b] - scaled[a] || a - b);
    for (const i of order) {
      const mass = Math.exp(scaled[i]) / total;
      if (before >= p) scaled[i] = -Infinity;
      before += mass;
    }
    rest = rest.flatMap(([logit, count]) => {
      // of a bin of equals, as many as are needed
      const each = Math.exp(logit) / total,
        taken = before >= p ? 0 : Math.min(count, Math.ceil((p - before) / each));
      before += count * each;
      return taken ? [[logit, taken]] : [];
    });
  }
  const beyond = sumOf(rest);
  let total = beyond,
    kept = rest.reduce((sum, [, count]) => sum + count, 0);
  const out = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    total += out[i] = Math.exp(scaled[i]);
    if (scaled[i] > -Infinity) kept++;
  }
  for (let i = 0; i < n; i++) out[i] /= total;
  // of the tail: what each of its bins still holds, [probability of one token, how many, its logit]
  return {
    p: out,
    kept,
    tail: beyond / total,
    rest: rest.map(([logit, count]) => [Math.exp(logit) / total, count, logit * temperature + max])
  };
}

/** The generator behind torch.manual_seed on a CPU: MT19937 (Matsumoto and Nishimura 1998). */
export class Twister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed % 2 ** 32;
    for (let j = 1; j < 624; j++) this.state[j] = Math.imul(1812433253, this.state[j - 1] ^ (this.state[j - 1] >>> 30)) + j;
    this.at = 624;
  }
  next() {
    const {state} = this;
    if (this.at === 624) {
      for (let j = 0; j < 624; j++) {
        const y = (state[j] & 0x80000000) | (state[(j + 1) % 624] & 0x7fffffff);
        state[j] = state[(j + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let y = state[this.at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }
  /** torch.rand(dtype=float64): 53 bits of two numbers. */
  uniform() {
    const high = this.next(),
      low = this.next();
    return ((high & 0x1fffff) * 2 ** 32 + low) * 2 ** -53;
  }
}

/** The first index at which the sum of p exceeds u times the whole sum: model.py's sample_next. -1: in the tail. */
export function drawn(p, u, tail = 0) {
  let total = tail,
    sum = 0,
    last = -1;
  for (const x of p) total += x;
  for (let i = 0; i < p.length; i++) {
    sum += p[i];
    if (p[i] > 0) last = i;
    if (sum > u * total) return i;
  }
  return tail > 0 ? -1 : last;
}
