"""The page and the API of sample.py --serve.

The API is OpenAI's: /v1/completions, /v1/chat/completions and /v1/models. What a request leaves out
is as on the command line, but n is 1 and seed is random. Beyond OpenAI's, a request may have top_k,
min_p, repetition_penalty, and truncation = auto, which drops what does not fit, as sample.py does.
What we cannot honor is refused.
"""
import contextlib
import json
import math
import os
import secrets
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

from configurator import Bound, Count, check_type, key_types, nearest
from lib.errors import UserError, first_line, require, restate, shorten
from lib.files import parse_json
from lib.generation import require_drawn
from lib.memory import device_memory, require_sampling_fits
from lib.messages import read_messages
from lib.page import DATA, page_template
from lib.sampling import batches, check_options, generate_samples, recent_turns
from lib.serve import error_json, serve
from lib.tokenizer import encode_prompt, encode_turns

MAX_TEXTS = 128  # of a request: the others wait while one of its steps runs
MAX_STOPS, MAX_STOP = 16, 1000  # stop texts, and the characters of each
Texts = Annotated[int, Bound(lambda x: 1 <= x <= MAX_TEXTS, f'1 to {MAX_TEXTS}')]
Alternatives = Annotated[int, Bound(lambda x: 0 <= x <= 20, '0 to 20')]

SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed', 'stop')
OPTIONS = {'n': 'num_samples', 'max_tokens': 'max_new_tokens',
           'max_completion_tokens': 'max_new_tokens'} | {key: key for key in SAMPLING}
TYPES = {'model': str, 'stream': bool, 'n': Texts, 'max_tokens': Count,
         'max_completion_tokens': Count, 'logprobs': Alternatives,
         'truncation': Literal['auto', 'disabled']}
CHAT_TYPES = TYPES | {'logprobs': bool, 'top_logprobs': Alternatives}
# parameters that change no text, and those that do not with this value
HARMLESS = ('user', 'metadata', 'service_tier', 'safety_identifier', 'prompt_cache_key')
NEUTRAL = {'best_of': 1, 'echo': False, 'frequency_penalty': 0, 'presence_penalty': 0, 'suffix': '',
           'logit_bias': {}, 'response_format': {'type': 'text'}, 'store': False, 'tools': []}


class NotFound(UserError):
    status, code = 404, 'model_not_found'


class TooLong(UserError):
    code = 'context_length_exceeded'


class Piece(NamedTuple):
    """What a step adds to a text."""
    index: int  # of the text
    text: str  # lags behind the tokens at half a character or at what may become a stop text
    token: tuple | None  # (id, log-probability, [(id, log-probability) of the most likely ones])
    finish_reason: str | None


