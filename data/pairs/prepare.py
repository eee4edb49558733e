"""Sources and targets: translations, questions and answers, chats, as token bins.

    python data/pairs/prepare.py --input=ita.txt --dataset=en_it    # lines of source TAB target
    python data/pairs/prepare.py --input=chats.jsonl --tokenizer=gpt2 --block_size=1024

JSON is an object per line, or one array of them. Read are {"prompt": ..., "response": ...}, the
pairs of keys in PAIRS, Alpaca's {"instruction": ..., "input": ..., "output": ...}, {"messages":
[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}, such a list alone,
and ShareGPT's {"conversations": [{"from": "human", "value": ...}, ...]}. A chat may begin with a
message of the role system, "history" has earlier turns, [[source, target], ...]; examples with
calls of tools or images are left out. Only targets are learned (mask_prompt).
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import Bound, FilePath, ValFraction, configure
from lib.errors import UserError, plural, require, user_errors

RowSize = Annotated[int, Bound(lambda x: 5 <= x <= 2**20, 'at least 5, at most 2**20')]


@dataclass
class Config:
    input: FilePath = ''  # lines of source TAB target, or JSON, perhaps .gz; -: standard input
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int | None = None  # of bpe; None: 4096, or what a short text has pairs for
    init_from: FilePath = ''  # weights to finetune (a run's folder, a checkpoint): their tokenizer
    dataset: str = 'pairs'  # the bins go to data/<dataset>
    block_size: RowSize = 128  # tokens per row; longer pairs are left out
    packing: bool = True  # several pairs per row, which do not see one another; False: one
    mask_prompt: bool = True  # no loss on sources
    val_fraction: ValFraction = 0.05  # the fraction of sources, by hash, kept for validation


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, given = configure(Config)
        own = {'tokenizer', 'vocab_size'} & given.keys() if config.init_from else ()
        require(not own, f'init_from = {config.init_from!r} brings its tokenizer: leave out '
                         f'{", ".join(sorted(own))}')

from lib.bpe import make_tokenizer
from lib.files import command, open_text, printable
from lib.messages import Unusable, check_text_only, read_messages
from lib.records import read_records
from lib.text import regular_file
from lib.write import dataset_folder
from lib.write_pairs import write_pairs

PAIRS = (('prompt', 'response'), ('prompt', 'completion'), ('question', 'answer'),
         ('input', 'output'))


def read_documents(path, left_out=None):
    """Yield (where, [source, target, source, target, ...]) for each line that is not blank, or each
    item of a JSON array; where: 'line 3', 'item 3'. Unusable records are added to the list
    left_out. Raises UserError that names file and place."""
    records, read_record = read_lines(path), read_tsv
    if is_json(path):
        records, read_record = read_records(path), read_example
    for where, record in records:
        try:
            parts = [part.strip() for part in read_record(record)]
        except Unusable as error:
            if left_out is not None:
                left_out.append(f'{where}: {error}')
            continue
        except UserError as error:
            raise UserError(f'{path} {where}: {error}; mend or delete the '
                            f'{where.split()[0]}') from None
        yield where, parts


def is_json(path):
    """By its name, or because it begins with an object or an array and no tab follows."""
    with open_text(path) as file:
        first = next(filter(None, map(str.strip, file)), '')
    named = path.name.lower().removesuffix('.gz').endswith(('.jsonl', '.json'))
    return named or first[:1] in ('{', '[') and '\t' not in first


def read_lines(path):
    with open_text(path) as file:
        lines = [(f'line {n}', line) for n, line in enumerate(file, 1) if line.strip()]
    yield from lines


def read_tsv(line):
    """[source, target]; further columns (of licences, say) are ignored."""
    columns = line.split('\t')
    require(len(columns) > 1, 'there is no tab between a source and a target')
    require(all(column.strip() for column in columns[:2]), 'a side is empty')
    return columns[:2]


def read_example(example):
    """[source, target, ...] of a record in JSON. Raises UserError, Unusable."""
    check_text_only(example)
    keys = example if isinstance(example, dict) else {}
    history = keys.get('history') or []
    require(isinstance(history, list) and all(isinstance(turn, list) and [*map(type, turn)] ==
                                              [str, str] for turn in history),
            'history is not a list of pairs of texts')
    parts = [*itertools.chain(*history), *read_sides(example)]
    for key in ('context', 'system'):  # they come before the first source
        before = keys.get(key)
        if isinstance(before, str) and before.strip():
            parts = [f'{before}\n\n{parts[0]}', *parts[1:]]
    if not all(part.strip() for part in parts):
        raise Unusable('a side is empty')
    return parts


def read_sides(example):
    """The same without context and system."""
    match example:
        case list(messages) | {'messages': list(messages)} | {'conversations': list(messages)}:
            parts = read_messages(messages)
            if not parts or len(parts) % 2:
                raise Unusable('the last message is not the assistant\'s')
            return parts
        case {'instruction': str(instruction), 'output': str(output)}:  # Alpaca
            details = example.get('input') or ''
            require(isinstance(details, str), 'input is not a text')
            return ['\n\n'.join(filter(str.strip, (instruction, details))), output]
        case dict():
            for keys in PAIRS:
                sides = [example.get(key) for key in keys]
                if all(isinstance(side, str) for side in sides):
                    return sides
    pairs = ', '.join(f'"{source}" and "{target}"' for source, target in PAIRS)
    raise UserError(f'give an object with texts under {pairs}, or "instruction" and "output", or '
                    f'with a list "messages" or "conversations"')


def pick_tokenizer(config, path):
    if not config.init_from:
        texts = lambda: (part for _, parts in read_documents(path) for part in parts)  # noqa: E731
        return make_tokenizer(config.tokenizer, texts, config.vocab_size, end_of_text=True)
    from checkpoint import load  # imports torch

    tokenizer = load(config.init_from, mmap=True).get_tokenizer()
    require(tokenizer.eot is not None,
            f'init_from = {config.init_from!r}: its tokenizer ({tokenizer.kind}) has no '
            f'<|endoftext|>, which separates sources from targets: take weights that were trained '
            f'with bpe or gpt2')
    return tokenizer


def main(config):
    require(config.input, 'name your pairs: python data/pairs/prepare.py --input=FILE, '
                          'lines of source TAB target, or JSON')
    dataset_folder(config.dataset)
    with regular_file(config.input) as path:
        prepare(config, path)


def prepare(config, path):
    left_out = []
    documents = list(read_documents(path, left_out))  # report bad lines before writing anything
    reasons = '; '.join(left_out[:3]) + '; ...' * (len(left_out) > 3)
    require(documents, f'{config.input}: there is no pair in it{reasons and f" ({reasons})"}')
    if left_out:
        print(f'left out: {len(left_out):,} of {plural(len(documents) + len(left_out), "example")} '
              f'({reasons})')
    write_pairs(documents, pick_tokenizer(config, path), printable(config.input), config.dataset,
                config.block_size, config.packing, config.mask_prompt, config.val_fraction)
    if not config.init_from:
        name = 'quickstart' if is_json(path) else 'translate_en_it'
        if config.tokenizer == 'gpt2':
            name = 'finetune_chat'
        flags = {} if config.block_size == Config.block_size else {'block_size': config.block_size}
        print('next:', command('train.py', f'config/{name}.py', dataset=config.dataset,
                               out_dir=f'out-{config.dataset}', **flags))


if __name__ == '__main__':
    with user_errors():
        main(config)
