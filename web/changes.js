// What is changed in the model ("break it yourself"): a list as text in the URL, and as hooks of
// the engine. It needs no page: the Worker uses it too.
//
// The text is name=number,...; a factor from 0 (off) to 2 for
//   L0.H3      a head: what it mixes from the values, before the output projection
//   attn0      all heads of a layer       mlp1   all neurons of a layer
//   L1.n57     a neuron: its activation   ngrams, positions   these embeddings; RoPE: its angles
// and
//   mask=0        queries see keys that come after them
//   L0.H3@5.2=1   head L0·H3: the attention of query 5 to key 2, from 0 to 1; the other weights
//                 of the query keep their proportions and add up to the rest
// Biases of output projections stay.

const CHANGE_NAME =
  /^(?:L(\d+)\.(?:H(\d+)(?:@(\d+)\.(\d+))?|n(\d+))|(attn|mlp)(\d+)|ngrams|positions|mask)$/;
const CHANGE_NUMBER = /^\d(\.\d+)?$/;

/**
 * The parts of a name, or null if a model has no such part.
 *
 * model: {L, H, F: neurons in a layer, tokens: block_size, ngrams, positions: whether it has them}.
 */
export function readPart(name, model) {
  const found = CHANGE_NAME.exec(name);
  if (!found) return null;
  const [layer, head, query, key, neuron] = found.slice(1, 6).map(x => x && Number(x));
  const [kind, ofLayer] = found.slice(6);
  if (kind) return Number(ofLayer) < model.L ? {kind, layer: Number(ofLayer), most: 2} : null;
  if (layer === undefined) {
    if (name === 'mask') return {kind: name, most: 0};
    return model[name] ? {kind: name, most: 2} : null;
  }
  if (layer >= model.L) return null;
  if (neuron !== undefined) {
    return neuron < model.F ? {kind: 'neuron', layer, neuron, most: 2} : null;
  }
  if (head >= model.H) return null;
  if (query === undefined) return {kind: 'head', layer, head, most: 2};
  if (Math.max(query, key) >= model.tokens) return null;
  return {kind: 'look', layer, head, query, key, most: 1};
}

/** A Map of names to numbers; what is not valid is left out. */
export function parseChanges(text, model) {
  const changes = new Map();
  for (const item of text.split(',')) {
    const [name, number, more] = item.split('=');
    const part = readPart(name, model);
    if (!part || more !== undefined || !CHANGE_NUMBER.test(number ?? '')) continue;
    if (Number(number) <= part.most) changes.set(name, Number(number));
  }
  return changes;
}

/** The inverse of parseChanges. */
export const formatChanges = changes =>
  Array.from(changes, ([name, number]) => `${name}=${number}`).join(',');

/** What Changes needs to know of an engine. */
export const describeModel = ({L, H, neurons, config}) => ({
  L,
  H,
  F: neurons,
  tokens: config.block_size,
  ngrams: config.ngram > 1,
  positions: config.position !== 'none'
});

/** Hooks of the engine (see there) for changes, a Map of parseChanges. */
export class Changes {
  /**
   * frozen: the trace of a text whose attention patterns are used, or null. A query attends as the
   * one at its position does there; queries beyond its end attend by themselves.
   */
  constructor(changes, {L, H, F}, frozen = null) {
    this.changes = changes;
    this.H = H;
    this.F = F;
    this.frozen = frozen;
    this.seesFuture = changes.get('mask') === 0;
    this.rotation = this.factor('positions');
    const layers = () => Array.from({length: L}, () => []);
    this.looks = layers(); // of each layer
    this.neuronsOf = layers();
    for (const [name, number] of changes) {
      const part = readPart(name, {L, H, F, tokens: Infinity});
      if (part?.kind === 'look') this.looks[part.layer].push({...part, share: number});
      if (part?.kind === 'neuron') this.neuronsOf[part.layer].push({...part, factor: number});
    }
  }

  factor(name) {
    return this.changes.get(name) ?? 1;
  }

  headFactor(layer, head) {
    return this.factor(`attn${layer}`) * this.factor(`L${layer}.H${head}`);
  }

  /** Whether the pattern of a head is not what its queries and keys give. */
  forces(layer, head) {
    return Boolean(this.frozen) || this.looks[layer].some(look => look.head === head);
  }

  mask(mask, T) {
    this.seen = mask;
    if (!this.frozen) return;
    const {T: T0, mask: frozen} = this.frozen;
    copyRows(frozen, T0, mask, T);
  }

  embedding(name, data) {
    const factor = this.factor({'n-grams': 'ngrams', position: 'positions'}[name]);
    scaleBy(data, factor);
  }

  attention(layer, data) {
    const T = Math.sqrt(data.length / this.H);
    for (let head = 0; this.frozen && head < this.H; head++) {
      const {T: T0, attention} = this.frozen;
      const from = attention[layer].subarray(head * T0 * T0, (head + 1) * T0 * T0);
      copyRows(from, T0, data.subarray(head * T * T, (head + 1) * T * T), T);
    }
    for (const {head, query, key, share} of this.looks[layer]) {
      if (Math.max(query, key) >= T || !this.seen[query * T + key]) continue;
      const start = (head * T + query) * T;
      lookAt(data.subarray(start, start + T), key, share);
    }
  }

  mixed(layer, data) {
    const size = data.length / this.H;
    for (let head = 0; head < this.H; head++) {
      scaleBy(data.subarray(head * size, (head + 1) * size), this.headFactor(layer, head));
    }
  }

  post(layer, data) {
    scaleBy(data, this.factor(`mlp${layer}`));
    for (const {neuron, factor} of this.neuronsOf[layer]) {
      for (let i = neuron; i < data.length; i += this.F) data[i] *= factor;
    }
  }
}

function scaleBy(data, factor) {
  if (factor === 1) return;
  for (let i = 0; i < data.length; i++) data[i] *= factor;
}

/** The rows of a (n, n) matrix into the first ones of a (T, T) matrix: 0 beyond their end. */
function copyRows(from, n, to, T) {
  const size = Math.min(n, T);
  for (let t = 0; t < size; t++) {
    to.fill(0, t * T, (t + 1) * T);
    to.set(from.subarray(t * n, t * n + size), t * T);
  }
}

/** Give key s this share of a row of attention. A query that sees no other key keeps its row. */
function lookAt(row, s, share) {
  let others = 0;
  row.forEach((p, i) => (others += i === s ? 0 : p));
  if (others === 0) return;
  for (let i = 0; i < row.length; i++) row[i] *= (1 - share) / others;
  row[s] = share;
}
