"""The keys of a run, and how config files and flags set them. Imports neither torch nor numpy.

    python train.py config/x.py --batch_size=32 --compile=False --eval_only

A key is a field of a dataclass, `key: type = default  # comment`: typing, bounds and --help follow
from that line. A config file is flat Python, `key = value`: literals, arithmetic, names of other
keys; a name that is no key may help to compute later values. It is parsed, never executed.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import numbers
import operator
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from lib.errors import UserError, require, restate, shorten
from lib.files import find, open_text

MAX_FILE_BYTES = 100_000  # of a config file
FilePath = typing.NewType('path', str)  # `~` is expanded
Text = typing.NewType('text', str)  # a flag may have the escapes \n, \t and \\


class Bound(NamedTuple):
    """Attached to a key's type: a predicate on its values, and its wording."""
    holds: Callable
    text: str


Count = Annotated[int, Bound(lambda x: x >= 1, 'at least 1')]
Size = Annotated[int, Bound(lambda x: 1 <= x < 2**31, 'at least 1, less than 2**31')]
Width = Annotated[int, Bound(lambda x: 1 <= x <= 2**24, 'at least 1, at most 2**24')]
Heads = Annotated[int, Bound(lambda x: 1 <= x <= 2**16, 'at least 1, at most 2**16')]
Depth = Annotated[int, Bound(lambda x: 1 <= x <= 2**18, 'at least 1, at most 2**18')]
Ngram = Annotated[int, Bound(lambda x: 1 <= x <= 64, 'at least 1, at most 64')]
WholeNumber = Annotated[int, Bound(lambda x: x >= 0, '0 or more')]
Positive = Annotated[float, Bound(lambda x: x > 0, 'more than 0')]
Theta = Annotated[float, Bound(lambda x: x >= 1, 'at least 1')]
NonNegative = Annotated[float, Bound(lambda x: x >= 0, '0 or more')]
Fraction = Annotated[float, Bound(lambda x: 0 <= x < 1, 'at least 0 and less than 1')]
Share = Annotated[float, Bound(lambda x: 0 < x <= 1, 'more than 0, at most 1')]
ValFraction = Annotated[float, Bound(lambda x: 0 < x < 1, 'a share between 0 and 1')]
CountOrAll = Annotated[int, Bound(lambda x: x >= 1 or x == -1, 'at least 1, or -1')]
Which = Literal['auto', 'last', 'best'] | WholeNumber
Softcap = Annotated[float, Bound(lambda x: x == 0 or 0.1 <= x <= 1e6, '0 (off), or 0.1 to 1e6')]
Beams = Annotated[int, Bound(lambda x: 1 <= x <= 1000, 'at least 1, at most 1000')]
Port = Annotated[int, Bound(lambda x: 0 <= x < 2**16, '0 (any) to 65535')]
LengthPenalty = Annotated[float, Bound(lambda x: -10 <= x <= 10, '-10 to 10')]


@dataclass
class ModelConfig:
    """The choices of an architecture; model.py implements them."""
    # model
    block_size: Size = 1024  # context length in tokens
    n_layer: Size = 12  # blocks
    n_head: Heads = 12  # attention heads per block
    n_embd: Width = 768  # width of the residual stream
    dropout: Fraction = 0.0  # 0 for pretraining; for small data or finetuning try 0.1 or more
    bias: bool = True  # in Linear and LayerNorm: True as in GPT-2; False is a bit better and faster
    ngram: Ngram = 1  # hashed embeddings of the last 2, ..., ngram tokens (Huang 2025); 1: off
    ngram_rows: Size = 16384  # hash table rows per n-gram length
    position: Literal['learned', 'sinusoidal', 'rope', 'none'] = 'learned'  # see model.py
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # Ba 2016 | Zhang & Sennrich 2019
    norm_position: Literal['pre', 'post'] = 'pre'  # GPT-2 | Vaswani 2017, 3.1
    activation: Literal['gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu'] = 'gelu_tanh'  # MLP
    n_kv_head: Heads | None = None  # key/value heads for GQA (Ainslie 2023); None: n_head
    head_size: Heads | None = None  # of queries, keys and values; None: n_embd / n_head
    n_hidden: Width | None = None  # width of the MLP; None: 4 n_embd (swiglu: 8/3 n_embd)
    rope_theta: Theta = 10000.0  # base of RoPE's wavelengths (Su 2021); larger: longer ones
    norm_eps: Positive = 1e-5  # added to the variance, or to the mean square
    qk_norm: bool | Literal['gain'] = False  # RMS-normalize queries, keys (Henry 2020; Qwen3: gain)
    tie_weights: bool = True  # lm_head shares the token embedding (Press & Wolf 2017)
    logit_softcap: Softcap = 0.0  # c > 0: logits become c * tanh(logits / c) (Gemma 2); 0: off
    zero_init: bool = False  # output projections start at 0, so each block starts as the identity
    label_smoothing: Fraction = 0.0  # in training only (Szegedy 2016, section 7)
    prefix_lm: bool = False  # pairs: bidirectional attention within a source (Raffel 2020, 3.2.1)
    attention: Literal['sdpa', 'math'] = 'sdpa'  # math is written out, and slower
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, more time

    @property
    def head_dim(self):
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self):
        if self.activation == 'swiglu':
            # three matrices instead of two: 2/3 of the width keeps the parameters equal
            # (Shazeer 2020, section 3)
            return self.n_hidden or 8 * math.ceil(self.n_embd / 3)
        return self.n_hidden or 4 * self.n_embd


