"""Evaluate a checkpoint on pairs, a text, LAMBADA or HellaSwag. Nothing is downloaded.

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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Count, WholeNumber, check_bounds, configure
from lib.errors import UserError, require, user_errors


@dataclass
class Config:
    # model
    init_from: str = 'resume'  # resume (out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl or a path
    out_dir: str = 'out'  # the folder of a run
    average_last: Count = 1  # average the weights of the last N checkpoints (Vaswani 2017: 5)
    # task
    task: Literal['auto', 'pairs', 'text', 'lambada', 'hellaswag'] = 'auto'  # auto: pairs or text
    input: str = ''  # file of lambada, hellaswag or text; empty: the val split of dataset
    dataset: str = ''  # a folder in data/, or a path; empty: the one that the run was trained on
    limit: Count | None = None  # only the first N examples; None: all
    show: WholeNumber = 0  # print the first N sources with their targets and answers
    # answers
    num_beams: Count = 1  # of beam search; 1: greedy
    length_penalty: float = 0.6  # as in sample.py
    # system
    batch_size: Count = 32  # examples per batch
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights


def check(config):
    """Validate the config. Raises UserError."""
    check_bounds(config)
    require(config.input or config.task not in ('lambada', 'hellaswag'),
            f'task = {config.task}: name its file with --input=PATH')
    require(not config.input or config.task != 'pairs',
            'task = pairs reads a data set: prepare the file with data/pairs/prepare.py, and name '
            'it with --dataset=NAME')
    require(not config.input or Path(config.input).is_file(),
            f'input = {config.input!r}: there is no such file')


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)
        check(config)

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint as ckpt
from lib import bins, evaluation
from lib.device import dtype_name, pick_device, pick_dtype, to_device
from lib.generation import KVCache, beam_search, cache_dtype, generate, left_pad
from lib.run import Signals
from lib.text import read_pieces
from lib.tokenizer import encode_turns

# Pairs of sources and targets --------------------------------------------------------------------


def read_turns(split, tokenizer):
    """[([source], target)] of a split; in chats ([source, target, ..., source], target)."""
    turns = []
    for number in range(split.n_windows):
        for document in split.documents(number):
            texts = [tokenizer.decode(ids) for ids in document]
            turns += [(texts[:i], texts[i]) for i in range(1, len(texts), 2)]
    return turns


def write_answers(model, tokenizer, turns, config):
    """The model's answer to each turn, by greedy decoding or beam search."""
    block_size, eot = model.config.block_size, tokenizer.eot
    prompts = [encode_turns(source, tokenizer) for source, _ in turns]
    answers = [''] * len(turns)
    bar = tqdm(total=len(turns), disable=None)
    waiting = sorted(range(len(turns)), key=lambda i: -len(prompts[i]))  # longest first
    while waiting:
        chosen, waiting = waiting[:config.batch_size], waiting[config.batch_size:]
        batch = [prompts[i] for i in chosen]
        longest = len(batch[0])
        room = block_size - longest
        require(room > 0, f'a source has {longest} tokens, which leaves no room for a target in '
                          f'block_size = {block_size}')
        found = generate_answers(model, batch, room, eot, tokenizer.vocab_size, config)
        unfinished = []
        for i, results in zip(chosen, found):
            ended = all(eot in ids for ids in results)
            if not ended and len(prompts[i]) < longest:
                # the longest prompt of the batch limits all of its answers: this one has more room
                # in the next batch
                unfinished.append(i)
            else:
                answers[i] = tokenizer.decode([token for token in results[0] if token != eot])
        waiting = unfinished + waiting
        bar.update(len(chosen) - len(unfinished))
    bar.close()
    return answers


def generate_answers(model, batch, max_new_tokens, eot, vocab_size, config):
    """New tokens for each prompt, best first: a list per beam, or one."""
    if config.num_beams > 1:
        found = beam_search(model, batch, max_new_tokens, config.num_beams, config.length_penalty,
                            stop_tokens=[eot], vocab_size=vocab_size)
        return [[ids for ids, _ in results] for results in found]
    found = generate(model, batch, max_new_tokens, temperature=0, stop_tokens=[eot],
                     vocab_size=vocab_size)
    return [[ids[len(prompt):]] for ids, prompt in zip(found, batch)]


