"""The programs as a person runs them: real processes, real files."""

import hashlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY
from test_bins import nanogpt_folder

import checkpoint as ckpt
from data import bins
from model import GPT, GPTConfig


def log_lines(out_dir, key):
    lines = (Path(out_dir) / 'log.jsonl').read_text().splitlines(keepends=True)
    return [line for line in (json.loads(line) for line in lines if line.endswith('\n')) if key in line]


def weights(out_dir):
    return ckpt.load(out_dir).model


# Training -----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_log_its_config_and_a_checkpoint(trained, char_data):
    steps = log_lines(trained, 'loss')
    assert [line['step'] for line in steps] == list(range(20))
    assert all(set(line) == {'step', 'loss', 'lr', 'grad_norm', 'tokens_per_second', 'samples_seen'} for line in steps)
    assert [line['samples_seen'] for line in steps] == [4 * (s + 1) for s in range(20)]
    evaluations = log_lines(trained, 'val_loss')
    assert [line['step'] for line in evaluations] == [0, 10, 20]
    assert all(set(line) == {'step', 'train_loss', 'val_loss', 'val_bits_per_byte', 'seconds'} for line in evaluations)
    assert evaluations[-1]['val_loss'] < evaluations[0]['val_loss'] - 0.5
    assert ckpt.load(trained).step == 20 and ckpt.load(trained).val_loss == evaluations[-1]['val_loss']
    assert f"dataset = '{char_data}'" in (trained / 'config.py').read_text()


def test_the_saved_config_runs_again(run, trained, tmp_path):
    run('train.py', trained / 'config.py', f'--out_dir={tmp_path}/out')
    assert [line['loss'] for line in log_lines(tmp_path / 'out', 'loss')] == [line['loss'] for line in log_lines(trained, 'loss')]


def test_the_loss_of_the_whole_split_is_that_of_the_model(run, trained, char_data):
    before = (trained / 'log.jsonl').read_bytes()
    result = run('train.py', '--init_from=resume', f'--out_dir={trained}', '--eval_only', '--eval_iters=-1', '--dtype=float32')
    assert (trained / 'log.jsonl').read_bytes() == before  # a mere evaluation is no part of the run
    said = re.search(r'val loss ([\d.]+), .* ([\d.]+) bits per byte', result.stdout)
    model, characters = ckpt.load_model(trained)
    val = torch.from_numpy(np.fromfile(char_data / 'val.bin', dtype='<u2').astype(np.int64))
    nats = 0.0
    for start in range(0, len(val) - 1, 32):  # windows laid end to end, the last one shorter
        targets = val[start + 1 : start + 33]
        logits, _ = model(val[None, start : start + len(targets)], targets[None])
        nats -= logits[0].log_softmax(-1).gather(1, targets[:, None]).sum().item()
    assert float(said[1]) == pytest.approx(nats / (len(val) - 1), abs=6e-5)  # four digits are printed
    n_bytes = len(characters.decode(val[1:].tolist()).encode())
    assert float(said[2]) == pytest.approx(nats / math.log(2) / n_bytes, abs=6e-5)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(run, char_data, tmp_path):
    common = (*TINY, f'--dataset={char_data}', '--max_iters=14', '--eval_interval=7', '--dropout=0.2', '--batch_size=2',
              '--gradient_accumulation_steps=3', '--dtype=float16')
    run('train.py', f'--out_dir={tmp_path}/whole', *common)
    run('train.py', f'--out_dir={tmp_path}/parts', *common, '--max_iters=7', '--lr_decay_iters=14')
    result = run('train.py', f'--out_dir={tmp_path}/parts', '--init_from=resume', '--max_iters=14')  # all else as it was
    assert 'step 7:' in result.stdout and 'step 6:' not in result.stdout
    for key in ('loss', 'val_loss'):
        whole, parts = ([line[key] for line in log_lines(tmp_path / name, key)] for name in ('whole', 'parts'))
        assert whole == parts and len(whole) == (14 if key == 'loss' else 3)
    whole, parts = ckpt.load(tmp_path / 'whole'), ckpt.load(tmp_path / 'parts')
    assert all(torch.equal(whole.model[name], parts.model[name]) for name in whole.model)
    assert parts.scaler == whole.scaler and parts.scaler['_growth_tracker'] == 14