@dataclass
class GPTConfig(ModelConfig):
    """ModelConfig plus fields derived from the data; defaults: GPT-2 124M. Raises UserError."""
    vocab_size: Size = 50304  # GPT-2's 50257 rounded up to a multiple of 64, as in nanoGPT
    eot_token: int | None = None  # attention and n-grams do not look back past it; None: no masking
    turns: WholeNumber = 0  # maximum source/target turns per document (lib/pairs.py); 0: plain text

    def __post_init__(self):
        check_fields(self)
        require(self.head_size or self.n_head <= self.n_embd,
                f'n_head = {self.n_head}: give at most n_embd = {self.n_embd}, and a divisor of it')
        require(self.head_size or self.n_embd % self.n_head == 0,
                f'n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: '
                f'try n_embd = {math.ceil(self.n_embd / self.n_head) * self.n_head}')
        require(self.n_kv_head is None or self.n_head % self.n_kv_head == 0,
                f'n_kv_head = {self.n_kv_head} is not a divisor of n_head = {self.n_head}')
        require(self.position != 'rope' or self.head_dim % 2 == 0,
                f'position = rope needs an even n_embd / n_head, not {self.head_dim}')
        require(self.position != 'sinusoidal' or self.n_embd % 2 == 0,
                f'position = sinusoidal needs an even n_embd, not {self.n_embd}')
        require(not self.prefix_lm or self.turns and self.eot_token is not None,
                'prefix_lm = True needs sources and targets: turns and eot_token')
        require(self.eot_token is None or 0 <= self.eot_token < self.vocab_size,
                f'eot_token = {self.eot_token} must be below vocab_size = {self.vocab_size}')


OLD_NAMES = {'document_token': 'eot_token', 'checkpointing': 'activation_checkpointing'}


def read_model_config(values):
    """Every field of GPTConfig, from those in a file: {field: value}. Raises UserError if one is
    unknown: what it asks for would be left out."""
    types_ = key_types(GPTConfig)
    values = {OLD_NAMES.get(key, key): value for key, value in values.items()}
    for key in values:
        require(key in types_, f'{str(key)[:40]} = {shorten(values[key])}: no such choice here; if '
                               f'the model works without it, remove it from the file')
    return dataclasses.asdict(GPTConfig(**{key: check_type(key, value, types_[key])
                                           for key, value in values.items()}))


