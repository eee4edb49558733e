"""Records in JSON: a file of JSON Lines, or one JSON array, perhaps compressed."""
import json

from lib.errors import UserError, first_line
from lib.files import parse_json, read_text


def read_records(path):
    """Yield (where, value) for each line that is not blank, or for each item if the whole file is
    an array. where: 'line 3', 'item 3'. Raises UserError that names the file and the place."""
    for where, text in split_records(path):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise UserError(f'{path} {where}: not JSON: {first_line(error)[:200]}; mend or delete '
                            f'the {where.split()[0]}') from None
        yield where, value


def split_records(path):
    """[(where, its JSON)]"""
    text = read_text(path)
    lines = [(f'line {n}', line) for n, line in enumerate(text.split('\n'), 1) if line.strip()]
    if not text.lstrip().startswith('['):
        return lines
    try:
        array = json.loads(text)
        items = [(f'item {n}', json.dumps(item)) for n, item in enumerate(array, 1)]
    except (ValueError, RecursionError) as error:
        reason = getattr(error, 'msg', first_line(error))
        if reason == 'Extra data':  # each line is a list
            return lines
        raise UserError(f'{path} line {getattr(error, "lineno", 1)}: not JSON: {reason}; mend the '
                        f'line') from None
    return [('line 1', text)] if is_chat(array) else items


def is_chat(value):
    """Whether a value is a list of messages."""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(item, dict) and ('role' in item or 'from' in item)
                    for item in value))