def evaluate_pairs(model, tokenizer, split, config):
    """Exact match, and chrF and BLEU if sacrebleu is installed."""
    turns = read_turns(split, tokenizer)[:config.limit]
    answers = write_answers(model, tokenizer, turns, config)
    for (source, target), answer in list(zip(turns, answers))[:config.show]:
        print(f'source: {" | ".join(source)}\ntarget: {target}\nanswer: {answer}\n')
    targets = [target for _, target in turns]
    n_exact = sum(answer.strip() == target.strip() for answer, target in zip(answers, targets))
    result = (f'{len(targets):,} targets, beam {config.num_beams}: '
              f'exact match {n_exact / len(targets):.2%}')
    try:
        import sacrebleu  # optional
    except ImportError:
        return result + '; for chrF and BLEU: pip install sacrebleu'
    chrf = sacrebleu.corpus_chrf(answers, [targets]).score
    bleu = sacrebleu.corpus_bleu(answers, [targets]).score
    return f'{result}, chrF {chrf:.2f}, BLEU {bleu:.2f}'


# Text --------------------------------------------------------------------------------------------


class TextFile:
    """A text file with the windows of a TokenBin."""

    def __init__(self, path, tokenizer, block_size):
        pieces = [tokenizer.encode_to_numpy(piece) for piece in read_pieces(path)]
        n_tokens = sum(map(len, pieces))
        require(n_tokens > 1, f'input = {str(path)!r}: there is too little text in it')
        self.block_size = block_size
        self.n_windows = math.ceil((n_tokens - 1) / block_size)
        padding = np.full(block_size, -1)
        self.ids = np.concatenate([*pieces, padding]).astype(np.int64)

    def windows(self, index):
        """x, y (len(index), block_size); y is -1 past the end."""
        T = self.block_size
        window = np.stack([self.ids[i * T:(i + 1) * T + 1] for i in index])  # (len(index), T + 1)
        return window[:, :-1].clip(min=0), window[:, 1:]


def evaluate_text(model, tokenizer, split, config, device):
    """Perplexity and bits per byte over windows laid end to end, as in train.py's evaluations."""
    def loss_of(x, y):
        return model(*to_device(x, y, device), return_logits=False)[1]

    windows = np.arange(split.n_windows)[:config.limit]
    loss, bits, n_tokens = evaluation.evaluate(loss_of, split, windows, config.batch_size,
                                               tokenizer.text_bytes(), Signals(catch=False))
    return (f'{n_tokens:,} tokens: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}, '
            f'{bits:.4f} bits per byte')


# Endings of a context: LAMBADA and HellaSwag -----------------------------------------------------