@dataclass
class TrainConfig(ModelConfig):
    """The keys of train.py: these and ModelConfig's."""
    # scaling
    depth: Depth | None = None  # sets model, rates, batch and steps; keys after it override
    # files
    out_dir: FilePath = 'out'  # checkpoints, log.jsonl and config.py go here
    eval_interval: Count = 2000  # steps between evaluations, each followed by a checkpoint
    log_interval: Count = 1  # steps between log lines
    eval_iters: CountOrAll = 200  # batches per evaluation, always the same; -1: the whole split
    eval_only: bool = False  # evaluate once and exit
    average_last: Count = 1  # with eval_only: average the weights of the last N checkpoints
    always_save_checkpoint: bool = True  # False: save only if val loss improved
    save_interval: Count | None = None  # steps between extra checkpoints; None: at evaluations only
    keep_last: Count = 2  # checkpoints to keep, in addition to the best one
    async_save: bool = True  # write checkpoints in the background; a GPU's from a copy
    init_from: FilePath = 'scratch'  # scratch, resume, gpt2, gpt2-medium, ..., gpt2-xl or a path
    sample_every_eval: bool = False  # print a sample at each evaluation
    seed: WholeNumber = 1337  # of weights, batches and dropout
    # wandb and TensorBoard
    wandb_log: bool = False  # also log to wandb, offline if not logged in; it reads WANDB_TAGS, ...
    wandb_project: str | None = None  # None: WANDB_PROJECT, or plaingpt
    wandb_run_name: str | None = None  # None: WANDB_NAME, or what wandb chooses
    tensorboard_log: bool = False  # also log to out_dir/tensorboard (pip install tensorboard)
    # data
    dataset: FilePath = 'openwebtext'  # a folder in data/, or a path, with train.bin and val.bin
    gradient_accumulation_steps: Size = 5 * 8  # micro-batches per step, over all processes
    batch_size: Size | Literal['auto'] = 12  # sequences per micro-batch; auto: what fits a GPU
    doc_mask: bool = False  # attention and n-grams do not cross <|endoftext|>
    # optimizer
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # Muon trains only the blocks' matrices
    learning_rate: Positive = 6e-4  # peak learning rate of AdamW
    muon_learning_rate: Positive = 0.02  # peak learning rate of Muon; same schedule
    muon_momentum: Fraction = 0.95  # Nesterov momentum of Muon
    embedding_learning_rate: Positive | None = None  # n-grams, untied wte; None: learning_rate
    weight_decay: NonNegative = 1e-1  # on matrices and embeddings, not on gains and biases
    beta1: Fraction = 0.9  # AdamW
    beta2: Fraction = 0.95  # AdamW
    adam_eps: Positive = 1e-8  # AdamW
    grad_clip: NonNegative = 1.0  # maximum gradient norm; 0: no clipping
    nonfinite: Literal['stop', 'skip'] = 'stop'  # what to do on an infinite or nan loss or gradient
    max_skips: Count = 10  # consecutive skipped steps before the run stops anyway
    # LoRA
    lora_rank: WholeNumber = 0  # finetune updates of this rank only (Hu 2021); 0: all weights
    lora_alpha: Positive = 16.0  # scales the updates, by lora_alpha / lora_rank
    lora_dropout: Fraction = 0.0  # on the input of the updates
    # budget: give one of the first four; schedules follow it
    max_iters: WholeNumber = 600000  # steps
    target_tokens: Count | None = None  # tokens to train on; sets max_iters
    target_flops: Positive | None = None  # 6 per weight and token, and attention; sets max_iters
    max_minutes: Positive | None = None  # of training, without evaluations
    patience: Count | None = None  # evaluations without a lower val loss until the run stops
    # learning rate schedule
    decay_lr: bool = True  # False: constant learning_rate, no warmup
    schedule: Literal['cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'] = 'cosine'  # decay
    warmup_iters: WholeNumber = 2000  # steps of linear warmup
    lr_decay_iters: Count | None = None  # step at which min_lr is reached; None: max_iters
    min_lr: NonNegative | None = None  # final learning rate; None: learning_rate / 10
    decay_fraction: Share = 0.2  # wsd: fraction of the steps after warmup that decay
    extended_at: WholeNumber = 0  # set by resuming with more steps: warms up again from this step
    # system
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # float16 uses a GradScaler
    compile: bool | Literal['auto'] = 'auto'  # torch.compile; auto: on CUDA
    deterministic: bool | Literal['auto'] = 'auto'  # bitwise reproducible; auto: not on CUDA
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # for torchrun; auto: nccl on CUDA
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # for torchrun; auto: ddp if a copy fits
    deterministic_sum: bool = False  # same bits for 1, 2, 4, ... processes; no overlap
    peak_flops: Positive | None = None  # of your device, for MFU; None: from a table
    bias: bool = False  # nanoGPT's default for training

    auto_batch_size = False  # not a key: batch_size was auto (lib/recipe.py)


def key_types(cls):
    """{key: type}, bounds included."""
    return typing.get_type_hints(cls, include_extras=True)


def check_fields(config):
    """Raise UserError unless each field of a dataclass has its type and is within its bound."""
    for key, type_ in key_types(type(config)).items():
        check_type(key, getattr(config, key), type_)


def options_of(type_):
    """[(type, its Bound or None)] of the members of a union, or of a single type."""
    union = isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union
    options = typing.get_args(type_) if union else [type_]
    return [(option.__origin__, option.__metadata__[0]) if hasattr(option, '__metadata__')
            else (option, None) for option in options]


