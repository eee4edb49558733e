// A guided tour of the Transformer: each step has a formula, shapes, and an example on this page.

import {LIMITS, argmax, fixed, h, integer, percent, range, set, state, sum, watch} from './core.js';
import {
  H,
  HS,
  L,
  T,
  arrays,
  facts,
  headName,
  isPostNorm,
  row,
  tokenQuoted,
  visibleKeys
} from './model.js';
import {attentionRow, queryKeyDots, score} from './heads.js';
import {filtered} from './sampling.js';
import {logitsAt} from './next.js';

const C = facts.model.n_embd;
const V = facts.vocab_size;
const {position: positions, norm: normKind} = facts.model;

const here = () => tokenQuoted(facts.ids[state.t]);
const head = () => `head ${headName(state.layer, state.head)}`;
const normHere = (name, ...index) => row('size_' + name, ...index)[state.t];

/** The key that the selected query attends to most. */
function topKey() {
  const attention = attentionRow(state.layer, state.head, state.t);
  const s = argmax(attention);
  return {s, p: attention[s], name: tokenQuoted(facts.ids[s])};
}

const POSITION_STEP = {
  learned: {
    text:
      'Attention by itself ignores the order of its inputs. So a second learned vector, one per ' +
      'position, is added to each token embedding.',
    formula: 'x<sub>0</sub> = W<sub>E</sub>[token] + W<sub>P</sub>[t]'
  },
  sinusoidal: {
    text:
      'Attention by itself ignores the order of its inputs. So sines and cosines of the position ' +
      'are added to each token embedding, with a different frequency for each pair of dimensions.',
    formula: 'PE(t, 2i) = sin(t / 10000<sup>2i/d</sup>)'
  },
  rope: {
    text:
      'Attention by itself ignores the order of its inputs. RoPE rotates queries and keys by an ' +
      'angle proportional to their position, so a score depends on the distance of two tokens.',
    formula: 'q′ = R(t) q,  k′ = R(s) k  ⇒  q′·k′ depends on t − s'
  },
  none: {
    text: 'This model has no positional encoding. It can only infer order from the mask.',
    formula: 'x<sub>0</sub> = W<sub>E</sub>[token]'
  }
}[positions] ?? {
  text: 'Attention by itself ignores the order of its inputs.',
  formula: `position = ${positions}`
};

function positionExample() {
  if (facts.embeddings.includes('position')) {
    const token = fixed(normHere('token'));
    const position = fixed(normHere('position'));
    return (
      `At position ${state.t}, the token embedding has norm ${token}, ` +
      `the positional embedding ${position}.`
    );
  }
  if (positions === 'rope') {
    return 'The plot shows the cosines: the first pairs rotate fast, the last hardly at all.';
  }
  return 'Compare with a model that has positional embeddings.';
}

function scoreExample() {
  if (!arrays.q) return 'The scores were left out to keep the page small.';
  const {s, name} = topKey();
  const dot = queryKeyDots(state.layer, state.head, state.t)[s];
  const scaled = fixed(dot / Math.sqrt(HS));
  return `Query ${here()}, key ${name}: ${fixed(dot)} / √${HS} = ${scaled}.`;
}

function softmaxExample() {
  if (!arrays.attention) return 'The attention patterns were left out to keep the page small.';
  const {name, p} = topKey();
  return `In ${head()}, ${here()} puts ${percent(p)} of its attention on ${name}.`;
}

function headsExample() {
  const heads = range(L * H, n => [Math.floor(n / H), n % H]);
  const previous = ([l, k]) => score('previous', l, k);
  const [best] = heads.sort((a, b) => previous(b) - previous(a));
  const value = fixed(previous(best));
  return `Head ${headName(...best)} has the highest previous-token score, ${value}.`;
}

function samplingExample() {
  const {temperature, k, p} = state;
  const {logits, tail} = logitsAt(state.t);
  const {kept} = filtered(logits, temperature, k, p, tail);
  return (
    `Temperature ${temperature.toFixed(2)}, top-k ${integer(k)} and top-p ${p.toFixed(2)} keep ` +
    `${integer(kept)} of ${integer(V)} tokens. Move the sliders.`
  );
}

const NORM_PLACE = isPostNorm
  ? 'After each attention and MLP, the sum of the stream and the new output is normalized: '
  : 'Before each attention and MLP, the stream is normalized: ';

