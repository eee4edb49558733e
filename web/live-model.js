// The model in the page: a Worker made of the page's own text, which computes as PyTorch does.

import {takeBytes} from './core.js';
import {facts} from './model.js';

let worker = null;
let lastId = 0;
const waiting = new Map(); // id -> {resolve, reject}

export const hasModel = Boolean(facts.engine);

/** Start the Worker and give it the weights; resolves when it can answer. */
export async function startModel() {
  const code = document.getElementById('worker').textContent;
  const url = URL.createObjectURL(new Blob([code], {type: 'text/javascript'}));
  worker = new Worker(url);
  worker.onmessage = ({data: {id, result, error}}) => {
    const {resolve, reject} = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  worker.onerror = ({message}) => {
    for (const {reject} of waiting.values()) reject(new Error(message));
    waiting.clear();
  };
  const bytes = takeBytes('weights');
  const message = {facts: facts.engine, vocabSize: facts.vocab_size, bytes};
  return ask('load', message, [bytes.buffer]);
}

/** Ask the Worker; see ANSWERS in worker.js. Rejects with an Error of one sentence. */
export function ask(kind, message = {}, transfer = []) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    waiting.set(id, {resolve, reject});
    worker.postMessage({...message, id, kind}, transfer);
  });
}
