// The Worker that holds the model. It answers messages {id, kind, ...} with {id, result} or
// {id, error}, in their order.

import {Analysis} from './analysis.js';
import {Answers} from './answers.js';
import {readArray} from './arrays.js';
import {Engine} from './engine.js';
import {PageTokenizer} from './tokenizer.js';

let engine;
let tokenizer;
let answers;

/** Weights of lib/page_weights.py: {name: {data: Float32Array, shape}}. */
async function readWeights(bytes, index) {
  const read = async name => [name, await readArray(bytes, index[name])];
  const arrays = Object.fromEntries(await Promise.all(Object.keys(index).map(read)));
  const weights = {};
  for (const [name, {data, shape}] of Object.entries(arrays)) {
    if (name === 'tokenizer' || name.endsWith(':scale')) continue;
    const scales = arrays[`${name}:scale`]?.data;
    weights[name] = {data: scales ? fromSteps(data, scales) : data, shape};
  }
  const saved = JSON.parse(new TextDecoder().decode(arrays.tokenizer.data));
  return {weights, saved};
}

/** int8 steps, stored around 128, times the scale of their row. */
function fromSteps(steps, scales) {
  const width = steps.length / scales.length;
  const weights = new Float32Array(steps.length);
  scales.forEach((scale, row) => {
    for (let i = row * width; i < (row + 1) * width; i++) weights[i] = (steps[i] - 128) * scale;
  });
  return weights;
}

const ANSWERS = {
  async load({facts, vocabSize, bytes}) {
    const {weights, saved} = await readWeights(bytes, facts.arrays);
    engine = new Engine(facts.config, weights);
    tokenizer = new PageTokenizer(saved);
    answers = new Answers(new Analysis(engine, vocabSize), tokenizer);
  },
  encode: ({text}) => tokenizer.encode(text),
  run: ({ids}) => engine.run(ids),
  show: request => answers.show(request),
  more: request => answers.more(request),
  draw: request => answers.draw(request),
  ablate: request => answers.ablate(request),
  patch: request => answers.patch(request),
  patchMore: () => answers.patchMore()
};

let queue = Promise.resolve();
self.onmessage = ({data}) => {
  queue = queue.then(async () => {
    const {id, kind} = data;
    try {
      self.postMessage({id, result: await ANSWERS[kind](data)});
    } catch (error) {
      self.postMessage({id, error: error.message});
    }
  });
};
