// "Break it yourself", the end of the course: parts of the model are switched off by the reader.

import {DEFAULTS, argmax, fixed, percent, range, set, signed, state, sum} from './core.js';
import {T, arrays, facts, headName, row, targetAt, tokenQuoted} from './model.js';
import {NGRAMS, here, measured, topAt} from './course.js';
import {hasModel} from './live-model.js';
import {softmax} from './sampling.js';
import {activeChanges, setChange} from './switches.js';

/** The most likely token of logits at a position, and its probability. */
function bestOf(logits) {
  const p = softmax(logits);
  const best = argmax(p);
  return {best, p: p[best]};
}

const isOff = name => activeChanges().get(name) === 0;

/** What a change of the model did to the loss and to the prediction at the selected token. */
function damage() {
  if (!arrays.logits_before) return 'Try it: here you will read what it did to this text.';
  const mean = losses => fixed(sum(losses) / losses.length);
  const places = measured();
  const losses = name => places.map(t => row(name)[t]);
  const means = `${mean(losses('loss_before'))} → ${mean(losses('loss'))}`;
  const before = bestOf(row('logits_before', state.t));
  const now = bestOf(row('logits', state.t));
  const said = ({best, p}) => `${tokenQuoted(best)} (${percent(p)})`;
  return (
    (places.length ? `Mean loss: ${means} nats. ` : '') +
    `Most likely after ${here()}: ${said(before)} → ${said(now)}.`
  );
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
        'Look at the colors in the strip and at the next token.' +
        (NGRAMS ? ' The n-grams stay: they still know neighbors.' : ''),
      question: 'Does the model still work? Which predictions suffer most?',
      answer:
        'Usually the loss rises. Those tokens suffer that depend on what stood where. Words that ' +
        'make sense in one order only may survive.'
    }),
  breakStop(() => 'mask', {
    title: 'Break it: no mask',
    target: ['#figure-heads'],
    text:
      'This lets every token look at later ones. The patterns of the heads now fill the upper ' +
      'right half too. Look at the loss before and after.',
    question: 'Every token can see the answer now. Does the loss fall?',
    answer:
      'Hardly: this model predicted without them in training. It has not learned to use them, so ' +
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
      'Often not: other heads and MLPs add to the same logit, and some step in. If it is lost, ' +
      'you have found a head that this answer depends on.'
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
