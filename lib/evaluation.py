"""Losses over a split, and a sample of what the model writes."""
import math
import time

import numpy as np
import torch

from lib.distributed import any_process, fail, gather, is_shard, print0, rank, world_size
from lib.generation import generate
from lib.tokenizer import END_OF_TEXT


@torch.no_grad()
def evaluate(loss_of, split, windows, batch_size, token_bytes, signals):
    """(loss in nats per token, bits per byte, number of tokens) over windows of a split.

    loss_of(x, y): mean loss of a batch. windows: their numbers. (None, None, None) if a signal to
    any process asks for a stop, which is then in the signals of every process. Bits per byte =
    nats / (ln 2 * bytes of the targets' text) compares models with different tokenizers.
    """
    mine = windows[rank()::world_size()]
    longest = len(windows[::world_size()])
    losses, n_tokens, n_bytes = [], 0, 0
    for start in range(0, longest, batch_size):  # the same number in every process: FSDP
        if any_process(signals.stop):
            break
        x, y = split.windows(mine[start:start + batch_size])
        targets = y[y >= 0]
        missing = ((0, batch_size - len(x)), (0, 0))  # fill the last batch: static shapes
        loss = loss_of(np.pad(x, missing), np.pad(y, missing, constant_values=-1))
        if len(targets):
            losses.append(loss * len(targets))  # stays on the device: no sync
        n_tokens += len(targets)
        n_bytes += int(token_bytes[targets].sum())
    nats = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    *sums, stops = zip(*gather((nats, n_tokens, n_bytes, signals.stop)))
    if any(stops):
        signals.stop = max(stops)
        return None, None, None
    nats, n_tokens, n_bytes = map(sum, sums)
    bits = nats / math.log(2) / n_bytes if n_bytes else math.nan  # only special tokens
    return nats / n_tokens, bits, n_tokens


def evaluate_run(loss_of, model, data, config, step, run):
    """Evaluate both splits, print and log the losses, and a sample if asked for.

    model: not wrapped. Returns the log line, or None if a signal interrupted it. Raises UserError
    if the val loss is not finite.
    """
    start = time.perf_counter()
    n_windows = data.val.n_windows
    if config.eval_iters > 0:
        n_windows = config.eval_iters * config.batch_size
    sharded = is_shard(model.lm_head.weight)  # ask now: a forward pass leaves the head gathered
    (val_loss, bits, _), (train_loss, *_) = (
        evaluate(loss_of, split, split.evaluation_windows(n_windows), config.batch_size,
                 data.token_bytes, run.signals) for split in (data.val, data.train))
    if val_loss is None or train_loss is None:
        return None
    if not math.isfinite(val_loss):
        fail(f'step {step}: the val loss is {val_loss}: lower --learning_rate or set --grad_clip; '
             f'checkpoints saved in {config.out_dir} are kept')
    seconds = time.perf_counter() - start
    line = {'step': step, 'train_loss': train_loss, 'val_loss': val_loss,
            'val_bits_per_byte': bits, 'seconds': round(seconds, 3)}
    print0(f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
           f'{bits:.4f} bits per byte ({seconds:.1f} s)')
    if run.log:
        run.log.write(line)
        if config.sample_every_eval and not sharded:
            if step == 0 and config.init_from == 'scratch':
                print0('a sample of the untrained model:')
            text = sample(model, data, config.seed)
            print0('\n'.join('  | ' + line for line in text.splitlines()), indent='  | ')
            run.add_sample(step, text)
    return line


def sample(model, data, seed):
    """A text that the model writes; of pairs a source of the val split and the answer to it."""
    tokenizer, block_size = data.tokenizer, model.config.block_size
    eot, vocab_size = tokenizer.eot, tokenizer.vocab_size
    if data.pairs:
        source = [eot, *data.val.documents(0)[0][0], eot]
        n_new = min(100, block_size - len(source))
        tokens = generate(model, [source], n_new, temperature=0, stop_tokens=[eot], seed=seed,
                          vocab_size=vocab_size)[0]
        return tokenizer.decode(tokens[1:]).replace(END_OF_TEXT, '\n')
    prompt = [eot] if eot is not None else data.val.read([0], 1)[0].tolist()
    tokens = generate(model, [prompt], 100, temperature=0.8, slide=max(1, block_size // 8),
                      seed=seed, vocab_size=vocab_size)[0]
    return tokenizer.decode(tokens[1:])