/** target: selectors of the element to show, the first that exists; shapes, example: functions. */
const STEPS = [
  {
    title: 'Token embeddings',
    target: ['#figure-neighbors'],
    text:
      'The text is split into tokens, and each token is looked up in a learned table of ' +
      'vectors. Tokens used in similar contexts get similar vectors.',
    formula: 'x = W<sub>E</sub>[token]',
    shapes: () => `W_E is ${integer(V)} × ${C}; the text becomes ${T} × ${C}`,
    example: () => {
      const id = facts.ids[state.t];
      const [neighbor] = row('near', facts.distinct.indexOf(id));
      return `${here()} is row ${id}. Its nearest neighbor is ${tokenQuoted(neighbor)}.`;
    }
  },
  {
    title: 'Positions',
    target: ['#figure-positions', '#embedding'],
    text: POSITION_STEP.text,
    formula: POSITION_STEP.formula,
    shapes: () =>
      positions === 'rope' ? `${HS / 2} angles per head` : `${T} × ${C}, like the embeddings`,
    example: positionExample
  },
  {
    title: 'Query, key, value',
    target: ['#figure-terms', '#head'],
    text:
      'Each token asks a question (query), offers an answer (key), and carries content to pass ' +
      'on (value). All three are linear projections of its vector.',
    formula: 'q = x W<sub>Q</sub>,  k = x W<sub>K</sub>,  v = x W<sub>V</sub>',
    shapes: () => `${T} × ${HS} in each head, for queries, keys and values`,
    example: () =>
      `The figure shows the query of ${here()} in ${head()}, one key, and their product ` +
      `in each of the ${HS} dimensions.`
  },
  {
    title: 'Scaled dot product',
    target: ['#figure-scores', '#head'],
    text:
      'The score of a query and a key is their dot product. Its size grows with the number of ' +
      'dimensions, so it is divided by √d: large scores would saturate the softmax and leave ' +
      'hardly any gradient.',
    formula: 'score = q · k / √d<sub>h</sub>',
    shapes: () => `√${HS} = ${fixed(Math.sqrt(HS))}; one score per pair of tokens: ${T} × ${T}`,
    example: scoreExample
  },
  {
    title: facts.model.prefix_lm ? 'Attention mask' : 'Causal mask',
    target: ['#figure-attention', '#head'],
    text:
      'The model learns to predict the next token, so no token may attend to later ones. Their ' +
      'scores are set to −∞.' +
      (facts.model.prefix_lm
        ? ' The source is not predicted: its tokens attend to all of it (Raffel et al. 2020).'
        : ''),
    formula:
      'score<sub>ts</sub> = −∞  for s > t' +
      (facts.model.prefix_lm ? ', unless both are in the source' : ''),
    shapes: () => `${sum(visibleKeys.map(keys => keys.length))} of ${T * T} pairs remain`,
    example: () =>
      `${here()} is at position ${state.t}: it can attend to ${visibleKeys[state.t].length} of ` +
      `${T} tokens. Cells of masked pairs are empty.`
  },
  {
    title: 'Softmax',
    target: ['#figure-scores', '#head'],
    text:
      'Softmax turns the scores of a query into weights that sum to 1: it exponentiates them ' +
      'and divides by the sum. The largest score gets most of the weight.',
    formula: 'a<sub>s</sub> = e<sup>score<sub>s</sub></sup> / Σ e<sup>score</sup>',
    shapes: () => `each row of the ${T} × ${T} matrix sums to 1`,
    example: softmaxExample
  },
  {
    title: 'Multi-head attention',
    target: ['#figure-heads'],
    text:
      'A single head has a single attention pattern. So each layer has several heads in ' +
      'parallel, each with its own small projections, and they learn different patterns.',
    formula:
      'head<sub>i</sub> = ' +
      'softmax(Q<sub>i</sub> K<sub>i</sub><sup>T</sup> / √d<sub>h</sub>) V<sub>i</sub>',
    shapes: () => `${L} layers × ${H} heads, ${C} / ${H} = ${HS} dimensions each`,
    example: headsExample
  },
  {
    title: 'Output projection',
    target: ['#figure-promoted', '#head'],
    text:
      'The outputs of the heads are concatenated and multiplied by one more matrix. This equals ' +
      'a sum with one term per head, so each head can be studied by itself.',
    formula: 'out = [head<sub>1</sub> … head<sub>h</sub>] W<sub>O</sub>',
    shapes: () => `${H} × ${HS} = ${C} numbers per token, times ${C} × ${C}`,
    example: () => `The bars show the tokens that ${head()} promotes and suppresses at ${here()}.`
  },
  {
    title: 'Residual stream',
    target: ['#figure-flow'],
    text:
      'Layers do not replace the vector of a token; they add to it. The residual stream carries ' +
      'everything written so far, and gradients flow straight back through it.',
    formula: isPostNorm
      ? 'x ← norm(x + attention(x)),  x ← norm(x + MLP(x))'
      : 'x ← x + attention(norm(x)),  x ← x + MLP(norm(x))',
    shapes: () => `${T} × ${C} from the first layer to the last`,
    example: () => {
      const start = fixed(normHere('stream', 0));
      const end = fixed(normHere('stream', L));
      return `At ${here()} the stream has norm ${start} at the start and ${end} at the end.`;
    }
  },
  {
    title: normKind === 'layernorm' ? 'LayerNorm' : 'RMSNorm',
    target: ['#figure-flow'],
    text:
      NORM_PLACE +
      (normKind === 'layernorm'
        ? 'LayerNorm centers the vector, divides it by its standard deviation '
        : 'RMSNorm divides the vector by its root mean square ') +
      'and multiplies it by a learned gain. This keeps training stable' +
      (isPostNorm ? '.' : ' as the stream grows.'),
    formula:
      normKind === 'layernorm'
        ? 'norm(x) = g · (x − mean) / √(var + ε) + b'
        : 'norm(x) = g · x / √(mean(x²) + ε)',
    shapes: () => `${2 * L + !isPostNorm} norms with ${C} gains each`,
    example: () => {
      const norm = fixed(normHere('stream', L));
      const root = `√${C} = ${fixed(Math.sqrt(C), 1)}`;
      if (isPostNorm) return `After the last norm the stream has norm ${norm}; ${root}.`;
      return `A stream of norm ${norm} is rescaled to about ${root}.`;
    }
  },
  {
    title: 'MLP',
    target: ['#figure-neurons', '#mlp'],
    text:
      'Attention moves information between tokens; the MLP processes each token by itself: a ' +
      'wide hidden layer, a nonlinearity, and a projection back. Much factual knowledge is ' +
      'stored here.',
    formula: 'MLP(x) = act(x W<sub>1</sub>) W<sub>2</sub>',
    shapes: () => `${C} → ${integer(facts.neurons_in_a_layer)} → ${C}`,
    example: () => {
      if (!arrays.neurons) return 'The neurons were left out to keep the page small.';
      const [neuron] = row('neurons', state.layer, state.t);
      return `In layer ${state.layer}, neuron ${neuron} has the largest output at ${here()}.`;
    }
  },
  {
    title: 'Logits',
    target: ['#figure-logit-lens'],
    text:
      'At the end, the dot product of the stream with an output vector of each token gives the ' +
      'logits. Softmax turns them into probabilities.',
    formula: `logits = ${isPostNorm ? 'x' : 'norm(x)'} W<sub>U</sub>,  p = softmax(logits)`,
    shapes: () => `${C} → ${integer(V)} at each position`,
    example: () => {
      const best = tokenQuoted(row('lens_ids', L, state.t)[0]);
      const p = percent(row('lens', L, state.t)[0]);
      return (
        `After ${here()}, ${best} is the most likely token (${p}). ` +
        'Read a column upwards to see in which layer the prediction emerges.'
      );
    }
  },
  {
    title: 'Sampling',
    target: ['#next .card'],
    text:
      'To generate text, one token is sampled, appended to the text, and the model runs again. ' +
      'A temperature below 1 sharpens the distribution; top-k and top-p cut off unlikely tokens.',
    formula: 'p<sub>i</sub> ∝ e<sup>logit<sub>i</sub> / temperature</sup>',
    shapes: () => `one of ${integer(V)} tokens`,
    example: samplingExample
  }
];