def test_accumulation_does_not_change_the_step(run, char_data, tmp_path):
    for name, options in (('one', ('--batch_size=6',)), ('three', ('--batch_size=2', '--gradient_accumulation_steps=3'))):
        run(
            'train.py',
            f'--out_dir={tmp_path / name}',
            f'--dataset={char_data}',
            *TINY,
            '--max_iters=5',
            '--dtype=float32',
            *options,
        )
    one, three = ([line['loss'] for line in log_lines(tmp_path / name, 'loss')] for name in ('one', 'three'))
    assert one == pytest.approx(three, abs=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_training_is_adamw_written_out_by_hand(run, char_data, tmp_path, dtype):
    """Five steps of train.py against a plain loop of torch's own parts; in half precision to within its rounding."""
    options = {'learning_rate': 0.01, 'weight_decay': 0.2, 'beta1': 0.8, 'beta2': 0.9, 'grad_clip': 0.5, 'warmup_iters': 2}
    run('train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=5', '--bias', f'--dtype={dtype}',
        *(f'--{key}={value}' for key, value in options.items()))
    data = bins.open_dataset(char_data, 32)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32, vocab_size=data.tokenizer.vocab_size))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{'params': matrices, 'weight_decay': 0.2}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    norms, losses = [], []
    for step, lr in enumerate([0.01 / 3, 0.02 / 3, *(0.001 + 0.0045 * (1 + math.cos(math.pi * i / 3)) for i in range(3))]):
        for group in optimizer.param_groups:
            group['lr'] = lr
        x, y = map(torch.from_numpy, data.train.batch(4 * step, 4, 1337))
        losses.append(torch.nn.functional.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten()))
        losses[-1].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > 0.5  # clipping has something to do
    rounding = {'float32': 1e-5, 'bfloat16': 2e-2, 'float16': 2e-3}[dtype]
    lines = log_lines(tmp_path / 'out', 'loss')
    assert [line['loss'] for line in lines] == pytest.approx([loss.item() for loss in losses], rel=rounding)
    assert [line['grad_norm'] for line in lines] == pytest.approx([norm.item() for norm in norms], rel=10 * rounding)
    trained_weights = weights(tmp_path / 'out')
    if dtype == 'float32':
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(trained_weights[name], expected, atol=1e-5, rtol=1e-4)
    else:  # it was half precision indeed
        assert [line['loss'] for line in lines] != pytest.approx([loss.item() for loss in losses], rel=1e-7)
        assert all(w.dtype == torch.float32 for w in trained_weights.values())


def test_two_processes_train_as_one(clone, run, char_data, tmp_path):
    common = (
        f'--dataset={char_data}',
        *TINY,
        '--gradient_accumulation_steps=4',
        '--max_iters=6',
        '--dtype=float32',
        '--dropout=0.1',
    )
    run('train.py', f'--out_dir={tmp_path}/one', *common)
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        clone / 'train.py',
        f'--out_dir={tmp_path}/two',
        *common,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=clone)
    assert result.returncode == 0, result.stderr
    for key in ('loss', 'val_loss', 'grad_norm'):
        one, two = ([line[key] for line in log_lines(tmp_path / name, key)] for name in ('one', 'two'))
        assert one == pytest.approx(two, abs=1e-5) and len(one) in (2, 6)


def start(clone, *arguments):
    return subprocess.Popen(
        [sys.executable, clone / 'train.py', *map(str, arguments)],
        cwd=clone,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def read_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f'{words!r} never came')


def test_ctrl_c_stops_an_evaluation_at_once(clone, trained):
    options = ('--init_from=resume', '--eval_only', '--eval_iters=1000000', '--batch_size=1')
    with start(clone, f'--out_dir={trained}', *options) as process:
        read_until(process, 'parameters')
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == 'stopped\n'
    assert process.returncode == 130


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(refused, char_data, tmp_path):
    refused('train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=40', '--eval_interval=2',
            '--learning_rate=1e15', '--grad_clip=0', '--dtype=float32', says=('the loss is', 'learning_rate'))
    assert all(math.isfinite(manifest['val_loss']) for manifest in ckpt.manifests(tmp_path / 'out'))
    assert (tmp_path / 'out' / 'status').read_text() == 'failed\n'


