"""Evaluate a checkpoint on pairs, a text, LAMBADA or HellaSwag. Nothing is downloaded.

    python tools/evaluate.py --out_dir=out-translate --num_beams=4 --show=3
    python tools/evaluate.py --init_from=gpt2 --task=text --input=book.txt
    python tools/evaluate.py --init_from=gpt2 --task=lambada --input=lambada_test.jsonl
    python tools/evaluate.py --init_from=gpt2 --task=hellaswag --input=hellaswag_val.jsonl
"""
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Beams, Count, FilePath, LengthPenalty, Which, WholeNumber, configure
from lib.errors import UserError, plural, require, user_errors
from lib.files import find, read_text


@dataclass
class Config:
    # model
    init_from: FilePath = 'resume'  # resume (out_dir), gpt2, gpt2-medium, ..., gpt2-xl or a path
    out_dir: FilePath = 'out'  # the folder of a run
    checkpoint: Which = 'auto'  # last, best (by val loss) or a step; auto: docs/sampling.md
    average_last: Count = 1  # average the weights of the last N checkpoints (Vaswani 2017: 5)
    # task
    task: Literal['auto', 'pairs', 'text', 'lambada', 'hellaswag'] = 'auto'  # auto: pairs or text
    input: FilePath = ''  # file of lambada, hellaswag or text; empty: the val split of dataset
    dataset: FilePath = ''  # a folder in data/, or a path; empty: the one of the run
    limit: Count | None = None  # only the first N examples, or windows of a text; None: all
    stride: Count | None = None  # of text: tokens from window to window; None: block_size
    show: WholeNumber = 0  # print the first N sources with their targets and answers
    # answers
    num_beams: Beams = 1  # of beam search; 1: greedy
    length_penalty: LengthPenalty = 0.6  # as in sample.py
    # system
    batch_size: Count = 32  # examples per batch
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights


def check(config):
    """Validate the config and find its files. Raises UserError."""
    require(config.input or config.task not in ('lambada', 'hellaswag'),
            f'task = {config.task}: name its file with --input=PATH')
    require(config.stride is None or config.task in ('auto', 'text'),
            f'stride = {config.stride} is for task = text, not for {config.task}: leave it out')
    require(not config.input or config.task != 'pairs',
            'task = pairs reads a data set: prepare the file with data/pairs/prepare.py, and name '
            'it with --dataset=NAME')
    if config.input:
        found = find(config.input)
        require(found.exists() and not found.is_dir(),
                f'input = {config.input!r}: there is no such file')
        config.input = str(found)


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
from lib.records import read_records
from lib.run import Signals
from lib.tokenizer import END_OF_TEXT, encode_turns

