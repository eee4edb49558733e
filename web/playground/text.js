// A generated text whose tokens show their probabilities.

import {afterFrame, clamp, h, hideTip, percent, showTip} from '../core.js';

/** A token among the most likely ones in its place, in lines. */
function describe({text, logprob, top}) {
  const all = [...top.filter(other => other.text !== text), {text, logprob}];
  const line = other => {
    const mark = other.text === text ? '▸' : ' ';
    const chance = percent(Math.exp(other.logprob)).padStart(5);
    return `${mark}${chance} “${other.text.replaceAll('\n', '↵')}”`;
  };
  return all.toSorted((a, b) => b.logprob - a.logprob).map(line).join('\n');
}

export class GeneratedText {
  /** onPick(text): called with what there is to say about the token at the keyboard's place. */
  constructor(label, onPick) {
    this.onPick = onPick;
    this.tokens = new Map(); // span -> its tokens
    this.pending = []; // tokens whose text has not come yet
    this.picked = null;
    this.plain = '';
    this.element = h('div', {
      class: 'generated',
      tabindex: 0,
      role: 'group',
      'aria-label': label,
      onkeydown: event => this.onKey(event),
      onpointerover: event => this.show(event.target),
      onpointerleave: hideTip,
      onclick: event => this.pick(event.target),
      onblur: () => this.pick(null)
    });
  }

  isInSight() {
    return this.element.getBoundingClientRect().bottom < innerHeight;
  }

  reveal() {
    this.element.scrollIntoView({block: 'nearest', behavior: 'instant'});
  }

  add({text, tokens, reason}) {
    this.pending.push(...tokens);
    this.plain += text;
    if (text) this.addSpan({}, text);
    // what ended it is not part of the text
    if (reason && this.pending.length) this.addSpan({class: 'end'}, '■');
  }

  addSpan(attributes, text) {
    const span = h('span', attributes, text);
    this.tokens.set(span, this.pending);
    this.pending = [];
    this.element.append(span);
  }

  /** What there is to say about a span, in lines. */
  textOf(span) {
    return (this.tokens.get(span) ?? []).map(describe).join('\n');
  }

  show(span) {
    const text = this.textOf(span);
    if (!text) return hideTip();
    const {left, bottom} = [...span.getClientRects()].at(-1);
    showTip({clientX: left, clientY: bottom - 8}, text);
  }

  pick(span) {
    this.picked?.classList.remove('picked');
    this.picked = this.tokens.has(span) ? span : null;
    this.picked?.classList.add('picked');
    this.onPick(this.textOf(this.picked).replaceAll('\n', ', '));
    afterFrame(() => this.show(this.picked)); // scrolling hides it
  }

  onKey(event) {
    const spans = [...this.tokens.keys()];
    const place = spans.indexOf(this.picked);
    const places = {
      ArrowLeft: place - 1,
      ArrowRight: place + 1,
      Home: 0,
      End: spans.length - 1
    };
    if (!(event.key in places) || !spans.length) return;
    event.preventDefault();
    const span = spans[clamp(places[event.key], 0, spans.length - 1)];
    span.scrollIntoView({block: 'nearest', behavior: 'instant'});
    this.pick(span);
  }
}