class Request:
    """What a client asks for, and the bytes that answer it."""

    def __init__(self, models, defaults, body, is_chat):
        """models: {name: (model, tokenizer)}; defaults: sample.py's config; body: bytes of JSON.
        Raises UserError."""
        try:
            sent = parse_json(body.decode('utf-8'))
        except ValueError as error:
            raise UserError(f'the body is not JSON: {first_line(error)}') from None
        require(isinstance(sent, dict), 'the body is not a JSON object')
        prompt = sent.pop('messages' if is_chat else 'prompt', None)
        stream_options = sent.pop('stream_options', None) or {}
        given = read_parameters(sent, type(defaults), is_chat)
        self.name = given.get('model', next(iter(models)))
        if self.name not in models:
            raise NotFound(f'model = {shorten(self.name)}: there is {" and ".join(models)}')
        self.model, self.tokenizer = models[self.name]
        self.is_chat, self.is_stream = is_chat, given.get('stream', False)
        self.counts_tokens = stream_options == {'include_usage': True}  # at the end of a stream
        require(self.counts_tokens and self.is_stream
                or stream_options in ({}, {'include_usage': False}),
                f'stream_options = {shorten(stream_options)}: give include_usage and stream = true')
        self.n_top = given.get('logprobs')  # most likely tokens at each; None: no probabilities
        if is_chat:
            require(self.n_top or 'top_logprobs' not in given, 'top_logprobs needs logprobs = true')
            self.n_top = given.get('top_logprobs', 0) if self.n_top else None
        options = {OPTIONS[key]: value for key, value in given.items() if key in OPTIONS}
        fresh = {'num_samples': 1, 'seed': secrets.randbelow(2**31)}
        self.config = replace(defaults, **fresh | options)
        stop = self.config.stop
        require('' not in stop, 'stop: an empty text matches at once')
        require(len(stop) <= MAX_STOPS and all(len(str(text)) <= MAX_STOP for text in stop),
                f'stop: give at most {MAX_STOPS} texts of at most {MAX_STOP:,} characters')
        check_options(self.model, self.tokenizer, self.config)
        read = self.read_chat if is_chat else self.read_prompts
        self.prompts = read(prompt, cuts=given.get('truncation') == 'auto')  # lists of ids
        n, longest = len(self.prompts) * self.config.num_samples, max(map(len, self.prompts))
        require(n <= MAX_TEXTS, f'{n} texts: at most {MAX_TEXTS} at a time; lower n')
        size = self.model.config.block_size - (self.model.config.turns > 0)
        if longest > size:
            raise TooLong(f'the prompt has {longest} tokens: at most {size} fit')
        self.bytes = require_sampling_fits(self.model, n, longest, self.config.max_new_tokens)
        self.head = {'object': 'text_completion', 'id': f'cmpl-{secrets.token_hex(12)}',
                     'created': int(time.time()), 'model': self.name}
        if is_chat:
            self.head |= {'object': 'chat.completion' + '.chunk' * self.is_stream,
                          'id': f'chat{self.head["id"]}'}

    def read_prompts(self, prompt, cuts):
        """Lists of ids of a text, of ids, or of a list of either."""
        prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
        require(prompts and isinstance(prompts, list), 'prompt: give a text or a list of texts')
        return [self.encode(prompt, cuts) for prompt in prompts]

    def encode(self, prompt, cuts):
        """The ids of a text, or ids."""
        n, config = self.tokenizer.vocab_size, self.model.config
        if isinstance(prompt, str) and config.turns:
            return encode_turns([prompt], self.tokenizer, 'prompt')
        if isinstance(prompt, str):
            prompt = encode_prompt(prompt, self.tokenizer, 'prompt')
        require(is_ids(prompt) and all(0 <= id_ < n for id_ in prompt),
                f'prompt: give texts, or ids below {n}')
        return prompt[-config.block_size:] if cuts and not config.turns else prompt

    def read_chat(self, messages, cuts):
        """[ids of a chat]"""
        turns = self.model.config.turns
        require(turns, f'{self.name} was trained on plain text, not on chats: use /v1/completions')
        with restate(UserError, 'messages'):
            require(isinstance(messages, list), 'give a list')
            parts = read_messages(messages)
            require(len(parts) % 2, 'the last one must be the user\'s')
        require(cuts or len(parts) < 2 * turns,
                f'messages has {len(parts) // 2 + 1} turns, at most {turns} in training: leave out '
                f'the first ones, or give truncation = auto')
        if not cuts:
            return [encode_turns(parts, self.tokenizer, 'messages')]
        _, ids = recent_turns(parts[:-1], parts[-1], self.model, self.tokenizer, self.config)
        return [ids]

    def generate(self):
        """Yield the Pieces of each step, a list."""
        first = 0
        for prompts in batches(self.prompts, self.model, self.config):
            samples, steps = generate_samples(self.model, self.tokenizer, prompts, self.config,
                                              with_logits=True)
            for next_token, logits in steps:
                try:
                    require_drawn(next_token.tolist())
                except UserError as error:  # the weights are to blame, not the request
                    error.status = 500
                    raise
                tokens = with_logprobs(next_token, logits, self.n_top)
                growing = [i for i, sample in enumerate(samples) if not sample.ended]
                yield [Piece(first + i, samples[i].add(tokens[i][0]), tokens[i],
                             'stop' if samples[i].ended else None) for i in growing]
                if all(sample.ended for sample in samples):
                    break
            yield [Piece(first + i, sample.finish(), None, 'length')
                   for i, sample in enumerate(samples) if not sample.ended]
            first += len(samples)

    def complete(self, steps):
        """Yield b'' at each step, then the answer. steps: of generate()"""
        texts = defaultdict(list)
        for pieces in steps:
            for piece in pieces:
                texts[piece.index].append(piece)
            yield b''
        choices = [self.choice(texts[i], 'message') for i in sorted(texts)]
        n_tokens = sum(piece.token is not None for text in texts.values() for piece in text)
        yield to_json(self.head | {'choices': choices, 'usage': self.usage(n_tokens)})

    def stream(self, steps):
        """Yield the answer as server-sent events."""
        begun, n_tokens = set(), 0
        try:
            for pieces in steps:
                choices = []
                for piece in pieces:
                    n_tokens += piece.token is not None
                    if piece.text or piece.finish_reason or self.n_top is not None:
                        choices.append(self.choice([piece], 'delta', piece.index not in begun))
                        begun.add(piece.index)
                yield b''.join(event(self.head | {'choices': [new]}) for new in choices)
            if self.counts_tokens:
                yield event(self.head | {'choices': [], 'usage': self.usage(n_tokens)})
            yield b'data: [DONE]\n\n'
        except UserError as error:
            if not begun:
                raise
            yield event(error_json(str(error), 500))

    def choice(self, pieces, part, is_first=True):
        """Pieces of one text. part: of a chat: message or delta."""
        text, tokens = ''.join(piece.text for piece in pieces), [p.token for p in pieces if p.token]
        found = {'index': pieces[-1].index, 'finish_reason': pieces[-1].finish_reason,
                 'logprobs': None}
        if self.is_chat:
            found[part] = ({'role': 'assistant'} if is_first else {}) | {'content': text}
        else:
            found['text'] = text
        if self.n_top is not None and tokens:
            found['logprobs'] = self.logprobs(tokens)
        return found

    def logprobs(self, tokens):
        def entry(id_, logprob):
            data = self.tokenizer.decode_bytes([id_])
            try:
                text = data.decode('utf-8')
            except UnicodeDecodeError:  # not whole characters: in OpenAI's way
                text = 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)
            return {'token': text, 'logprob': logprob, 'bytes': list(data)}

        entries = [entry(id_, logprob) | {'top_logprobs': [entry(*other) for other in top]}
                   for id_, logprob, top in tokens]
        if self.is_chat:
            return {'content': entries}
        return {'tokens': [entry['token'] for entry in entries],
                'token_logprobs': [entry['logprob'] for entry in entries],
                'top_logprobs': [{other['token']: other['logprob']
                                  for other in entry['top_logprobs']} for entry in entries]}

    def usage(self, n_tokens):
        n_read = sum(map(len, self.prompts))
        return {'prompt_tokens': n_read, 'completion_tokens': n_tokens,
                'total_tokens': n_read + n_tokens}


