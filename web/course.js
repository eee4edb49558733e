// The texts of the course, from a token to sampling. Each stop has words, a formula, shapes, an
// example with this page's numbers, and a question with its answer.

import {argmax, fixed, integer, percent, range, state, sum} from './core.js';
import {
  H,
  HS,
  L,
  T,
  arrays,
  facts,
  headName,
  isPostNorm,
  measured,
  row,
  sees,
  tokenQuoted,
  visibleKeys
} from './model.js';

import {attentionRow, queryKeyDots, score} from './heads.js';
import {tokensOfNeuron} from './layers.js';
import {logitsAt} from './next.js';
import {hasModel} from './live-model.js';
import {filtered} from './sampling.js';

const C = facts.model.n_embd;
const V = facts.vocab_size;
const {position: positions, norm: normKind, prefix_lm: isPrefix, turns} = facts.model;
const isLayerNorm = normKind === 'layernorm';

export const here = () => tokenQuoted(facts.ids[state.t]);
const head = () => `head ${headName(state.layer, state.head)}`;
const normHere = (name, ...index) => row('size_' + name, ...index)[state.t];

/** The key that the selected query attends to most. */
function topKey() {
  const attention = attentionRow(state.layer, state.head, state.t);
  const s = argmax(attention);
  return {s, p: attention[s], name: tokenQuoted(facts.ids[s])};
}

// Examples ----------------------------------------------------------------------------------------

function tokensExample() {
  const ids = facts.ids.slice(0, 8);
  const more = T > ids.length ? ', …' : '';
  const pieces = ids.map(id => `${tokenQuoted(id)} (${id})`).join(', ');
  return `This text has ${integer(T)} tokens: ${pieces}${more}. In brackets: their numbers.`;
}

function neighborExample() {
  const id = facts.ids[state.t];
  const [neighbor] = row('near', facts.distinct.indexOf(id));
  return `${here()} is row ${id} of the table. The most similar row: ${tokenQuoted(neighbor)}.`;
}

function positionExample() {
  if (facts.embeddings.includes('position')) {
    const token = fixed(normHere('token'));
    const position = fixed(normHere('position'));
    return (
      `At position ${state.t}, the vector of the token has length ${token}, ` +
      `the one of the position ${position}.`
    );
  }
  if (positions === 'rope') {
    return (
      'In the figure each row is a position, and each column a pair of numbers, with the cosine ' +
      'of its angle. From row to row the first pairs turn fast, the last hardly at all.'
    );
  }
  return 'Compare with a model that has positions.';
}

function scoreExample() {
  if (!arrays.q) return 'The scores were left out to keep the page small.';
  const {s, name} = topKey();
  const dot = queryKeyDots(state.layer, state.head, state.t)[s];
  const scaled = fixed(dot / Math.sqrt(HS));
  return `In ${head()}, query ${here()}, key ${name}: ${fixed(dot)} / √${HS} = ${scaled}.`;
}

function softmaxExample() {
  if (!arrays.attention) return 'The attention patterns were left out to keep the page small.';
  const {name, p} = topKey();
  return `In ${head()}, ${here()} takes ${percent(p)} of its mixture from ${name}.`;
}

/** A source token that sees a later one; otherwise the selected token. */
function maskExample() {
  const tokenAndPlace = t => `${tokenQuoted(facts.ids[t])} (position ${t})`;
  const count = t => `${visibleKeys[t].length} of ${T} tokens`;
  const t = range(T - 1, i => i).find(i => i > 0 && sees(i, i + 1));
  if (t === undefined) {
    const place = `${here()} is at position ${state.t}, counted from 0`;
    return `${place}: it can attend to ${count(state.t)}.`;
  }
  const last = visibleKeys[t].at(-1);
  const {eot_token: eot} = facts.model;
  const answer = range(T, i => i).findLast(i => i > last && facts.ids[i] !== eot) ?? T - 1;
  return (
    `${tokenAndPlace(t)} is in the source: it can attend to ${count(t)}, also to later ones, ` +
    `up to ${tokenAndPlace(last)}. ${tokenAndPlace(answer)} can attend to ${count(answer)}, ` +
    'none of them later.'
  );
}

