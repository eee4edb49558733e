// Entry point: loads the data, fills the header, builds all panels.

import {
  DEFAULTS,
  buildTheme,
  fixed,
  followWindow,
  h,
  inSection,
  integer,
  readHash,
  redraw,
  showError,
  state
} from './core.js';
import {H, L, T, facts, isPostNorm, loadArrays, row} from './model.js';
import {buildNext, buildStrip} from './next.js';
import {buildEmbedding, buildFlow} from './flow.js';
import {buildHead, buildHeads} from './heads.js';
import {buildLens, buildMlp, buildWhy} from './layers.js';
import {buildBigrams, buildCircuits} from './circuits.js';
import {buildTraining} from './training.js';
import {buildStep} from './step.js';
import {buildCompare} from './compare.js';
import {buildTour} from './tour.js';

function buildHeader() {
  const name = facts.run.path || 'this model';
  document.title = `${name} | plainGPT explain`;
  document.getElementById('run-name').textContent = name;
  const items = modelFacts().map(([key, value]) =>
    h('div', {}, h('dt', {}, key), h('dd', {}, String(value)))
  );
  document.getElementById('run-facts').append(...items);
  document.getElementById('accuracy').textContent = accuracyNote();
  const sections = [...document.querySelectorAll('main section')];
  document.getElementById('contents').append(...sections.map(sectionLink));
  if (facts.live) buildTextForm();
  if (!facts.left_out) return;
  const n = `${integer(facts.left_out)} token${facts.left_out > 1 ? 's' : ''}`;
  showNotice(`The text is too long: its first ${n} are left out. ${T} fit.`);
}

/** A message above the tokens that nobody should miss. */
function showNotice(text) {
  const notice = document.getElementById('notice');
  notice.hidden = false;
  notice.textContent = text;
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
    ['norm, activation', `${model.norm}${isPostNorm ? ' (post)' : ''}, ${model.activation}`],
    ['text', T > 1 ? `${T} tokens` : '1 token']
  ];
  if (model.prefix_lm) items.push(['attention', 'bidirectional in sources']);
  if (run.val_loss !== null) items.splice(1, 0, ['val loss', fixed(run.val_loss, 4)]);
  return items;
}

function accuracyNote() {
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
  text.setAttribute('aria-invalid', 'true');
  text.setAttribute('aria-describedby', 'notice');
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
  step: buildStep,
  training: buildTraining,
  compare: buildCompare
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
for (const [id, build] of Object.entries(panels)) inSection(id, build);
inSection('tour', buildTour);
Object.assign(state, readHash()); // after the panels have registered their valid values
redraw();
setScrollPadding();
followWindow(setScrollPadding);
document.documentElement.dataset.ready = Math.round(performance.now());