OVERFLOW = ('its weights are damaged or overflow in this dtype: try --dtype=float32 or an earlier '
            'checkpoint')

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
    result = (f'{plural(len(targets), "target")}, beam {config.num_beams}: '
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
    """The token ids of a text file, to be read like those of a TokenBin."""
    pairs = None

    def __init__(self, path, tokenizer, block_size):
        self.ids = encode_file(path, tokenizer).astype(np.int64)
        self.n_tokens, self.block_size = len(self.ids), block_size
        require(self.n_tokens > 1, f'input = {str(path)!r}: there is too little text in it')

    def read(self, starts, count):
        """count ids from each position in starts, 0 past the end. -> (len(starts), count)"""
        batch = np.zeros((len(starts), count), np.int64)
        for row, start in zip(batch, starts):
            ids = self.ids[start:start + count]
            row[:len(ids)] = ids
        return batch


def encode_file(path, tokenizer):
    """The ids of a text file, (n,). Raises UserError that names the line of an unknown character.
    """
    text = read_text(path)
    try:
        return tokenizer.encode_to_numpy(text)
    except UserError:
        for number, line in enumerate(text.split('\n'), 1):
            try:
                tokenizer.encode_to_numpy(line + '\n')
            except UserError as error:
                raise UserError(f'{path} line {number}: {error}') from None
        raise


class StridedWindows:
    """Windows of a text that move by `stride` tokens, as in Hugging Face's guide to the perplexity
    of fixed-length models.

    The first one scores block_size tokens, the others their last `stride`. So each token but the
    very first is scored once, with at least block_size - stride tokens of context from there on.
    """

    def __init__(self, split, stride):
        """split: a TextFile or TokenBin. stride: block_size lays windows end to end."""
        self.split, self.stride = split, stride
        past_first = max(0, split.n_tokens - 1 - split.block_size)
        self.n_windows = 1 + math.ceil(past_first / stride)

    def windows(self, index):
        """x, y (len(index), block_size); y is -1 where a token is not scored."""
        T = self.split.block_size
        starts = np.asarray(index, dtype=np.int64)[:, None] * self.stride
        window = self.split.read(starts[:, 0].tolist(), T + 1)  # (len(index), T + 1)
        column = np.arange(1, T + 1)
        scored = (starts == 0) | (column > T - self.stride)  # once
        scored &= starts + column < self.split.n_tokens
        return window[:, :-1], np.where(scored, window[:, 1:], -1)


def evaluate_text(model, tokenizer, split, config, device):
    """Perplexity and bits per byte, and of a file perplexity per word, WikiText's measure."""
    def loss_of(x, y):
        return model(*to_device(x, y, device), return_logits=False)[1]

    if not split.pairs:
        block_size = split.block_size
        stride = config.stride or block_size
        require(stride <= block_size,
                f'stride = {stride}: give at most block_size = {block_size}, or tokens are left '
                f'out')
        split = StridedWindows(split, stride)
    windows = np.arange(split.n_windows)[:config.limit]
    batch_size = min(config.batch_size, len(windows))
    loss, bits, n_tokens = evaluation.evaluate(loss_of, split, windows, batch_size,
                                               tokenizer.text_bytes(), Signals(catch=False))
    require(math.isfinite(loss), f'the loss is {loss}: {OVERFLOW}')
    result = (f'{plural(n_tokens, "token")}: loss {loss:.4f}, perplexity '
              f'{math.exp(min(loss, 700)):.2f}, {bits:.4f} bits per byte')
    if config.input:
        text = tokenizer.decode(split.split.ids[:n_tokens + 1]).replace(END_OF_TEXT, ' ')
        n_words = len(text.split())
        per_word = math.exp(min(loss * n_tokens / max(1, n_words), 700))
        result += f', {per_word:.2f} per-word perplexity ({plural(n_words, "word")})'
    return result


# Endings of a context: LAMBADA and HellaSwag -----------------------------------------------------


class Example(NamedTuple):
    where: str  # file and line, for messages
    context: str
    endings: list  # of str
    label: int = 0  # the number of the right ending


def encode_pair(context, ending, tokenizer):
    """(ids of a context, ids of an ending), split as in EleutherAI's lm-evaluation-harness. Raises
    UserError.

    White space at the end of the context belongs to the ending. Both are encoded together; the
    ending begins after as many tokens as the context has by itself. An empty context becomes
    `<|endoftext|>`.
    """
    kept = context.rstrip()
    ids = tokenizer.encode(context + ending)
    if kept:
        context_ids = tokenizer.encode(kept)
        ending_ids = ids[len(context_ids):]
    else:
        require(tokenizer.eot is not None,
                f'there is no context before the ending, and the tokenizer ({tokenizer.kind}) has '
                f'no <|endoftext|> to stand for it')
        begins_with_eot = ids[:1] == [tokenizer.eot]
        context_ids, ending_ids = [tokenizer.eot], ids[1:] if begins_with_eot else ids
    require(ending_ids, f'the ending {ending!r} adds no token to its context')
    return context_ids, ending_ids


@torch.no_grad()
def score(model, contexts, endings, device):
    """log p of every token of every ending; a context is read once for all of its endings.

    contexts: B lists of ids. endings: K lists of ids per context; without its last token, each fits
    into block_size together with its context. Returns (log p (B K, longest), 0 past an ending;
    whether greedy decoding would write the ending (B K,)).
    """
    flat = [ending for endings_i in endings for ending in endings_i]  # B K lists
    longest = max(map(len, flat))
    contexts, tokens, padding = left_pad(model, contexts)
    if tokens.size(1) + longest - 1 > model.config.block_size:
        # a long context and another one's long ending: one context at a time
        results = [score(model, [ids], [endings_i], device)
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
    lengths = torch.tensor([len(ending) for ending in flat], device=device)  # (B K,)
    inside = torch.arange(longest, device=device) < lengths[:, None]  # (B K, longest)
    logp = logits.log_softmax(dim=-1).gather(2, ids[..., None]).squeeze(2)  # (B K, longest)
    greedy = (logits.argmax(dim=-1) == ids) | ~inside  # (B K, longest)
    return logp.where(inside, 0.0), greedy.all(dim=1)


def encode_examples(examples, tokenizer, block_size):
    """[(context ids, [ending ids], [(number of the example, number of the ending)])]

    Each ending keeps as much of the end of its context as fits into block_size; the endings of an
    example that keep the same are together. Raises UserError that names file and line.
    """
    requests = {}
    for i, example in enumerate(examples):
        for k, ending in enumerate(example.endings):
            try:
                context, ending = encode_pair(example.context, ending, tokenizer)
                require(len(ending) <= block_size, f'an ending has {len(ending)} tokens, more than '
                                                   f'block_size = {block_size}')
            except UserError as error:
                raise UserError(f'{example.where}: {error}') from None
            # the last token of an ending is never an input
            context = context[-(block_size - len(ending) + 1):]
            _, endings, places = requests.setdefault((i, tuple(context)), (context, [], []))
            endings.append(ending)
            places.append((i, k))
    return list(requests.values())


def score_examples(model, tokenizer, examples, config, device):
    """For each example (log p of each ending (K,), whether it is the greedy one (K,))."""
    requests = encode_examples(examples, tokenizer, model.config.block_size)
    requests.sort(key=lambda request: -len(request[0]))  # less padding
    logps = [torch.zeros(len(example.endings)).double() for example in examples]
    greedy = [torch.zeros(len(example.endings)).bool() for example in examples]
    for start in tqdm(range(0, len(requests), config.batch_size), disable=None):
        contexts, endings, places = zip(*requests[start:start + config.batch_size])
        logp, same = score(model, contexts, endings, device)
        sums = logp.double().sum(dim=1).tolist()
        places = [place for places_i in places for place in places_i]
        for (i, k), total, is_greedy in zip(places, sums, same.tolist()):
            require(math.isfinite(total),
                    f'{examples[i].where}: the log probability of an ending is {total}: {OVERFLOW}')
            logps[i][k], greedy[i][k] = total, is_greedy
    return list(zip(logps, greedy))


def read_examples(path, keys):
    """Yield (file and line, object) of a file of JSON objects. keys: {key: type} that each object
    must have. Raises UserError that names the line."""
    for where, example in read_records(path):
        for key, type_ in keys.items():
            require(isinstance(example, dict) and isinstance(example.get(key), type_),
                    f'{path} {where}: {key!r} must be a {type_.__name__}')
        yield f'{path} {where}', example


def read_lambada(path):
    """Lines of {"text": ...} -> Examples: the task is to predict the last word of a passage
    (Paperno et al. 2016), split off at the last space as in EleutherAI's evaluation harness."""
    examples = []
    for where, example in read_examples(path, {'text': str}):
        require(example['text'].strip(), f'{where}: there is no word in {example["text"]!r}')
        context, _, word = example['text'].rpartition(' ')
        examples.append(Example(where, context, [' ' + word]))
    return examples


def read_hellaswag(path):
    """Lines of hellaswag_val.jsonl -> Examples (Zellers et al. 2019), preprocessed as in
    EleutherAI's evaluation harness."""
    def clean(text):
        text = text.strip().replace(' [title]', '. ')
        return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')

    keys = {'activity_label': str, 'ctx_a': str, 'ctx_b': str, 'endings': list}
    examples = []
    for where, example in read_examples(path, keys):
        endings = example['endings']
        require(all(isinstance(ending, str) for ending in endings),
                f'{where}: endings must be strings')
        label = str(example.get('label'))  # an int, or a str in Hugging Face's copy
        require(label in map(str, range(len(endings))),
                f'{where}: label = {label!r} is not the number of an ending; test '
                f'splits have no labels: take hellaswag_val.jsonl')
        context = f'{example["activity_label"]}: {example["ctx_a"]} {example["ctx_b"].capitalize()}'
        endings = [' ' + clean(ending) for ending in endings]
        examples.append(Example(where, clean(context), endings, int(label)))
    return examples


def summarize_lambada(results, examples):
    """Accuracy, and perplexity of the last words."""
    n = len(results)
    nats = -sum(logp.item() for logp, _ in results)
    correct = sum(greedy.item() for _, greedy in results)
    return (f'{plural(n, "passage")}: accuracy {correct / n:.2%}, '
            f'perplexity {math.exp(min(nats / n, 700)):.2f}')


def summarize_hellaswag(results, examples):
    """Accuracy by log p, and by log p per character."""
    n = len(results)
    correct = correct_by_length = 0
    for (logp, _), example in zip(results, examples):
        # without the space
        n_characters = torch.tensor([len(ending) - 1 for ending in example.endings])
        correct += int(logp.argmax()) == example.label
        correct_by_length += int((logp / n_characters).argmax()) == example.label
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


def is_out_of_memory(error):
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return out_of_memory or "can't allocate memory" in str(error)  # torch on a CPU


def main(config):
    examples = []
    if config.task in READ:
        examples = READ[config.task](config.input)[:config.limit]
        require(examples, f'{config.input}: there are no examples in it')
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
    require(config.stride is None or task == 'text' and not split.pairs,
            f'stride = {config.stride} is for plain text, and these are sources and targets: leave '
            f'it out')
    try:
        if task == 'pairs':
            result = evaluate_pairs(model, tokenizer, split, config)
        elif task == 'text':
            result = evaluate_text(model, tokenizer, split, config, device)
        else:
            scores = score_examples(model, tokenizer, examples, config, device)
            result = SUMMARIZE[task](scores, examples)
    except (RuntimeError, MemoryError) as error:
        require(not is_out_of_memory(error),
                f'out of memory with batch_size = {config.batch_size}: lower --batch_size')
        raise
    print(f'{checkpoint.path}: step {checkpoint.step}; {device}, {dtype_name(dtype)}',
          file=sys.stderr)
    print(f'{task}: {result}')


if __name__ == '__main__':
    with user_errors():
        main(config)
