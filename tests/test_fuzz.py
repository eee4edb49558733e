"""Random damage to every kind of file, and random values, paths and options: the outcome is what it
would be without the damage, or one sentence (UserError)."""

import copy
import dataclasses
import json
import math
import random
import struct
from contextlib import suppress
from functools import partial

import pytest
import torch
import transformers

import checkpoint as ckpt
import sample
from configurator import TrainConfig, configure, key_types
from helpers import TINY, deep_equal
from lib import bins, recipe, resume, tokenizer, write
from lib.bpe import train_bpe, train_char
from lib.errors import UserError
from lib.files import find, read_json
from lib.run import read_log
from lib.text import split_at_end
from model import GPT, GPTConfig
from optimizer import make_optimizer

N = 300  # mutations of each kind
TEXT = "def main(x):\n    return 'naïve 日本'\n\n" * 40
WRONG = [None, 'text', '', -1, 0.5, 1e999, math.nan, 2**70, -(2**70), [], {}, [1], {'a': 1}, True,
         [[]], ['x'], {'a': {}}]  # fmt: skip


def leaves(value, path=()):
    """Paths of all values in nested dicts and lists, not only of the innermost."""
    yield path
    items = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:50]
    for key, item in items:
        yield from leaves(item, (*path, key))


def kind_of(value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return 'number' if number and value == value // 1 else type(value)


def mutate(value, rng):
    """A copy with one value deleted, or replaced by one of another kind; also its path."""
    value = copy.deepcopy(value)
    *path, last = rng.choice([path for path in leaves(value) if path])
    parent = value
    for key in path:
        parent = parent[key]
    old = parent[last]
    if isinstance(parent, dict) and rng.random() < 0.2:
        del parent[last]
    else:
        wrong = [w for w in WRONG if kind_of(w) != kind_of(old)]
        if isinstance(old, torch.Tensor):
            wrong = ['text', None, [], {}, old.flatten()[:-1], old[None, None], old.to_sparse()]
        parent[last] = rng.choice(wrong)
    return value, (*path, last)


def damage_text(text, rng):
    """Damage below the level of JSON."""
    i = rng.randrange(len(text))
    return rng.choice([text[:i], text[:i] + '\0' + text[i:], '[' * 200_000, '', '\ufeff' + text,
                       text[:i] + '9' * 5000 + text[i:], '"\\ud800"', 'null', '[]',
                       '3'])  # fmt: skip


def fuzz(original, write_file, read, ignored=(), n=N, seed=0):
    """Write mutations of a file, read each: equal to the original's result, or a UserError."""
    rng, counts = random.Random(seed), {'equal': 0, 'refused': 0}
    write_file(original)
    expected = read()
    for i in range(n):
        if isinstance(original, (dict, list)) and (i % 10 or not as_json(original)):
            value, where = mutate(original, rng)
        else:
            value, where = damage_text(json.dumps(original), rng), 'text'
        write_file(value)
        try:
            result = read()
        except UserError:
            counts['refused'] += 1
            continue
        except BaseException as error:
            raise AssertionError(f'{where}: {error!r}') from error
        if not any(key in ignored for key in where):
            assert deep_equal(result, expected), where
        counts['equal'] += 1
    print(counts)
    assert counts['refused'] > n / 10


def as_json(value):
    with suppress(TypeError):
        return bool(json.dumps(value))


def json_writer(path):
    return lambda v: path.write_text(v if isinstance(v, str) else json.dumps(v), 'utf-8')


TOKENIZERS = {
    'char': train_char([TEXT], end_of_text=True),
    'byte': tokenizer.ByteTokenizer(),
    'bpe': train_bpe([TEXT], 280),
    'ids': tokenizer.IdTokenizer(['a', None, 'b']),
    'odd ids': tokenizer.BPETokenizer(
        'bpe', r'[\s\S]', [bytes([b]) for b in range(256)], list(range(1, 257)), {'<s>': 0}
    ),
}


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_saved_tokenizers(tmp_path, kind):
    path, text = tmp_path / 't.json', '0 2' if kind == 'ids' else TEXT

    def read():
        tok = tokenizer.Tokenizer.from_dict(read_json(path))
        return tok.encode(text), tok.decode(tok.encode(text)), tok.vocab_size

    # another name of an id, or of none, is another tokenizer
    ignored = {'ids': ('names',), 'bpe': ('kind',), 'odd ids': ('kind',)}.get(kind, ())
    fuzz(TOKENIZERS[kind].to_dict(), json_writer(path), read, (*ignored, 'end_of_text'))


@pytest.mark.parametrize('kind', ['char', 'bpe', 'pairs'])
def test_meta_json(tmp_path, kind, prepare_pairs):
    if kind == 'pairs':
        folder = prepare_pairs([(f'a{i}', f'b{i}') for i in range(200)], '--tokenizer=byte')
    else:
        folder, pieces = tmp_path, split_at_end([(TEXT, False)], len(TEXT.encode()))
        write.write_dataset(folder, pieces, TOKENIZERS[kind], 'test')

    def read():
        data = bins.open_dataset(folder, 128 if kind == 'pairs' else 16)
        x, y = data.train.batch(0, 4, 1)
        return x.tolist(), y.tolist(), data.tokenizer.decode(x[0].tolist()), data.val.n_windows

    # what pairs say of themselves cannot be checked against the ids
    fuzz(json.loads((folder / 'meta.json').read_text()), json_writer(folder / 'meta.json'), read,
         ignored=('pairs', 'pattern', 'end_of_text'), n=N // 3)  # fmt: skip


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """A tiny GPT-2 of transformers, with tokenizer.json, vocab.json and merges.txt."""
    import tokenizers as hf

    folder = tmp_path_factory.mktemp('gpt2')
    tok = hf.ByteLevelBPETokenizer()
    tok.train_from_iterator([TEXT], 280, show_progress=False, special_tokens=['<|endoftext|>'])
    tok.save_model(str(folder))
    tok.save(str(folder / 'tokenizer.json'))
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=300)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ['config.json', 'vocab.json', 'tokenizer.json', 'merges.txt'])
def test_huggingface_folder(gpt2, tmp_path, name):
    folder = tmp_path / 'gpt2'
    folder.mkdir()
    for path in gpt2.iterdir():
        if path.name != 'tokenizer.json' or name in ('tokenizer.json', 'config.json'):
            (folder / path.name).write_bytes(path.read_bytes())
    if name == 'vocab.json':
        (folder / 'merges.txt').unlink()

    def read():
        checkpoint = ckpt.load(folder)
        model, tok = checkpoint.build_model().eval(), checkpoint.get_tokenizer()
        idx = torch.arange(16)[None] % model.config.vocab_size
        return model(idx, idx)[0], tok.encode(TEXT), tok.decode(tok.encode(TEXT))

    path = folder / name
    if name == 'merges.txt':
        lines = path.read_text().splitlines()

        def write_lines(lines):
            path.write_text(lines if isinstance(lines, str) else '\n'.join(map(str, lines)))

        fuzz(lines, write_lines, read, n=100)
    else:
        fuzz(json.loads(path.read_text()), json_writer(path), read)