const HABITS = {
  previous: 'the token just before',
  duplicate: 'earlier copies of the same token',
  induction:
    'what came after an earlier copy of the token: so it can continue what it has seen before'
};

/** What one head does: its habit on random tokens if it is clear, otherwise what it does here. */
function typicalHead() {
  const heads = range(L * H, n => [Math.floor(n / H), n % H]);
  const found = Object.keys(HABITS).flatMap(kind =>
    heads.map(([l, k]) => [headName(l, k), score(kind, l, k) || 0, kind])
  );
  const [name, value, kind] = found.reduce((best, x) => (x[1] > best[1] ? x : best));
  if (value >= 0.2) {
    const share = `${percent(value)} of its attention`;
    return `in a text of random tokens ${name} puts ${share}, more than any other head, on ` +
      HABITS[kind];
  }
  if (!arrays.attention) return `${name} writes what the figure “Tokens raised and lowered” shows`;
  const {name: key, p} = topKey();
  const chosen = headName(state.layer, state.head);
  return `${chosen} looks from ${here()} mostly at ${key} (${percent(p)})`;
}

function streamExample() {
  const start = fixed(normHere('stream', 0));
  const end = fixed(normHere('stream', L));
  return (
    `At ${here()} the vector has length ${start} at the start and ${end} at the end. The lengths ` +
    'of what is added do not simply sum up: vectors point in different directions.'
  );
}

function normExample() {
  const length = fixed(normHere('stream', L));
  const root = `√${C} = ${fixed(Math.sqrt(C), 1)}`;
  if (isPostNorm) return `After the last norm the vector has length ${length}; ${root}.`;
  return (
    `Before the last norm the vector has length ${length}. Dividing makes the mean of its ` +
    `squared numbers 1, so its length ${root}; then the gains change it a little.`
  );
}

function mlpExample() {
  if (!arrays.neurons) return 'The neurons were left out to keep the page small.';
  const [neuron] = row('neurons', state.layer, state.t);
  const tokens = [...tokensOfNeuron(state.layer, state.t, 0)];
  const lowered = tokens.splice(tokens.length / 2);
  const isNegative = row('neuron_post', state.layer, state.t)[0] < 0; // raises what it lowers
  const raised = (isNegative ? lowered : tokens).slice(0, 3).map(tokenQuoted).join(', ');
  return (
    `In layer ${state.layer}, neuron ${neuron} has the largest output at ${here()}: it makes ` +
    `${raised} more likely. ${facts.snippets ? 'Below are the texts that excite it most.' : ''}`
  );
}

function logitsExample() {
  const best = tokenQuoted(row('lens_ids', L, state.t)[0]);
  const p = percent(row('lens', L, state.t)[0]);
  return (
    `After ${here()}, ${best} is the most likely token (${p}). ` +
    'The figure does the same after each layer, for each token: read a column upwards.'
  );
}


function lossExample() {
  const places = measured();
  if (!places.length) return 'This text is too short: nothing in it is predicted.';
  // the selected token shows no color in the strip
  const t = places.includes(state.t) ? state.t : places.at(-2) ?? places.at(-1);
  const loss = row('loss')[t];
  const mean = sum(places.map(i => row('loss')[i])) / places.length;
  return (
    `After ${tokenQuoted(facts.ids[t])} comes ${tokenQuoted(facts.ids[t + 1])}. ` +
    `The model gave it ${percent(Math.exp(-loss))}: a loss of ${fixed(loss)} nats. The mean over ` +
    `the text is ${fixed(mean)}; blind guessing would give ${fixed(Math.log(V))}.`
  );
}

/** The chance of the most likely token at a temperature, with top-k and top-p as they are set. */
export function topAt(temperature) {
  const {logits, tail} = logitsAt(state.t);
  return percent(Math.max(...filtered(logits, temperature, state.k, state.p, tail).p));
}

export function samplingExample() {
  const {logits, ids} = logitsAt(state.t);
  const best = argmax(logits);
  return (
    `After ${here()}, ${tokenQuoted(ids ? ids[best] : best)} has a chance of ${topAt(0)} at ` +
    `temperature 0, ${topAt(0.8)} at 0.8, ${topAt(1)} at 1 and ${topAt(2)} at 2.`
  );
}

// Stops -------------------------------------------------------------------------------------------

