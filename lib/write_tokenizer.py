"""Tokenizers for other programs: tokenizer.json of Hugging Face's package tokenizers, merges of a
BPE, a chat template."""
from lib.errors import require
from lib.tokenizer import (
    CHARACTERS,
    DIGITS_PATTERN,
    END_OF_TEXT,
    GPT2_PATTERN,
    bpe_merges,
    printable_bytes,
    read_pattern,
)

BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
              'use_regex': False}
DIGITS = {'type': 'Digits', 'individual_digits': True}
# Jinja: the ids of lib.tokenizer.encode_turns, with the rules of data/pairs/prepare.py. A
# generation prompt adds nothing: a target begins after the <|endoftext|> that ends its source. In a
# message we read <|endoftext|> as plain text; a template cannot say so and refuses it.
CHAT_TEMPLATE = """
{%- set end = '<|endoftext|>' %}
{%- set ns = namespace(side='', part='') %}
{{- end }}
{%- for message in messages %}
    {%- set text = message['content'] %}
    {%- if text is not string %}
        {%- set texts = namespace(joined='') %}
        {%- for piece in text or [] %}
            {%- if piece['type'] != 'text' %}
                {{- raise_exception('a part of a message is not text: ' ~ piece['type']) }}
            {%- endif %}
            {%- set texts.joined = texts.joined ~ piece['text'] %}
        {%- endfor %}
        {%- set text = texts.joined %}
    {%- endif %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' ~ message['role']) }}
    {%- elif message.get('tool_calls') %}
        {{- raise_exception('tool_calls cannot become text') }}
    {%- elif not text | trim %}
        {{- raise_exception('the content of a message is empty') }}
    {%- elif end in text %}
        {{- raise_exception(end ~ ' in a message would end it') }}
    {%- endif %}
    {%- set side = 'target' if message['role'] == 'assistant' else 'source' %}
    {%- if not ns.side and side == 'target' %}
        {{- raise_exception('the first message is the assistant\\'s') }}
    {%- elif side == ns.side %}
        {%- set ns.part = ns.part ~ '\\n\\n' ~ text %}
    {%- else %}
        {%- if ns.side %}
            {{- ns.part | trim ~ end }}
        {%- endif %}
        {%- set ns.side = side %}
        {%- set ns.part = text %}
    {%- endif %}
{%- endfor %}
{{- ns.part | trim ~ end }}
""".strip()


def tokenizer_files(tokenizer, block_size, turns):
    """{name: content} of the JSON files from which transformers' AutoTokenizer makes a tokenizer
    with the same ids: tokenizer.json, tokenizer_config.json. {} for one of kind ids, which has
    no rule for text. turns > 0: with a chat template (lib/pairs.py). Raises UserError."""
    if tokenizer.kind == 'ids':
        return {}
    special = sorted(tokenizer.special.items(), key=lambda item: item[1])
    saved = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [
            {'id': id_, 'content': text, 'single_word': False, 'lstrip': False, 'rstrip': False,
             'normalized': False, 'special': True} for text, id_ in special],
        'normalizer': None,
        'post_processor': None,
    }
    saved |= by_character(tokenizer) if tokenizer.kind == 'char' else by_byte(tokenizer)
    vocabulary = saved['model']['vocab']
    for text, id_ in special:  # without an id in the vocabulary they would get the next one
        require(text not in vocabulary, f'the tokenizer has two tokens {text!r}')
        vocabulary[text] = id_
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'model_input_names': ['input_ids', 'attention_mask'],
        'clean_up_tokenization_spaces': False,
    }
    if tokenizer.eot is not None:
        config |= dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), END_OF_TEXT)
    if turns:
        config['chat_template'] = CHAT_TEMPLATE
    return {'tokenizer.json': saved, 'tokenizer_config.json': config}


def by_character(tokenizer):
    """The parts of tokenizer.json for a CharTokenizer. Another character is an error there too:
    unk_token is no token."""
    vocabulary = {c: id_ for id_, c in enumerate(tokenizer.characters)}
    return {
        'pre_tokenizer': CHARACTERS,
        'decoder': {'type': 'Fuse'},
        'model': {'type': 'WordLevel', 'vocab': vocabulary, 'unk_token': '<unk>'},
    }


def by_byte(tokenizer):
    """The parts of tokenizer.json for a ByteTokenizer or a BPETokenizer: byte-level BPE."""
    text_of = {byte: c for c, byte in printable_bytes().items()}

    def printable(token):
        return ''.join(text_of[byte] for byte in token)

    if tokenizer.kind == 'byte':
        split, merges, normalizer = BYTE_LEVEL, [], None
        vocabulary = {printable(bytes([byte])): byte for byte in range(256)}
    else:
        split, normalizer = split_rule(tokenizer.pattern), tokenizer.normalizer
        merges = [[printable(left), printable(right)]
                  for left, right in bpe_merges(tokenizer.tokens)]
        vocabulary = {printable(token): id_ for token, id_ in zip(tokenizer.tokens, tokenizer.ids)}
        for text, id_ in tokenizer.unused.items():
            require(text not in vocabulary, f'the tokenizer has two tokens {text!r}')
            vocabulary[text] = id_
    return {
        'normalizer': normalizer and {'type': normalizer},
        'pre_tokenizer': split,
        'decoder': BYTE_LEVEL,
        'model': {'type': 'BPE', 'vocab': vocabulary, 'merges': merges},
    }


def split_rule(pattern):
    """The inverse of lib.tokenizer.read_pattern. Raises UserError."""
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL | {'use_regex': True}
    if pattern == DIGITS_PATTERN:
        return {'type': 'Sequence', 'pretokenizers': [DIGITS, BYTE_LEVEL | {'use_regex': True}]}
    rule = {'type': 'Sequence', 'pretokenizers': [
        CHARACTERS | {'pattern': {'Regex': pattern}}, BYTE_LEVEL]}
    read_pattern(rule)  # no pattern that other programs might read in another way
    return rule