def configure(cls, argv=None):
    """Read argv (default: the command line) into the dataclass cls, from left to right.

    Returns (config, given): {key: its config file, or None for a flag}, in the order in which they
    were last set. --help prints the keys and exits, --version what is installed. Raises UserError
    on an unknown key, a bad value or file, a value out of bounds.
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(cls))
        sys.exit(0)
    if '--version' in argv:
        from lib.version import describe_version  # imports torch

        print(describe_version())
        sys.exit(0)
    types_, values, given, words = key_types(cls), {}, {}, list(argv)
    while words:
        word = words.pop(0)
        flag = word.startswith('-')
        new = read_flag(word, words, types_) if flag else read_config_file(word, cls)
        for key, value in new.items():
            given.pop(key, None)  # re-insert: order matters for --depth
            given[key] = None if flag else word
            values[key] = value
    return cls(**values), given


def read_flag(word, words, types_):
    """Parse --key=value, --key value (popped from words) or --switch into {key: value}."""
    key, equals, text = word.removeprefix('--').partition('=')
    require(word.startswith('--') and key, f'{word}: options are written --key=value')
    if key not in types_:
        raise UserError(f'--{key}: no such key{nearest(key, types_)}')
    if equals:
        return {key: parse_value(key, text, types_[key])}
    if types_[key] is bool or bool in typing.get_args(types_[key]):
        with contextlib.suppress(UserError, IndexError):  # --compile False, but --compile config.py
            value = parse_value(key, words[0], types_[key])
            words.pop(0)
            return {key: value}
        return {key: True}
    require(words and not words[0].startswith('--'),
            f'--{key}: a value is missing, write --{key}=value')
    return {key: parse_value(key, words.pop(0), types_[key])}


def read_config_file(path, cls):
    """{key: value} of a config file, typed by cls. Raises UserError with file and line.

    A program that reads a run (it has a key out_dir) takes a config file of train.py too: the keys
    that it shares, without init_from, which says where the training began.
    """
    as_input = f', or name a text with --input={path}' if 'input' in key_types(cls) else ''
    tree = parse_config_file(path, as_input)
    types_, values, ignored = key_types(cls), {}, []
    reads_run = 'out_dir' in types_ and not issubclass(cls, TrainConfig)
    of_train = key_types(TrainConfig) if reads_run else {}
    names = vars(cls())  # the defaults
    used = {node.id for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for statement in tree.body:
        where = f'{path} line {statement.lineno}'
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                continue  # `import time`, a docstring
            case (ast.Assign(targets=[ast.Name(id=key)], value=node)
                  | ast.AnnAssign(target=ast.Name(id=key), value=ast.AST() as node)):
                if not (key in types_ or key in of_train or key in used):
                    raise UserError(f'{where}: {key}: no such key{nearest(key, types_)}')
                with restate(UserError, where):
                    value = names[key] = evaluate(node, names)
                    if key in of_train and not fits(key, value, types_):
                        check_type(key, value, of_train[key])
                        ignored.append(key)
                    elif key in types_:
                        values[key] = names[key] = check_type(key, value, types_[key])
            case _:
                raise UserError(f'{where}: only lines of key = value are read here; '
                                f'config files are not executed{as_input}')
    if ignored:
        if values.pop('init_from', None) is not None:
            ignored.append('init_from')
        print(f'{path}: keys of train.py are ignored: {", ".join(ignored)}', file=sys.stderr)
    return values


def fits(key, value, types_):
    try:
        return key in types_ and check_type(key, value, types_[key]) == value
    except UserError:
        return False


def parse_config_file(path, as_input=''):
    """The syntax tree of a config file. Raises UserError, which ends in as_input."""
    found = find(path)
    if not os.path.exists(found):
        others = [str(p) for p in sorted(Path('config').glob('*.py'))]
        hint = nearest(str(path), others, otherwise='')
        if os.path.join('config', path) in others:
            hint = f'; did you mean {os.path.join("config", path)}?'
        elif '=' in str(path):
            hint = f'; did you mean --{path}?'
        raise UserError(f'{path}: there is no such file{hint}; '
                        f'a word without -- is the path of a config file')
    require(not found.is_dir(), f'{path} is a folder; a word without -- is a config file; a run: '
                                f'--out_dir={path}')
    try:
        with open_text(found) as file:
            text = file.read(MAX_FILE_BYTES + 1)
        require(len(text) <= MAX_FILE_BYTES, f'{path}: it has more than {MAX_FILE_BYTES:,} bytes')
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f' line {error.lineno}' if getattr(error, 'lineno', None) else ''
        reason = getattr(error, 'msg', str(error)).removeprefix(f'{found}: ')
        raise UserError(f'{path}{line}: not a config file: {reason}; '
                        f'write lines of key = value{as_input}') from None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
             ast.Pow: operator.pow}


def evaluate(node, names):
    """The value of a literal, arithmetic, a name, str + str, a list, str(x) or time.time()."""
    match node:
        case ast.Constant(value=value):
            require(type(value) is not int or value < 2**63,
                    'a whole number has more than 64 bits')  # which str() may refuse to print
            return value
        case ast.Name(id=name):
            require(name in names, f'{name}: no such key{nearest(name, names)}')
            return names[name]
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
            return [evaluate(n, names) for n in nodes]
        case ast.UnaryOp(ast.USub(), operand) if is_number(value := evaluate(operand, names)):
            return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = evaluate(left, names), evaluate(right, names)
            return calculate(OPERATORS[type(op)], a, b, ast.unparse(node))
        case ast.Call(func=ast.Name(id='str'), args=[argument], keywords=[]):
            return str(evaluate(argument, names))
        case ast.Call(func=ast.Attribute(value=ast.Name(id='time'), attr='time'), args=[],
                      keywords=[]):
            return time.time()
    raise UserError(f'{ast.unparse(node)}: write a literal, arithmetic, or the name of another key')


def calculate(op, a, b, source):
    """op(a, b) for two numbers, or str + str. Raises UserError that names the source."""
    text = isinstance(a, str) and isinstance(b, str) and op is operator.add
    require(text or is_number(a) and is_number(b), f'{source}: arithmetic needs two numbers')
    small = op is not operator.pow or abs(b) <= 64 and abs(a) <= 2**64
    small = small and not (text and len(a) + len(b) > MAX_FILE_BYTES)
    require(small, f'{source[:60]} is too large')
    try:
        return op(a, b)
    except (ArithmeticError, ValueError) as error:
        raise UserError(f'{source}: {error}') from None


def parse_value(key, text, type_):
    """The value of a flag. A str key takes the text as typed; others are parsed as in files."""
    if type_ in (str, FilePath, Text):
        return check_type(key, unescape(text) if type_ is Text else text, type_)
    try:
        constants = {'true': True, 'false': False, 'none': None}
        value = evaluate(ast.parse(text.strip(), mode='eval').body, constants)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # not an expression: text
        value = unescape(text)
    if Text in typing.get_args(type_) and not isinstance(value, (list, types.NoneType)):
        value = unescape(text)
    try:
        return check_type(key, value, type_)
    except UserError as error:
        # a choice that parses as a value: --position=none; a prompt that looks like a list
        if not isinstance(value, list) or Text in typing.get_args(type_):
            with contextlib.suppress(UserError):
                return check_type(key, text, type_)
        raise error from None


def unescape(text):
    """Decode the escapes \\n, \\t and \\\\ of text that was typed in a shell; not in FILE:path."""
    if text.startswith('FILE:'):
        return text
    with contextlib.suppress(UnicodeError):  # Python took UTF-8 for bytes: LC_ALL=C
        text = os.fsencode(text).decode('utf-8')
    return re.sub(r'\\([nt\\])', lambda match: {'n': '\n', 't': '\t'}.get(match[1], '\\'), text)


def check_type(key, value, type_):
    """value as type_: 1.0 for int, 1 for float, 0 or 1 for bool, x for list[x]. Raises UserError if
    it has another type or is out of bounds."""
    options, choices = options_of(type_), []
    for option, bound in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            choices += arguments
            if isinstance(value, str) and value in arguments:
                return value
        elif origin is list:
            values = value if isinstance(value, (list, tuple)) else [value]
            single = isinstance(value, (list, tuple)) or len(options) == 1
            if single and all(isinstance(v, arguments) and not isinstance(v, bool) for v in values):
                return list(values)
        elif option is types.NoneType and value is None:
            return None
        elif option in (str, Text) and isinstance(value, str):
            return value
        elif option is FilePath and isinstance(value, str) and '\0' not in value:
            path = os.path.expanduser(value)
            require(not path.startswith('~'), f'{key} = {shorten(value)}: there is no such user')
            try:
                os.fsencode(path)
            except UnicodeEncodeError:
                raise UserError(f'{key} = {shorten(value)} cannot be the name of a file') from None
            return path
        elif option is bool and (isinstance(value, bool) or is_number(value) and value in (0, 1)):
            return bool(value)
        elif option is float and is_number(value) or option is int and is_whole(value):
            if not bound or bound.holds(value):
                return option(value)
            or_none = ', or None' * (types.NoneType in typing.get_args(type_))
            raise UserError(f'{key} = {option(value)}: give {bound.text}{or_none}')
    hint = nearest(value, choices) if isinstance(value, str) and choices else ''
    raise UserError(f'{key} = {shorten(value)}: expected {describe(type_)}{hint}')


def is_number(value):
    """A finite float, or an int of 64 bits, numpy's too; not a bool."""
    if isinstance(value, numbers.Integral):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, numbers.Real) and math.isfinite(value)