def test_a_mere_evaluation_leaves_other_runs_alone(run, trained, char_data, tmp_path):
    before = (trained / 'log.jsonl').read_text()
    common = ('--eval_only', f'--dataset={char_data}', *TINY)
    run('train.py', f'--out_dir={trained}', *common)
    run('train.py', f'--out_dir={tmp_path}/new', *common)
    assert (trained / 'log.jsonl').read_text() == before and not (tmp_path / 'new').exists()


def test_a_resumed_run_is_checked_with_what_it_really_has(run, refused, char_data, tmp_path):
    common = (f'--out_dir={tmp_path}/out', '--init_from=resume')
    run('train.py', f'--out_dir={tmp_path}/out', f'--dataset={char_data}', *TINY, '--max_iters=2', '--learning_rate=1e-2')
    run('train.py', *common, '--max_iters=4', '--min_lr=2e-3')
    refused('train.py', *common, '--max_iters=6', '--learning_rate=1e-3', says='min_lr = 0.002')


def test_under_torchrun_the_main_process_says_what_is_wrong(clone):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', clone / 'train.py']
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=clone)
    assert result.stderr.count('train.py: dataset =') == 1 and 'RuntimeError' not in result.stderr


def test_a_run_that_is_over_says_so(run, tmp_path, char_data):
    result = run('train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', '--max_iters=0', *TINY)
    assert ckpt.load(tmp_path / 'out').step == 0
    result = run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/out')
    assert 'max_iters = 0 is reached' in result.stdout


def test_the_mean_of_the_last_checkpoints_is_evaluated_and_sampled(run, refused, char_data, tmp_path):
    folder = f'--out_dir={tmp_path}/out'
    run('train.py', folder, f'--dataset={char_data}', *TINY, '--max_iters=12', '--save_interval=4', '--keep_last=3')
    files = sorted((tmp_path / 'out').glob('ckpt_*.pt'))[-3:]
    means = {name: sum(ckpt.load(file).model[name] for file in files) / 3 for name in ckpt.load(files[0]).model}
    loaded = ckpt.load(tmp_path / 'out', average_last=3)
    for name, weight in means.items():
        torch.testing.assert_close(loaded.model[name], weight)
    evaluate = ('train.py', '--init_from=resume', folder, '--eval_only', '--eval_iters=-1')
    said = run(*evaluate, '--average_last=3').stdout
    model, data = loaded.build_model().eval(), bins.open_dataset(char_data, 32)
    x, y = (torch.from_numpy(part) for part in data.val.windows(data.val.evaluation_windows(-1)))
    with torch.no_grad():
        assert f'val loss {model(x, y)[1].item():.4f}' in said and said != run(*evaluate).stdout
    assert 'and 2 before it' in run('sample.py', folder, '--average_last=3', '--num_samples=1', '--max_new_tokens=5').stderr
    refused(*evaluate, '--average_last=9', says=('average_last = 9', 'has 3 whole checkpoints', '--keep_last'))
    refused('train.py', folder, '--average_last=2', says='only to evaluate')


def test_a_second_run_keeps_the_first(run, char_data, tmp_path):
    common = (f'--out_dir={tmp_path}/out', f'--dataset={char_data}', *TINY)
    run('train.py', *common, '--max_iters=3')
    result = run('train.py', *common, '--max_iters=2')
    assert 'earlier-1' in result.stdout
    assert ckpt.load(tmp_path / 'out').step == 2 and ckpt.load(tmp_path / 'out' / 'earlier-1').step == 3


def test_a_sample_at_each_evaluation_and_nothing_else_changes(run, trained, char_data, tmp_path):
    result = run(
        'train.py', f'--dataset={char_data}', f'--out_dir={tmp_path}/out', '--max_iters=20', *TINY, '--sample_every_eval'
    )
    assert result.stdout.count('  | ') >= 3
    assert [line['loss'] for line in log_lines(tmp_path / 'out', 'loss')] == [line['loss'] for line in log_lines(trained, 'loss')]


