// lib/tokenizer.py in JavaScript: text to token ids, for characters, bytes, ids and BPE.

export const END_OF_TEXT = '<|endoftext|>';
// Unicode's White_Space, which \s means to tiktoken; JavaScript's \s differs at U+0085 and U+FEFF
const SPACE = '\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000';
// what Python's str.strip removes
const BLANK = `[${SPACE}\\x1c-\\x1f]`;
const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const CASELESS = "'(?:[sS\u017f]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])";

/** A pattern of tiktoken as a RegExp. */
function toRegExp(pattern) {
  let source = '';
  let isInClass = false;
  const plain = pattern.replace(CONTRACTIONS, CASELESS).replaceAll('++', '+');
  for (const part of plain.match(/\\.|[^]/gu) ?? []) {
    if (part === '[') isInClass = true;
    if (part === ']') isInClass = false;
    if (part === '\\s') source += isInClass ? SPACE : `[${SPACE}]`;
    else if (part === '\\S') source += `[^${SPACE}]`;
    else source += part;
  }
  return new RegExp(source, 'gu');
}

const utf8 = new TextEncoder();
const toUtf8 = text => Array.from(utf8.encode(text), byte => String.fromCharCode(byte)).join('');
const escaped = text => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

/** A tokenizer from its to_dict(): encode and decode. Tokens are strings of bytes. */
export class PageTokenizer {
  constructor(saved) {
    this.kind = saved.kind;
    this.tokens = []; // id -> bytes
    if (saved.kind === 'char') {
      this.tokens = [...saved.characters].map(toUtf8);
      this.idOf = new Map([...saved.characters].map((character, id) => [character, id]));
    } else if (saved.kind === 'byte') {
      this.tokens = Array.from({length: 256}, (_, byte) => String.fromCharCode(byte));
    } else if (saved.kind === 'ids') {
      this.tokens = saved.names.map((name, i) => toUtf8(name ?? ` ${i}`));
    } else this.readBpe(saved);
    this.readSpecial(saved);
  }

  readBpe({pattern, tokens, ids, unused, normalizer}) {
    const bytes = tokens.map(atob);
    this.pattern = toRegExp(pattern);
    this.normalizer = normalizer;
    this.ranks = new Map(bytes.map((token, rank) => [token, rank]));
    this.ids = ids ?? bytes.map((_, rank) => rank);
    this.words = new Map(); // word -> ids
    bytes.forEach((token, rank) => (this.tokens[this.ids[rank]] = token));
    for (const [text, id] of Object.entries(unused ?? {})) this.tokens[id] = toUtf8(text);
  }

  readSpecial({special, end_of_text: endOfText, tokens}) {
    const added = endOfText || tokens ? {[END_OF_TEXT]: tokens?.length ?? this.tokens.length} : {};
    this.special = special ?? added;
    for (const [text, id] of Object.entries(this.special)) this.tokens[id] = toUtf8(text);
    const longestFirst = Object.keys(this.special).sort((a, b) => b.length - a.length);
    this.findSpecial = new RegExp(`(${longestFirst.map(escaped).join('|')})`, 'u');
    this.eot = this.special[END_OF_TEXT] ?? null;
  }

  /** Ids of a text in which special tokens are recognized. Throws an Error with one sentence. */
  encode(text) {
    if (!Object.keys(this.special).length) return this.encodeOrdinary(text);
    return text
      .split(this.findSpecial)
      .flatMap((part, i) => (i % 2 ? [this.special[part]] : this.encodeOrdinary(part)));
  }

  /** Ids of a prompt, as encode_prompt: an empty one is <|endoftext|>. */
  encodePrompt(text) {
    const ids = this.encode(text);
    if (ids.length) return ids;
    if (this.eot === null) throw new Error('Type at least one character.');
    return [this.eot];
  }

  /** Ids of [source, target, source, ...], as encode_turns. */
  encodeTurns(texts) {
    const ends = new RegExp(`^${BLANK}+|${BLANK}+$`, 'gu');
    const parts = texts.map(text => text.replace(ends, ''));
    if (parts.some(part => !part)) throw new Error('Type a source.');
    return [this.eot, ...parts.flatMap(part => [...this.encodeOrdinary(part), this.eot])];
  }

  encodeOrdinary(text) {
    if (/\p{Surrogate}/u.test(text)) throw new Error('This is not UTF-8 text.');
    if (this.kind === 'char') return this.encodeCharacters(text);
    if (this.kind === 'byte') return [...utf8.encode(text)];
    if (this.kind === 'ids') return this.encodeIds(text);
    const normal = this.normalizer ? text.normalize(this.normalizer) : text;
    return (normal.match(this.pattern) ?? []).flatMap(word => this.encodeWord(word));
  }

  encodeCharacters(text) {
    const characters = [...text];
    const unknown = new Set(characters.filter(character => !this.idOf.has(character)));
    if (unknown.size) {
      const list = Array.from(unknown, character => JSON.stringify(character)).join(', ');
      const noun = unknown.size > 1 ? 'characters' : 'character';
      throw new Error(`This model does not know the ${noun} ${list}.`);
    }
    return characters.map(character => this.idOf.get(character));
  }

  encodeIds(text) {
    return text
      .split(new RegExp(`${BLANK}+`, 'u'))
      .filter(Boolean)
      .map(word => {
        if (/^[0-9]+$/.test(word) && Number(word) < this.tokens.length) return Number(word);
        throw new Error(`This model knows token ids from 0 to ${this.tokens.length - 1} only.`);
      });
  }

  /** Byte-pair encoding: merge the pair whose token has the lowest rank until none is left. */
  encodeWord(word) {
    const known = this.words.get(word);
    if (known) return known;
    const parts = [...toUtf8(word)];
    const rankAt = i => this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.slice(1).map((_, i) => rankAt(i)); // of each pair
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) break; // also: one part is left
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      for (const i of [best - 1, best]) if (i in ranks) ranks[i] = rankAt(i);
    }
    const ids = parts.map(part => this.ids[this.ranks.get(part)]);
    if (this.words.size < 10_000) this.words.set(word, ids);
    return ids;
  }

  /** Text; bytes that are not UTF-8 become U+FFFD. */
  decode(ids) {
    const bytes = ids.map(id => this.tokens[id] ?? '').join('');
    const decoder = new TextDecoder('utf-8', {ignoreBOM: true});
    return decoder.decode(Uint8Array.from(bytes, byte => byte.charCodeAt(0)));
  }
}
