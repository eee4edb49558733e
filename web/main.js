// The page: its head, its theme, and all panels one after the other.

import {
  DEFAULTS,
  H,
  L,
  T,
  facts,
  fixed,
  grouped,
  h,
  hideTip,
  inSection,
  loadArrays,
  readColours,
  readHash,
  redraw,
  row,
  set,
  state,
  watch
} from './core.js';
import {buildNext, buildStrip} from './next.js';
import {buildEmbedding, buildFlow} from './flow.js';
import {buildHead, buildHeads} from './heads.js';
import {buildLens, buildMlp, buildWhy} from './layers.js';
import {buildBigrams, buildCircuits} from './circuits.js';
import {buildTraining} from './training.js';
import {buildTour} from './tour.js';

function buildTop() {
  const {run, model} = facts,
    name = run.path || 'this model';
  document.title = `${name}: plainGPT explain`;
  document.getElementById('run-name').textContent = name;
  const rows = [
    ['step', grouped(run.step)],
    run.val_loss !== null && ['val loss', fixed(run.val_loss, 4)],
    [
      'parameters',
      grouped(facts.parameters - facts.tables) + (facts.tables ? ` + ${grouped(facts.tables)} in n-gram tables` : '')
    ],
    ['layers × heads', `${L} × ${H}` + (facts.n_kv_head !== H ? ` (${facts.n_kv_head} kv)` : '')],
    ['width', model.n_embd],
    ['context', grouped(model.block_size)],
    ['vocabulary', grouped(facts.vocab_size)],
    ['positions', model.position],
    ['norm, activation', `${model.norm}, ${model.activation}`],
    ['text', `${T} token${T > 1 ? 's' : ''}`]
  ];
  document
    .getElementById('run-facts')
    .append(...rows.filter(Boolean).map(([key, value]) => h('div', {}, h('dt', {}, key), h('dd', {}, String(value)))));
  const digits = facts.difference ? facts.difference.toExponential(1).replace('e-', 'e−') : '0';
  document.getElementById('truth').textContent =
    `Every number on this page was computed from these weights by PyTorch in float32; those of single heads, neurons and layers are kept to three digits. Largest difference between the logits of the pass shown here and those of model(idx): ${digits}, among logits of up to ${fixed(facts.largest, 1)}.` +
    (facts.left_out ? ` The text has ${grouped(facts.left_out)} more tokens in front, which the model does not see here.` : '') +
    (facts.dropped.length ? ` Left out to keep the page below ${facts.largest_page}: ${facts.dropped.join(', ')}.` : '');
  document.getElementById('contents').append(
    ...[...document.querySelectorAll('main section')].map(section =>
      h(
        'a',
        {
          href: '#' + section.id,
          onclick: event => {
            event.preventDefault();
            section.scrollIntoView();
          }
        },
        section.dataset.name
      )
    )
  );
  if (facts.live) {
    const form = document.getElementById('live'),
      text = document.getElementById('live-text');
    form.hidden = false;
    text.value = facts.text;
    form.addEventListener('submit', event => {
      // a form would send its line ends as two characters
      event.preventDefault();
      location.assign('/?start=' + encodeURIComponent(text.value.slice(-8000)) + location.hash);
    });
    document.getElementById('live-error').textContent = facts.error || '';
  }
}

function buildTheme() {
  const button = document.getElementById('theme'),
    system = matchMedia('(prefers-color-scheme: dark)');
  const dark = () => (state.theme ? state.theme === 'dark' : system.matches);
  const apply = () => {
    document.documentElement.dataset.theme = dark() ? 'dark' : 'light';
    button.textContent = dark() ? 'Light' : 'Dark';
    button.setAttribute('aria-label', `Switch to ${dark() ? 'light' : 'dark'} colours`);
    readColours();
  };
  watch(['theme'], apply);
  button.addEventListener('click', () => set({theme: dark() ? 'light' : 'dark'}));
  system.addEventListener('change', () => {
    apply();
    redraw();
  });
}

await loadArrays();
// the first look: at the head that adds most to the logit of the next token
{
  const parts = facts.parts.map(([kind, layer, head], i) => ({kind, layer, head, i})).filter(x => x.kind === 'head');
  const share = x => row('parts', x.i, DEFAULTS.t)[0];
  const best = parts.toSorted((a, b) => share(b) - share(a))[0];
  Object.assign(DEFAULTS, {layer: best.layer, head: best.head});
}
buildTheme();
buildTop();
buildStrip();
const panels = {
  next: buildNext,
  flow: buildFlow,
  embedding: buildEmbedding,
  heads: buildHeads,
  head: buildHead,
  mlp: buildMlp,
  lens: buildLens,
  why: buildWhy,
  circuits: buildCircuits,
  bigrams: buildBigrams,
  training: buildTraining
};
for (const [id, build] of Object.entries(panels)) inSection(id, build);
buildTour();
Object.assign(state, readHash()); // now that the panels have said what it may be
redraw();
const clearStrip = () => {
  document.documentElement.style.scrollPaddingTop = document.getElementById('strip').offsetHeight + 14 + 'px';
};
clearStrip();
let width = innerWidth;
addEventListener('resize', () => {
  if (innerWidth !== width) {
    width = innerWidth;
    redraw();
    clearStrip();
  }
});
addEventListener('hashchange', () => {
  if (location.hash.includes('=')) set(readHash());
});
addEventListener('scroll', hideTip, {passive: true});
document.documentElement.dataset.ready = Math.round(performance.now());