def test_wandb_logs_offline_and_never_stops_training(run, char_data, tmp_path):
    common = (f'--dataset={char_data}', *TINY, '--max_iters=2', '--wandb_log')
    no_account = {'WANDB_API_KEY': '', 'HOME': str(tmp_path), 'WANDB_SILENT': 'true'}
    result = run('train.py', f'--out_dir={tmp_path}/out', *common, env=no_account)
    assert 'logs offline' in result.stdout and list((tmp_path / 'out' / 'wandb').glob('offline-run-*/*.wandb'))
    broken = 'Settings = dict\ndef login(**options): return True\ndef init(**options): raise RuntimeError("no such project")\n'
    (tmp_path / 'wandb.py').write_text(broken)
    result = run('train.py', f'--out_dir={tmp_path}/broken', *common, env={'PYTHONPATH': str(tmp_path)})
    assert 'wandb does not work, going on without it: RuntimeError: no such project' in result.stdout
    assert len(log_lines(tmp_path / 'broken', 'loss')) == 2


# Weights of others --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def gpt2_folder(tmp_path_factory, bpe_data):
    """GPT-2 in miniature, in Hugging Face's layout, with the vocabulary of bpe_data."""
    folder = tmp_path_factory.mktemp('gpt2')
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=32, vocab_size=400, n_positions=64, bos_token_id=399, eos_token_id=399
        )
    ).save_pretrained(folder)
    made = bins.open_tokenizer(bpe_data)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    char_of = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    vocabulary = {''.join(char_of[b] for b in token): i for i, token in enumerate(made.token_bytes[:-1])}
    (folder / 'vocab.json').write_text(json.dumps(vocabulary | {'<|endoftext|>': 399}))
    return folder


@pytest.fixture(scope='module')
def bpe_data(tmp_path_factory, text):
    from data import tokenizer

    folder = tmp_path_factory.mktemp('data') / 'bpe'
    pieces = bins.split_at_end([(text, True)], len(text.encode()))
    bins.write_dataset(folder, pieces, tokenizer.train_bpe([text], 400), 'test')
    return folder


def test_gpt2_weights_are_finetuned_and_sampled(run, refused, gpt2_folder, bpe_data, char_data, tmp_path):
    sampled = run('sample.py', f'--init_from={gpt2_folder}', '--start=def ', '--num_samples=1', '--max_new_tokens=5')
    assert sampled.stdout.startswith('def ')
    common = (
        '--device=cpu',
        f'--out_dir={tmp_path}/out',
        '--max_iters=3',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        '--eval_iters=2',
        '--warmup_iters=0',
        '--learning_rate=1e-3',
    )
    run('train.py', f'--init_from={gpt2_folder}', f'--dataset={bpe_data}', *common, '--block_size=16')
    tuned = ckpt.load(tmp_path / 'out')
    assert (
        tuned.model_config['block_size'] == 16
        and tuned.model_config['bias']
        and tuned.model['transformer.wpe.weight'].shape == (16, 32)
    )
    before = ckpt.load(gpt2_folder).model['transformer.h.0.mlp.c_fc.weight']
    assert not torch.equal(tuned.model['transformer.h.0.mlp.c_fc.weight'], before)
    refused('train.py', f'--init_from={gpt2_folder}', f'--dataset={char_data}', *common, says='another tokenizer')
    refused(
        'train.py',
        f'--init_from={gpt2_folder}',
        f'--dataset={bpe_data}',
        *common,
        '--n_layer=5',
        says=('n_layer = 5', 'n_layer = 2'),
    )


