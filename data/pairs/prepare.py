"""Sources and targets: translations, questions and answers, chats, as token bins.

    python data/pairs/prepare.py --input=ita.txt --dataset=en_it    # lines of source TAB target
    python data/pairs/prepare.py --input=chats.jsonl --tokenizer=gpt2 --block_size=1024

A .jsonl file has an object per line: {"prompt": "...", "response": "..."}, or {"messages":
[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}, perhaps with a
message of the role system first. Only targets are learned (mask_prompt).
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure
from lib.errors import UserError, require, user_errors


@dataclass
class Config:
    input: str = ''  # a UTF-8 file of lines: source TAB target, or JSON if its name ends in .jsonl
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int = 4096  # of bpe
    init_from: str = ''  # weights to finetune (a run's folder, a checkpoint): use their tokenizer
    dataset: str = 'pairs'  # the bins go to data/<dataset>
    block_size: int = 128  # tokens per row; longer pairs are left out
    packing: bool = True  # several pairs per row, which do not see one another; False: one
    mask_prompt: bool = True  # no loss on sources
    val_fraction: float = 0.05  # the fraction of sources, by hash, kept for validation


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)

from lib.bpe import make_tokenizer
from lib.write import dataset_folder
from lib.write_pairs import write_pairs


def read_documents(path):
    """Yield (line number, [source, target, source, target, ...]) for each line that is not blank.

    Raises UserError with the line number.
    """
    read_line = read_json if path.suffix.lower() in ('.jsonl', '.json') else read_tsv
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode('utf-8-sig' if number == 1 else 'utf-8').strip('\r\n')
                if not text.strip():
                    continue
                parts = [part.strip() for part in read_line(text)]
                require(all(parts), 'a side is empty')
                ''.join(parts).encode('utf-8')  # JSON can name half a character
            except UnicodeError:
                raise UserError(f'{path} line {number}: not UTF-8 text; '
                                f'convert the file to UTF-8') from None
            except UserError as error:
                raise UserError(f'{path} line {number}: {error}; '
                                f'mend or delete the line') from None
            yield number, parts


def read_tsv(line):
    """[source, target]; further columns (of licences, say) are ignored."""
    columns = line.split('\t')
    require(len(columns) > 1, 'there is no tab between a source and a target')
    return columns[:2]


def read_json(line):
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'not JSON, one object per line: {error}') from None
    match example:
        case {'prompt': str(prompt), 'response': str(response)}:
            return [prompt, response]
        case {'messages': list(messages)}:
            return read_messages(messages)
    raise UserError('give {"prompt": text, "response": text} or {"messages": [...]}')


def read_messages(messages):
    """A chat's messages -> [source, target, ...]. Consecutive messages of one side are joined by a
    blank line; a system message is part of the source after it."""
    parts = []
    for message in messages:
        match message:
            case {'role': 'system' | 'user' | 'assistant' as role, 'content': str(content)}:
                side = int(role == 'assistant')
            case {'role': role, 'content': str()}:
                raise UserError(f'role {role!r} is none of system, user, assistant')
            case _:
                raise UserError('a message is {"role": text, "content": text}')
        require(content.strip(), f'the content of a message ({role}) is empty')
        require(parts or side == 0,
                'the first message is the assistant\'s: there is nothing that it answers')
        if len(parts) % 2 == side:
            parts.append(content)
        else:
            parts[-1] += '\n\n' + content
    require(parts and len(parts) % 2 == 0, 'the last message is not the assistant\'s')
    return parts


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
                          'lines of source TAB target, or .jsonl')
    dataset_folder(config.dataset)
    require(0 < config.val_fraction < 1,
            f'val_fraction = {config.val_fraction}: give a share between 0 and 1')
    require(config.block_size >= 5,
            f'block_size = {config.block_size}: give at least 5, 3 of which separate a pair')
    path = Path(config.input).expanduser()
    require(path.is_file(), f'--input={config.input}: there is no such file')
    documents = list(read_documents(path))  # report any bad line before anything is written
    require(documents, f'{config.input}: there is no pair in it')
    write_pairs(documents, pick_tokenizer(config, path), config.input, config.dataset,
                config.block_size, config.packing, config.mask_prompt, config.val_fraction)


if __name__ == '__main__':
    with user_errors():
        main(config)
