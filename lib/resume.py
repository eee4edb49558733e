"""Settings that a run takes from its checkpoint and data, and combinations it rejects."""
import hashlib
import json
import shutil
from dataclasses import asdict, fields

import torch

from configurator import GPTConfig, ModelConfig, TrainConfig, key_types
from lib import bins
from lib.budget import BUDGETS, describe_budget, schedule_step
from lib.device import device_name, dtype_name
from lib.distributed import fail, gather, job, print0, require_same, world_size
from lib.errors import UserError, reason_of, require
from lib.files import command
from lib.lora import lora_layers
from optimizer import EXTENDED_PEAK, lr_multiplier, state_bytes

# may differ from the checkpoint's
FREE_KEYS = ('dropout', 'label_smoothing', 'attention', 'activation_checkpointing')
DATA_KEYS = ('eot_token', 'turns', 'prefix_lm')  # follow from the data
MODEL_KEYS = [field.name for field in fields(ModelConfig)]


def environment(data, device, dtype):
    """What a bitwise resume depends on, for checkpoints."""
    return {'torch': str(torch.__version__), 'threads': torch.get_num_threads(),
            'world_size': world_size(), 'device': device_name(device), 'dtype': dtype_name(dtype),
            'data': data.fingerprint(), 'job': job()}


def check_same_config(config, given):
    """All processes must have the same keys. They may find the same data in different folders, and
    a run's name in wandb may hold the time. All processes call it."""
    require_same({key: repr(value) + ' (default)' * (key not in given)
                  for key, value in asdict(config).items()
                  if key not in ('dataset', 'wandb_run_name')})


def check_same_checkpoint(checkpoint, where):
    """All processes must have loaded the same one. All processes call it."""
    samples = [weight.flatten()[:64].double().sum().item() for weight in checkpoint.model.values()]
    content = repr((checkpoint.step, checkpoint.samples_seen, samples))  # nan equals nan
    if len(set(gather(content))) > 1:
        fail(f'{where} is not the same for all processes: name a folder that all machines see')


def check_same_data(data, name):
    """All processes must have opened the same data set. All processes call it."""
    meta = json.dumps([data.tokenizer.to_dict(), repr(data.pairs)]).encode()
    content = data.fingerprint(), hashlib.sha256(meta).hexdigest()
    everywhere = gather((name, content))
    for number, (other, others) in enumerate(everywhere):
        if others != everywhere[0][1]:
            fail(f'dataset = {everywhere[0][0]!r} on rank 0 and {other!r} on rank {number} hold '
                 f'different data: name the same data set, or copy it from one to the other')


def take_saved_config(config, given, checkpoint):
    """Resuming: keys that are not given are as they were. Raises UserError."""
    saved = checkpoint.config
    for key in ('depth', 'lora_rank', 'lora_alpha'):
        now, then = getattr(config, key), saved.get(key, getattr(TrainConfig, key))
        require(key not in given or now == then,
                f'{key} = {now} but {checkpoint.path} has {then}: leave it out')
    own = (set(given) - {'init_from'}) | {'out_dir', 'eval_only'}
    if own & set(BUDGETS):
        own |= set(BUDGETS) - {'max_iters'}  # the given one replaces the saved one
    for field in fields(config):
        if field.name in saved and field.name not in own:
            setattr(config, field.name, saved[field.name])
    for key, path in given.items():  # a flag says it itself
        now = getattr(config, key)
        if path and key not in ('init_from', 'out_dir') and saved.get(key, now) != now:
            print0(f'note: {path} changes {key} from {saved[key]!r} to {now!r}')
    unknown = ', '.join(str(key) for key in saved if not hasattr(config, str(key)))
    if unknown:
        print0(f'note: {checkpoint.path} has keys that are ignored here: {unknown}')


def extend(config, checkpoint):
    """Warm up again where a larger budget lifts a learning rate that had decayed."""
    types_ = key_types(TrainConfig)
    saved = TrainConfig(**{key: v for key, v in checkpoint.config.items() if key in types_})
    done = checkpoint.step, checkpoint.seconds
    before = lr_multiplier(schedule_step(saved, *done), saved)
    now = schedule_step(config, *done)
    if lr_multiplier(now, config) > 1.1 * before:
        config.extended_at = int(now)
        print0(f'note: the learning rate had decayed to {before:.0%} of its peak: with '
               f'{describe_budget(config)} it warms up again, to {EXTENDED_PEAK:.0%} of its '
               f'schedule')


def names_other_data(config, checkpoint):
    """Whether config.dataset is not the data set of the run."""
    folders = [bins.find_dataset(name).resolve()
               for name in (config.dataset, checkpoint.config.get('dataset', ''))]
    return folders[0] != folders[1]


def choose_model_config(config, given, checkpoint, resuming=False):
    """The fields of ModelConfig: the config's or the checkpoint's. Raises UserError if they do not
    fit together, or a given key differs from the checkpoint's."""
    keys = [key for key in MODEL_KEYS if key != 'prefix_lm']  # follows from the data
    chosen = {key: getattr(config, key) for key in keys}
    if checkpoint is None:
        GPTConfig(**chosen)
        return chosen
    saved = checkpoint.model_config
    for key in set(given) & set(keys) - set(FREE_KEYS):
        # finetuning may shorten the context
        shorter = key == 'block_size' and not resuming and chosen[key] < saved[key]
        require(shorter or chosen[key] == saved[key],
                f'{key} = {chosen[key]} but {checkpoint.path} has {key} = {saved[key]}: '
                f'leave {key} out, or train from scratch')
    if 'block_size' in given:
        saved = saved | {'block_size': chosen['block_size']}
    return {key: saved[key] for key in keys}