@torch.no_grad()
def score(model, contexts, endings, vocab_size, device):
    """log p of every token of every ending; a context is read once for all of its endings.

    contexts: B lists of ids. endings: K lists of ids per context. Returns (log p (B K, longest), 0
    past an ending; whether greedy decoding would write the ending (B K,)).
    """
    flat = [ending for endings_i in endings for ending in endings_i]  # B K lists
    longest = max(map(len, flat))
    block_size = model.config.block_size
    require(longest <= block_size,
            f'an ending has {longest} tokens, more than block_size = {block_size}')
    # the end of a context that is too long; the last token of an ending is never an input
    kept = [block_size - max(map(len, endings_i)) + 1 for endings_i in endings]
    contexts = [ids[-n:] for ids, n in zip(contexts, kept)]
    contexts, tokens, padding = left_pad(model, contexts)
    if tokens.size(1) + longest - 1 > block_size:
        # a long context and another one's long ending: one context at a time
        results = [score(model, [ids], [endings_i], vocab_size, device)
                   for ids, endings_i in zip(contexts, endings)]
        logps = [F.pad(logp, (0, longest - logp.size(1))) for logp, _ in results]
        return torch.cat(logps), torch.cat([greedy for _, greedy in results])

    cache = KVCache(model.config, len(contexts), tokens.size(1) + longest, device,
                    cache_dtype(model), padding if padding.any() else None)
    first = model(tokens, cache=cache)[0][:, -1:]  # (B, 1, V)
    n_endings = torch.tensor([len(endings_i) for endings_i in endings], device=device)  # (B,)
    context = torch.arange(len(contexts), device=device).repeat_interleave(n_endings)  # (B K,)
    ids = torch.zeros(len(flat), longest, dtype=torch.long)
    for row, ending in zip(ids, flat):
        row[:len(ending)] = torch.tensor(ending)
    ids = ids.to(device)  # (B K, longest)
    logits = first[context]  # (B K, 1, V)
    if longest > 1:
        rest, _ = model(ids[:, :-1], ids[:, 1:], cache=cache.select(context))
        logits = torch.cat((logits, rest), dim=1)  # (B K, longest, V)
    logits = logits[..., :vocab_size]
    lengths = torch.tensor([len(ending) for ending in flat], device=device)  # (B K,)
    inside = torch.arange(longest, device=device) < lengths[:, None]  # (B K, longest)
    logp = logits.log_softmax(dim=-1).gather(2, ids[..., None]).squeeze(2)  # (B K, longest)
    greedy = (logits.argmax(dim=-1) == ids) | ~inside  # (B K, longest)
    return logp.where(inside, 0.0), greedy.all(dim=1)


def score_examples(model, tokenizer, examples, config, device):
    """For each example (log p of each ending (K,), whether it is the greedy one (K,))."""
    contexts = [tokenizer.encode(context) for context, _, _ in examples]
    endings = [[tokenizer.encode(ending) for ending in texts] for _, texts, _ in examples]
    results = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(contexts[i]))  # less padding
    for start in tqdm(range(0, len(order), config.batch_size), disable=None):
        chosen = order[start:start + config.batch_size]
        logp, greedy = score(model, [contexts[i] for i in chosen], [endings[i] for i in chosen],
                             tokenizer.vocab_size, device)
        n_endings = [len(endings[i]) for i in chosen]
        sums = logp.double().sum(dim=1).cpu().split(n_endings)
        for i, *result in zip(chosen, sums, greedy.cpu().split(n_endings)):
            results[i] = result
    return results


def read_jsonl(path, keys):
    """[(line number, object)] of a JSON lines file. keys: {key: type} that each object must have.

    Raises UserError that names the line.
    """
    examples = []
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                # JSON can escape half of a surrogate pair
                json.dumps(example, ensure_ascii=False).encode('utf-8')
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path} line {number}: not JSON: {error}') from None
            for key, type_ in keys.items():
                require(isinstance(example, dict) and isinstance(example.get(key), type_),
                        f'{path} line {number}: {key!r} must be a {type_.__name__}')
            examples.append((number, example))
    require(examples, f'{path}: there are no examples in it')
    return examples


def read_lambada(path):
    """Lines of {"text": ...} -> [(context, [ending], 0)]: the task is to predict the last word of a
    passage (Paperno et al. 2016), split off as in EleutherAI's evaluation harness."""
    examples = []
    for number, example in read_jsonl(path, {'text': str}):
        context, _, word = example['text'].rstrip().rpartition(' ')
        require(context and word,
                f'{path} line {number}: there is no last word in {example["text"][:60]!r}')
        examples.append((context, [' ' + word], 0))
    return examples


