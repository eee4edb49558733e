// "Break it yourself", the end of the course: parts of the model are switched off by the reader.

import {DEFAULTS, argmax, fixed, percent, range, set, signed, state, sum} from './core.js';
import {T, arrays, facts, headName, measured, row, targetAt, tokenQuoted} from './model.js';
import {NGRAMS, here, topAt} from './course.js';
import {hasModel} from './live-model.js';
import {filtered} from './sampling.js';
import {activeChanges, setChange} from './switches.js';

/** The most likely token by logits, with its probability as the panel "Next token" shows it. */
function bestOf(logits) {
  const {temperature, k, p} = state;
  const best = argmax(logits);
  return `${tokenQuoted(best)} (${percent(filtered(logits, temperature, k, p).p[best])})`;
}

const isOff = name => activeChanges().get(name) === 0;

/** What a change of the model did to the loss and to the prediction at the selected token. */
function damage() {
  if (!arrays.logits_before) return 'Try it: here you will read what it did to this text.';
  const [before, now] = ['logits_before', 'logits'].map(name => bestOf(row(name, state.t)));
  const where = `${here()}, at temperature ${fixed(state.temperature)}`;
  return `${damageToLosses()}Most likely after ${where}: ${before} → ${now}.`;
}

function damageToLosses() {
  const places = measured();
  if (!places.length) return '';
  const change = f => `${fixed(f(row('loss_before')))} → ${fixed(f(row('loss')))}`;
  const mean = losses => sum(places.map(t => losses[t])) / places.length;
  const rise = t => row('loss')[t] - row('loss_before')[t];
  const worst = places.reduce((a, b) => (rise(b) > rise(a) ? b : a));
  const token = `${tokenQuoted(facts.ids[worst + 1])} (${worst + 1})`;
  const most = rise(worst) > 0 ? `It rises most at ${token}: ${change(x => x[worst])}. ` : '';
  return `Mean loss: ${change(mean)} nats. ${most}`;
}

/** The head that adds most to the logit of the next token, or the one that is switched off. */
function strongestHead() {
  const off = [...activeChanges().keys()].find(name => /^L\d+\.H\d+$/.test(name) && isOff(name));
  if (off) return off;
  const heads = facts.parts.flatMap(([kind, layer, k], i) =>
    kind === 'head' ? [[row('parts', i, state.t)[0], `L${layer}.H${k}`]] : []
  );
  return heads.reduce((best, x) => (x[0] > best[0] ? x : best))[1];
}

/** A stop that switches a part off. name: a function, see changes.js. */
const breakStop = (name, stop) => ({
  formula: '',
  shapes: () => '',
  example: damage,
  tries: [['Try it', () => setChange(name(), 0)]],
  undo: () => setChange(name(), undefined),
  ...stop
});

const MODEL_STOPS = [
  facts.model.position !== 'none' &&
    breakStop(() => 'positions', {
      title: 'Break it: no positions',
      target: ['#figure-next-token'],
      text:
        'Now break it yourself. This switches off what tells the model the order of the tokens. ' +
        'Look at the orange of the strip and at the next token.' +
        (NGRAMS ? ' The n-grams stay: they still know neighbors.' : ''),
      question: 'Does the model still work? Which predictions suffer most?',
      answer:
        'Usually the loss rises, most where a token depends on what stood where. The orange of ' +
        'the strip shows it for each token.'
    }),
  breakStop(() => 'mask', {
    title: 'Break it: no mask',
    target: ['#figure-heads'],
    text:
      'This lets every token look at later ones. The patterns of the heads now fill the upper ' +
      'right half too. Look at the loss before and after.',
    question: 'Every token can see the answer now. Does the loss fall?',
    answer:
      'Usually not: in training this model never saw them. It has not learned to use them, so ' +
      'they mostly disturb it. A model trained this way would copy the answer, and could not ' +
      'write.'
  }),
  breakStop(strongestHead, {
    title: 'Break it: one head',
    target: ['#figure-next-token'],
    text:
      'This switches off the head that adds most to the logit of the next token. Look at the ' +
      'next token, then click other tokens in the strip.',
    example: () => {
      const [, layer, k] = /L(\d+)\.H(\d+)/.exec(strongestHead());
      const i = facts.parts.findIndex(x => x[0] === 'head' && x[1] === +layer && x[2] === +k);
      const added = signed(row('parts', i, state.t)[0]);
      const name = headName(layer, k);
      if (isOff(strongestHead())) return `${name} is off. ${damage()}`;
      const target = tokenQuoted(targetAt(state.t));
      return `${name} adds ${added} to the logit of ${target} at ${here()}.`;
    },
    question: 'Is the answer lost without its strongest head?',
    answer:
      'Not always: other heads and MLPs add to the same logit, and some step in. If it is lost, ' +
      'you have found a head that this answer depends on. The mean loss may even fall: what ' +
      'helps here can hurt elsewhere in the text.'
  })
];

const TEMPERATURE_STOP = {
  title: 'Break it: temperature',
  target: ['#next .card'],
  text:
    'Set the temperature to 0, then to 2. Look at the ten samples: each is a possible next ' +
    'token. The button for 2 also lets top-k keep all tokens.',
  formula: '',
  shapes: () => '',
  example: () => {
    const {temperature} = state;
    const share = `the most likely token has a chance of ${topAt(temperature)}`;
    return `Now, at temperature ${temperature.toFixed(2)}, ${share}.`;
  },
  tries: [
    ['Temperature 0', () => set({temperature: 0})],
    ['Temperature 2', () => set({temperature: 2, k: facts.vocab_size})]
  ],
  undo: () => set({temperature: DEFAULTS.temperature, k: DEFAULTS.k}),
  question: 'Which temperature would you take for a translation, which for a poem?',
  answer: 'A translation should be right: 0 or a little more. A poem may surprise: near 1.'
};

/** The stops of this page, as in course.js; tries: [[label, act], ...] of its buttons. */
export const BREAK_STOPS = [...(hasModel ? MODEL_STOPS.filter(Boolean) : []), TEMPERATURE_STOP];
