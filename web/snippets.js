// Where neurons are most active and heads look most strongly, in a sample of the validation data.

import {DEFAULTS, LIMITS, figure, fixed, h, integer, range, set, state, watch} from './core.js';
import {arrays, facts, headName, row, tokenText} from './model.js';

const CONTEXT = 10; // tokens before what a snippet is about
const AFTER = 4; // tokens after it
const LONGEST = 24; // tokens between key and query; more are left out
Object.assign(DEFAULTS, {neuron: -1}); // shown with its snippets, -1: the strongest one here
Object.assign(LIMITS, {neuron: [-1, facts.neurons_in_a_layer - 1]});

const sampleLine = () =>
  `a sample of ${integer(facts.snippets.tokens)} tokens of ${facts.snippets.path}`;

/** Stands in for snippets that are not there. */
const noSnippets = () =>
  h('p', {class: 'note'}, `No snippets: ${facts.snippets?.missing ?? 'they are left out'}.`);

/** Tokens from `first` to `last` of a window, with those in marks {position: class} marked. */
function snippet(window, first, last, marks) {
  const ids = row('snippet_ids', window);
  const places = range(ids.length, t => t).filter(t => t >= first && t <= last);
  const parts = places.map(t => {
    const text = tokenText(ids[t]);
    return marks[t] ? h('mark', {class: marks[t]}, text) : text;
  });
  return h('span', {class: 'snippet mono'}, parts);
}

/** The snippets of a neuron or head: the k-th row of `name`_best and `name`_places. */
function bestPlaces(name, layer, i) {
  const values = Array.from(row(`${name}_best`, layer, i));
  return values.map((value, n) => [value, ...row(`${name}_places`, layer, i, n)]);
}

// Neurons -----------------------------------------------------------------------------------------

const neuronsHere = () => Array.from(row('neurons', state.layer, state.t));

/** The selected neuron, if it is among those listed; else the strongest one. */
function chosenNeuron() {
  const all = neuronsHere();
  return all.includes(state.neuron) ? state.neuron : all[0];
}

function neuronRows(id) {
  return bestPlaces('neuron', state.layer, id).map(([value, window, t]) => ({
    value,
    text: snippet(window, t - CONTEXT, t + AFTER, {[t]: 'query'})
  }));
}

/** A figure with the top snippets of one of the strongest neurons. */
export function neuronSnippets() {
  if (!arrays.snippet_ids) return noSnippets();
  const select = h('select', {
    id: 'neuron',
    onchange: event => set({neuron: Number(event.target.value)})
  });
  const controls = h('div', {class: 'controls'}, h('label', {for: 'neuron'}, 'Neuron'), select);
  const list = figure(
    'neuron-snippets',
    'Where a neuron is most active',
    () => [
      ['neuron', 'activation', 'snippet'],
      neuronsHere().flatMap(id =>
        neuronRows(id).map(({value, text}) => [id, value.toFixed(4), text.textContent])
      )
    ],
    controls,
    false
  );
  watch(['t', 'layer', 'neuron'], () => {
    select.replaceChildren(...neuronsHere().map(id => h('option', {value: id}, String(id))));
    select.value = chosenNeuron();
    list.heading.textContent =
      `Layer ${state.layer}, neuron ${chosenNeuron()}: where it is most active`;
    showSnippets(list, 'activation', neuronRows(chosenNeuron()));
  });
  list.setReadout(
    `The largest activations in ${sampleLine()}, at most one of each piece of text. ` +
      'Marked: the token at which the neuron is active; it does not see what comes after.'
  );
  return list;
}

function showSnippets(list, quantity, rows) {
  const line = ({value, text}) =>
    h('li', {}, h('span', {class: 'amount', title: quantity}, fixed(value)), text);
  list.picture.replaceChildren(h('ol', {class: 'snippets'}, rows.map(line)));
  list.refresh();
}

// Heads -------------------------------------------------------------------------------------------

function headRows() {
  return bestPlaces('head', state.layer, state.head)
    .filter(([value]) => value > 0)
    .map(([value, window, query, key]) => {
      const marks = {[query]: 'query', [key]: 'key'};
      const cut = query - key > LONGEST;
      const text = snippet(window, key - 3, cut ? key + 3 : query, marks);
      if (cut) text.append(' … ', snippet(window, query - 3, query, marks));
      return {value, text};
    });
}

/** A figure with the pairs of tokens between which the selected head attends most. */
export function headSnippets() {
  if (!arrays.snippet_ids) return noSnippets();
  const list = figure(
    'head-snippets',
    'Where a head looks most strongly',
    () => [
      ['attention', 'snippet'],
      headRows().map(({value, text}) => [value.toFixed(4), text.textContent])
    ],
    null,
    false
  );
  watch(['layer', 'head'], () => {
    const name = headName(state.layer, state.head);
    list.heading.textContent = `Head ${name}: where it looks most strongly`;
    showSnippets(list, 'attention', headRows());
  });
  list.setReadout(
    `The most attention in ${sampleLine()}, at most one in each piece of text. Outlined: the ` +
      'query; filled: the key it attends to. Not counted: the query itself, the first token ' +
      'that it sees, and queries that see only a few tokens.'
  );
  return list;
}
