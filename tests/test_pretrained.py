"""Pretrained weights and foreign runs: GPT-2 from Hugging Face, and nanoGPT."""

import hashlib
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers

import checkpoint as ckpt
from helpers import error_line, write_nanogpt_dataset
from lib import bins, write
from lib.bpe import train_bpe
from lib.text import split_at_end
from model import GPT, GPTConfig


@pytest.fixture(scope='module')
def gpt2_folder(tmp_path_factory, bpe_data):
    """A tiny GPT-2 in Hugging Face's format, with the vocabulary of bpe_data."""
    folder = tmp_path_factory.mktemp('gpt2')
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            vocab_size=400,
            n_positions=64,
            bos_token_id=399,
            eos_token_id=399,
        )
    ).save_pretrained(folder)
    tok = bins.open_tokenizer(bpe_data)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    char_of = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    vocabulary = {
        ''.join(char_of[b] for b in token): i for i, token in enumerate(tok.token_bytes[:-1])
    }
    (folder / 'vocab.json').write_text(json.dumps(vocabulary | {'<|endoftext|>': 399}))
    return folder


@pytest.fixture(scope='module')
def bpe_data(tmp_path_factory, text):

    folder = tmp_path_factory.mktemp('data') / 'bpe'
    pieces = split_at_end([(text, True)], len(text.encode()))
    write.write_dataset(folder, pieces, train_bpe([text], 400), 'test')
    return folder


def test_gpt2_weights_can_be_finetuned_and_sampled(
    run, refused, gpt2_folder, bpe_data, char_data, tmp_path
):
    sampled = run(
        'sample.py',
        f'--init_from={gpt2_folder}',
        '--start=def ',
        '--num_samples=1',
        '--max_new_tokens=5',
    )
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
    run(
        'train.py',
        f'--init_from={gpt2_folder}',
        f'--dataset={bpe_data}',
        *common,
        '--block_size=16',
    )
    tuned = ckpt.load(tmp_path / 'out')
    assert tuned.model_config['block_size'] == 16
    assert tuned.model_config['bias']
    assert tuned.model['transformer.wpe.weight'].shape == (16, 32)
    before = ckpt.load(gpt2_folder).model['transformer.h.0.mlp.c_fc.weight']
    assert not torch.equal(tuned.model['transformer.h.0.mlp.c_fc.weight'], before)
    refused(
        'train.py',
        f'--init_from={gpt2_folder}',
        f'--dataset={char_data}',
        *common,
        says='different tokenizer',
    )
    refused(
        'train.py',
        f'--init_from={gpt2_folder}',
        f'--dataset={bpe_data}',
        *common,
        '--n_layer=5',
        says=('n_layer = 5', 'n_layer = 2'),
    )


def test_gpt2_is_downloaded_once_and_verified(run, refused, gpt2_folder, hub, tmp_path):
    common = (
        'sample.py',
        '--init_from=gpt2',
        '--start=def ',
        '--num_samples=1',
        '--max_new_tokens=5',
        '--dtype=float32',
    )
    env = hub(gpt2_folder, 'openai-community/gpt2', corrupt='model.safetensors')
    result = run(*common, code=2, env=env)
    assert 'sha256' in result.stderr and 'Traceback' not in result.stderr
    first = run(*common, env=hub(gpt2_folder, 'openai-community/gpt2'))
    cache = tmp_path / 'cache' / 'plaingpt' / 'gpt2'
    assert sorted(p.name for p in cache.iterdir()) == [
        'config.json',
        'model.safetensors',
        'vocab.json',
    ]
    offline = env | {'HF_ENDPOINT': 'http://127.0.0.1:9'}
    assert run(*common, env=offline).stdout == first.stdout
    assert run(*common, f'--init_from={gpt2_folder}').stdout == first.stdout
    refused(
        'sample.py', '--init_from=gpt2-medium', env=offline, says=('gpt2-medium', 'put config.json')
    )


@pytest.fixture
def nanogpt_run(tmp_path, text):
    """The folder of a compiled nanoGPT run, with its dataset."""

    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    write_nanogpt_dataset(tmp_path / 'data' / 'mine', text)
    size = pickle.loads((tmp_path / 'data' / 'mine' / 'meta.pkl').read_bytes())['vocab_size']
    shape = {
        'n_layer': 2,
        'n_head': 2,
        'n_embd': 16,
        'block_size': 32,
        'bias': False,
        'vocab_size': size,
    }
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


@pytest.mark.slow
def test_nanogpt_run_can_be_sampled_resumed_and_finetuned(run, nanogpt_run):
    sampled = run(
        'sample.py',
        '--out_dir=out',
        '--start=def ',
        '--num_samples=1',
        '--max_new_tokens=5',
        cwd=nanogpt_run,
    )
    assert sampled.stdout.startswith('def ')
    run('train.py', '--init_from=resume', '--out_dir=out', '--device=cpu', cwd=nanogpt_run)
    resumed = ckpt.load(nanogpt_run / 'out')
    assert (resumed.step, resumed.samples_seen, resumed.model_config['activation']) == (
        4,
        32,
        'gelu',
    )
    assert resumed.optimizer['state'][0]['step'] == 4  # nanoGPT's two steps and two more
    # the saved config still starts from nanoGPT's weights, which stay in place
    for _ in range(2):
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


@pytest.mark.parametrize(
    'case, says',
    [
        ('cut off', 'connection lost after'),
        ('other content', 'sha256'),
        ('not https', 'only https'),
    ],
)
def test_gpt2_download_is_renamed_only_when_complete(run, tmp_path, case, says):
    content = b'{"model_type": "gpt2"}' * 1000

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header(
                'X-Linked-Etag',
                f'"{hashlib.sha256(b"x" if case == "other content" else content).hexdigest()}"',
            )
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content[:-100] if case == 'cut off' else content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host = 'example.com' if case == 'not https' else f'127.0.0.1:{server.server_port}'
        hub = {'HF_ENDPOINT': f'http://{host}', 'XDG_CACHE_HOME': str(tmp_path)}
        assert says in error_line(run('sample.py', '--init_from=gpt2', env=hub, code=2))
        server.shutdown()
        thread.join()
    assert not list(tmp_path.rglob('config.json'))
