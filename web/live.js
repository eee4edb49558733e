// The text box of a page that holds the model: every panel follows what is typed or generated.

import {
  DEFAULTS,
  afterFrame,
  h,
  hold,
  integer,
  isDrawn,
  readHash,
  rebuild,
  resume,
  state,
  visiblePanels,
  watch
} from './core.js';
import {ask, isServed} from './live-model.js';
import {T, completeText, facts, fulfil, nextWishes, setText, whenAsked} from './model.js';

const box = document.getElementById('live-text');
const generateButton = document.getElementById('generate');
const background = [];
const live = {
  next: null, // the text to show next: {text, hash, since, stays}; a later one replaces it
  text: facts.text, // the last one asked for
  changes: '', // that were asked for with it
  frozen: '',
  isGenerating: false,
  first: null, // {seed} until the first token is drawn
  isWorking: false
};

/** Show a message above the tokens, or none. */
export function showNotice(text = '') {
  const notice = document.getElementById('notice');
  notice.hidden = !text;
  notice.textContent = text;
  box.setAttribute('aria-invalid', Boolean(text));
  if (text) box.setAttribute('aria-describedby', 'notice');
}

/** Say how many tokens did not fit, if any. */
export function showLeftOut(n = 0) {
  const tokens = `${integer(n)} token${n > 1 ? 's' : ''}`;
  showNotice(n && `The text is too long: its first ${tokens} are left out. ${T} fit.`);
}

export function buildLive() {
  document.getElementById('live').hidden = false;
  document.getElementById('run').hidden = !isServed;
  box.value = facts.text;
  box.addEventListener('input', event => {
    stop();
    show({text: box.value, since: event.timeStamp});
  });
  document.getElementById('live').addEventListener('submit', event => {
    event.preventDefault(); // submitting would turn \n into \r\n
    if (isServed) writePage();
  });
  generateButton.hidden = false;
  generateButton.addEventListener('click', () => {
    if (live.isGenerating) return stop();
    live.isGenerating = true;
    generateButton.textContent = 'Stop';
    hold(1);
    work({seed: state.seed});
  });
  if (facts.model.turns) addTurnButton();
  if (facts.error) showNotice(facts.error); // of --serve
  whenAsked(() => work());
}

/** Let the server write a page of this text, with what is computed for such a text only. */
function writePage() {
  const hash = new URLSearchParams(location.hash.slice(1));
  hash.delete('text');
  const start = encodeURIComponent(box.value.slice(-8000));
  location.assign(`/?start=${start}#${hash}`);
}

/** Compute what the page left out of its own text. */
export async function completeOwnText() {
  if (!facts.dropped.length) return;
  const request = {text: facts.text, selection: selection(), changes: '', frozen: ''};
  completeText(await ask('show', request));
  rebuild();
}

/** Show the text in the URL, now and whenever the URL changes, and what is changed in the model. */
export function followUrl() {
  const follow = () => {
    if (state.text === live.text) return;
    box.value = state.text;
    show({text: state.text, hash: location.hash});
  };
  const change = () => {
    if (state.changes === live.changes && state.frozen === live.frozen) return;
    show({...(live.next ?? {text: live.text, stays: true})});
  };
  addEventListener('hashchange', follow);
  follow();
  watch(['changes', 'frozen'], change);
  change();
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

/** End the generation. */
function stop() {
  if (!live.isGenerating) return;
  live.isGenerating = false;
  generateButton.textContent = 'Generate';
  hold(-1);
}

function show(job) {
  const isFirst = !live.next;
  live.next = job;
  Object.assign(live, {text: job.text, changes: state.changes, frozen: state.frozen});
  if (isFirst) hold(1); // draws, and what is drawn may ask for another one
  work();
}

/** job(): asks the model for more, and returns a Promise, or null when there is nothing to do. It
 * is called when nothing else is asked for. */
export const inBackground = job => background.push(job);

/** There is something to do for a job in the background. */
export const wake = () => work();

/** Answer what is asked for, one request at a time: a new text first, then what panels wait for,
 * then the next token, then what can wait. first: {seed} for the first token. */
async function work(first = null) {
  if (first) live.first = first;
  if (live.isWorking) return;
  live.isWorking = true;
  await null; // let the caller go on
  try {
    for (;;) {
      if (live.next) await answerText();
      else if (live.isGenerating && isServed) await generateOne(); // panels take longer there
      else if (nextWishes().length) await answerWishes();
      else if (live.isGenerating) await generateOne();
      else if (!(await nextInBackground())) break;
    }
  } catch (error) {
    showNotice(`This cannot be computed: ${error.message}`);
    if (live.next) hold(-1);
    live.next = null;
    stop();
  }
  live.isWorking = false;
}

/** Whether a job had something to do. */
async function nextInBackground() {
  const asked = background.map(job => job()).find(Boolean);
  await asked;
  return Boolean(asked);
}

const selection = () => ({layer: state.layer, head: state.head, panels: visiblePanels()});

async function answerText() {
  const job = live.next;
  const {changes, frozen} = state;
  const isOwn = job.text === DEFAULTS.text && !changes && !frozen;
  const isComplete = isOwn && !facts.dropped.length;
  const request = {text: job.text, selection: selection(), changes, frozen};
  const answer = isComplete ? {} : await ask('show', request);
  const reply = isOwn ? {} : answer;
  if (live.next === job) live.next = null;
  if (reply.problem) showNotice(reply.problem);
  else if (!live.next) {
    display(reply, job);
    showLeftOut(reply.leftOut);
  }
  if (!live.next) hold(-1);
}

async function answerWishes() {
  const {found} = await ask('more', {wishes: nextWishes()});
  if (live.next) return; // another text
  for (const [wish, arrays] of found) fulfil(wish, arrays);
  resume();
}

/** Show an answer to `show` or `draw`: at its last token, or at the selection of a URL hash, or
 * where it is (stays). */
function display({facts: newFacts, arrays, found = []}, {text, hash, since, stays}) {
  setText(newFacts && {...newFacts, text}, arrays);
  for (const [wish, more] of found) fulfil(wish, more);
  const end = stays ? {} : {t: DEFAULTS.t, source: -1};
  const {changes, frozen} = live;
  Object.assign(state, hash ? readHash(hash) : end, {text, changes, frozen});
  live.text = text;
  if (since !== undefined) afterFrame(() => measure(since)); // before what is off screen is drawn
  rebuild();
}

/** Draw one more token with the settings of the sliders. */
async function generateOne() {
  const {temperature, k, p, changes, frozen} = state;
  const settings = {temperature, k, p, changes, frozen};
  const request = {text: box.value, ...settings, selection: selection(), ...live.first};
  live.first = null;
  const reply = await ask('draw', request);
  if (live.next || !live.isGenerating) return;
  if (reply.problem) showNotice(reply.problem);
  else {
    box.value = reply.text;
    box.scrollTop = box.scrollHeight;
    display(reply, {text: reply.text});
  }
  if (reply.isOver) stop();
  await new Promise(requestAnimationFrame); // so that each token is seen
  if (isServed && nextWishes().length && !live.next) await answerWishes();
}

/** Once all visible panels are on screen: how long that took since the input, in ms. */
function measure(since) {
  if (!isDrawn()) return afterFrame(() => measure(since));
  document.documentElement.dataset.reaction = Math.round(performance.now() - since);
  drawClock();
}

/** The page's own clock, in the footer. */
export function drawClock() {
  const {ready, reaction} = document.documentElement.dataset;
  const last = reaction ? `; last reaction to typing in ${reaction} ms` : '';
  document.getElementById('clock').textContent = `Opened in ${ready} ms${last}.`;
}
