// Entry point: loads the data, fills the header, builds all panels.

import {
  DEFAULTS,
  buildTheme,
  fixed,
  followWindow,
  h,
  inSection,
  integer,
  panel,
  readHash,
  redraw,
  showError,
  state,
  watch
} from './core.js';
import {H, L, T, facts, isOriginal, isPostNorm, loadArrays, row} from './model.js';
import {hasModel, startModel} from './live-model.js';
import {buildLive, drawClock, showNotice} from './live.js';
import {buildNext, buildStrip} from './next.js';
import {buildEmbedding, buildFlow} from './flow.js';
import {buildHead, buildHeads} from './heads.js';
import {buildLens, buildMlp, buildWhy} from './layers.js';
import {buildBigrams, buildCircuits} from './circuits.js';
import {buildChanges} from './switches.js';
import {buildTraining} from './training.js';
import {buildTour} from './tour.js';

function buildHeader() {
  const name = facts.run.path || 'this model';
  document.title = `${name} | plainGPT explain`;
  document.getElementById('run-name').textContent = name;
  const items = modelFacts().map(([key, value]) =>
    h('div', {}, h('dt', {}, key), h('dd', {}, String(value)))
  );
  const length = h('dd');
  items.push(h('div', {}, h('dt', {}, 'text'), length));
  document.getElementById('run-facts').append(...items);
  watch([], () => {
    length.textContent = T > 1 ? `${T} tokens` : '1 token';
    document.getElementById('accuracy').textContent = accuracyNote();
  });
  const sections = [...document.querySelectorAll('main section')];
  document.getElementById('contents').append(...sections.map(sectionLink));
  if (hasModel) buildLive();
  else if (facts.live) buildTextForm();
  if (!facts.left_out) return;
  const n = `${integer(facts.left_out)} token${facts.left_out > 1 ? 's' : ''}`;
  showNotice(`The text is too long: its first ${n} are left out. ${T} fit.`);
}

function modelFacts() {
  const {run, model} = facts;
  const tables = facts.tables ? ` + ${integer(facts.tables)} in n-gram tables` : '';
  const kvHeads = facts.n_kv_head === H ? '' : ` (${facts.n_kv_head} KV)`;
  const items = [
    ['step', integer(run.step)],
    ['parameters', integer(facts.parameters - facts.tables) + tables],
    ['layers × heads', `${L} × ${H}${kvHeads}`],
    ['embedding size', model.n_embd],
    ['context', integer(model.block_size)],
    ['vocabulary', integer(facts.vocab_size)],
    ['positions', model.position],
    ['norm, activation', `${model.norm}${isPostNorm ? ' (post)' : ''}, ${model.activation}`]
  ];
  if (model.prefix_lm) items.push(['attention', 'bidirectional in sources']);
  if (run.val_loss !== null) items.splice(1, 0, ['val loss', fixed(run.val_loss, 4)]);
  return items;
}

function accuracyNote() {
  if (!isOriginal()) {
    return (
      'The numbers of this text were computed in this page, by the model’s weights in ' +
      `${facts.engine.format}. For the text that the page was written with, PyTorch computed them.`
    );
  }
  const {difference, largest, dropped} = facts;
  const error = difference ? difference.toExponential(1).replace('e-', 'e−') : '0';
  const notes = [
    'All numbers were computed by PyTorch in float32; those of single heads, neurons and layers ' +
      'are stored with three significant digits.',
    `Largest difference from the logits of model(idx): ${error}, ` +
      `with logits of up to ${fixed(largest, 1)}.`
  ];
  if (dropped.length) {
    const names = dropped.join(', ');
    notes.push(`Left out to keep the page below ${facts.largest_page}: ${names}.`);
  }
  return notes.join(' ');
}

function sectionLink(section) {
  const onclick = event => {
    event.preventDefault(); // the hash holds the state
    section.scrollIntoView();
  };
  return h('a', {href: '#' + section.id, onclick}, section.dataset.name);
}

/** The text box of a page served with --serve. */
function buildTextForm() {
  const form = document.getElementById('live');
  const text = document.getElementById('live-text');
  form.hidden = false;
  text.value = facts.text;
  form.addEventListener('submit', event => {
    event.preventDefault(); // submitting would turn \n into \r\n
    const start = encodeURIComponent(text.value.slice(-8000));
    location.assign(`/?start=${start}${location.hash}`);
  });
  if (!facts.error) return;
  showNotice(facts.error);
  text.focus();
}

/** By default, select the head that adds most to the logit of the last target. */
function selectBestHead() {
  let best = -Infinity;
  facts.parts.forEach(([kind, layer, head], i) => {
    const contribution = row('parts', i, DEFAULTS.t)[0];
    if (kind !== 'head' || contribution <= best) return;
    best = contribution;
    Object.assign(DEFAULTS, {layer, head});
  });
}

/** Keep the sticky token strip from covering what is scrolled to. */
function setScrollPadding() {
  const height = document.getElementById('strip').offsetHeight;
  document.documentElement.style.scrollPaddingTop = height + 14 + 'px';
}

const sections = {
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

try {
  await loadArrays();
} catch (error) {
  showError(document.querySelector('main'), error); // no panel can do without
  throw error;
}
buildTheme();
inSection('why', selectBestHead);
inSection('run-facts', buildHeader);
inSection('tokens', buildStrip);
buildChanges();
for (const [id, build] of Object.entries(sections)) panel(id, build);
inSection('tour', buildTour);
Object.assign(state, readHash()); // after the panels have registered their valid values
redraw();
setScrollPadding();
followWindow(setScrollPadding);
document.documentElement.dataset.ready = Math.round(performance.now());
drawClock();
if (hasModel) {
  await startModel();
  document.documentElement.dataset.engine = Math.round(performance.now());
}