def test_attention_within_documents_is_trained_and_sampled(run, refused, char_data, tmp_path, text):
    from data import tokenizer

    made = tokenizer.train_bpe([text], 300)
    pieces = [bins.Piece('val' if i % 9 == 8 else 'train', text[at : at + 70], True) for i, at in enumerate(range(0, 20000, 70))]
    bins.write_dataset(tmp_path / 'data', pieces, made, 'test')
    common = (f'--out_dir={tmp_path}/out', '--max_iters=3', *TINY)
    run('train.py', f'--dataset={tmp_path}/data', '--doc_mask', '--position=rope', '--ngram=2', *common)
    model, _ = ckpt.load_model(tmp_path / 'out')
    assert model.config.document_token == made.eot
    run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/out', '--max_iters=4', '--eval_iters=-1')

    # its val loss is that of each document of a window alone
    model, _ = ckpt.load_model(tmp_path / 'out')
    data = bins.open_dataset(tmp_path / 'data', 32)
    x, y = (torch.from_numpy(part) for part in data.val.windows(data.val.evaluation_windows(-1)))
    losses = []
    for ids, targets in zip(x.tolist(), y.tolist()):
        starts = sorted({0, *(i for i, token in enumerate(ids) if token == made.eot), len(ids)})
        for first, last in zip(starts, starts[1:]):
            logits, _ = model(torch.tensor([ids[first:last]]), torch.tensor([targets[first:last]]))
            expected = torch.tensor(targets[first:last])
            each = torch.nn.functional.cross_entropy(logits[0], expected, reduction='none', ignore_index=-1)
            losses += each[expected >= 0].tolist()
    said = [json.loads(line) for line in (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()]
    assert said[-1]['val_loss'] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert run('sample.py', f'--out_dir={tmp_path}/out', '--start=def', '--num_samples=1', '--max_new_tokens=50').stdout
    search = ('--num_beams=300', '--num_samples=300', '--max_new_tokens=2')
    beams = run('sample.py', f'--out_dir={tmp_path}/out', '--start=def', *search)
    assert '\ndef\n--' in '\n' + beams.stdout  # one of 300 ends at once, with <|endoftext|>, which is not shown
    weights = sorted((tmp_path / 'out').glob('ckpt_*.pt'))[-1]
    for given, token in ((), made.eot), (('--doc_mask=False',), None):  # who finetunes them keeps it, unless it is given
        run('train.py', f'--init_from={weights}', f'--dataset={tmp_path}/data', f'--out_dir={tmp_path}/tuned', '--max_iters=1',
            *(option for option in TINY if not option.startswith(('--block_size', '--n_'))), *given)
        assert ckpt.load(tmp_path / 'tuned').model_config['document_token'] == token
    refused('train.py', f'--dataset={char_data}', '--doc_mask', f'--out_dir={tmp_path}/none', *TINY, says=('doc_mask', 'char'))


def test_gpt2_is_downloaded_once_and_verified(run, refused, gpt2_folder, tmp_path):
    """The hub in miniature on this machine: each file with its sha256, as Hugging Face announces it."""
    answers = {f'/openai-community/gpt2/resolve/main/{path.name}': path.read_bytes() for path in gpt2_folder.iterdir()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = answers[self.path]
            self.send_response(200)
            self.send_header('X-Linked-Etag', f'"{hashlib.sha256(announced.get(self.path, content)).hexdigest()}"')
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    announced = {'/openai-community/gpt2/resolve/main/model.safetensors': b'another file'}
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub = {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'XDG_CACHE_HOME': str(tmp_path)}
        common = ('sample.py', '--init_from=gpt2', '--start=def ', '--num_samples=1', '--max_new_tokens=5', '--dtype=float32')
        result = run(*common, code=2, env=hub)
        assert 'sha256' in result.stderr and 'Traceback' not in result.stderr
        announced.clear()
        first = run(*common, env=hub)
        server.shutdown()
        thread.join()
    assert sorted(p.name for p in (tmp_path / 'plaingpt' / 'gpt2').iterdir()) == [
        'config.json',
        'model.safetensors',
        'vocab.json',
    ]
    assert run(*common, env=hub).stdout == first.stdout == run(*common, f'--init_from={gpt2_folder}').stdout
    refused('sample.py', '--init_from=gpt2-medium', env=hub, says=('gpt2-medium', 'put config.json'))


@pytest.fixture
def nanogpt_run(tmp_path, text):
    """A folder as nanoGPT leaves it, compiled and wrapped by DDP, with its data folder."""

    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    nanogpt_folder(tmp_path / 'data' / 'mine', text)
    size = pickle.loads((tmp_path / 'data' / 'mine' / 'meta.pkl').read_bytes())['vocab_size']
    shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 32, 'bias': False, 'vocab_size': size}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, activation='gelu'))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    for _ in range(2):
        model(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))[1].backward()
        optimizer.step()
    (tmp_path / 'out').mkdir()
    torch.save(
        {
            'model': {'_orig_mod.' + k: v for k, v in model.state_dict().items()},
            'optimizer': optimizer.state_dict(),
            'model_args': shape | {'dropout': 0.0},
            'iter_num': 2,
            'best_val_loss': torch.tensor(4.0),
            'config': {
                'dataset': 'mine',
                'batch_size': 4,
                'gradient_accumulation_steps': 2,
                'max_iters': 4,
                'eval_iters': 2,
                'eval_interval': 1,
                'learning_rate': 1e-3,
                'warmup_iters': 0,
                'lr_decay_iters': 4,
                'min_lr': 1e-4,
                'device': 'cuda',
                'dtype': 'float16',
                'compile': True,
                'block_size': 32,
            },
        },
        tmp_path / 'out' / 'ckpt.pt',
    )
    return tmp_path


