// The text box of a page that holds the model: every panel follows what is typed or generated.

import {
  DEFAULTS,
  h,
  hold,
  integer,
  isDrawn,
  readHash,
  rebuild,
  resume,
  state,
  watch
} from './core.js';
import {ask} from './live-model.js';
import {T, facts, fulfil, nextWishes, setText, whenAsked} from './model.js';

const box = document.getElementById('live-text');
const generateButton = document.getElementById('generate');
const live = {
  next: null, // the text to show next: {text, hash, since, stays}; a later one replaces it
  text: facts.text, // the last one asked for
  changes: '', // that were asked for with it
  frozen: '',
  isGenerating: false,
  isWorking: false
};

/** Show a message above the tokens, or none. */
export function showNotice(text = '') {
  const notice = document.getElementById('notice');
  notice.hidden = !text;
  notice.textContent = text;
  box.toggleAttribute('aria-invalid', Boolean(text));
  if (text) box.setAttribute('aria-describedby', 'notice');
}

export function buildLive() {
  document.getElementById('live').hidden = false;
  document.getElementById('run').hidden = true;
  box.value = facts.text;
  box.addEventListener('input', event => {
    live.isGenerating = false;
    show({text: box.value, since: event.timeStamp});
  });
  document.getElementById('live').addEventListener('submit', event => event.preventDefault());
  generateButton.hidden = false;
  generateButton.addEventListener('click', () => {
    live.isGenerating = !live.isGenerating;
    drawButton();
    if (live.isGenerating) work({seed: state.seed});
  });
  if (facts.model.turns) addTurnButton();
  whenAsked(() => work());
  watch(['text'], () => {
    if (state.text === live.text) return;
    box.value = state.text;
    show({text: state.text, hash: location.hash});
  });
  watch(['changes', 'frozen'], () => {
    if (state.changes === live.changes && state.frozen === live.frozen) return;
    show({...(live.next ?? {text: live.text, stays: true})});
  });
}

/** Models of sources and targets: the separator is nothing that anybody likes to type. */
function addTurnButton() {
  const label = facts.model.turns === 2 ? 'Add target' : 'Add turn';
  const onclick = () => {
    box.setRangeText('<|endoftext|>', box.value.length, box.value.length, 'end');
    box.focus();
  };
  generateButton.before(h('button', {type: 'button', onclick}, label));
}

function drawButton() {
  generateButton.textContent = live.isGenerating ? 'Stop' : 'Generate';
}

function show(job) {
  const isFirst = !live.next;
  live.next = job;
  Object.assign(live, {text: job.text, changes: state.changes, frozen: state.frozen});
  if (isFirst) hold(1); // draws, and what is drawn may ask for another one
  work();
}

/** Answer what is asked for, one request at a time: a new text first, then what panels wait for,
 * then the next token. */
async function work(first = null) {
  if (live.isWorking) return;
  live.isWorking = true;
  let draw = first;
  await null; // let the caller go on
  for (;;) {
    if (live.next) await answerText();
    else if (nextWishes().length) await answerWishes();
    else if (live.isGenerating) {
      await generateOne(draw);
      draw = null;
    } else break;
  }
  live.isWorking = false;
}

async function answerText() {
  const job = live.next;
  const {layer, head, changes, frozen} = state;
  const isOwn = job.text === DEFAULTS.text && !changes && !frozen;
  const request = {text: job.text, selection: {layer, head}, changes, frozen};
  const reply = isOwn ? {} : await ask('show', request);
  if (live.next === job) live.next = null;
  if (reply.problem) showNotice(reply.problem);
  else if (!live.next) {
    const n = `${integer(reply.leftOut)} token${reply.leftOut > 1 ? 's' : ''}`;
    showNotice(reply.leftOut ? `The text is too long: its first ${n} are left out.` : '');
    display(reply, job);
  }
  if (!live.next) hold(-1);
}

async function answerWishes() {
  const {found} = await ask('more', {wishes: nextWishes()});
  if (live.next) return; // another text
  for (const [wish, arrays] of found) fulfil(wish, arrays);
  resume();
  measure();
}

/** Show an answer to `show` or `draw`: at its last token, or at the selection of a URL hash, or
 * where it is (stays). */
function display({facts: newFacts, arrays, found = []}, {text, hash, since, stays}) {
  setText(newFacts && {...newFacts, text}, arrays);
  for (const [wish, more] of found) fulfil(wish, more);
  const end = stays ? {} : {t: T - 1, source: -1};
  const {changes, frozen} = live;
  Object.assign(state, hash ? readHash(hash) : end, {text, changes, frozen});
  live.text = text;
  live.since = since;
  rebuild();
  measure();
}

/** Draw one more token with the sliders' settings; first: {seed} at the beginning. */
async function generateOne(first) {
  const since = performance.now();
  const {temperature, k, p, layer, head} = state;
  const selection = {layer, head};
  const request = {text: state.text, temperature, k, p, selection, ...first};
  const reply = await ask('draw', request);
  if (live.next || !live.isGenerating) return;
  box.value = reply.text;
  box.scrollTop = box.scrollHeight;
  display(reply, {text: reply.text, since});
  if (reply.isOver) live.isGenerating = false;
  drawButton();
  await new Promise(requestAnimationFrame); // so that each token is seen
}

/** Once all visible panels are drawn: how long that took since the input, in ms. */
function measure() {
  if (live.since === undefined || !isDrawn()) return;
  const {since} = live;
  live.since = undefined;
  requestAnimationFrame(() =>
    setTimeout(() => {
      const reaction = Math.round(performance.now() - since);
      document.documentElement.dataset.reaction = reaction;
      drawClock();
    })
  );
}

/** The page's own clock, in the footer. */
export function drawClock() {
  const {ready, reaction} = document.documentElement.dataset;
  const last = reaction ? `; last reaction to typing in ${reaction} ms` : '';
  document.getElementById('clock').textContent = `Opened in ${ready} ms${last}.`;
}