const POSITION_KIND = {
  learned: {
    text:
      'So a second learned vector, one for each position, is added to the vector of the token. ' +
      'The same token then has another vector in another place.',
    formula: 'x<sub>0</sub> = W<sub>E</sub>[token] + W<sub>P</sub>[t]'
  },
  sinusoidal: {
    text:
      'So a second vector is added to the one of the token: sines and cosines of the position, ' +
      'with another frequency for each pair of numbers.',
    formula: 'PE(t, 2i) = sin(t / 10000<sup>2i/d</sup>)'
  },
  rope: {
    text:
      'So before a score is computed, query and key are rotated, two numbers at a time like the ' +
      'hand of a clock, by an angle that grows with the position (RoPE). The score then also ' +
      'depends on the distance between the two tokens.',
    formula: 'q′ = R(t) q,  k′ = R(s) k  ⇒  q′·k′ depends on t − s'
  },
  none: {
    text:
      'This model gets no positions. It can only infer the order from how many tokens each one ' +
      'may look at.',
    formula: 'x<sub>0</sub> = W<sub>E</sub>[token]'
  }
}[positions];

export const NGRAMS = facts.tables
  ? ' This model also looks up each token together with those just before it (<b>n-grams</b>), ' +
    'and adds that vector.'
  : '';

const HINTS = [
  !isPrefix && 'the mask, which hides later tokens,',
  NGRAMS && 'the n-grams, which know direct neighbors,'
].filter(Boolean);

const WITHOUT_POSITIONS =
  positions === 'none'
    ? 'From how many tokens each one may look at; it gets no positions.'
    : {
        learned: 'A vector of the position is added to each token.',
        sinusoidal: 'A vector of the position is added to each token.',
        rope: 'Queries and keys are rotated by an angle that grows with the position.'
      }[positions] +
      ' Without that, the tokens that a token looks at would be a heap without order: “dog bites ' +
      'man” like “man bites dog”. ' +
      (HINTS.length ? `Only ${HINTS.join(' and ')} would give a hint. ` : '') +
      (hasModel ? 'At the end of the course you can try it.' : '');

const POSITION_STOP = {
  title: 'Positions',
  target: ['#figure-positions', '#embedding'],
  text:
    (positions === 'rope'
      ? 'So far nothing says where a token stands: a score compares two vectors only. '
      : 'Attention, which comes next, looks at a set of tokens and ignores their order. ') +
    POSITION_KIND.text,
  formula: POSITION_KIND.formula,
  shapes: () =>
    positions === 'rope' ? `${HS / 2} angles per head` : `${T} × ${C}, like the embeddings`,
  example: positionExample,
  question: 'How does this model know the order of the words, and what if that is taken away?',
  answer: WITHOUT_POSITIONS
};

const GROUPS =
  facts.n_kv_head === H
    ? ''
    : ` Here ${H / facts.n_kv_head} heads share their keys and values (grouped queries).`;

const MASK_TEXT =
  'The model learns by predicting each next token. If a token could look at later ones, it would ' +
  'simply read the answer there. So these pairs are hidden: their scores are set to −∞, which ' +
  'gives them no share at the next stop.' +
  (isPrefix
    ? ' The source, the part before the separator &lt;|endoftext|&gt;, is given: nothing in it ' +
      'is predicted. So its tokens look in both directions (prefix LM, Raffel et al. 2020). Only ' +
      'the target, the answer to it, is written from left to right.'
    : turns
      ? ' This also holds in the source, the part before the separator &lt;|endoftext|&gt;.'
      : '');

/** Of one stop: title; target: selectors of what to highlight, the first that exists; text: static
 * HTML; the others: text, or functions of the state that return it. */