def test_safetensors(gpt2, tmp_path):
    content = (gpt2 / 'model.safetensors').read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    path = tmp_path / 'model.safetensors'
    (tmp_path / 'config.json').write_bytes((gpt2 / 'config.json').read_bytes())

    def read():
        return ckpt.load(tmp_path).build_model().state_dict()

    def write_file(header):
        text = (header if isinstance(header, str) else json.dumps(header)).encode('utf-8')
        path.write_bytes(struct.pack('<Q', len(text)) + text + content[8 + length :])

    fuzz(json.loads(content[8 : 8 + length]), write_file, read)


def model_and_optimizer():
    torch.manual_seed(0)
    keys = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 16}
    config = TrainConfig(**keys, optimizer='muon')
    tok = TOKENIZERS['char']
    model = GPT(GPTConfig(**keys, vocab_size=tok.vocab_size, activation='gelu'))
    return config, model, make_optimizer(model, config), tok


@pytest.mark.slow
def test_checkpoints_of_ours(tmp_path):
    config, model, optimizer, tok = model_and_optimizer()
    state = {
        'format': 1, 'model_config': dataclasses.asdict(model.config), 'model': model.state_dict(),
        'step': 3, 'samples_seen': 7, 'val_loss': 2.5, 'best_val_loss': 2.0,
        'config': dataclasses.asdict(config), 'optimizer': optimizer.state_dict(), 'scaler': {},
        'tokenizer': tok.to_dict(), 'environment': {'torch': 'x', 'data': 'y'},
    }  # fmt: skip
    path = tmp_path / 'a.pt'

    def read():
        checkpoint = ckpt.load(path)
        model = checkpoint.build_model()
        _, _, optimizer, _ = model_and_optimizer()
        resume.load_optimizer(optimizer, torch.amp.GradScaler('cpu', enabled=False), checkpoint)
        config = TrainConfig()
        resume.take_saved_config(config, {}, checkpoint)
        recipe.check(config)
        return (model.state_dict(), checkpoint.get_tokenizer().encode('def main'),
                optimizer.state_dict()['state'], checkpoint.step)  # fmt: skip

    # values of its own kind that an older version may have left out
    fuzz(state, lambda v: torch.save(v, path), read, ignored=('param_groups', 'model_config'))


