"""The messages of a chat, in OpenAI's format or ShareGPT's, as sources and targets."""
from lib.errors import UserError, require

ROLES = {'system': 'source', 'user': 'source', 'assistant': 'target', 'developer': 'source',
         'human': 'source', 'gpt': 'target'}  # the last two are ShareGPT's
# of an example or a message: what no text of ours can hold
MORE_THAN_TEXT = ('tools', 'tool_calls', 'functions', 'function_call', 'images', 'videos', 'audios',
                  'audio', 'refusal', 'reasoning_content')


class Unusable(UserError):
    """A record in JSON without a source or a target, as large collections have some."""


def check_text_only(record):
    """Raise Unusable if an example or a message has more than text."""
    for key in MORE_THAN_TEXT:
        if isinstance(record, dict) and record.get(key) and record[key] != '[]':
            raise Unusable(f'it has {key}, which cannot become text')


def read_messages(messages):
    """A chat's messages -> [source, target, source, ...]. Consecutive messages of one side are
    joined by a blank line; a system message is part of the source after it. Raises UserError,
    Unusable."""
    parts = []
    for message in messages:
        check_text_only(message)
        match message:
            case {'role': str(role), 'content': content} | {'from': str(role), 'value': content}:
                text = read_content('' if content is None else content)
            case _:
                raise UserError('a message is {"role": text, "content": text}, or {"from": text, '
                                '"value": text}')
        if role not in ROLES:  # tool, function, observation, ...
            raise Unusable(f'role {role!r} is none of {", ".join(ROLES)}')
        if not text.strip():
            raise Unusable(f'the content of a message ({role}) is empty')
        side = int(ROLES[role] == 'target')
        if not parts and side == 1:
            raise Unusable('the first message is the assistant\'s: there is nothing it answers')
        if len(parts) % 2 == side:
            parts.append(text)
        else:
            parts[-1] += '\n\n' + text
    return parts


def read_content(content):
    """The text of a message, which may come in parts. Raises UserError."""
    if isinstance(content, str):
        return content
    require(isinstance(content, list), 'the content of a message is neither a text nor a list of '
                                       'parts')
    texts = []
    for part in content:
        match part:
            case {'type': 'text', 'text': str(text)}:
                texts.append(text)
            case _:
                kind = part.get('type') if isinstance(part, dict) else part
                raise UserError(f'a part of a message ({str(kind)[:40]!r}) is not {{"type": "text",'
                                f' "text": ...}}')
    return ''.join(texts)
