// The selected run: commands, differences to the baseline, keys, samples.

import {clamp, content, h, integer, set, state, tableOf, watch} from '../core.js';
import {baseline, info, runs, selectedRun} from './data.js';

/** A menu of all runs for the state key `run`. */
function runMenu(id) {
  const select = h('select', {id, onchange: () => set({run: select.value, sample: -1})});
  watch(['run', 'hidden', 'filter'], () => {
    const option = run => h('option', {value: run.id, selected: run === selectedRun()}, run.name);
    select.replaceChildren(...runs.map(option));
  });
  return h('div', {class: 'controls'}, h('label', {for: id}, 'Run'), select);
}

const VERBS = {resume: 'Go on', repeat: 'Do it again'};

function commandLines(run) {
  return Object.entries(run.commands).map(([name, text]) => [
    h('h3', {}, VERBS[name]),
    h('code', {class: 'command'}, text)
  ]);
}

function explainLink(run) {
  if (!run.explain) return null;
  const text = `${run.path}/explain.html shows it from the inside.`;
  if (info.poll_seconds) return h('p', {class: 'note'}, text); // a served page links no files
  return h('p', {}, h('a', {href: run.explain}, 'See it from the inside: explain.html'));
}

/** Keys in which the run and the baseline differ. */
function differences(run, base) {
  const keys = Object.keys({...base.config, ...run.config});
  const rows = keys
    .filter(key => run.config[key] !== base.config[key])
    .map(key => [key, base.config[key] ?? 'n/a', run.config[key] ?? 'n/a']);
  if (!rows.length) return h('p', {class: 'note'}, `All keys are those of ${base.name}.`);
  return h('div', {class: 'keys', tabindex: 0, role: 'region', 'aria-label': 'Differences'},
    tableOf(['key', base.name, run.name], rows));
}

export function buildOne() {
  const card = h('div', {class: 'card', id: 'run-card'});
  watch(['run', 'base', 'hidden', 'filter'], () => {
    const run = selectedRun();
    if (!run) return; // a served page, all of whose folders are gone
    const base = baseline();
    const lines = run.lines > info.max_points
      ? `${integer(run.lines)} log lines, drawn as ${integer(run.curves.step.length)} points`
      : `${integer(run.lines)} log lines`;
    const keys = Object.entries(run.config);
    card.replaceChildren(
      h('h3', {}, run.name),
      h('p', {class: 'note'}, `${run.path}: ${run.status}, ${lines}`),
      ...commandLines(run).flat(),
      explainLink(run) ?? '',
      base && base !== run ? h('h3', {}, 'Other keys than the baseline') : '',
      base && base !== run ? differences(run, base) : '',
      h('details', {}, h('summary', {}, `All ${keys.length} keys`),
        h('div', {class: 'keys', tabindex: 0, role: 'region', 'aria-label': 'All keys'},
          tableOf(['key', 'value'], keys)))
    );
  });
  content('one').append(runMenu('one-run'), card);
}

// Samples -----------------------------------------------------------------------------------------

function sampleCard(run, sample) {
  return h('div', {class: 'card'},
    h('h3', {}, `${run.name}, step ${integer(sample.step)}`),
    h('pre', {class: 'sample'}, sample.text));
}

/** Its sample nearest to a step. */
const nearestSample = (run, step) =>
  run.samples.toSorted((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step))[0];

export function buildSamples() {
  const slider = h('input', {
    type: 'range',
    class: 'short',
    id: 'sample',
    min: 0,
    oninput: () => set({sample: Number(slider.value)})
  });
  const output = h('output', {});
  const controls = h('div', {class: 'controls'}, h('label', {for: 'sample'}, 'Evaluation'), slider,
    output);
  const box = h('div', {class: 'columns two'});
  watch(['run', 'base', 'sample', 'hidden', 'filter'], () => {
    const run = selectedRun();
    if (!run) return;
    const base = baseline();
    const last = run.samples.length - 1;
    controls.hidden = last < 1;
    if (last < 0) {
      const hint = 'The log of this run has no samples; --sample_every_eval keeps some.';
      box.replaceChildren(h('p', {class: 'note'}, hint));
      return;
    }
    const i = state.sample < 0 ? last : clamp(state.sample, 0, last);
    slider.max = last;
    slider.value = i;
    const sample = run.samples[i];
    output.textContent = `step ${integer(sample.step)}`;
    const cards = [sampleCard(run, sample)];
    if (base && base !== run && base.samples.length) {
      cards.push(sampleCard(base, nearestSample(base, sample.step)));
    }
    box.replaceChildren(...cards);
  });
  content('samples').append(runMenu('samples-run'), controls, box);
}