def read_hellaswag(path):
    """Lines of hellaswag_val.jsonl -> [(context, endings, number of the right one)] (Zellers et al.
    2019), preprocessed as in EleutherAI's evaluation harness."""
    def clean(text):
        text = text.strip().replace(' [title]', '. ')
        return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')

    keys = {'activity_label': str, 'ctx_a': str, 'ctx_b': str, 'endings': list}
    examples = []
    for number, example in read_jsonl(path, keys):
        endings = example['endings']
        require(all(isinstance(ending, str) for ending in endings),
                f'{path} line {number}: endings must be strings')
        label = str(example.get('label'))  # an int, or a str in Hugging Face's copy
        require(label in map(str, range(len(endings))),
                f'{path} line {number}: label = {label!r} is not the number of an ending; test '
                f'splits have no labels: take hellaswag_val.jsonl')
        context = f'{example["activity_label"]}: {example["ctx_a"]} {example["ctx_b"].capitalize()}'
        examples.append((clean(context), [' ' + clean(ending) for ending in endings], int(label)))
    return examples


def summarize_lambada(results, examples):
    """Accuracy, and perplexity of the last words."""
    n = len(results)
    nats = -sum(logp.item() for logp, _ in results)
    correct = sum(greedy.item() for _, greedy in results)
    return (f'{n:,} passages: accuracy {correct / n:.2%}, '
            f'perplexity {math.exp(min(nats / n, 700)):.2f}')


def summarize_hellaswag(results, examples):
    """Accuracy by log p, and by log p per character."""
    n = len(results)
    correct = correct_by_length = 0
    for (logp, _), (_, endings, label) in zip(results, examples):
        n_characters = torch.tensor([len(ending) - 1 for ending in endings])  # without the space
        correct += int(logp.argmax()) == label
        correct_by_length += int((logp / n_characters).argmax()) == label
    return (f'{n:,} contexts: accuracy {correct / n:.2%}, '
            f'normalized by length {correct_by_length / n:.2%}')


READ = {'lambada': read_lambada, 'hellaswag': read_hellaswag}
SUMMARIZE = {'lambada': summarize_lambada, 'hellaswag': summarize_hellaswag}

# -------------------------------------------------------------------------------------------------


def open_val(config, task, checkpoint, tokenizer):
    """The val split of --dataset, or of the data that the run was trained on. Raises UserError."""
    dataset = config.dataset or checkpoint.config.get('dataset', '')
    folder = bins.find_dataset(dataset)
    require(dataset and (folder / 'val.bin').exists(),
            f'dataset = {dataset!r}: there is no {folder / "val.bin"}: name a data set with '
            f'--dataset=NAME, or a text with --input=PATH')
    data = bins.open_dataset(folder, checkpoint.model_config['block_size'])
    require(data.tokenizer.to_dict() == tokenizer.to_dict(),
            f'{folder} was made with another tokenizer than {checkpoint.path}: name another data '
            f'set')
    require(task != 'pairs' or data.pairs, f'task = pairs: {folder} is plain text')
    return data.val


def main(config):
    examples = []
    if config.task in READ:
        examples = READ[config.task](config.input)[:config.limit]
    device = pick_device(config.device)
    checkpoint = ckpt.load_for(config)
    dtype = pick_dtype(config.dtype, device, checkpoint.model_config['n_embd'])
    tokenizer = checkpoint.get_tokenizer()
    model = checkpoint.build_model(dropout=0.0).to(device, dtype).eval()
    task = config.task
    if task == 'auto':
        task = 'pairs' if model.config.turns and not config.input else 'text'
    require(task != 'pairs' or model.config.turns,
            f'task = pairs: {checkpoint.path} was trained on plain text')
    split = None
    if not config.input:
        split = open_val(config, task, checkpoint, tokenizer)
    elif task == 'text':
        split = TextFile(config.input, tokenizer, model.config.block_size)
    print(f'{checkpoint.path}: step {checkpoint.step}; {device}, {dtype_name(dtype)}',
          file=sys.stderr)
    if task == 'pairs':
        result = evaluate_pairs(model, tokenizer, split, config)
    elif task == 'text':
        result = evaluate_text(model, tokenizer, split, config, device)
    else:
        scores = score_examples(model, tokenizer, examples, config, device)
        result = SUMMARIZE[task](scores, examples)
    print(f'{task}: {result}')


if __name__ == '__main__':
    with user_errors():
        main(config)
