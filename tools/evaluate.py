"""What a checkpoint can do: translate or answer, predict a text, LAMBADA, HellaSwag. Nothing is downloaded.

    python tools/evaluate.py --out_dir=out-translate --num_beams=4 --show=3
    python tools/evaluate.py --init_from=gpt2 --task=text --input=book.txt
    python tools/evaluate.py --init_from=gpt2 --task=lambada --input=lambada_test.jsonl
    python tools/evaluate.py --init_from=gpt2 --task=hellaswag --input=hellaswag_val.jsonl
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from configurator import UserError, configure, require, user_errors


@dataclass
class Config:
    # model
    init_from: str = 'resume'  # resume (from out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to weights
    out_dir: str = 'out'  # the folder of a run
    average_last: int = 1  # the mean weights of so many of its last checkpoints (2017: 5)
    # task
    task: Literal['auto', 'pairs', 'text', 'lambada', 'hellaswag'] = 'auto'  # auto: pairs if it was trained on them, else text
    input: str = ''  # the file of lambada or hellaswag, or a text; of pairs and text otherwise the val split of --dataset
    dataset: str = ''  # a folder in data/, or a path; empty: the one that the run was trained on
    limit: int | None = None  # examples, from the first on; None: all
    show: int = 0  # so many sources with their targets and answers are printed
    # answers
    num_beams: int = 1  # of beam search; 1: greedy
    length_penalty: float = 0.6  # as in sample.py
    # system
    batch_size: int = 32  # examples at a time
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 where it is native


def check(config):
    for key in ('batch_size', 'num_beams', 'average_last'):
        require(getattr(config, key) >= 1, f'{key} = {getattr(config, key)}: give at least 1')
    require(config.limit is None or config.limit >= 1, f'limit = {config.limit}: give at least 1, or None')
    require(config.show >= 0, f'show = {config.show}: give 0 or more')
    require(config.input or config.task not in ('lambada', 'hellaswag'), f'task = {config.task}: name its file with --input=PATH')
    require(not config.input or config.task != 'pairs', 'task = pairs reads a data set: prepare the file with '
                                                        'data/pairs/prepare.py, and name it with --dataset=NAME')
    require(not config.input or Path(config.input).is_file(), f'input = {config.input!r}: there is no such file')


if __name__ == '__main__':
    with user_errors():
        config, _ = configure(Config)
        check(config)

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint as ckpt
import train
from data import bins
from data.tokenizer import encode_turns
from device import pick_device, pick_dtype
from model import KVCache
from processes import Signals

# Sources and targets ------------------------------------------------------------------------------------------------------

def read_turns(split, tokenizer):
    """[([source], its target)] of a split, in chats ([source, target, ..., source], its target)."""
    documents = [document for number in range(split.n_windows) for document in split.documents(number)]
    texts = [[tokenizer.decode(ids) for ids in document] for document in documents]
    return [(text[:i], text[i]) for text in texts for i in range(1, len(text), 2)]


def write_targets(model, tokenizer, turns, config):
    """What the model answers to each turn: greedily, or by beam search."""
    prompts, answers = [encode_turns(source, tokenizer) for source, _ in turns], [''] * len(turns)
    block_size, eot, bar = model.config.block_size, tokenizer.eot, tqdm(total=len(turns), disable=None)
    waiting = sorted(range(len(turns)), key=lambda i: -len(prompts[i]))
    while waiting:
        which, waiting = waiting[:config.batch_size], waiting[config.batch_size:]
        rows = [prompts[i] for i in which]
        room = block_size - len(rows[0])
        require(room > 0, f'a source has {len(rows[0])} tokens: there is no room for a target in block_size = {block_size}')
        if config.num_beams > 1:
            found = model.beam_search(rows, room, config.num_beams, config.length_penalty, stop_tokens=[eot],
                                      vocab_size=tokenizer.vocab_size)
            found = [[ids for ids, _ in results] for results in found]
        else:
            found = model.generate(rows, room, temperature=0, stop_tokens=[eot], vocab_size=tokenizer.vocab_size)
            found = [[row[len(prompt):]] for row, prompt in zip(found, rows)]
        # the longest prompt of a batch ends what all of them write: those that had more room go on in the next one
        cut = [i for i, ids in zip(which, found) if len(prompts[i]) < len(rows[0]) and any(eot not in new for new in ids)]
        waiting = cut + waiting
        for i, ids in zip(which, found):
            answers[i] = tokenizer.decode([id_ for id_ in ids[0] if id_ != eot])
        bar.update(len(which) - len(cut))
    bar.close()
    return answers


def evaluate_pairs(model, tokenizer, split, config):
    turns = read_turns(split, tokenizer)[:config.limit]
    answers = write_targets(model, tokenizer, turns, config)
    targets = [target for _, target in turns]
    for (source, target), answer in list(zip(turns, answers))[:config.show]:
        print(f'source: {" | ".join(source)}\ntarget: {target}\nanswer: {answer}\n')
    exact = sum(answer.strip() == target.strip() for answer, target in zip(answers, targets)) / len(targets)
    line = f'{len(targets):,} targets, beam {config.num_beams}: exact match {exact:.2%}'
    try:
        import sacrebleu
    except ImportError:
        return line + '; for chrF and BLEU: pip install sacrebleu'
    chrf, bleu = sacrebleu.corpus_chrf(answers, [targets]), sacrebleu.corpus_bleu(answers, [targets])
    return line + f', chrF {chrf.score:.2f}, BLEU {bleu.score:.2f}'


# Text ---------------------------------------------------------------------------------------------------------------------

def evaluate_text(model, tokenizer, split, config, device):
    """Perplexity and bits per byte over windows of block_size laid end to end, as train.py evaluates."""
    def loss_of(x, y):
        return model(*train.to_device(x, y, device), return_logits=False)[1]

    windows = np.arange(split.n_windows)[:config.limit]
    signals = Signals(catch=False)
    loss, bits, n_tokens = train.evaluate(loss_of, split, windows, config.batch_size, tokenizer.text_bytes(), signals)
    return f'{n_tokens:,} tokens: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}, {bits:.4f} bits per byte'


class TextFile:
    """A text file in the place of a split."""

    def __init__(self, path, tokenizer, block_size):
        ids = np.concatenate([tokenizer.encode_to_numpy(piece) for piece in bins.read_pieces(path)] or [[]]).astype(np.int64)
        require(len(ids) > 1, f'input = {str(path)!r}: there is too little text in it')
        self.block_size, self.n_windows = block_size, -(-(len(ids) - 1) // block_size)
        self.ids = np.concatenate((ids, np.full(block_size, -1)))

    def windows(self, index):
        window = np.stack([self.ids[i * self.block_size:(i + 1) * self.block_size + 1] for i in index])
        return window[:, :-1].clip(min=0), window[:, 1:]


# Continuations ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def score(model, context, endings, vocab_size, device):
    """log p of each token of the endings of each context: a context is read once, whatever the number of its endings.

    context: B lists of ids; endings: for each of them K lists. -> (log p (B K, longest), 0 behind an ending; whether each
    ending is what the model would write greedily (B K,))
    """
    n_endings = [len(e) for e in endings]
    flat = [ending for e in endings for ending in e]
    longest = max(map(len, flat))
    block_size = model.config.block_size
    require(longest <= block_size, f'an ending has {longest} tokens: block_size = {block_size} has no room for it')
    context = [ids[-(block_size - max(map(len, e)) + 1):] for ids, e in zip(context, endings)]  # an ending's last is not read
    context, tokens, padding = model.left_padded(context, 0)
    if tokens.size(1) + longest - 1 > block_size:  # a long context beside another one's long ending
        alone = [score(model, [ids], [e], vocab_size, device) for ids, e in zip(context, endings)]
        wide = [F.pad(logp, (0, longest - logp.size(1))) for logp, _ in alone]
        return torch.cat(wide), torch.cat([greedy for _, greedy in alone])
    cache = KVCache(model.config, len(context), tokens.size(1) + longest, device, model.cache_dtype(),
                    padding if padding.any() else None)
    first = model(tokens, cache=cache)[0][:, -1:]  # (B, 1, V)
    which = torch.arange(len(context), device=device).repeat_interleave(torch.tensor(n_endings, device=device))  # (B K,)
    ids = torch.zeros(len(flat), longest, dtype=torch.long)
    for row, ending in zip(ids, flat):
        row[:len(ending)] = torch.tensor(ending)
    ids = ids.to(device)
    logits = first[which]  # (B K, 1, V)
    if longest > 1:
        rest, _ = model(ids[:, :-1], ids[:, 1:], cache=cache.rows(which))
        logits = torch.cat((logits, rest), dim=1)  # (B K, longest, V)
    logits = logits[..., :vocab_size]
    there = torch.arange(longest, device=device) < torch.tensor([len(ending) for ending in flat], device=device)[:, None]
    logp = logits.log_softmax(dim=-1).gather(2, ids[..., None]).squeeze(2).where(there, 0.0)
    greedy = ((logits.argmax(dim=-1) == ids) | ~there).all(dim=1)
    return logp, greedy


def read_jsonl(path, keys):
    """[(line number, object)] of a file of JSON lines, each with these keys: {key: type}. Raises UserError with the line."""
    examples = []
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                json.dumps(example, ensure_ascii=False).encode('utf-8')  # JSON can name half a character
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path} line {number}: not JSON: {error}') from None
            for key, type_ in keys.items():
                require(isinstance(example, dict) and isinstance(example.get(key), type_),
                        f'{path} line {number}: there is no {key!r} that is {type_.__name__}')
            examples.append((number, example))
    require(examples, f'{path}: there is no example in it')
    return examples


def read_lambada(path):
    """The last word of a passage (Paperno et al. 2016), {"text": ...} on each line, cut as EleutherAI's evaluation harness does.
    -> [(context, [ending], 0)]
    """
    examples = []
    for number, example in read_jsonl(path, {'text': str}):
        context, _, word = example['text'].rstrip().rpartition(' ')
        require(context and word, f'{path} line {number}: there is no last word in {example["text"][:60]!r}')
        examples.append((context, [' ' + word], 0))
    return examples


def read_hellaswag(path):
    """Which of four endings (Zellers et al. 2019): lines of hellaswag_val.jsonl, prepared as EleutherAI's harness does.
    -> [(context, endings, number of the right one)]
    """
    def clean(text):
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

    examples = []
    for number, e in read_jsonl(path, {'activity_label': str, 'ctx_a': str, 'ctx_b': str, 'endings': list}):
        require(all(isinstance(ending, str) for ending in e['endings']), f'{path} line {number}: endings must be texts')
        label = str(e.get('label'))  # a number, and text in Hugging Face's copy
        require(label in map(str, range(len(e['endings']))), f'{path} line {number}: label = {label!r} is none of the endings; a '
                                                             f'test split has none: take hellaswag_val.jsonl')
        context = clean(f'{e["activity_label"]}: {e["ctx_a"]} {e["ctx_b"].capitalize()}')
        examples.append((context, [' ' + clean(ending) for ending in e['endings']], int(label)))
    return examples


def scores(model, tokenizer, examples, config, device):
    """For each example (log p of each ending (K,), whether it is what the model would write (K,))"""
    ids = [(tokenizer.encode(context), [tokenizer.encode(ending) for ending in endings]) for context, endings, _ in examples]
    found = [None] * len(ids)
    ordered = sorted(range(len(ids)), key=lambda i: -len(ids[i][0]))  # about as long together
    for start in tqdm(range(0, len(ids), config.batch_size), disable=None):
        which = ordered[start:start + config.batch_size]
        context, endings = zip(*(ids[i] for i in which))
        logp, greedy = score(model, context, endings, tokenizer.vocab_size, device)
        parts = [len(e) for e in endings]
        for i, *result in zip(which, logp.double().sum(dim=1).cpu().split(parts), greedy.cpu().split(parts)):
            found[i] = result
    return found


def evaluate_lambada(found, examples):
    nats, n = -sum(logp.item() for logp, _ in found), len(found)
    right = sum(greedy.item() for _, greedy in found)
    return f'{n:,} passages: accuracy {right / n:.2%}, perplexity {math.exp(min(nats / n, 700)):.2f}'


def evaluate_hellaswag(found, examples):
    """Accuracy by log p, and by log p for each character."""
    n, right, by_length = len(found), 0, 0
    for (logp, _), (_, endings, label) in zip(found, examples):
        length = torch.tensor([len(ending) - 1 for ending in endings])  # without the space before it
        right += int(logp.argmax()) == label
        by_length += int((logp / length).argmax()) == label
    return f'{n:,} contexts: accuracy {right / n:.2%}, normalised by length {by_length / n:.2%}'


ENDINGS = {'lambada': (read_lambada, evaluate_lambada), 'hellaswag': (read_hellaswag, evaluate_hellaswag)}


def main(config):
    examples = ENDINGS[config.task][0](config.input)[:config.limit] if config.task in ENDINGS else []
    device = pick_device(config.device)
    where = config.out_dir if config.init_from == 'resume' else config.init_from
    checkpoint = ckpt.load(where, prefer_best=True, mmap=True, average_last=config.average_last)
    dtype = pick_dtype(config.dtype, device, checkpoint.model_config['n_embd'])
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).to(device, dtype).eval()
    task = config.task
    if task == 'auto':
        task = 'pairs' if model.config.turns and not config.input else 'text'
    require(task != 'pairs' or model.config.turns, f'task = pairs: {checkpoint.path} was trained on plain text')
    val = None
    if not config.input:
        dataset = config.dataset or checkpoint.config.get('dataset', '')
        folder = bins.find_dataset(dataset)
        require(dataset and (folder / 'val.bin').exists(), f'dataset = {dataset!r}: there is no {folder / "val.bin"}: name a '
                                                           f'data set with --dataset=NAME, or a text with --input=PATH')
        data = bins.open_dataset(folder, model.config.block_size)
        same = data.tokenizer.to_dict() == tokenizer.to_dict()
        require(same, f'{folder} was made with another tokenizer than {checkpoint.path}: name another data set')
        require(task != 'pairs' or data.pairs, f'task = pairs: {folder} is plain text')
        val = data.val
    elif task == 'text':
        val = TextFile(config.input, tokenizer, model.config.block_size)
    print(f'{checkpoint.path}: step {checkpoint.step}; {device}, {str(dtype)[6:]}', file=sys.stderr)
    if task == 'pairs':
        line = evaluate_pairs(model, tokenizer, val, config)
    elif task == 'text':
        line = evaluate_text(model, tokenizer, val, config, device)
    else:
        line = ENDINGS[task][1](scores(model, tokenizer, examples, config, device), examples)
    print(f'{task}: {line}')


if __name__ == '__main__':
    with user_errors():
        main(config)