def choose_data_config(config, given, checkpoint, data, resuming):
    """The fields DATA_KEYS of GPTConfig. Sets config.doc_mask and prefix_lm: the checkpoint's,
    unless given. All processes call it; raises UserError if they do not fit the data."""
    T = data.train.block_size
    if checkpoint is None and T < config.block_size:
        fail(f'block_size = {config.block_size}: the rows of {data.folder} have {T} tokens: give '
             f'--block_size={T}, or prepare it with --block_size={config.block_size}')
    saved = checkpoint.model_config if checkpoint else {}
    if checkpoint and not resuming:
        if 'doc_mask' not in given:
            config.doc_mask = saved['eot_token'] is not None
        if 'prefix_lm' not in given:
            config.prefix_lm = saved['prefix_lm']
    if resuming and config.prefix_lm != saved['prefix_lm']:
        fail(f'prefix_lm = {config.prefix_lm} but {checkpoint.path} has {saved["prefix_lm"]}: '
             f'leave it out, or begin another run with --init_from={checkpoint.path}')
    if config.prefix_lm and not data.pairs:
        fail(f'prefix_lm = True: {data.folder} has no sources and targets: give --prefix_lm=False, '
             f'or prepare some with data/pairs/prepare.py')
    if needs_doc_mask(config, data):
        if 'doc_mask' in given and not config.doc_mask:
            fail(f'doc_mask = False: pairs of a row must not attend to each other: leave it out, '
                 f'or prepare {data.folder} with --packing=False and give --prefix_lm=False')
        config.doc_mask = True
    eot = data.tokenizer.eot if config.doc_mask else None
    if config.doc_mask and eot is None:
        fail(f'doc_mask = True: {data.folder} has no <|endoftext|> between documents '
             f'({data.tokenizer.kind}): leave it out')
    return {'eot_token': eot, 'turns': data.pairs.turns if data.pairs else 0,
            'prefix_lm': config.prefix_lm}


def derived_keys(config, data):
    """The keys of a new run that open_data and build_model of train.py set."""
    if config.init_from != 'scratch':
        return {*MODEL_KEYS, 'doc_mask'}
    return {'doc_mask'} if needs_doc_mask(config, data) else set()


def needs_doc_mask(config, data):
    """Whether pairs share a row, or sources need bidirectional attention."""
    return bool(data.pairs) and (data.pairs.packing or config.prefix_lm)


def check_same_tokenizer(checkpoint, data):
    """The data must use the checkpoint's tokenizer. Raises UserError."""
    tokenizer, vocab_size = data.tokenizer, checkpoint.model_config['vocab_size']
    if checkpoint.tokenizer is not None:
        same = checkpoint.tokenizer == tokenizer.to_dict()
    else:  # nanoGPT rounds 50257 up
        same = vocab_size == tokenizer.vocab_size or (vocab_size == 50304
                                                      and tokenizer.vocab_size == 50257)
    require(same, f'{data.folder} was made with a different tokenizer ({tokenizer.kind}, '
                  f'{tokenizer.vocab_size} tokens) from {checkpoint.path} ({vocab_size} tokens): '
                  f'prepare the data set with the tokenizer of the weights')


def check_environment(checkpoint, environment, data, allow_other_data, note=True):
    """Report what prevents a bitwise resume. Raises UserError if the data have changed."""
    saved = environment | checkpoint.environment
    require(allow_other_data or saved['data'] == environment['data'],
            f'{data.folder} has changed since {checkpoint.path} was trained on it: restore it, or '
            f'train on the new data from these weights: '
            f'{command("train.py", init_from=checkpoint.path, dataset=data.folder, out_dir="NEW")}')
    names = {'world_size': 'processes'}
    changed = [f'{names.get(key, key)} {saved[key]} then, {now} now'
               for key, now in environment.items()
               if key not in ('data', 'job') and saved[key] != now]
    if saved['data'] != environment['data']:
        changed.append('other data')
    if changed and note:
        print0(f'note: the run will not be bitwise the same ({"; ".join(changed)})')


def load_optimizer(optimizer, scaler, checkpoint):
    """Restore their state; weight decay and betas stay the config's. Raises UserError."""
    path, state = checkpoint.path, checkpoint.optimizer
    require(state is not None, f'{path} has no optimizer state: use --init_from={path}')
    try:
        optimizer.load_state_dict(state)
        if checkpoint.scaler and not scaler.state_dict().keys() <= checkpoint.scaler.keys():
            raise ValueError('the state of its gradient scaler is incomplete')
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # of the file
        reason = str(error) if isinstance(error, ValueError) else reason_of(error)
        raise UserError(f'{path}: its optimizer state does not fit: {reason}; start another run '
                        f'from these weights with --init_from={path}') from None
    if checkpoint.scaler:
        scaler.load_state_dict(checkpoint.scaler)


def check_disk(run, model):
    """Room for the checkpoints to keep, and the one being written. Raises UserError."""
    if not run.writes:
        return
    config, n = run.config, 1 if run.resuming else run.config.keep_last + 2
    n_saved = model.get_num_params(False)
    n_saved += sum(layer.weight.numel() for layer in lora_layers(model).values())  # not merged
    need = n * (4 * n_saved + state_bytes(model, config))
    free = shutil.disk_usage(config.out_dir).free
    require(free >= need,
            f'out_dir = {config.out_dir!r}: checkpoints need {need / 1e6:,.1f} MB, '
            f'{free / 1e6:,.1f} MB are free: free some, lower --keep_last or name another folder')
