"""train.py as a user runs it: real processes, real files."""

import math
import re

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from helpers import TINY, log_lines
from lib import bins, write
from lib.bpe import train_bpe
from model import GPT, GPTConfig


def weights(out_dir):
    return ckpt.load(out_dir).model


def test_train_writes_log_config_and_checkpoint(trained, char_data):
    steps = log_lines(trained, 'loss')
    assert [line['step'] for line in steps] == list(range(20))
    assert all(
        set(line)
        == {
            'step', 'loss', 'lr', 'grad_norm', 'tokens_per_second', 'samples_seen', 'epoch',
            'update_ratio_adamw', 'update_ratio_gains', 'peak_memory',
        }  # fmt: skip
        for line in steps
    )
    assert [line['samples_seen'] for line in steps] == [4 * (s + 1) for s in range(20)]
    evaluations = log_lines(trained, 'val_loss')
    assert [line['step'] for line in evaluations] == [0, 10, 20]
    assert all(
        set(line) == {'step', 'train_loss', 'val_loss', 'val_bits_per_byte', 'seconds'}
        for line in evaluations
    )
    assert evaluations[-1]['val_loss'] < evaluations[0]['val_loss'] - 0.5
    assert ckpt.load(trained).step == 20
    assert ckpt.load(trained).val_loss == evaluations[-1]['val_loss']
    assert f"dataset = '{char_data}'" in (trained / 'config.py').read_text()


def test_train_reproduces_run_from_saved_config(run, trained, tmp_path):
    run('train.py', trained / 'config.py', f'--out_dir={tmp_path}/out')
    assert [line['loss'] for line in log_lines(tmp_path / 'out', 'loss')] == [
        line['loss'] for line in log_lines(trained, 'loss')
    ]


