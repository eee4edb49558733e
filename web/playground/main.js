// Entry point: the text or message, its buttons, and the columns of the models.

import {
  DEFAULTS,
  buildTheme,
  choice,
  followWindow,
  readHash,
  redraw,
  set,
  state,
  watch
} from '../core.js';
import {facts} from './api.js';
import {buildColumns, columns} from './column.js';
import {buildOptions} from './options.js';

const byId = id => document.getElementById(id);
const [input, go, stop, retry, clear] = ['input', 'go', 'stop', 'retry', 'clear'].map(byId);
const MODES = {
  write: {label: 'Text to continue', go: 'Write', keys: 'Ctrl+Enter writes, Escape stops', rows: 5},
  chat: {label: 'Message', go: 'Send', keys: 'Enter sends, Shift+Enter breaks the line', rows: 2}
};
const start = facts.start.trim() ? facts.start : '';
const texts = {write: start, chat: start}; // in the box of each mode
const last = {write: null, chat: null}; // what was asked in each mode
let running = null; // an AbortController

function setRunning(controller) {
  running = controller;
  // aria-disabled: the button that was pressed keeps the focus
  const disable = (button, isOff) => button.setAttribute('aria-disabled', Boolean(isOff));
  disable(go, running);
  disable(stop, !running);
  disable(clear, running);
  disable(retry, running || last[state.mode] === null);
}

/** Ask all models; ask(column, signal) is a promise. */
async function run(ask) {
  const controller = new AbortController();
  setRunning(controller);
  await Promise.all(columns.map(column => ask(column, controller.signal)));
  if (running === controller) setRunning(null); // it may have been stopped, and another begun
}

function send(text) {
  last[state.mode] = text;
  if (state.mode === 'write') return run((column, signal) => column.write(text, signal));
  return run((column, signal) => column.answer(text, signal));
}

function submit() {
  if (running) return;
  const text = input.value;
  if (state.mode === 'chat') {
    if (!text.trim()) return;
    input.value = '';
  }
  send(text || facts.start);
}

function again() {
  if (running || last[state.mode] === null) return;
  set({seed: state.seed + 1});
  if (state.mode === 'chat') columns.forEach(column => column.undo());
  send(last[state.mode]);
}

function keep(text) {
  input.value = text;
  input.focus();
  input.scrollTop = input.scrollHeight;
}

function onKey(event) {
  const sends = state.mode === 'chat' ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key === 'Enter' && sends && !event.isComposing) {
    event.preventDefault();
    submit();
  }
}

let shownMode = null;

/** Show what belongs to the mode: the message of a chat is below the chat. */
function showMode() {
  const {label, go: name, keys, rows} = MODES[state.mode];
  if (shownMode) texts[shownMode] = input.value;
  shownMode = state.mode;
  running?.abort();
  byId('input-label').textContent = label;
  byId('keys').textContent = keys;
  go.textContent = name;
  input.rows = rows;
  input.value = texts[state.mode];
  const box = byId('columns');
  if (state.mode === 'chat') box.after(byId('composer'));
  else box.before(byId('composer'));
  byId('work').dataset.mode = state.mode;
  columns.forEach(column => column.showMode());
  setRunning(null);
}

DEFAULTS.mode = facts.models.every(model => model.turns) ? 'chat' : 'write';
buildTheme();
byId('title').textContent = facts.models.map(model => model.name).join(' and ');
byId('api').textContent = `${location.origin}/v1`;
buildColumns({onPick: text => (byId('readout').textContent = text), onKeep: keep});
buildOptions();
byId('options').open = innerWidth > 760;
const modes = choice('mode', {write: 'Write', chat: 'Chat'}, 'Mode');
if (facts.models.some(model => model.turns)) byId('modes').append(modes);
watch(['mode'], showMode);
byId('composer').addEventListener('submit', event => {
  event.preventDefault();
  submit();
});
input.addEventListener('keydown', onKey);
stop.addEventListener('click', () => running?.abort());
retry.addEventListener('click', again);
addEventListener('keydown', event => event.key === 'Escape' && running?.abort());
clear.addEventListener('click', () => {
  if (running) return;
  columns.forEach(column => column.clear());
  last[state.mode] = null;
  setRunning(null);
  input.focus();
});
Object.assign(state, readHash());
redraw();
followWindow();
document.documentElement.dataset.ready = Math.round(performance.now());