def read_parameters(sent, config_type, is_chat):
    """{parameter: value}, those that we honor. Raises UserError at others that would matter."""
    types = (CHAT_TYPES if is_chat else TYPES) | {
        key: key_types(config_type)[key] for key in SAMPLING}
    given = {}
    for key, value in sent.items():
        if key in types and (value is not None or key in ('top_k', 'top_p', 'min_p')):  # None: off
            given[key] = check_type(key, value, types[key])
        elif value not in (None, NEUTRAL.get(key)) and key not in HARMLESS:
            raise UserError(f'{key} = {shorten(value)} is not supported: leave it out'
                            f'{nearest(key, types, otherwise="")}')
    return given


def is_ids(value):
    return isinstance(value, list) and value and all(type(id_) is int for id_ in value)


def with_logprobs(tokens, logits, n_top):
    """[(id, log-probability, [(id, log-probability), ...]), ...] of tokens (B,): as the model gives
    them, before temperature and filters. n_top: most likely ones of each; None: only ids."""
    if n_top is None:
        return [(id_, None, []) for id_ in tokens.tolist()]
    logprobs = logits.float().log_softmax(-1).clamp(min=-9999)  # JSON has no infinity
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
    top = logprobs.topk(min(n_top, logprobs.size(1)))
    top = [list(zip(*row)) for row in zip(top.indices.tolist(), top.values.tolist())]
    return list(zip(tokens.tolist(), chosen, top))


