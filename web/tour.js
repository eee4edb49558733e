// The course as a box next to the page: it walks through the stops of course.js and breaking.js.

import {LIMITS, Pending, h, scrollToElement, set, state, watch} from './core.js';
import {BREAK_STOPS} from './breaking.js';
import {STOPS} from './course.js';

const COURSE = [...STOPS, ...BREAK_STOPS];

export function buildTour() {
  const box = document.getElementById('tour');
  const opener = document.getElementById('tour-start');
  LIMITS.tour = [0, COURSE.length];
  const title = h('h2', {id: 'tour-title'});
  const text = h('p');
  const formula = h('p', {class: 'formula'});
  const shapes = h('p', {class: 'shapes'});
  const example = h('p', {class: 'look', 'aria-live': 'polite'});
  const tries = h('div', {class: 'tries'});
  const question = h('summary');
  const answer = h('p');
  const quiz = h('details', {}, question, answer);
  const progress = h('span');
  const goTo = step => {
    set({tour: step});
    if (!step) opener.focus();
  };
  const button = (label, onclick) => h('button', {type: 'button', onclick}, label);
  const back = button('Back', () => goTo(Math.max(1, state.tour - 1)));
  const next = button('Next', () => goTo(state.tour === COURSE.length ? 0 : state.tour + 1));
  const close = button('Close', () => goTo(0));
  const controls = h('div', {class: 'bar'}, back, next, close, progress);
  box.append(title, text, formula, shapes, example, tries, quiz, controls);
  addEventListener('keydown', event => {
    if (event.key === 'Escape' && state.tour) goTo(0);
  });
  opener.addEventListener('click', () => {
    goTo(1);
    next.focus({preventScroll: true}); // the box begins at its top
  });

  let shownStep = 0;
  let undo = null; // of what was tried at this stop
  const takeBack = () => {
    const last = undo;
    undo = null;
    last?.();
  };
  /** act() on the model or the sampling, then show the figure again: it is built anew, and the bar
   * of changes moves it. */
  const actAt = (stop, act) => {
    act();
    showTarget(stop?.target ?? []);
  };
  const tryIt = (stop, act) => {
    undo = stop.undo;
    actAt(stop, act);
  };
  /** What depends on the stop only. */
  const enter = stop => {
    actAt(stop, takeBack);
    if (!stop) return;
    box.scrollTop = 0;
    title.textContent = stop.title;
    text.innerHTML = stop.text;
    formula.innerHTML = stop.formula;
    formula.hidden = shapes.hidden = !stop.formula;
    question.textContent = stop.question;
    quiz.open = false;
    const buttons = stop.tries?.map(([label, act]) => button(label, () => tryIt(stop, act))) ?? [];
    if (stop.tries) buttons.push(button('Undo', () => actAt(stop, takeBack)));
    tries.replaceChildren(...buttons);
    progress.textContent = `${state.tour} of ${COURSE.length}`;
    back.disabled = state.tour === 1;
    next.textContent = state.tour === COURSE.length ? 'Finish' : 'Next';
  };
  watch(['tour', 't', 'layer', 'head', 'temperature', 'k', 'p', 'changes'], () => {
    const stop = COURSE[state.tour - 1];
    box.hidden = !stop;
    document.documentElement.classList.toggle('touring', Boolean(stop));
    if (state.tour !== shownStep) {
      shownStep = state.tour;
      enter(stop);
    }
    if (!stop) return;
    shapes.textContent = 'Shapes: ' + stop.shapes();
    answer.textContent = stop.answer instanceof Function ? stop.answer() : stop.answer;
    describe(example, stop);
  });
}

function describe(example, stop) {
  try {
    example.textContent = stop.example();
  } catch (error) {
    if (error instanceof Pending) throw error; // it is drawn again when the data is there
    example.textContent = error.message; // the panel that it is about says so too
  }
}

let shownTarget = null; // selectors

/** Highlight the first of these elements that exists, and scroll to it, once all is drawn. */
function showTarget(selectors) {
  shownTarget = selectors;
  const show = () => {
    if (selectors !== shownTarget) return; // another stop
    if (!document.documentElement.hasAttribute('data-settled')) return setTimeout(show, 20);
    for (const each of document.querySelectorAll('.visited')) each.classList.remove('visited');
    const target = selectors.map(x => document.querySelector(x)).find(Boolean);
    if (!target) return;
    target.classList.add('visited');
    scrollToElement(target);
  };
  // two frames later: the page has become narrower, and is drawn again
  requestAnimationFrame(() => requestAnimationFrame(show));
}