def test_eval_only_matches_loss_computed_by_hand(run, trained, char_data):
    before = (trained / 'log.jsonl').read_bytes()
    result = run(
        'train.py',
        '--init_from=resume',
        f'--out_dir={trained}',
        '--eval_only',
        '--eval_iters=-1',
        '--dtype=float32',
    )
    assert (trained / 'log.jsonl').read_bytes() == before  # an evaluation is not part of the run
    output = re.search(r'val loss ([\d.]+), .* ([\d.]+) bits per byte', result.stdout)
    model, characters = ckpt.load_model(trained)
    val = torch.from_numpy(np.fromfile(char_data / 'val.bin', dtype='<u2').astype(np.int64))
    nats = 0.0
    for start in range(0, len(val) - 1, 32):  # contiguous windows, the last one shorter
        targets = val[start + 1 : start + 33]
        logits, _ = model(val[None, start : start + len(targets)], targets[None])
        nats -= logits[0].log_softmax(-1).gather(1, targets[:, None]).sum().item()
    # four digits are printed
    assert float(output[1]) == pytest.approx(nats / (len(val) - 1), abs=6e-5)
    n_bytes = len(characters.decode(val[1:].tolist()).encode())
    assert float(output[2]) == pytest.approx(nats / math.log(2) / n_bytes, abs=6e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_train_matches_plain_pytorch_loop(run, char_data, tmp_path, dtype):
    """Five steps against a loop written with torch alone, up to the rounding of the dtype."""
    options = {
        'learning_rate': 0.01,
        'weight_decay': 0.2,
        'beta1': 0.8,
        'beta2': 0.9,
        'grad_clip': 0.5,
        'warmup_iters': 2,
    }
    run(
        'train.py',
        f'--dataset={char_data}',
        f'--out_dir={tmp_path}/out',
        *TINY,
        '--max_iters=5',
        '--bias',
        f'--dtype={dtype}',
        *(f'--{key}={value}' for key, value in options.items()),
    )
    data = bins.open_dataset(char_data, 32)
    torch.manual_seed(1337)
    model = GPT(
        GPTConfig(
            block_size=32, n_layer=2, n_head=2, n_embd=32, vocab_size=data.tokenizer.vocab_size
        )
    )
    matrices, vectors = (
        [p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False)
    )
    groups = [{'params': matrices, 'weight_decay': 0.2}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    norms, losses = [], []
    for step, lr in enumerate(
        [0.01 / 3, 0.02 / 3, *(0.001 + 0.0045 * (1 + math.cos(math.pi * i / 3)) for i in range(3))]
    ):
        for group in optimizer.param_groups:
            group['lr'] = lr
        x, y = map(torch.from_numpy, data.train.batch(4 * step, 4, 1337))
        losses.append(torch.nn.functional.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten()))
        losses[-1].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > 0.5  # clipping takes effect
    rounding = {'float32': 1e-5, 'bfloat16': 2e-2, 'float16': 2e-3}[dtype]
    lines = log_lines(tmp_path / 'out', 'loss')
    assert [line['loss'] for line in lines] == pytest.approx(
        [loss.item() for loss in losses], rel=rounding
    )
    assert [line['grad_norm'] for line in lines] == pytest.approx(
        [norm.item() for norm in norms], rel=10 * rounding
    )
    trained_weights = weights(tmp_path / 'out')
    if dtype == 'float32':
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(trained_weights[name], expected, atol=1e-5, rtol=1e-4)
    else:  # it really was half precision
        assert [line['loss'] for line in lines] != pytest.approx(
            [loss.item() for loss in losses], rel=1e-7
        )
        assert all(w.dtype == torch.float32 for w in trained_weights.values())


def test_eval_only_leaves_existing_run_untouched(run, trained, char_data, tmp_path):
    before = (trained / 'log.jsonl').read_text()
    common = ('--eval_only', f'--dataset={char_data}', *TINY)
    run('train.py', f'--out_dir={trained}', *common)
    run('train.py', f'--out_dir={tmp_path}/new', *common)
    assert (trained / 'log.jsonl').read_text() == before and not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_average_last_averages_checkpoint_weights(run, refused, char_data, tmp_path):
    folder = f'--out_dir={tmp_path}/out'
    run(
        'train.py',
        folder,
        f'--dataset={char_data}',
        *TINY,
        '--max_iters=12',
        '--save_interval=4',
        '--keep_last=3',
    )
    files = sorted((tmp_path / 'out').glob('ckpt_*.pt'))[-3:]
    means = {
        name: sum(ckpt.load(file).model[name] for file in files) / 3
        for name in ckpt.load(files[0]).model
    }
    loaded = ckpt.load(tmp_path / 'out', average_last=3)
    for name, weight in means.items():
        torch.testing.assert_close(loaded.model[name], weight)
    evaluate = ('train.py', '--init_from=resume', folder, '--eval_only', '--eval_iters=-1')
    output = run(*evaluate, '--average_last=3').stdout
    model, data = loaded.build_model().eval(), bins.open_dataset(char_data, 32)
    x, y = (torch.from_numpy(part) for part in data.val.windows(data.val.evaluation_windows(-1)))
    with torch.no_grad():
        assert f'val loss {model(x, y)[1].item():.4f}' in output and output != run(*evaluate).stdout
    options = ('--average_last=3', '--num_samples=1', '--max_new_tokens=5')
    assert 'and 2 before it' in run('sample.py', folder, *options).stderr
    refused(
        *evaluate,
        '--average_last=9',
        says=('average_last = 9', 'has 3 whole checkpoints', '--keep_last'),
    )
    refused('train.py', folder, '--average_last=2', says='only to evaluate')


def test_train_moves_earlier_run_aside(run, char_data, tmp_path):
    common = (f'--out_dir={tmp_path}/out', f'--dataset={char_data}', *TINY)
    run('train.py', *common, '--max_iters=3')
    result = run('train.py', *common, '--max_iters=2')
    assert 'earlier-1' in result.stdout
    assert ckpt.load(tmp_path / 'out').step == 2
    assert ckpt.load(tmp_path / 'out' / 'earlier-1').step == 3


def test_sample_every_eval_leaves_training_unchanged(run, trained, char_data, tmp_path):
    result = run(
        'train.py',
        f'--dataset={char_data}',
        f'--out_dir={tmp_path}/out',
        '--max_iters=20',
        *TINY,
        '--sample_every_eval',
    )
    assert result.stdout.count('  | ') >= 3
    assert [line['loss'] for line in log_lines(tmp_path / 'out', 'loss')] == [
        line['loss'] for line in log_lines(trained, 'loss')
    ]


@pytest.mark.slow
def test_doc_mask_trains_and_samples(run, refused, char_data, tmp_path, text):
    tok = train_bpe([text], 300)
    pieces = [
        write.Piece('val' if i % 9 == 8 else 'train', text[at : at + 70], True)
        for i, at in enumerate(range(0, 20000, 70))
    ]
    write.write_dataset(tmp_path / 'data', pieces, tok, 'test')
    common = (f'--out_dir={tmp_path}/out', '--max_iters=3', *TINY)
    run(
        'train.py',
        f'--dataset={tmp_path}/data',
        '--doc_mask',
        '--position=rope',
        '--ngram=2',
        *common,
    )
    model, _ = ckpt.load_model(tmp_path / 'out')
    assert model.config.eot_token == tok.eot
    run(
        'train.py',
        '--init_from=resume',
        f'--out_dir={tmp_path}/out',
        '--max_iters=4',
        '--eval_iters=-1',
    )

    # the val loss is that of the documents of each window on their own
    model, _ = ckpt.load_model(tmp_path / 'out')
    data = bins.open_dataset(tmp_path / 'data', 32)
    x, y = (torch.from_numpy(part) for part in data.val.windows(data.val.evaluation_windows(-1)))
    losses = []
    for ids, targets in zip(x.tolist(), y.tolist()):
        starts = sorted({0, *(i for i, token in enumerate(ids) if token == tok.eot), len(ids)})
        for first, last in zip(starts, starts[1:]):
            logits, _ = model(torch.tensor([ids[first:last]]), torch.tensor([targets[first:last]]))
            expected = torch.tensor(targets[first:last])
            each = torch.nn.functional.cross_entropy(
                logits[0], expected, reduction='none', ignore_index=-1
            )
            losses += each[expected >= 0].tolist()
    log = log_lines(tmp_path / 'out', 'step')
    assert log[-1]['val_loss'] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert run(
        'sample.py',
        f'--out_dir={tmp_path}/out',
        '--start=def',
        '--num_samples=1',
        '--max_new_tokens=50',
    ).stdout
    search = ('--num_beams=300', '--num_samples=300', '--max_new_tokens=2')
    beams = run('sample.py', f'--out_dir={tmp_path}/out', '--start=def', *search)
    # one of 300 ends immediately with <|endoftext|>, which is not printed
    assert '\ndef\n--' in '\n' + beams.stdout
    weights = sorted((tmp_path / 'out').glob('ckpt_*.pt'))[-1]
    # finetuning keeps doc_mask unless it is given
    for given, token in (((), tok.eot), (('--doc_mask=False',), None)):
        run(
            'train.py',
            f'--init_from={weights}',
            f'--dataset={tmp_path}/data',
            f'--out_dir={tmp_path}/tuned',
            '--max_iters=1',
            *(option for option in TINY if not option.startswith(('--block_size', '--n_'))),
            *given,
        )
        assert ckpt.load(tmp_path / 'tuned').model_config['eot_token'] == token
    refused(
        'train.py',
        f'--dataset={char_data}',
        '--doc_mask',
        f'--out_dir={tmp_path}/none',
        *TINY,
        says=('doc_mask', 'char'),
    )


def test_train_reports_user_errors_and_writes_nothing(refused, char_data, trained, tmp_path):
    (tmp_path / 'file').write_text('x')
    out = tmp_path / 'out'
    common = (f'--out_dir={out}', f'--dataset={char_data}', *TINY)
    refused(
        'train.py',
        '--dataset=openwebtext',
        says=('openwebtext', 'python data/openwebtext/prepare.py', 'config/quickstart.py'),
    )
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
    refused(
        'train.py', *common, f'--out_dir={tmp_path}/file/out', says=('out_dir', 'choose another')
    )
    refused(
        'train.py',
        '--init_from=resume',
        f'--out_dir={trained}',
        '--n_layer=3',
        says=('n_layer = 3', 'n_layer = 2'),
    )
    refused(
        'train.py',
        '--init_from=resume',
        f'--out_dir={trained}',
        '--block_size=16',
        says='block_size = 32',
    )
    assert not out.exists()


def test_train_keeps_secrets_out_of_files(run, train_args, tmp_path):
    secrets = {
        'WANDB_API_KEY': 'a1b2c3d4e5' * 4,
        'HF_TOKEN': 'hf_verysecretverysecret',
        'WANDB_MODE': 'offline',
        'WANDB_SILENT': 'true',
        'HOME': str(tmp_path),
    }
    result = run(
        'train.py',
        f'--out_dir={tmp_path}/out',
        *train_args,
        '--wandb_log',
        '--max_iters=4',
        env=secrets,
    )
    files = [path for path in (tmp_path / 'out').rglob('*') if path.is_file()]
    assert any('wandb' in path.parts for path in files)
    for written in (
        result.stdout.encode(),
        result.stderr.encode(),
        *(path.read_bytes() for path in files),
    ):
        for name in ('WANDB_API_KEY', 'HF_TOKEN'):
            assert secrets[name].encode() not in written


COUNT_SYNCS = """
import atexit, torch
syncs = 0
def counted(real):
    def counting(self, *args, **kwargs):
        global syncs
        syncs += 1
        return real(self, *args, **kwargs)
    return counting
for name in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'):
    setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
atexit.register(lambda: print('SYNCS', syncs))
"""


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_train_does_not_synchronize_between_log_lines(
    run, train_args, patched_env, tmp_path, optimizer
):
    """Each of these calls would block the CPU until the GPU has finished its queued work."""
    syncs = []
    for steps in (5, 15):
        options = (
            f'--max_iters={steps}',
            '--log_interval=1000',
            '--eval_interval=1000',
            '--save_interval=1000',
            f'--optimizer={optimizer}',
        )
        result = run(
            'train.py',
            f'--out_dir={tmp_path}/{steps}',
            *train_args,
            *options,
            env=patched_env(COUNT_SYNCS),
        )
        syncs.append(int(result.stdout.split('SYNCS')[1]))
    assert syncs[0] == syncs[1] > 0