def test_checkpoints_of_nanogpt(tmp_path):
    _, model, _, tok = model_and_optimizer()
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bias', 'dropout')
    args = {name: getattr(model.config, name) for name in names}
    state = {'model': model.state_dict(), 'model_args': args, 'iter_num': 5,
             'best_val_loss': torch.tensor(2.0), 'optimizer': None,
             'config': {'dataset': 'x', 'batch_size': 4, 'gradient_accumulation_steps': 2}
             }  # fmt: skip
    path = tmp_path / 'ckpt.pt'

    def read():
        checkpoint = ckpt.load(path)
        return checkpoint.build_model().state_dict(), checkpoint.step

    fuzz(state, lambda v: torch.save(v, path), read, ignored=('bias', 'iter_num'))


@pytest.mark.slow
def test_manifests(trained, tmp_path):
    (source,) = trained.glob('ckpt_*20.json')
    path = tmp_path / source.name
    path.with_suffix('.pt').write_bytes(source.with_suffix('.pt').read_bytes())

    def read():
        checkpoint = ckpt.load(tmp_path, 'auto')
        return checkpoint.model, checkpoint.step

    fuzz(json.loads(source.read_text()), json_writer(path), read)


@pytest.mark.slow
def test_progress_of_an_interrupted_prepare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, 'COMMIT_BYTES', 100)
    monkeypatch.setattr(write, 'encode_pieces', partial(write.encode_pieces, size=100))
    texts = [TEXT[i : i + 50] for i in range(0, len(TEXT), 50)]

    def pieces(n):
        for i, text in enumerate(texts):
            if i == n:
                raise KeyboardInterrupt
            yield write.Piece('train' if i % 5 else 'val', text)

    def prepare(folder, n=None):
        with suppress(KeyboardInterrupt):
            write.write_dataset(folder, pieces(n), TOKENIZERS['char'], 'test')

    prepare(tmp_path / 'whole')
    prepare(tmp_path / 'broken', n=20)
    progress = json.loads((tmp_path / 'broken' / 'progress.json').read_text())

    def interrupt_again(value):
        for path in (tmp_path / 'broken').glob('*.bin'):
            path.unlink()
        (tmp_path / 'broken' / 'progress.json').unlink(missing_ok=True)
        prepare(tmp_path / 'broken', n=20)
        json_writer(tmp_path / 'broken' / 'progress.json')(value)

    def read():
        prepare(tmp_path / 'broken')
        assert (tmp_path / 'broken' / 'train.bin').read_bytes() == (
            tmp_path / 'whole' / 'train.bin'
        ).read_bytes()
        return True

    rng = random.Random(0)
    for i in range(N // 3):
        value, where = mutate(progress, rng) if i % 10 else (damage_text('{"a": 1}', rng), '')
        interrupt_again(value)
        with suppress(UserError):
            read()


def test_logs(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / 'log.jsonl').read_text().splitlines()]
    rng = random.Random(0)
    for i in range(N):
        damaged = [mutate(line, rng)[0] if rng.random() < 0.2 else line for line in lines]
        text = '\n'.join(json.dumps(line) for line in damaged)
        text = text if i % 5 else damage_text(text, rng)
        (tmp_path / 'log.jsonl').write_text(text, 'utf-8', errors='surrogatepass')
        for line in read_log(tmp_path):
            assert all(v is None or isinstance(v, (int, float)) for v in line.values())


VALUES = ['', '0', '1', '-1', '1.5', '1e999', 'nan', '2**63', '10**18', '0x' + 'f' * 5000,
          '9' * 5000, 'None', 'True', 'text', '[1]', "['a']", '{}', '(' * 5000, "'a' * 10**9",
          '1/0', '~', '\0', '日本', '"', '__import__("os")', 'lambda: 0', '9**9**9', ' ', '-',
          '\udcff', '1e-400', "'a'+'b'"]  # fmt: skip


def test_config_values():
    rng, keys, accepted = random.Random(0), list(key_types(TrainConfig)), 0
    for _ in range(7 * N):
        key, value = rng.choice(keys), rng.choice(VALUES)
        try:
            config, _ = recipe.read_train_config([f'--{key}={value}'])
        except UserError as error:
            assert len(str(error)) < 500
            continue
        accepted += 1
        json.dumps(dataclasses.asdict(config))  # numbers and text, which can be saved
    assert accepted > N / 3
    print(f'{7 * N} values, {accepted} accepted')