def to_json(value):
    return json.dumps(value).encode()


def event(value):
    return b'data: ' + to_json(value) + b'\n\n'


class Playground:
    """Answers requests. The steps of the models run in one thread, in the order in which they are
    asked for: requests take turns, and one whose client has gone asks no more."""

    def __init__(self, models, page, config):
        self.models, self.page, self.config = models, page, config
        self.worker = ThreadPoolExecutor(1)
        self.created = int(time.time())
        self.bytes, self.changed = 0, threading.Condition()  # of the KV caches of all requests

    def answer(self, path, query):
        if path == '/':
            return 200, 'text/html', self.page
        if path == '/v1/models':
            models = [{'id': name, 'object': 'model', 'created': self.created,
                       'owned_by': 'plaingpt'} for name in self.models]
            return 200, 'application/json', to_json({'object': 'list', 'data': models})
        return None

    def answer_message(self, path, body):
        if path not in ('/v1/completions', '/v1/chat/completions'):
            return None
        request = Request(self.models, self.config, body, is_chat='chat' in path)
        steps = self.in_turn(request)
        if request.is_stream:
            return 200, 'text/event-stream', request.stream(steps)
        return 200, 'application/json', request.complete(steps)

    def in_turn(self, request):
        """request.generate(); each step waits for those that other requests asked for first."""
        with self.room(request):
            steps = request.generate()
            while (step := self.worker.submit(next, steps, None).result()) is not None:
                yield step

    @contextlib.contextmanager
    def room(self, request):
        """Wait until its KV cache fits into half of the memory, together with the others'."""
        most = (device_memory(request.model.lm_head.weight.device) or math.inf) / 2
        with self.changed:
            self.changed.wait_for(lambda: self.bytes == 0 or self.bytes + request.bytes <= most)
            self.bytes += request.bytes
        try:
            yield
        finally:
            with self.changed:
                self.bytes -= request.bytes
                self.changed.notify_all()


def serve_playground(server, models, start, config):
    """Serve the page and the API until Ctrl-C or SIGTERM, which end the process.

    models: {name: (model, tokenizer, a line about them)}; start: the first text in the page.
    """
    template, policy = page_template('playground.html', connects=True)
    facts = {'start': start, 'max_tokens': config.max_new_tokens,
             'options': {key: getattr(config, key) for key in SAMPLING},
             'models': [{'name': name, 'about': about, 'turns': model.config.turns,
                         'block_size': model.config.block_size}
                        for name, (model, _, about) in models.items()]}
    text = json.dumps(facts).replace('<', '\\u003c')  # no </script> inside a script
    page = template.replace(DATA, f'<script type="application/json" id="facts">{text}</script>\n')
    playground = Playground({name: (model, tokenizer) for name, (model, tokenizer, _)
                             in models.items()}, page.encode(), config)
    try:
        serve(server, playground.answer, policy, playground.answer_message, at_once=True)
    except (KeyboardInterrupt, SystemExit) as stop:
        # a step may be running: torch's threads can crash a normal exit
        os._exit(getattr(stop, 'code', 130))
