"""Records in JSON: a file of JSON Lines, or one JSON array, perhaps compressed."""
import json

from lib.errors import UserError, first_line
from lib.files import check_characters, parse_json, read_text


def read_records(path):
    """Yield (where, value) for each line that is not blank, or for each item if the whole file is
    an array. where: 'line 3', 'item 3'. Raises UserError that names the file and the place."""
    records, parse = split_records(path)
    for where, record in records:
        try:
            value = parse(record)
        except ValueError as error:
            raise UserError(f'{path} {where}: not JSON: {first_line(error)[:200]}; mend or delete '
                            f'the {where.split()[0]}') from None
        yield where, value


def split_records(path):
    """([(where, JSON)], its parser), or ([(where, value)], its check)"""
    text = read_text(path)
    lines = [(f'line {n}', line) for n, line in enumerate(text.split('\n'), 1) if line.strip()]
    if not text.lstrip().startswith('['):
        return lines, parse_json
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, 'msg', first_line(error))
        if reason == 'Extra data':  # each line is a list
            return lines, parse_json
        raise UserError(f'{path} line {getattr(error, "lineno", 1)}: not JSON: {reason}; mend the '
                        f'line') from None
    items = [array] if is_chat(array) else array
    return [(f'item {n}', item) for n, item in enumerate(items, 1)], check_characters


def is_chat(value):
    """Whether a value is a list of messages."""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(item, dict) and ('role' in item or 'from' in item)
                    for item in value))