def test_config_files(tmp_path):
    rng, path = random.Random(0), tmp_path / 'c.py'
    atoms = ['batch_size', '=', '1', "'a'", '+', '*', '(', ')', '\n', 'out_dir', 'x', '**', '[',
             ']', ',', '"""', '#', 'import x', 'str(', 'time.time()', '\\', '\0', '10**9', 'f"{x}"',
             ':', 'del', 'while True: pass', '\t']  # fmt: skip
    for _ in range(2 * N):
        path.write_text(' '.join(rng.choices(atoms, k=rng.randint(1, 12))))
        with suppress(UserError):
            configure(TrainConfig, [str(path)])
    for bomb in ('a = "x"\n' + 'a = a + a\n' * 60 + 'out_dir = a\n', 'seed = 1\n' * 75_000):
        path.write_text(bomb)
        with pytest.raises(UserError, match='too large|more than'):
            configure(TrainConfig, [str(path)])


PATHS = ['', '.', '..', '~', '~nobody', '/', '/dev/null', '\0', 'a\nb', "it's", 'a b', '日本',
         'x' * 300, 'x/' * 3000, '\udcff', '-', '--x', '*', '/proc/self/mem', '/nowhere/x/y', 'NUL',
         'con.txt', 'FILE:', 'FILE:~', 'a\\b']  # fmt: skip


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readers = {
        'load': ckpt.load,
        'dataset': lambda path: bins.open_dataset(bins.find_dataset(path), 16),
        'prompt': lambda path: tokenizer.read_prompt(f'FILE:{path}'),
        'config': lambda path: configure(TrainConfig, [path] if path else ['--out_dir']),
        'find': find,
    }
    for name, read in readers.items():
        for path in PATHS:
            with suppress(UserError):
                read(path)
                assert name in ('find', 'prompt', 'config'), (name, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sampling_options(trained, capsys):
    rng, done = random.Random(0), 0
    pool = {
        'temperature': ['0', '1e-300', '1e300', '1', '5e-324'],
        'top_k': ['1', '2', 'None', '10**9'],
        'top_p': ['1e-320', '1e-9', '1', '0.5', 'None'],
        'min_p': ['0', '1', '5e-324', 'None'],
        'repetition_penalty': ['0.01', '100', '1'],
        'num_beams': ['1', '3'],
        'length_penalty': ['-10', '10', '0'],
        'slide': ['0', '1', '32', '33'],
        'stop': ['\\n', "['a', 1]", '10**9', "['']"],
        'num_samples': ['1', '3', '10**9'],
        'max_new_tokens': ['0', '1', '5', '10**10'],
        'start': ['\\n', 'def', "['a', 'bcd']", '日本', ''],
        'quantize': ['auto', 'none', 'int8'],
        'checkpoint': ['last', 'best', '20', '999', 'auto'],
        'seed': ['0', str(2**63 - 1)],
    }
    for _ in range(N):
        options = {key: rng.choice(values) for key, values in pool.items() if rng.random() < 0.3}
        options = {'max_new_tokens': '3', 'num_samples': '2'} | options
        argv = [f'--{key}={value}' for key, value in options.items()]
        try:
            config, _ = configure(sample.Config, [f'--out_dir={trained}', '--device=cpu', *argv])
            sample.check(config)
            sample.main(config)
            done += 1
        except UserError:
            continue
        except Exception as error:
            raise AssertionError(f'{argv}: {error!r}') from error
    assert done > N / 10
    with capsys.disabled():
        print(f'{N} combinations of options, {done} sampled', end=' ')


@pytest.mark.slow
def test_train_options_out_of_proportion(refused, tmp_path, char_data):
    """Sizes that cannot fit are refused by arithmetic, at once."""
    for argument in ('--n_layer=1000000', '--depth=200000', '--gradient_accumulation_steps=10**18',
                     '--gradient_accumulation_steps=2*10**9', '--batch_size=10**9',
                     '--n_embd=1000000', '--ngram_rows=10**18', '--ngram_rows=10**9',
                     '--n_head=10**6', '--block_size=10**9', '--keep_last=10**12'):  # fmt: skip
        options = [o for o in TINY if o.split('=')[0] != argument.split('=')[0]]
        extra = ['--ngram=3'] if 'ngram' in argument else []
        refused('train.py', *options, *extra, argument, f'--dataset={char_data}',
                f'--out_dir={tmp_path / "o"}', says='=')  # fmt: skip
    assert not (tmp_path / 'o' / 'log.jsonl').exists()