def is_whole(value):
    return is_number(value) and value == value // 1 and abs(value) < 2**63


def describe(type_):
    """A type in words: 'int', 'float or None', 'learned, rope or none'."""
    words = []
    for option, _ in options_of(type_):
        if typing.get_origin(option) is Literal:
            words += typing.get_args(option)
        elif option is types.NoneType:
            words.append('None')
        else:
            words.append(str(option) if typing.get_origin(option) else option.__name__)
    *others, last = words
    return f'{", ".join(others)} or {last}' if others else last


SYNONYMS = {  # what other programs call a key
    'learning_rate': 'lr learn_rate max_lr', 'min_lr': 'min_learning_rate lr_min',
    'batch_size': 'bs batch micro_batch_size', 'weight_decay': 'wd decay l2',
    'n_layer': 'layers num_layers n_layers num_hidden_layers',
    'n_head': 'heads num_heads n_heads num_attention_heads',
    'n_embd': 'dim d_model hidden hidden_size n_embed width embed_dim model_dim hidden_dim emb_dim',
    'n_kv_head': 'kv_heads num_kv_heads num_key_value_heads',
    'block_size': 'ctx context context_length ctx_len seq_len max_seq_len sequence_length n_ctx',
    'max_iters': 'steps iters max_steps num_steps n_steps train_steps iterations epochs num_epochs',
    'gradient_accumulation_steps': 'grad_accum accum accumulation grad_acc_steps grad_accum_steps',
    'warmup_iters': 'warmup warmup_steps', 'grad_clip': 'clip max_grad_norm clip_grad clip_norm',
    'adam_eps': 'eps', 'dropout': 'drop', 'optimizer': 'optim', 'muon_momentum': 'momentum',
    'lora_rank': 'lora lora_r rank r', 'lora_alpha': 'alpha',
    'temperature': 'temp', 'start': 'prompt text', 'num_samples': 'n samples',
    'max_new_tokens': 'max_tokens length n_tokens max_length', 'num_beams': 'beams beam_size',
    'dataset': 'data data_dir', 'input': 'file path text in', 'val_fraction': 'val val_split split',
    'out_dir': 'out output output_dir dir save_dir',
    'init_from': 'ckpt model checkpoint_path resume',
    'eval_interval': 'eval_every eval_steps eval_freq', 'save_interval': 'save_every save_steps',
    'log_interval': 'log_every logging_steps', 'dtype': 'precision fp16 bf16',
    'gpus': 'n_gpus num_gpus',
}