def test_a_run_of_nanogpt_is_sampled_resumed_and_finetuned(run, nanogpt_run):
    sampled = run('sample.py', '--out_dir=out', '--start=def ', '--num_samples=1', '--max_new_tokens=5', cwd=nanogpt_run)
    assert sampled.stdout.startswith('def ')
    run('train.py', '--init_from=resume', '--out_dir=out', '--device=cpu', cwd=nanogpt_run)
    resumed = ckpt.load(nanogpt_run / 'out')
    assert (resumed.step, resumed.samples_seen, resumed.model_config['activation']) == (4, 32, 'gelu')
    assert resumed.optimizer['state'][0]['step'] == 4  # two steps here on top of nanoGPT's two
    for _ in range(2):  # the config of the resumed run starts from nanoGPT's weights, which stay where they are
        assert (nanogpt_run / 'out' / 'ckpt.pt').exists()
        run('train.py', 'out/config.py', '--max_iters=1', '--out_dir=out', cwd=nanogpt_run)
    run(
        'train.py',
        '--init_from=out/ckpt.pt',
        '--out_dir=tuned',
        '--dataset=mine',
        '--max_iters=1',
        '--eval_iters=1',
        '--warmup_iters=0',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        cwd=nanogpt_run,
    )
    assert ckpt.load(nanogpt_run / 'tuned').step == 1


# Data ---------------------------------------------------------------------------------------------------------------------


def test_your_own_text_becomes_a_data_set(run, refused, clone, tmp_path, text):
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    (tmp_path / 'in' / 'a.txt').write_text(text[:30000])
    (tmp_path / 'in' / 'sub' / 'b.txt').write_text(text[30000:])
    (tmp_path / 'in' / os.fsdecode(b'caf\xe9.txt')).write_text('')
    (tmp_path / 'in' / 'picture.png').write_bytes(b'\x89PNG\0\xff')
    result = run('data/text/prepare.py', '--input', tmp_path / 'in', '--tokenizer', 'bpe', '--vocab_size', 400, '--dataset=mine')
    assert '1 files are not UTF-8 text' in result.stdout and 'train.bin' in result.stdout and '100%' in result.stderr
    data = bins.open_dataset(clone / 'data' / 'mine', 32)
    everything = data.tokenizer.decode([*data.train.read([0], data.train.n_tokens)[0], *data.val.read([0], data.val.n_tokens)[0]])
    assert sorted(filter(None, everything.split('<|endoftext|>'))) == sorted([text[:30000], text[30000:]])
    for kind in ('char', 'byte'):
        result = run('data/text/prepare.py', f'--input={tmp_path}/in/a.txt', f'--tokenizer={kind}', '--dataset=mine')
        assert 'replacing the data set' in result.stdout
        data = bins.open_dataset(clone / 'data' / 'mine', 32)
        ids = [*data.train.read([0], data.train.n_tokens)[0], *data.val.read([0], data.val.n_tokens)[0]]
        assert data.tokenizer.decode(ids) == text[:30000]
    run('train.py', '--dataset=mine', f'--out_dir={tmp_path}/out', '--max_iters=1', *TINY)
    refused('data/text/prepare.py', says='--input=PATH')
    for name in ('', '../config', 'text/prepare.py'):
        refused('data/text/prepare.py', f'--input={tmp_path}/in/a.txt', f'--dataset={name}', says='dataset = ')
    refused('data/text/prepare.py', '--input=/no/such', says='/no/such')
    refused('data/text/prepare.py', f'--input={tmp_path}/in/picture.png', says='not UTF-8')
    (tmp_path / 'empty').mkdir()
    refused('data/text/prepare.py', f'--input={tmp_path}/empty', says='no text')


