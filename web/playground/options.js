// The sampling options: fields for state keys, with the names that the API gives them.

import {DEFAULTS, LIMITS, TEXTS, content, h, set, state, watch} from '../core.js';
import {facts} from './api.js';

// key: [label, what it does, lowest, highest, step]
const NUMBERS = {
  temperature: ['Temperature', '0: greedy', 0, 100, 0.05],
  top_k: ['Top k', '0: all tokens', 0, 1e6, 1],
  top_p: ['Top p', '1: off', 0.05, 1, 0.05],
  min_p: ['Min p', '0: off', 0, 1, 0.01],
  repetition_penalty: ['Repetition penalty', '1: off', 0.05, 100, 0.05],
  max_tokens: ['New tokens', 'at most', 1, 1e5, 1],
  n: ['Texts', 'not in a chat', 1, 16, 1],
  seed: ['Seed', 'same seed, same text', 0, Number.MAX_SAFE_INTEGER, 1]
};
const OFF = {top_k: 0, top_p: 1, min_p: 0}; // what null is in the API

const escape = text =>
  text.replaceAll('\\', '\\\\').replaceAll('\n', '\\n').replaceAll('\t', '\\t');
const unescape = text =>
  text.replace(/\\([nt\\])/g, (_, letter) => ({n: '\n', t: '\t'})[letter] ?? '\\');
const stopIds = facts.options.stop.filter(stop => typeof stop === 'number');
const stopTexts = facts.options.stop.filter(stop => typeof stop === 'string');

for (const [key, [, , low, high]] of Object.entries(NUMBERS)) {
  const value = {...facts.options, max_tokens: facts.max_tokens, n: 1}[key];
  DEFAULTS[key] = value ?? OFF[key];
  LIMITS[key] = [low, high];
}
DEFAULTS.stop = stopTexts.map(escape).join('\n');
TEXTS.stop = /^/;

/** The options as the API takes them. */
export function options() {
  const value = key => (state[key] === OFF[key] ? null : state[key]);
  const values = Object.keys(NUMBERS).map(key => [key, value(key)]);
  const stop = [...stopIds, ...state.stop.split('\n').filter(line => line).map(unescape)];
  return {...Object.fromEntries(values), stop};
}

function numberField([key, [label, hint, min, max, step]]) {
  const input = h('input', {
    type: 'number',
    id: `option-${key}`,
    'aria-describedby': `hint-${key}`,
    min,
    max,
    step,
    oninput: () => {
      const {badInput, rangeUnderflow, rangeOverflow} = input.validity;
      if (input.value && !badInput && !rangeUnderflow && !rangeOverflow) {
        set({[key]: Number(input.value)});
      }
    },
    onblur: () => (input.value = state[key])
  });
  watch([key], () => {
    if (Number(input.value) !== state[key] || !input.value) input.value = state[key];
  });
  return h('div', {class: 'field'}, h('label', {for: input.id}, label), input,
    h('span', {class: 'note', id: `hint-${key}`}, hint));
}

export function buildOptions() {
  const stop = h('textarea', {
    id: 'option-stop',
    rows: 2,
    spellcheck: 'false',
    'aria-describedby': 'hint-stop',
    oninput: () => set({stop: stop.value})
  });
  watch(['stop'], () => {
    if (stop.value !== state.stop) stop.value = state.stop;
  });
  content('options').append(
    ...Object.entries(NUMBERS).map(numberField),
    h('div', {class: 'field wide'}, h('label', {for: stop.id}, 'Stop at'), stop,
      h('span', {class: 'note', id: 'hint-stop'}, 'texts, one per line; \\n: line break')),
    h('button', {type: 'button', onclick: () => set(defaults())}, 'Reset options')
  );
}

const defaults = () =>
  Object.fromEntries([...Object.keys(NUMBERS), 'stop'].map(key => [key, DEFAULTS[key]]));
