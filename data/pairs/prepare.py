"""Sources and targets: translations, questions and answers, chats, cut into tokens.

    python data/pairs/prepare.py --input=ita.txt --dataset=en_it    # source TAB target, a pair on each line
    python data/pairs/prepare.py --input=chats.jsonl --tokenizer=gpt2 --block_size=1024 --dataset=chat

A file that ends in .jsonl has an object on each line: {"prompt": "...", "response": "..."}, or {"messages": [{"role": "user",
"content": "..."}, {"role": "assistant", "content": "..."}, ...]} with a message of the role system first, if any. Only what is to
be answered is learnt (mask_prompt).
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import UserError, configure, require, user_errors


@dataclass
class Config:
    input: str = ''  # a UTF-8 file of lines: source TAB target, or, if its name ends in .jsonl, JSON
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int = 4096  # of bpe
    init_from: str = ''  # weights to be finetuned (a run's folder, a checkpoint): their tokenizer is taken instead
    dataset: str = 'pairs'  # the bins go to data/<dataset>
    block_size: int = 128  # tokens in a row; a pair that is longer is left out
    packing: bool = True  # several pairs in a row, which do not see one another; False: one, and the rest is filled up
    mask_prompt: bool = True  # no loss on sources
    val_fraction: float = 0.05  # the share of the sources, chosen by their hash, that is kept for validation


def read_documents(path):
    """(line number, [source, target, source, target, ...]) for each line that is not blank. Raises UserError with its number."""
    read = read_json if path.suffix.lower() in ('.jsonl', '.json') else read_tsv
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode('utf-8-sig' if number == 1 else 'utf-8').strip('\r\n')
                if text.strip():
                    parts = [part.strip() for part in read(text)]
                    require(all(parts), 'a side is empty')
                    ''.join(parts).encode('utf-8')  # JSON can name half a character
                    yield number, parts
            except UnicodeError:
                raise UserError(f'{path} line {number}: not UTF-8 text; convert the file to UTF-8') from None
            except UserError as error:
                raise UserError(f'{path} line {number}: {error}; mend or delete the line') from None


def read_tsv(line):
    """Further columns (of licences, say) are not read."""
    columns = line.split('\t')
    require(len(columns) > 1, 'there is no tab between a source and a target')
    return columns[:2]


def read_json(line):
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'not JSON, of which each line has one object: {error}') from None
    match example:
        case {'prompt': str(prompt), 'response': str(response)}:
            return [prompt, response]
        case {'messages': list(messages)}:
            return read_messages(messages)
    raise UserError('give {"prompt": text, "response": text} or {"messages": [...]}')


def read_messages(messages):
    """A chat's messages -> [source, target, ...]. Messages that follow one another on one side are one, with a blank line between
    them: a system's is part of the source behind it.
    """
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
        require(parts or not side, 'the first message is the assistant\'s: there is nothing that it answers')
        if len(parts) % 2 == side:
            parts.append(content)
        else:
            parts[-1] += '\n\n' + content
    require(parts and len(parts) % 2 == 0, 'the last message is not the assistant\'s')
    return parts


def hash_of(source):
    """A number from 0 to 1 that decides the split: the same sources are in the same one, however the file grows."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8]) / 2**64


def pack(documents, size, packing, n_open=64):
    """Rows of at most `size` ids out of documents (ids, text): each goes where it fills a row best, of the n_open that are begun.
    -> [(ids, text)] for each row
    """
    rows = []  # [ids in it, documents]
    for ids, text in documents:
        fitting = [row for row in rows if row[0] + len(ids) <= size] if packing else []
        row = max(fitting, key=lambda row: row[0], default=None)
        if row is None:
            row = [0, []]
            rows.append(row)
        row[0] += len(ids)
        row[1].append((ids, text))
        if len(rows) > n_open:
            yield rows.pop(max(range(len(rows)), key=lambda i: rows[i][0]))[1]
    for _, documents in rows:
        yield documents


def main(config):
    from data import bins

    require(config.input, 'name your pairs: python data/pairs/prepare.py --input=FILE, lines of source TAB target, or .jsonl')
    bins.own_folder(config.dataset)
    require(0 < config.val_fraction < 1, f'val_fraction = {config.val_fraction}: give a share between 0 and 1')
    require(config.block_size >= 5, f'block_size = {config.block_size}: give at least 5, of which a pair takes 3 for itself')
    path = Path(config.input).expanduser()
    require(path.is_file(), f'--input={config.input}: there is no such file')
    write(lambda: read_documents(path), config)


def write(documents, config):
    """Bins out of documents(), as read_documents gives them. config.input is what they are called."""
    import numpy as np
    from tqdm import tqdm

    from data import bins, tokenizer

    n_documents = sum(1 for _ in documents())  # whatever is wrong with one of them is said before anything else is done
    require(n_documents, f'{config.input}: there is no pair in it')
    if config.init_from:
        from checkpoint import load

        tokens = load(config.init_from, mmap=True).get_tokenizer()
        require(tokens.eot is not None, f'init_from = {config.init_from!r}: its tokenizer ({tokens.kind}) has no <|endoftext|>, '
                                        f'which divides sources from targets: take weights that were trained with bpe or gpt2')
    else:
        tokens = tokenizer.make(config.tokenizer, lambda: (part for _, parts in documents() for part in parts),
                                config.vocab_size, end_of_text=True)
    kept, lengths, left_out, turns = [], [], [], 0
    end = np.array([tokens.eot], dtype=np.uint32)
    for number, parts in tqdm(documents(), total=n_documents, desc='tokenize', unit='pair', delay=1):
        ids = np.concatenate([end, *(ids for part in parts for ids in (tokens.encode_to_numpy(part), end))])
        lengths.append(len(ids))
        if len(ids) > config.block_size:
            left_out.append(number)
            continue
        kept.append((hash_of(parts[0]), ids, ''.join(parts)))
        turns = max(turns, len(parts) // 2)
    median, most, longest = (int(np.quantile(lengths, share, method='higher')) for share in (0.5, 0.95, 1))
    print(f'{n_documents:,} pairs: half of them have up to {median} tokens, 95% up to {most}, the longest has {longest}')
    if left_out:
        lines = ', '.join(map(str, left_out[:10])) + ', ...' * (len(left_out) > 10)
        message = (f'{len(left_out):,} longer than block_size = {config.block_size} left out '
                   f'(line{"s" * (len(left_out) > 1)} {lines}); --block_size={longest} keeps all')
        require(kept, f'{config.input}: no pair is left: {message}')
        print(message)
    boundary = max(config.val_fraction, min(where for where, *_ in kept))  # one source at least
    splits = {'train': [(ids, text) for where, ids, text in kept if where > boundary],
              'val': [(ids, text) for where, ids, text in kept if where <= boundary]}
    require(splits['train'], f'{config.input}: no pair is left to train on, since all have one source; give more of them')

    def pieces():
        for split, pairs in splits.items():
            for row in pack(pairs, config.block_size, config.packing):
                ids = np.full(config.block_size, tokens.eot, dtype=np.uint32)
                whole = np.concatenate([ids for ids, _ in row])
                ids[:len(whole)] = whole
                yield bins.Piece(split, ''.join(text for _, text in row), ids=ids)

    size = sum(len(text.encode('utf-8')) for _, _, text in kept)
    layout = bins.Pairs(config.block_size, turns, config.packing, config.mask_prompt)
    bins.write_dataset(bins.own_folder(config.dataset), pieces(), tokens, config.input, size, pairs=layout)
    print(f'{len(splits["train"]):,} pairs to train on, {len(splits["val"]):,} for validation')


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