export const STOPS = [
  {
    title: 'Tokens',
    target: ['#strip'],
    text:
      'A language model reads text in pieces, called <b>tokens</b>: characters, parts of words, ' +
      'or words. All tokens that it knows are its <b>vocabulary</b>; each has a number. It was ' +
      'made before training: every character, or every piece that is frequent in the text to ' +
      'learn from. The strip shows the tokens of your text (· is a space, ↵ a new line). Click ' +
      'one: all figures follow. The model has one task: given some tokens, say which comes next.',
    formula: 'text → numbers of tokens',
    shapes: () => `vocabulary: ${integer(V)} tokens; this text: ${T}`,
    example: tokensExample,
    question: 'What is a token, and how many different ones does this model know?',
    answer: () => `A piece of text with a number. This model knows ${integer(V)} of them.`
  },
  {
    title: 'Token embeddings',
    target: ['#figure-neighbors'],
    text:
      'A model computes with numbers. So each token is looked up in a table that has a list of ' +
      'numbers, a <b>vector</b>, for each token. Nobody writes this table: like all numbers ' +
      'called <b>weights</b>, it is found in training: each step moves it a little, so that the ' +
      'right next tokens become more likely. The longer the training, the more similar the ' +
      'vectors of tokens that are used alike.' + NGRAMS,
    formula: 'x = W<sub>E</sub>[token]',
    shapes: () => `table: ${integer(V)} × ${C}; this text becomes ${T} × ${C}`,
    example: neighborExample,
    question: 'Why vectors, and not just the numbers of the tokens?',
    answer:
      'The number of a token says nothing about it. Vectors can be similar, and many properties ' +
      'fit into one, each as a direction.'
  },
  ...(positions === 'rope' ? [] : [POSITION_STOP]),
  {
    title: 'Query, key, value',
    target: ['#figure-terms', '#head'],
    text:
      `The model has ${L} <b>layer${L > 1 ? 's' : ''}</b>. Each has two parts, attention and an ` +
      'MLP. <b>Attention</b> lets tokens fetch information from other tokens. For this, three ' +
      'new vectors are made of the vector of each token: what it looks for (<b>query</b>), what ' +
      'it offers to be found by (<b>key</b>), and what it passes on (<b>value</b>). Each is a ' +
      'product ' +
      'with a matrix of weights. ' + GROUPS,
    formula: 'q = x W<sub>Q</sub>,  k = x W<sub>K</sub>,  v = x W<sub>V</sub>',
    shapes: () => `${T} × ${HS} for queries, keys and values, in each head (see stop 8)`,
    example: () =>
      `The figure shows the query of ${here()} in ${head()}, one key, and their product in each ` +
      `of the ${HS} dimensions (numbers of a vector).`,
    question: 'How does a token decide how much it takes from another one?',
    answer:
      'Its query is compared with the key of the other one. The better they match, the more of ' +
      'the value it takes. The next stops show the numbers.'
  },
  {
    title: 'Scaled dot product',
    target: ['#figure-scores', '#head'],
    text:
      'How well do a query and a key match? Multiply them number by number and add up: this is ' +
      'their <b>dot product</b>. More numbers give larger sums, so it is divided by the root of ' +
      'how many a vector has. The result is the <b>score</b>.' +
      (facts.model.qk_norm
        ? ' This model first brings queries and keys to a common length (QK-norm).'
        : ''),
    formula: 'score = q · k / √d<sub>h</sub>',
    shapes: () => `√${HS} = ${fixed(Math.sqrt(HS))}; one score for each pair: ${T} × ${T}`,
    example: scoreExample,
    question: 'Why divide by the root?',
    answer:
      'Large scores would give one token a share of nearly 100% (see Softmax). Then a small ' +
      'change of a weight would hardly change anything, and the model could not learn.'
  },
  {
    title: isPrefix ? 'Attention mask' : 'Causal mask',
    target: ['#figure-attention', '#head'],
    text: MASK_TEXT,
    formula:
      'score<sub>ts</sub> = −∞  for s > t' + (isPrefix ? ', unless both are in the source' : ''),
    shapes: () => `${sum(visibleKeys.map(keys => keys.length))} of ${T * T} pairs remain`,
    example: maskExample,
    question: 'Why may a token not look at later ones?',
    answer:
      'In training it would read off the answer instead of learning to predict. And when it ' +
      'writes, later tokens do not exist yet.' +
      (isPrefix ? ' The source exists from the beginning: it is read in both directions.' : '')
  },
  {
    title: 'Softmax',
    target: ['#figure-scores', '#head'],
    text:
      '<b>Softmax</b> turns any numbers into shares that are positive and sum to 1: raise e ' +
      '(2.718…) to the power of each number, then divide by the sum. −∞ gives 0. With these ' +
      'shares a token mixes the values of the tokens that it sees.',
    formula:
      'a<sub>s</sub> = e<sup>score<sub>s</sub></sup> / Σ e<sup>score</sup>,  ' +
      'mixture = Σ a<sub>s</sub> v<sub>s</sub>',
    shapes: () => `each row of the ${T} × ${T} shares sums to 1`,
    example: softmaxExample,
    question: 'A score is 1 higher than another. How much more is taken?',
    answer: 'e = 2.72 times as much. So a few large scores get most of it.'
  },
  ...(positions === 'rope' ? [POSITION_STOP] : []), // they act on queries and keys
  {
    title: 'Several heads',
    target: ['#figure-heads'],
    text:
      'One query per token can look for one kind of thing only. So each layer does all this ' +
      'several times at once, with other weights: these are its <b>heads</b>. L0·H2 is head 2 of ' +
      'layer 0; we count from 0.',
    formula:
      'head<sub>i</sub> = softmax(Q<sub>i</sub> K<sub>i</sub><sup>T</sup> / √d<sub>h</sub>) ' +
      'V<sub>i</sub>',
    shapes: () => `${L} layer${L > 1 ? 's' : ''} × ${H} heads, ${HS} dimensions each`,
    example: () =>
      `For example, ${typicalHead()}. Click a head: the panel below the figure shows it in full.`,
    question: 'Why are there several heads per layer, and what does one of this model do?',
    answer: () => `Each can look for something else. For example, ${typicalHead()}.`
  },
  {
    title: 'What a head writes',
    target: ['#figure-promoted', '#head'],
    text:
      'The mixtures of all heads, side by side, are multiplied by one more matrix of weights. ' +
      'Each head has its own rows in it, so the result is a sum with one part per head, and ' +
      'each can be studied by itself.',
    formula: 'out = [head<sub>1</sub> … head<sub>h</sub>] W<sub>O</sub>',
    shapes: () => `${H} × ${HS} = ${H * HS} numbers per token, times ${H * HS} × ${C}`,
    example: () =>
      `The bars show which next tokens ${head()} makes more likely (raises) and less likely ` +
      `(lowers) at ${here()}.`,
    question: 'Where a head looks and what it writes: is this the same?',
    answer:
      'No. Queries and keys decide where it looks; values and the last matrix decide what it ' +
      'writes.'
  },
  {
    title: 'Residual stream',
    target: ['#figure-flow'],
    text:
      'Layers do not replace the vector of a token: they add to it. This running sum is the ' +
      '<b>residual stream</b>. It carries the token itself and all that the layers have written.' +
      (isPostNorm ? ' In this model each sum is rescaled at once (next stop).' : ''),
    formula: isPostNorm
      ? 'x ← norm(x + attention(x)),  x ← norm(x + MLP(x))'
      : 'x ← x + attention(norm(x)),  x ← x + MLP(norm(x))',
    shapes: () => `${T} × ${C} from the first layer to the last`,
    example: streamExample,
    question: 'Does each layer replace what the one before it made?',
    answer:
      'No: it adds to it' +
      (isPostNorm ? ', and the sum is rescaled' : '') +
      '. A later layer can read what any earlier one wrote.'
  },
  {
    title: isLayerNorm ? 'LayerNorm' : 'RMSNorm',
    target: ['#figure-flow'],
    text:
      'The more is added, the longer a vector can get: its length is the root of the sum of its ' +
      'squared numbers. ' +
      (isPostNorm
        ? 'So after each attention and MLP the sum is brought to a common size. '
        : 'So before each attention and MLP a copy of the vector is brought to a common size. ') +
      (isLayerNorm
        ? 'LayerNorm subtracts the mean of its numbers, divides by their standard deviation, '
        : 'RMSNorm divides by the root of the mean of its squared numbers, ') +
      'and multiplies each by a learned gain g. This keeps training stable.',
    formula: isLayerNorm
      ? `norm(x) = g · (x − mean) / √(var + ε)${facts.model.bias ? ' + b' : ''}`
      : 'norm(x) = g · x / √(mean(x²) + ε)',
    shapes: () =>
      `${2 * L + !isPostNorm} norms with ${C} gains each: two in each layer` +
      (isPostNorm ? '' : ', one at the end'),
    example: normExample,
    question: 'What would happen without norms?',
    answer:
      'What is added would get larger and larger, or vanish, from layer to layer. Training with ' +
      'many layers would often fail.'
  },
  {
    title: 'MLP',
    target: ['#figure-neurons', '#mlp'],
    text:
      'Attention moves information between tokens. The <b>MLP</b> works on each token by itself. ' +
      `It has ${integer(facts.neurons_in_a_layer)} <b>neurons</b> in each layer. Each neuron has ` +
      'two vectors of weights. The first is a pattern: a dot product measures how much of it is ' +
      'in the vector of the token. The function act turns this into a strength, about 0 without ' +
      'the pattern. The neuron adds its second vector, times this strength, to the stream. So it ' +
      'works like a rule, for example: “if this token ends the name of a capital, then make the ' +
      'name of its country more likely”. Some of what a model knows has been found in such rules.',
    formula: facts.gated
      ? 'MLP(x) = (act(x W<sub>G</sub>) · x W<sub>1</sub>) W<sub>2</sub>'
      : 'MLP(x) = act(x W<sub>1</sub>) W<sub>2</sub>',
    shapes: () => `${C} → ${integer(facts.neurons_in_a_layer)} → ${C}`,
    example: mlpExample,
    question: 'What does the MLP do that attention does not?',
    answer:
      'It applies rules to the vector of a single token: if a pattern is there, it adds what ' +
      'follows from it. Attention only fetches and mixes what other tokens offer.'
  },
  {
    title: 'Logits',
    target: ['#figure-logit-lens'],
    text:
      'Every token of the vocabulary also has an output vector. After the last layer, its dot ' +
      'product with the vector at a position says how well it fits as the next token: this is ' +
      'its <b>logit</b>. Softmax turns the logits into probabilities.',
    formula:
      `logits = ${isPostNorm ? 'x' : 'norm(x)'} W<sub>U</sub>` +
      (facts.model.logit_softcap ? ', limited by tanh' : '') +
      ',  p = softmax(logits)',
    shapes: () => `${C} → ${integer(V)} at each position`,
    example: logitsExample,
    question: 'What exactly does the model put out after each token?',
    answer: () =>
      `${integer(V)} logits, one for each token of its vocabulary; softmax makes them ` +
      'probabilities that sum to 1. It does not put out words: one is drawn in the end.'
  },
  {
    title: 'Loss',
    target: ['#strip'],
    text:
      'How good is a prediction? Take the probability p that the model gave to the token that ' +
      'did come next. Its <b>loss</b> is −ln p (ln: natural logarithm), in units called nats: 0 ' +
      'if p was 100%, and 1 more each time p is divided by 2.72. Training changes the weights, ' +
      'step by step, so that the mean loss falls. The deeper the orange of a token in the strip, ' +
      'the larger its loss.',
    formula: 'loss = −ln p(next token)',
    shapes: () => `one loss for each token but the first; guessing blindly: ln ${integer(V)}`,
    example: lossExample,
    question: 'What does the loss of a token mean, and what would blind guessing give?',
    answer: () =>
      'It is −ln of the probability that the model gave to this token: how surprised it was. ' +
      `Guessing blindly gives each token 1/${integer(V)}, so ln ${integer(V)} = ` +
      `${fixed(Math.log(V))} nats.`
  },
  {
    title: 'Sampling',
    target: ['#next .card'],
    text:
      'To write, one token is drawn by its probability (<b>sampled</b>) and appended; then all ' +
      'starts again with the longer text. The <b>temperature</b> divides the logits first: below ' +
      '1 likely tokens become likelier, above 1 all become more alike. At 0 the most likely ' +
      'token is always taken. Top-k and top-p leave out unlikely tokens.',
    formula: 'p<sub>i</sub> = e<sup>logit<sub>i</sub> / temperature</sup> / Σ',
    shapes: () => `one of ${integer(V)} tokens`,
    example: samplingExample,
    question: 'What do temperature 0, 0.8 and 2 change?',
    answer:
      '0 takes the most likely token, so it always writes the same. 0.8 prefers likely tokens a ' +
      'little more than the model does. 2 gives unlikely ones a far better chance: the text gets ' +
      'varied, then wild.'
  }
];
