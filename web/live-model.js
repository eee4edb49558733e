// The model: a Worker, made of the page's own text, or PyTorch, run by explain.py --serve.

import {readArray} from './arrays.js';
import {takeBytes} from './core.js';
import {facts} from './model.js';

let worker = null;
let lastId = 0;
const waiting = new Map(); // id -> {resolve, reject}

/** Whether explain.py --serve answers, as the model does not fit into the page. */
export const isServed = Boolean(facts.server);
export const hasModel = isServed || Boolean(facts.engine);

/** Start the Worker, if there is one, and give it the weights; resolves when it can answer. */
export async function startModel() {
  if (isServed) return;
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
  return askWorker('load', message, [bytes.buffer]);
}

function askWorker(kind, message, transfer = []) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    waiting.set(id, {resolve, reject});
    worker.postMessage({...message, id, kind}, transfer);
  });
}

const pageName = String(Math.random()); // the server keeps the text of each page
const MAX_MESSAGE = 500_000; // characters: fewer bytes than MAX_BODY in lib/serve.py

async function askServer(kind, message) {
  const body = JSON.stringify({...message, kind, page: pageName});
  if (body.length > MAX_MESSAGE) throw new Error('The text is too long.');
  const headers = {'Content-Type': 'application/json'};
  let answer;
  try {
    const response = await fetch('/ask', {method: 'POST', headers, body});
    answer = new Uint8Array(await response.arrayBuffer());
  } catch {
    throw new Error('explain.py --serve does not answer. Its terminal may say why.');
  }
  const result = await unpackAnswer(answer);
  if (result.error !== undefined) throw new Error(result.error);
  return result;
}

/** The inverse of pack_answer in lib/page.py. */
async function unpackAnswer(bytes) {
  const [first, second] = [bytes.indexOf(10), bytes.indexOf(10, bytes.indexOf(10) + 1)];
  const text = (start, end) => new TextDecoder().decode(bytes.subarray(start, end));
  const data = bytes.subarray(second + 1);
  const places = JSON.parse(text(0, first));
  const arrays = await Promise.all(places.map(place => readArray(data, place)));
  const revive = (key, value) => (value?.array === undefined ? value : arrays[value.array].data);
  return JSON.parse(text(first, second), revive);
}

/** Ask the model; see ANSWERS in worker.js. Rejects with an Error of one sentence. */
export const ask = (kind, message = {}) => (isServed ? askServer : askWorker)(kind, message);
