// Entry point: loads the data, fills the header, builds all panels.

import {
  DEFAULTS,
  buildTheme,
  fixed,
  followWindow,
  h,
  hold,
  inSection,
  integer,
  panel,
  readHash,
  redraw,
  scrollToElement,
  showError,
  state,
  watch
} from './core.js';
import {H, L, T, facts, isOriginal, isPostNorm, loadArrays, row} from './model.js';
import {hasModel, isServed, startModel} from './live-model.js';
import {buildLive, completeOwnText, drawClock, followUrl, showLeftOut, showNotice} from './live.js';
import {buildNext, buildStrip} from './next.js';
import {buildEmbedding, buildFlow} from './flow.js';
import {buildHead, buildHeads} from './heads.js';
import {buildLens, buildMlp, buildWhy} from './layers.js';
import {buildAblation} from './ablation.js';
import {buildGraph} from './graph.js';
import {buildPatching} from './patching.js';
import {buildBigrams, buildCircuits} from './circuits.js';
import {buildChanges} from './switches.js';
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
  if (facts.left_out) showLeftOut(facts.left_out);
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
  if (!isOriginal() && isServed) return 'All numbers were computed by PyTorch in float32.';
  if (!isOriginal()) {
    return (
      'All numbers of this text were computed in this page, with the weights in ' +
      `${facts.engine.format}. Those of the text that the page was written with are PyTorch’s.`
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
  if (facts.engine) notes.push(weightsNote(facts.engine));
  if (dropped.length) {
    const names = dropped.join(', ');
    notes.push(
      hasModel
        ? `Computed ${isServed ? 'when shown' : 'in this page, by those weights'}: ${names}.`
        : `Left out to keep the page below ${facts.largest_page}: ${names}.`
    );
  }
  return notes.join(' ');
}

/** How precise the weights in the page are. */
function weightsNote({format, difference}) {
  if (format === 'float32') return 'The page holds the weights in float32, as the model has them.';
  const kind = format === 'int8' ? 'int8, with a scale for each row' : format;
  return (
    `The page holds the weights in ${kind}: this changes the logits of this text by up to ` +
    `${difference.toPrecision(2)}.`
  );
}

function sectionLink(section) {
  const onclick = event => {
    event.preventDefault(); // the hash holds the state
    scrollToElement(section);
  };
  return h('a', {href: '#' + section.id, onclick}, section.dataset.name);
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
  ablation: buildAblation,
  graph: buildGraph,
  patching: buildPatching,
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
if (!hasModel) document.getElementById('patching').remove();
inSection('why', selectBestHead);
inSection('run-facts', buildHeader);
inSection('tokens', buildStrip);
buildChanges();
inSection('tour', buildTour); // before the panels: they are narrower next to it
for (const [id, build] of Object.entries(sections)) {
  if (document.getElementById(id)) panel(id, build);
}
Object.assign(state, readHash()); // after the panels have registered their valid values
redraw();
followWindow();
new ResizeObserver(setScrollPadding).observe(document.getElementById('strip'));
document.documentElement.dataset.ready = Math.round(performance.now());
drawClock();
if (hasModel) {
  hold(1); // the URL may ask for another text, or for changes
  try {
    await startModel();
    await completeOwnText();
    followUrl();
    document.documentElement.dataset.engine = Math.round(performance.now());
  } catch (error) {
    showNotice(`The model cannot run in this page: ${error.message}`);
  }
  hold(-1);
}
