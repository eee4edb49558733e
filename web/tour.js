// A guided tour for someone who has never seen a Transformer: each idea with its formula, its shapes, and where to see it here.

import {H, HS, L, LIMITS, T, arrays, facts, fixed, grouped, h, percent, row, set, shown, state, watch} from './core.js';
import {KINDS, attentionRow, score, scores} from './heads.js';
import {filtered} from './sampling.js';
import {logitsAt} from './next.js';

const C = facts.model.n_embd,
  V = facts.vocab_size;
const here = () => `“${shown(facts.ids[state.t])}”`;
const rope = facts.model.position === 'rope';
const head = () => `head ${state.layer}.${state.head}`;
const strongest = () => {
  const p = attentionRow(state.layer, state.head, state.t),
    at = p.indexOf(Math.max(...p));
  return {at, p: p[at], name: `“${shown(facts.ids[at])}”`};
};
const size = (name, ...index) => row('size_' + name, ...index)[state.t];

const STEPS = [
  [
    'Tokens become vectors',
    '#figure-neighbours',
    'A model computes with numbers, so the text is cut into tokens, and each token is looked up in a table: a row of numbers that was learned. Tokens that are used alike end up with rows that point alike.',
    'x = W<sub>E</sub>[token]',
    () => `W_E has ${grouped(V)} rows of ${C} numbers; the text gives ${T} × ${C}`,
    () =>
      `${here()} is row ${facts.ids[state.t]}. Its nearest neighbour is “${shown(row('near', facts.distinct.indexOf(facts.ids[state.t]))[0])}”.`
  ],
  [
    'Where a token stands',
    '#figure-positions, #embedding',
    {
      learned:
        'Attention by itself does not know the order of tokens. So a second row, one for each place, is added to the first.',
      sinusoidal:
        'Attention by itself does not know the order of tokens. So sines and cosines of the place are added, each pair of numbers at a frequency of its own.',
      rope: 'Attention by itself does not know the order of tokens. Here, queries and keys are turned by an angle that grows with the place: what counts is how far two tokens are apart.',
      none: 'This model adds no positions. The mask alone lets it tell what came before.'
    }[facts.model.position],
    {
      learned: 'x<sub>0</sub> = W<sub>E</sub>[token] + W<sub>P</sub>[t]',
      sinusoidal: 'PE(t, 2i) = sin(t / 10000<sup>2i/d</sup>)',
      rope: 'q′ = R(t) q,  k′ = R(s) k  ⇒  q′·k′ depends on t − s',
      none: 'x<sub>0</sub> = W<sub>E</sub>[token]'
    }[facts.model.position],
    () => (rope ? `${HS / 2} pairs in each head, one angle each` : `${T} × ${C}, the same as the embedding`),
    () =>
      facts.embeddings.includes('position')
        ? `At place ${state.t} the token's row has length ${fixed(size('token'))}, the place's ${fixed(size('position'))}.`
        : rope
          ? 'The picture of positions shows the cosines: the first pairs turn fast, the last hardly move.'
          : 'Compare with a model that has positions.'
  ],
  [
    'Query, key, value',
    '#figure-terms, #head',
    'Each token asks (query), offers (key), and has something to pass on (value). All three are made from its vector by matrices that were learned.',
    'q = x W<sub>Q</sub>,  k = x W<sub>K</sub>,  v = x W<sub>V</sub>',
    () => `in each head ${T} × ${HS} for queries, keys and values`,
    () => `In ${head()}, “term by term” shows the query of ${here()}, a key, and their product in each of ${HS} dimensions.`
  ],
  [
    'Scaled scores',
    '#figure-scores, #head',
    "How well a query fits a key is their dot product. It is divided by the root of the head's size: sums of many products are large, and large scores would make the softmax too sure too early.",
    'score = q · k / √d<sub>h</sub>',
    () => `√${HS} = ${fixed(Math.sqrt(HS))}; a score for every pair: ${T} × ${T}`,
    () => {
      if (!arrays.q) return 'The scores were left out of this page.';
      const {at, name} = strongest(),
        x = scores(state.layer, state.head, state.t)[at];
      return `${here()} with ${name}: ${fixed(x)} becomes ${fixed(x / Math.sqrt(HS))}.`;
    }
  ],
  [
    'The mask',
    '#figure-attention, #head',
    'The model is to predict the next token, so no token may look at those that come later. Their scores are set to minus infinity.',
    'score<sub>ts</sub> = −∞  for s > t',
    () => `of ${T * T} pairs, ${(T * (T + 1)) / 2} stay`,
    () =>
      `${here()} stands at ${state.t}: it may look at ${state.t + 1} of ${T} tokens. In the picture of attention the upper right half is empty.`
  ],
  [
    'Softmax',
    '#figure-scores, #head',
    'The scores become shares that sum to 1: e is raised to the power of each, and divided by their sum. The largest wins most.',
    'a<sub>s</sub> = e<sup>score<sub>s</sub></sup> / Σ e<sup>score</sup>',
    () => `each row of ${T} × ${T} sums to 1`,
    () => {
      if (!arrays.attention) return 'Attention was left out of this page.';
      const {name, p} = strongest();
      return `${here()} gives ${percent(p)} of its attention in ${head()} to ${name}.`;
    }
  ],
  [
    'Many heads',
    '#figure-heads',
    'One head has one way of looking. So there are several side by side, each with its own small matrices, and they learn different things.',
    'head<sub>i</sub> = softmax(Q<sub>i</sub> K<sub>i</sub><sup>T</sup> / √d<sub>h</sub>) V<sub>i</sub>',
    () => `${L} layers × ${H} heads, ${C} / ${H} = ${HS} dimensions each`,
    () => {
      const all = Array.from({length: L * H}, (_, n) => [Math.floor(n / H), n % H]).sort(
        (a, b) => score('previous', ...b) - score('previous', ...a)
      )[0];
      return `Head ${all.join('.')} looks most at the token before: its ${KINDS.previous} score is ${fixed(score('previous', ...all))}.`;
    }
  ],
  [
    'Side by side again',
    '#figure-promoted, #head',
    'What the heads have gathered is put side by side and mixed by one more matrix. That is the same as each head adding something of its own, which is why a head can be looked at alone.',
    'out = [head<sub>1</sub> … head<sub>h</sub>] W<sub>O</sub>',
    () => `${H} × ${HS} = ${C} numbers for each token, times ${C} × ${C}`,
    () => `“What it writes” lists the tokens that ${head()} raises and lowers at ${here()}.`
  ],
  [
    'The residual stream',
    '#figure-flow',
    'No layer replaces the vector; each adds to it. The stream carries everything that was written so far, and gradients flow back through it undisturbed.',
    'x ← x + attention(norm(x)),  x ← x + MLP(norm(x))',
    () => `${T} × ${C} from the first layer to the last`,
    () => `At ${here()} the stream begins with length ${fixed(size('stream', 0))} and ends with ${fixed(size('stream', L))}.`
  ],
  [
    'Norm',
    '#figure-flow',
    facts.model.norm === 'layernorm'
      ? 'Before each part reads the stream, its numbers are centered and brought to the same size, then scaled by learned gains. Training stays steady however long the stream grows.'
      : 'Before each part reads the stream, its numbers are brought to the same size, then scaled by learned gains. Training stays steady however long the stream grows.',
    facts.model.norm === 'layernorm' ? 'norm(x) = g · (x − mean) / √(var + ε) + b' : 'norm(x) = g · x / √(mean(x²) + ε)',
    () => `${C} gains for each of ${2 * L + 1} norms`,
    () => `A stream of length ${fixed(size('stream', L))} is read as if it had length about √${C} = ${fixed(Math.sqrt(C), 1)}.`
  ],
  [
    'Feed-forward',
    '#figure-neurons, #mlp',
    'After tokens have exchanged what they know, each is worked on alone: a wide layer of neurons, a bend, and back. Much of what a model knows is kept here.',
    `MLP(x) = act(x W<sub>1</sub>) W<sub>2</sub>`,
    () => `${C} → ${grouped(facts.neurons_in_a_layer)} → ${C}`,
    () =>
      arrays.neurons
        ? `In layer ${state.layer}, neuron ${row('neurons', state.layer, state.t)[0]} writes most at ${here()}.`
        : 'The neurons were left out of this page.'
  ],
  [
    'Logits',
    '#figure-logit-lens',
    "At the end the stream is compared with a vector for each token of the vocabulary. The better the fit, the higher the token's logit; a softmax makes probabilities of them.",
    'logits = norm(x) W<sub>U</sub>,  p = softmax(logits)',
    () => `${C} → ${grouped(V)} for each position`,
    () =>
      `After ${here()}, “${shown(row('lens_ids', L, state.t)[0])}” is the likeliest with ${percent(row('lens', L, state.t)[0])}. The columns show how early the model knew.`
  ],
  [
    'Sampling',
    '#next .card',
    'To write, one token is drawn, put behind the text, and all begins again. A temperature below 1 sharpens the choice; top-k and top-p forbid what is unlikely.',
    'p<sub>i</sub> ∝ e<sup>logit<sub>i</sub> / temperature</sup>',
    () => `one of ${grouped(V)}`,
    () => {
      const {logits, tail} = logitsAt(state.t);
      return `At temperature ${state.temperature.toFixed(2)}, top-k ${grouped(state.k)} and top-p ${state.p.toFixed(2)}, ${grouped(filtered(logits, state.temperature, state.k, state.p, tail).kept)} tokens are left to draw from. Move the sliders.`;
    }
  ]
];

