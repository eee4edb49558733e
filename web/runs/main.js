// Entry point: loads the runs, fills the header, builds all panels; a served page follows the runs.

import {
  buildTheme,
  fixed,
  followWindow,
  h,
  inSection,
  integer,
  readHash,
  redraw,
  showError,
  state,
  watch
} from '../core.js';
import {info, loadRuns, runs, takeData} from './data.js';
import {readStrokes} from './chart.js';
import {buildCurves} from './curves.js';
import {buildTable, duration} from './table.js';
import {buildOne, buildSamples} from './one.js';

function totals() {
  const count = status => runs.filter(run => run.status === status).length;
  const [best] = runs.filter(run => run.best !== null).toSorted((a, b) => a.best - b.best);
  const seconds = runs.reduce((total, run) => total + (run.seconds ?? 0), 0);
  return [
    ['runs', integer(runs.length)],
    ['running', integer(count('running'))],
    ['best val loss', best ? fixed(best.best, 4) : 'n/a'],
    ['its run', best ? best.name : 'n/a'],
    ['training time of all', duration(seconds)]
  ];
}

function fillHeader() {
  const title = runs.length === 1 ? runs[0].name : `${integer(runs.length)} runs`;
  document.title = `${title} | plainGPT runs`;
  document.getElementById('title').textContent = title;
  const items = totals().map(([key, value]) => h('div', {}, h('dt', {}, key), h('dd', {}, value)));
  document.getElementById('totals').replaceChildren(...items);
  document.getElementById('accuracy').textContent =
    `Losses and steps in the table, and the curves of evaluations, are those of the logs. Curves ` +
    `of steps are rounded to 5 digits. A log of more than ${integer(info.max_points)} lines is ` +
    'drawn as about 500 points: its first 100 lines, then means of equally many lines, with ' +
    'their range shaded if 8 runs or fewer are shown. FLOPs are those of forward and backward: ' +
    '6 per parameter and token, plus attention (Chowdhery et al. 2022, appendix B).';
}

/** Ask the server for what has changed, again and again. */
async function follow() {
  const note = document.getElementById('connection');
  try {
    const response = await fetch(`/data?since=${info.version}`);
    const data = await response.json();
    const changed = data.version !== info.version || data.ids.length !== runs.length;
    if (changed) {
      takeData(data);
      redraw();
    }
    note.hidden = true;
  } catch {
    note.textContent = 'The server does not answer: the page shows what it sent last.';
    note.hidden = false;
  }
  setTimeout(follow, 1000 * info.poll_seconds);
}

try {
  await loadRuns();
} catch (error) {
  showError(document.querySelector('main'), error); // no panel can do without
  throw error;
}
buildTheme();
watch(['theme'], () => {
  readStrokes();
  fillHeader();
});
const panels = {table: buildTable, curves: buildCurves, one: buildOne, samples: buildSamples};
for (const [id, build] of Object.entries(panels)) inSection(id, build);
Object.assign(state, readHash()); // after the panels have registered their valid values
redraw();
followWindow();
if (info.poll_seconds) setTimeout(follow, 1000 * info.poll_seconds); // a served page
document.documentElement.dataset.ready = Math.round(performance.now());