export function buildTour() {
  const box = document.getElementById('tour');
  const opener = document.getElementById('tour-start');
  LIMITS.tour = [0, STEPS.length];
  const title = h('h2', {id: 'tour-title'});
  const text = h('p');
  const formula = h('p', {class: 'formula', tabindex: 0, 'aria-label': 'Formula'});
  const shapes = h('p', {class: 'shapes'});
  const example = h('p', {class: 'look'});
  const progress = h('span');
  const goTo = step => {
    set({tour: step});
    if (!step) opener.focus();
  };
  const button = (label, onclick) => h('button', {type: 'button', onclick}, label);
  const back = button('Back', () => goTo(Math.max(1, state.tour - 1)));
  const next = button('Next', () => goTo(state.tour === STEPS.length ? 0 : state.tour + 1));
  const close = button('Close', () => goTo(0));
  const controls = h('div', {class: 'bar'}, back, next, close, progress);
  box.append(title, text, formula, shapes, example, controls);
  addEventListener('keydown', event => {
    if (event.key === 'Escape' && state.tour) goTo(0);
  });
  opener.addEventListener('click', () => {
    goTo(1);
    next.focus();
  });
  let shownStep = 0;
  watch(['tour', 't', 'layer', 'head', 'temperature', 'k', 'p'], () => {
    box.hidden = !state.tour;
    document.documentElement.classList.toggle('touring', state.tour > 0);
    if (state.tour !== shownStep) showTarget(STEPS[state.tour - 1]?.target || []);
    shownStep = state.tour;
    if (!state.tour) return;
    const step = STEPS[state.tour - 1];
    title.textContent = step.title;
    text.textContent = step.text;
    formula.innerHTML = step.formula;
    shapes.textContent = 'Shapes: ' + step.shapes();
    try {
      example.textContent = step.example();
    } catch (error) {
      example.textContent = error.message; // the panel that it is about says so too
    }
    progress.textContent = `${state.tour} of ${STEPS.length}`;
    back.disabled = state.tour === 1;
    next.textContent = state.tour === STEPS.length ? 'Finish' : 'Next';
  });
}

/** Highlight the first of these elements that exists, and scroll to it once all is drawn. */
function showTarget(selectors) {
  for (const element of document.querySelectorAll('.visited')) element.classList.remove('visited');
  const target = selectors.map(x => document.querySelector(x)).find(Boolean);
  if (!target) return;
  target.classList.add('visited');
  const scroll = () => {
    const isSettled = document.documentElement.hasAttribute('data-settled');
    if (isSettled) target.scrollIntoView();
    else setTimeout(scroll, 20);
  };
  // two frames later: the page has become narrower, and is drawn again
  requestAnimationFrame(() => requestAnimationFrame(scroll));
}
