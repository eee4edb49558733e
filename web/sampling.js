// filter_logits and sample_next of model.py, with PyTorch's random numbers. Operations come in the
// same order and, where they decide which tokens are kept, are rounded to float32 in the same way.

const f = Math.fround;

/** Softmax of a typed array, in double precision. */
export function softmax(logits) {
  let max = -Infinity;
  for (const x of logits) max = Math.max(max, x);
  const p = new Float64Array(logits.length);
  let total = 0;
  for (let i = 0; i < p.length; i++) {
    p[i] = Math.exp(logits[i] - max);
    total += p[i];
  }
  return p.map(x => x / total);
}

/**
 * Probabilities after temperature (0: greedy), top-k (ties are kept) and top-p.
 *
 * tail: [[logit, count], ...], a histogram of the tokens outside `logits`, all less likely than
 * those. Returns {p, kept: number of tokens, tail: probability in the tail, rest: [[probability of
 * one token, count, logit], ...] of the tail}.
 */
export function filtered(logits, temperature, k, p, tail = []) {
  const n = logits.length;
  let best = 0;
  for (let i = 1; i < n; i++) if (logits[i] > logits[best]) best = i;
  const max = logits[best];
  if (temperature === 0) {
    const oneHot = new Float64Array(n);
    oneHot[best] = 1;
    return {p: oneHot, kept: 1, tail: 0, rest: []};
  }
  const scaled = new Float32Array(n);
  for (let i = 0; i < n; i++) scaled[i] = f(f(logits[i] - max) / f(temperature));
  let rest = tail.map(([logit, count]) => [(logit - max) / temperature, count]);
  if (k < n) {
    const kth = scaled.toSorted()[n - k];
    for (let i = 0; i < n; i++) if (scaled[i] < kth) scaled[i] = -Infinity;
  }
  rest = firstOfTail(rest, k - n);
  if (p < 1) rest = applyTopP(scaled, rest, p);

  const weights = Float64Array.from(scaled, Math.exp);
  const tailWeight = tailSum(rest);
  let total = tailWeight;
  for (const weight of weights) total += weight;
  const keptHere = scaled.filter(x => x > -Infinity).length;
  const keptInTail = rest.reduce((sum, [, count]) => sum + count, 0);
  return {
    p: weights.map(weight => weight / total),
    kept: keptHere + keptInTail,
    tail: tailWeight / total,
    rest: rest.map(([logit, count]) => [Math.exp(logit) / total, count, logit * temperature + max])
  };
}

const tailSum = tail => tail.reduce((sum, [logit, count]) => sum + count * Math.exp(logit), 0);

/** The first n tokens of a tail. */
function firstOfTail(tail, n) {
  let room = n;
  return tail.flatMap(([logit, count]) => {
    const taken = Math.max(0, Math.min(count, room));
    room -= taken;
    return taken ? [[logit, taken]] : [];
  });
}

/** Set what top-p removes from scaled to -Infinity; returns the part of the tail that is kept. */
function applyTopP(scaled, tail, p) {
  let total = tailSum(tail);
  for (const x of scaled) total += Math.exp(x);
  const order = Array.from(scaled.keys())
    .filter(i => scaled[i] > -Infinity)
    .sort((a, b) => scaled[b] - scaled[a] || a - b);
  let cumulative = 0; // of the more likely tokens
  for (const i of order) {
    const mass = Math.exp(scaled[i]) / total;
    if (cumulative >= p) scaled[i] = -Infinity;
    cumulative += mass;
  }
  return tail.flatMap(([logit, count]) => {
    const each = Math.exp(logit) / total;
    const needed = Math.ceil((p - cumulative) / each);
    const taken = cumulative >= p ? 0 : Math.min(count, needed);
    cumulative += count * each;
    return taken ? [[logit, taken]] : [];
  });
}

/** MT19937, the generator of torch.manual_seed on CPU (Matsumoto and Nishimura 1998). */
export class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed % 2 ** 32;
    for (let j = 1; j < 624; j++) {
      const previous = this.state[j - 1];
      this.state[j] = Math.imul(1812433253, previous ^ (previous >>> 30)) + j;
    }
    this.index = 624;
  }

  twist() {
    const {state} = this;
    for (let j = 0; j < 624; j++) {
      const y = (state[j] & 0x80000000) | (state[(j + 1) % 624] & 0x7fffffff);
      state[j] = state[(j + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.index = 0;
  }

  next() {
    if (this.index === 624) this.twist();
    let y = this.state[this.index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** torch.rand(dtype=torch.float64): the low 53 bits of two outputs. */
  uniform() {
    const high = this.next();
    const low = this.next();
    return ((high & 0x1fffff) * 2 ** 32 + low) * 2 ** -53;
  }
}

/** The first index whose cumulative sum exceeds u times the total, as in sample_next; -1: tail. */
export function sampleIndex(p, u, tail = 0) {
  let total = tail;
  for (const x of p) total += x;
  let cumulative = 0;
  let last = -1;
  for (let i = 0; i < p.length; i++) {
    cumulative += p[i];
    if (p[i] > 0) last = i;
    if (cumulative > u * total) return i;
  }
  return tail > 0 ? -1 : last;
}