def test_a_small_data_set_is_prepared_when_it_is_missing(run, clone, tmp_path):
    result = run('train.py', '--dataset=python_stdlib', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=1')
    assert 'running python data/python_stdlib/prepare.py' in result.stdout and '100%' in result.stderr
    data = bins.open_dataset(clone / 'data' / 'python_stdlib', 32)
    assert data.tokenizer.vocab_size == 2048 and 'def ' in data.tokenizer.decode(data.train.read([0], 5000)[0].tolist())
    assert data.train.n_tokens > 1_000_000


def test_shakespeare_without_a_network_is_one_sentence(refused, run, clone):
    offline = {'https_proxy': 'http://127.0.0.1:9'}
    refused(
        'data/shakespeare_char/prepare.py',
        env=offline,
        says=('https://raw.githubusercontent.com', 'data/shakespeare_char/input.txt', 'config/quickstart.py'),
    )
    (clone / 'data' / 'shakespeare_char' / 'input.txt').write_text(
        'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 50
    )
    run('data/shakespeare_char/prepare.py', env=offline)
    (clone / 'data' / 'shakespeare_char' / 'input.txt').unlink()


def test_a_large_data_set_needs_its_package(refused, tmp_path):
    (tmp_path / 'datasets.py').write_text('raise ImportError("not installed")')
    (tmp_path / 'tiktoken_cache').mkdir()
    for name in ('openwebtext', 'fineweb_edu'):
        refused(f'data/{name}/prepare.py', says='pip install datasets', env={'PYTHONPATH': str(tmp_path)})


# Mistakes -----------------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence_and_nothing_is_written(refused, char_data, trained, tmp_path):
    (tmp_path / 'file').write_text('x')
    out = tmp_path / 'out'
    common = (f'--out_dir={out}', f'--dataset={char_data}', *TINY)
    refused('train.py', says=('openwebtext', 'python data/openwebtext/prepare.py', 'config/quickstart.py'))
    refused('train.py', '--dataset=nothing', says=("dataset = 'nothing'", 'data/text/prepare.py'))
    refused('train.py', *common, '--lerning_rate=1', says='did you mean learning_rate')
    refused('train.py', 'config/quickstrat.py', says='did you mean config/quickstart.py')
    refused('train.py', *common, '--n_embd=30', '--n_head=4', says=('n_embd = 30', 'n_head = 4'))
    refused('train.py', *common, '--block_size=1000000', says=('train.bin', 'block_size = 1000000'))
    refused('train.py', *common, '--device=cuda:9', says='cuda:9')
    refused('train.py', *common, '--device=tpu', says='tpu')
    refused('train.py', *common, '--init_from=resume', says=str(out))
    refused('train.py', *common, '--init_from=gpt3', says='gpt3')
    for mistake in (
        'batch_size=0',
        'eval_iters=0',
        'eval_iters=-2',
        'learning_rate=0',
        'beta1=1',
        'max_iters=-1',
        'grad_clip=-1',
        'dropout=1',
        'keep_last=0',
        'decay_fraction=0',
        'n_kv_head=3',
        'seed=-1',
        'log_interval=0',
        'min_lr=-1',
        'min_lr=1',
        'lr_decay_iters=0',
        'peak_flops=0',
        'seed=2**64',
        'init_from=',
    ):
        refused('train.py', *common, f'--{mistake}', says=mistake.split('=')[0])
    refused('train.py', *common, f'--out_dir={tmp_path}/file/out', says=('out_dir', 'choose another'))
    refused('train.py', '--init_from=resume', f'--out_dir={trained}', '--n_layer=3', says=('n_layer = 3', 'n_layer = 2'))
    refused('train.py', '--init_from=resume', f'--out_dir={trained}', '--block_size=16', says='block_size = 32')
    assert not out.exists()


def test_the_tools_of_the_readme_are_there():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    command = 'pip install -r requirements-dev.txt && python -m pytest'
    assert command in readme and command in (ROOT / '.ci' / 'run').read_text()
    for path in set(re.findall(r'(?:config|data|tests)/[\w/]+\.(?:py|md)', readme)):
        assert (ROOT / path).exists(), path
    tests = ''.join(path.read_text(encoding='utf-8') for path in (ROOT / 'tests').glob('*.py'))
    promised = re.findall(r'`(test_\w+?)(_?\.\.\.)?`', readme)  # the tests behind the promises
    assert len(promised) > 20 and all(f'def {name}' in tests for name, _ in promised)
    requirements = (ROOT / 'requirements.txt').read_text().split()
    assert [r.split('==')[0] for r in requirements] == ['torch', 'numpy', 'tiktoken', 'tqdm', 'wandb']
    assert os.access(ROOT / '.ci' / 'run', os.X_OK)