def nearest(word, choices, otherwise='; --help lists them all'):
    """A hint for an unknown word."""
    lower = str(word).lower().replace('-', '_')
    close = [key for key in choices if lower in SYNONYMS.get(key, '').split()]
    close = close or difflib.get_close_matches(lower, list(choices), n=1, cutoff=0.8)
    return f'; did you mean {close[0]}?' if close else otherwise


def help_text(cls):
    """Every key with its default, type and comment, under the headings of the class's source."""
    lines = [inspect.getdoc(sys.modules['__main__']) or '', '',
             f'usage: python {sys.argv[0]} [config/file.py] [--key=value ...] [--switch ...]']
    defaults, hints = cls(), key_types(cls)
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    owner = {key: base for base in bases for key in base.__annotations__}  # the first to declare it
    for base in bases:
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r'    # (.+)', line):
                lines += ['', heading[1]]
            elif (match := re.match(r'    (\w+):', line)) and owner.get(match[1]) is base:
                key = match[1]
                flag = f'  --{key}={getattr(defaults, key)!r}'
                comment = line.partition('  # ')[2]
                bounds = [f': {bound.text}' for _, bound in options_of(hints[key]) if bound]
                kind = ''.join([describe(hints[key]), *bounds])
                lines.append(f'{flag:<41} ({kind}) {comment}'.rstrip())
    return '\n'.join(lines)
