// What one model writes and how a chat with it goes on.

import {h, integer, state} from '../core.js';
import {facts, generate} from './api.js';
import {options} from './options.js';
import {GeneratedText} from './text.js';

const ALTERNATIVES = 5;
const ENDS = {stop: 'complete', length: 'cut at the limit of new tokens'};

export class Column {
  constructor(model, {onPick, onKeep}) {
    Object.assign(this, {model, onPick, onKeep});
    this.turns = []; // of the chat: {content, text, elements}
    this.boxes = {write: h('div', {class: 'texts'}), chat: h('div', {class: 'texts'})};
    this.status = h('p', {class: 'note', role: 'status'});
    this.error = h('p', {class: 'notice', role: 'alert', hidden: true});
    const chats = `chats of up to ${model.turns} turns`;
    const data = ['plain text', 'pairs of texts'][model.turns] ?? chats;
    const more = `trained on ${data}, ${integer(model.block_size)} tokens of context`;
    this.element = h('section', {class: 'card', 'aria-label': model.name},
      facts.models.length > 1 && h('h2', {}, model.name),
      h('p', {class: 'note'}, `${model.about}; ${more}`),
      Object.values(this.boxes), this.error, this.status);
  }

  showMode() {
    for (const [mode, box] of Object.entries(this.boxes)) box.hidden = mode !== state.mode;
    this.say('');
  }

  say(text, error = '') {
    this.status.textContent = text;
    this.error.textContent = error;
    this.error.hidden = !error;
  }

  /** Forget what was written in this mode. */
  clear() {
    if (state.mode === 'chat') this.turns = [];
    this.boxes[state.mode].replaceChildren();
    this.say('');
  }

  /** Continue a text. */
  async write(prompt, signal) {
    this.clear();
    const label = i => `${this.model.name}${state.n > 1 ? `, text ${i + 1}` : ''}`;
    const texts = Array.from({length: state.n}, (_, i) => new GeneratedText(label(i), this.onPick));
    this.boxes.write.append(...texts.map(text => text.element));
    const body = {prompt, n: state.n, logprobs: ALTERNATIVES};
    await this.run('/v1/completions', body, texts, signal);
    if (!this.model.turns) this.offerToKeep(prompt, texts);
  }

  offerToKeep(prompt, texts) {
    for (const {plain, element} of texts.filter(text => text.plain)) {
      const keep = () => this.onKeep(prompt + plain);
      element.after(h('button', {type: 'button', class: 'small keep', onclick: keep},
        'Go on from here'));
    }
  }

  /** Answer a message. */
  async answer(content, signal) {
    if (!this.model.turns) {
      this.say('', 'This model was trained on plain text, not on chats: see Write.');
      return;
    }
    const messages = this.turns
      .filter(turn => turn.text.plain.trim()) // as in sample.py --interactive
      .flatMap(turn => [
        {role: 'user', content: turn.content},
        {role: 'assistant', content: turn.text.plain}
      ]);
    const text = new GeneratedText(`${this.model.name}: answer`, this.onPick);
    const elements = [h('p', {class: 'question'}, content), text.element];
    this.boxes.chat.append(...elements);
    this.turns.push({content, text, elements});
    text.reveal();
    messages.push({role: 'user', content});
    const body = {messages, n: 1, logprobs: true, top_logprobs: ALTERNATIVES};
    await this.run('/v1/chat/completions', body, [text], signal);
  }

  /** Take back the last message and its answer. */
  undo() {
    for (const element of this.turns.pop()?.elements ?? []) element.remove();
  }

  /** Add to a text; the end of an answer stays in sight, if it was. */
  add(text, piece) {
    const follows = state.mode === 'chat' && text.isInSight();
    text.add(piece);
    if (follows) text.reveal();
  }

  async run(path, body, texts, signal) {
    this.say('writing ...');
    const begin = performance.now();
    const reasons = new Set();
    let usage;
    try {
      const request = {model: this.model.name, truncation: 'auto', ...options(), ...body};
      for await (const piece of generate(path, request, signal)) {
        if (piece.usage) usage = piece.usage;
        else this.add(texts[piece.index], piece);
        if (piece.reason) reasons.add(piece.reason);
      }
      const seconds = ((performance.now() - begin) / 1000).toFixed(1);
      const {prompt_tokens: read, completion_tokens: written} = usage;
      const full = read >= this.model.block_size ? ', all that fit' : '';
      const ends = [...reasons].map(reason => ENDS[reason]).join('; ');
      this.say(
        `${integer(read)} tokens read${full}, ${integer(written)} written in ${seconds} s; ${ends}`
      );
    } catch (error) {
      const stopped = error.name === 'AbortError';
      this.say(stopped ? 'stopped' : '', stopped ? '' : error.message);
    }
  }
}

export const columns = [];

export function buildColumns(listeners) {
  for (const model of facts.models) columns.push(new Column(model, listeners));
  document.getElementById('columns').append(...columns.map(column => column.element));
}