export function buildTour() {
  const box = document.getElementById('tour'),
    opener = document.getElementById('tour-start');
  LIMITS.tour = [0, STEPS.length];
  const title = h('h2', {id: 'tour-title'}),
    text = h('p'),
    formula = h('p', {class: 'formula', tabindex: 0, 'aria-label': 'Formula'}),
    shapes = h('p', {class: 'shapes'}),
    look = h('p', {class: 'look'}),
    count = h('span');
  let last = 0;
  const go = step => {
    set({tour: step});
    if (!step) opener.focus();
  };
  const back = h('button', {type: 'button', onclick: () => go(Math.max(1, state.tour - 1))}, 'Back');
  const next = h('button', {type: 'button', onclick: () => go(state.tour === STEPS.length ? 0 : state.tour + 1)});
  box.append(
    title,
    text,
    formula,
    shapes,
    look,
    h('div', {class: 'bar'}, back, next, h('button', {type: 'button', onclick: () => go(0)}, 'Close'), count)
  );
  addEventListener('keydown', event => {
    if (event.key === 'Escape' && state.tour) go(0);
  });
  opener.addEventListener('click', () => {
    go(1);
    next.focus();
  });
  watch(['tour', 't', 'layer', 'head', 'temperature', 'k', 'p'], () => {
    box.hidden = !state.tour;
    if (state.tour !== last) {
      document.querySelectorAll('.visited').forEach(element => element.classList.remove('visited'));
      const there =
        state.tour &&
        STEPS[state.tour - 1][1]
          .split(', ')
          .map(x => document.querySelector(x))
          .find(x => x);
      if (there) {
        there.classList.add('visited');
        // what is drawn above it would move it
        const scroll = () =>
          document.documentElement.hasAttribute('data-settled') ? there.scrollIntoView() : setTimeout(scroll, 20);
        scroll();
      }
      last = state.tour;
    }
    if (!state.tour) return;
    const [name, , words, markup, shape, see] = STEPS[state.tour - 1];
    title.textContent = name;
    text.textContent = words;
    formula.innerHTML = markup;
    shapes.textContent = 'Shapes: ' + shape();
    look.textContent = see();
    count.textContent = `${state.tour} of ${STEPS.length}`;
    back.disabled = state.tour === 1;
    next.textContent = state.tour === STEPS.length ? 'Finish' : 'Next';
  });
}
