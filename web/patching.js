// The panel of activation patching: see patch.js for what it computes.

import {matrix} from './charts.js';
import {
  DEFAULTS,
  LIMITS,
  TEXTS,
  choice,
  content,
  diverging,
  figure,
  fixed,
  h,
  integer,
  set,
  state,
  watch
} from './core.js';
import {inBackground, wake} from './live.js';
import {depthName} from './layers.js';
import {ask, hasModel} from './live-model.js';
import {L, facts, tokenLabel, tokenQuoted, tokenText} from './model.js';

Object.assign(DEFAULTS, {patch: '', into: 'second', answer: -1, rival: -1});
TEXTS.patch = TEXTS.text;
for (const key of ['answer', 'rival']) LIMITS[key] = [-1, facts.vocab_size - 1];
const KEYS = ['patch', 'into', 'answer', 'rival', 'changes', 'frozen'];

const patching = {
  asked: '', // the request whose map is shown, as JSON
  map: null, // what the Worker said about it
  answers: [], // so far
  drawn: 0, // when
  draw: () => {}
};

/** The request for what is selected, or null. The clean text is the one that is put in. */
function patchRequest() {
  const {text, patch, into, answer, rival, changes, frozen} = state;
  if (!patch || patch === text) return null;
  const [clean, corrupted] = into === 'second' ? [text, patch] : [patch, text];
  return {clean, corrupted, tokens: [answer, rival], changes, frozen};
}

/** Ask for the map, then for its cells. */
function patchNext() {
  const request = patchRequest();
  if (!request) return null;
  const asked = JSON.stringify(request);
  if (asked !== patching.asked) return beginMap(request, asked);
  const {map, answers} = patching;
  return map.problem || answers.length === map.size ? null : continueMap();
}

async function beginMap(request, asked) {
  const map = await ask('patch', request);
  Object.assign(patching, {asked, map, answers: []});
  patching.draw();
}

async function continueMap() {
  patching.answers.push(...(await ask('patchMore')));
  const isDone = patching.answers.length === patching.map.size;
  if (isDone || performance.now() > patching.drawn + 200) patching.draw();
}

/** 0: as in the corrupted text, 1: as in the clean text. */
const restored = answer => (answer - patching.map.start) / patching.map.range;

if (hasModel) inBackground(patchNext);

const isCurrent = () => patching.asked === JSON.stringify(patchRequest());

export function buildPatching() {
  const second = h('textarea', {
    id: 'patch-text',
    rows: 2,
    autocomplete: 'off',
    spellcheck: 'false',
    oninput: event => set({patch: event.target.value, answer: -1, rival: -1})
  });
  const answer = answerSelect('answer', 0);
  const rival = answerSelect('rival', 1);
  const directions = {second: 'this text into the second', this: 'the second text into this'};
  const chart = figure('patching', 'Activation patching', patchTable, [
    h('div', {class: 'controls'}, h('label', {for: 'patch-text'}, 'Second text'), second),
    h(
      'div',
      {class: 'controls'},
      h('span', {}, 'Put'),
      choice('into', directions, 'Direction of patching'),
      answer,
      rival
    )
  ]);
  content('patching').append(chart);
  patching.draw = () => {
    patching.drawn = performance.now();
    drawMap(chart, [answer, rival]);
  };
  watch([...KEYS, 'theme'], () => {
    if (document.activeElement !== second) second.value = state.patch || facts.text;
    patching.draw();
    wake();
  });
}

/** The choice of one of the two tokens whose logits are compared. */
function answerSelect(key, i) {
  const label = ['Answer of the text put in', 'of the other'][i];
  const onchange = event => set({[key]: Number(event.target.value)});
  const select = h('select', {onchange});
  const update = map => {
    const ids = map ? [...new Set([map.tokens[i], ...map.candidates])] : [];
    select.replaceChildren(...ids.map(id => h('option', {value: id}, tokenText(id))));
    select.value = map?.tokens[i];
  };
  return Object.assign(h('label', {}, label, ' ', select), {update});
}

function patchTable() {
  const {map, answers} = patching;
  const headings = ['after', 'position', 'token put in', 'token there', 'logits', 'restored'];
  if (!isCurrent() || map.problem) return [headings, []];
  const [clean, corrupted] = map.ids.map(ids => ids.map(tokenText));
  const rowAt = (answer, i) => {
    const [depth, t] = [Math.floor(i / clean.length), i % clean.length];
    const place = [depthName(depth), t, clean[t], corrupted[t]];
    return [...place, answer.toFixed(5), restored(answer).toFixed(5)];
  };
  return [headings, answers.map(rowAt)];
}

/** Why there is no map, if there is none. */
function whyNoMap() {
  if (!patchRequest()) return 'Change a word of the second text, so that its answer differs.';
  if (!isCurrent()) return 'Computing …';
  const {problem, tokens, range: difference} = patching.map;
  if (problem) return problem;
  if (tokens[0] === tokens[1]) return 'Choose two different tokens.';
  return difference === 0 ? 'The two texts do not differ in this answer.' : '';
}

function drawMap(chart, selects) {
  const reason = whyNoMap();
  const map = isCurrent() && !patching.map.problem ? patching.map : null;
  for (const select of selects) {
    select.hidden = !map;
    select.update(map);
  }
  chart.dataset.into = state.into;
  chart.dataset.cells = map && !reason ? patching.answers.length : '';
  if (reason) {
    chart.picture.replaceChildren(h('p', {class: 'note'}, reason));
    chart.readout.hidden = true;
    chart.refresh();
    return;
  }
  const {ids, tokens, start, range: difference, size} = map;
  const [clean, corrupted] = ids;
  const n = clean.length;
  const depthOf = i => L - i; // the last layer on top
  const answerAt = (i, t) => patching.answers[depthOf(i) * n + t];
  const pair = `logit of ${tokenQuoted(tokens[0])} minus ${tokenQuoted(tokens[1])}`;
  const describe = (i, t) => {
    const answer = answerAt(i, t);
    const from = clean[t] === corrupted[t] ? '' : ` from ${tokenQuoted(clean[t])}`;
    const place = `${depthName(depthOf(i))}, at ${tokenQuoted(corrupted[t])} (${t})${from}`;
    if (answer === undefined) return `${place}: not computed yet`;
    return `${place}\nrestored ${fixed(restored(answer))}, ${pair}: ${fixed(answer, 3)}`;
  };
  matrix(chart, {
    rows: L + 1,
    columns: n,
    cellColor: (i, t) => {
      const answer = answerAt(i, t);
      return answer === undefined ? null : diverging(restored(answer));
    },
    describe,
    rowName: i => depthName(depthOf(i)),
    rowAxis: 'after',
    columnName: t => tokenLabel(corrupted[t], 8),
    columnAxis: 'position that is patched',
    cellHeight: 26,
    maxSize: 4000,
    label: 'How much of the answer each vector of the residual stream restores'
  });
  chart.heading.textContent = `How much is restored: ${pair}, at the end`;
  if (chart.cursor) return;
  const progress = patching.answers.length < size ? ` ${integer(patching.answers.length)} of ` +
    `${integer(size)} computed.` : '';
  chart.setReadout(
    `No color, 0: as without patching (${fixed(start)}). Blue, 1: as in the text put in ` +
      `(${fixed(start + difference)}). Orange: the other way.${progress}`
  );
}
