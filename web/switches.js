// Changing the model: buttons for the panels, and the bar that lists what is changed.

import {describeModel, formatChanges, parseChanges, readPart} from './changes.js';
import {fixed, h, inSection, percent, set, state, sum, watch} from './core.js';
import {hasModel} from './live-model.js';
import {L, H, T, arrays, facts, headName, measured, row, sees, tokenQuoted} from './model.js';

const MEANINGS = {
  ngrams: 'n-grams',
  positions: 'positions',
  mask: 'causal mask'
};
const changeable = hasModel
  ? describeModel({L, H, neurons: facts.neurons_in_a_layer, config: facts.model})
  : null;
const listed = new Map(); // name -> its element in the bar

export const activeChanges = () => parseChanges(state.changes, changeable);

/** Change a part of the model, see changes.js; number undefined: as it was trained. */
export function setChange(name, number) {
  const changes = activeChanges();
  if (number === undefined) changes.delete(name);
  else changes.set(name, number);
  set({changes: formatChanges(changes)});
}

const tokenAt = t => (t < T ? tokenQuoted(facts.ids[t]) : 'not in this text');

function meaning(name) {
  const {kind, layer, head, neuron, query, key} = readPart(name, changeable);
  if (kind === 'attn') return `all heads of layer ${layer}`;
  if (kind === 'mlp') return `MLP ${layer}`;
  if (kind === 'neuron') return `neuron ${neuron} of MLP ${layer}`;
  if (kind === 'head') return headName(layer, head);
  if (kind !== 'look') return MEANINGS[kind];
  const isHidden = Math.max(query, key) < T && !sees(query, key);
  const pair = `${tokenAt(query)} (${query}) at ${tokenAt(key)} (${key})`;
  return `${headName(layer, head)}, ${pair}${isHidden ? ', which it does not see' : ''}`;
}

// Buttons -----------------------------------------------------------------------------------------

/** A button that is pressed while isOn(); null in a page without the model. */
function toggle(keys, text, isOn, turn) {
  if (!hasModel) return null;
  const button = h('button', {type: 'button', onclick: () => turn(!isOn())});
  watch(['changes', 'frozen', ...keys], () => {
    button.textContent = text();
    button.setAttribute('aria-pressed', isOn());
  });
  return button;
}

/** A button that switches a part off and on again. name: a function; keys: of the state, on which
 * it depends. */
export const offButton = (name, ...keys) =>
  toggle(
    keys,
    () => `Switch off ${meaning(name())}`,
    () => activeChanges().get(name()) === 0,
    isOff => setChange(name(), isOff ? 0 : undefined)
  );

/** The same for a neuron, with few words. */
export function neuronButton(layer, neuron) {
  if (!hasModel) return null;
  const name = `L${layer}.n${neuron}`;
  const label = `Off: neuron ${neuron}`;
  const onclick = () => setChange(name, 0);
  return h('button', {type: 'button', class: 'small', 'aria-label': label, onclick}, 'Off');
}

/** A button that lets the selected query of the selected head attend to one key only. */
export function lookButton(key) {
  const name = () => `L${state.layer}.H${state.head}@${state.t}.${key()}`;
  return toggle(
    ['layer', 'head', 't', 'source'],
    () => `Attend only to ${tokenAt(key())} (${key()})`,
    () => activeChanges().get(name()) === 1,
    isOn => setChange(name(), isOn ? 1 : undefined)
  );
}

export const freezeButton = () =>
  toggle(
    [],
    () => 'Freeze attention',
    () => state.frozen !== '',
    isOn => set({frozen: isOn ? state.text : ''})
  );

// The bar -----------------------------------------------------------------------------------------

export function buildChanges() {
  if (!hasModel) return;
  const bar = document.getElementById('changes');
  const list = h('ul', {});
  const losses = h('p', {'aria-live': 'polite'});
  const reset = h(
    'button',
    {type: 'button', onclick: () => set({changes: '', frozen: ''})},
    'Reset'
  );
  bar.append(h('div', {class: 'head'}, losses, reset), list);
  inSection('changes', () =>
    watch(['changes', 'frozen'], () => {
      const valid = formatChanges(activeChanges());
      if (state.changes !== valid) return set({changes: valid}); // from a URL
      drawList(list);
      losses.textContent = describeLosses();
      bar.hidden = !list.children.length;
    })
  );
}

function describeLosses() {
  if (!arrays.loss_before || !measured().length) return 'Changed.';
  const places = measured();
  const mean = name => fixed(sum(places.map(t => row(name)[t])) / places.length);
  return `Changed. Mean loss ${mean('loss_before')} → ${mean('loss')} nats`;
}

/** Elements stay as long as their change: the hand on a slider should not lose it. */
function drawList(list) {
  const changes = activeChanges();
  const names = [...changes.keys()];
  if (state.frozen) names.push('frozen');
  for (const name of listed.keys()) {
    if (names.includes(name)) continue;
    const {element} = listed.get(name);
    const next = element.nextSibling ?? element.previousSibling;
    if (element.contains(document.activeElement)) next?.querySelector('button').focus();
    element.remove();
    listed.delete(name);
  }
  for (const name of names) {
    if (!listed.has(name)) {
      listed.set(name, name === 'frozen' ? frozenItem() : changeItem(name));
      list.append(listed.get(name).element);
    }
    listed.get(name).update(changes.get(name));
  }
}

function removeButton(what, onclick) {
  return h('button', {type: 'button', 'aria-label': `Remove: ${what}`, onclick}, '×');
}

function changeItem(name) {
  const {most} = readPart(name, changeable);
  const label = h('span');
  const output = h('output');
  const slider = h('input', {
    type: 'range',
    min: 0,
    max: most,
    step: 0.05,
    oninput: event => setChange(name, Number(event.target.value))
  });
  const remove = removeButton(meaning(name), () => setChange(name, undefined));
  const element = h('li', {}, label, most > 0 && slider, output, remove);
  const update = number => {
    const what = meaning(name);
    const text = most === 1 ? percent(number) : number ? `× ${number}` : 'off';
    label.textContent = what;
    slider.value = number;
    slider.setAttribute('aria-label', what);
    slider.setAttribute('aria-valuetext', text);
    output.textContent = text;
  };
  return {element, update};
}

function frozenItem() {
  const label = h('span');
  const remove = removeButton('frozen attention', () => set({frozen: ''}));
  const update = () => {
    const words = [...state.frozen];
    const text = words.length > 24 ? words.slice(0, 23).join('') + '…' : state.frozen;
    label.textContent = `attention weights as in “${text}”, whatever mask and scores say`;
  };
  return {element: h('li', {}, label, remove), update};
}
