"""On a real GPU: runs of train.py and sample.py. See test_cuda.py.

Models are tiny: what a step computes is tested there, here how a run holds together.
"""

import pytest
import torch

import checkpoint as ckpt
from helpers import (
    PARALLEL_RUN,
    TINY,
    assert_same_run,
    error_line,
    log_lines,
    save_overflowing,
    start_train,
    step_losses,
)
from lib import write
from lib.bpe import train_bpe

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('default')]

COMPILE_FAILED = 'torch.compile failed'
# of a loss: products of fp32 are in TF32, whose 11 bits may round either way; of bf16, 8 bits
ROUNDING, BF16_ROUNDING = 2e-3, 2e-2
# flex attention, in bf16 only
DOCUMENTS = ('--dtype=bfloat16', '--doc_mask', '--position=rope')


@pytest.fixture
def on_gpu(gpu):
    """The last flags of a run: TINY has --device=cpu."""
    return f'--device={gpu.type}', '--compile=False'


@pytest.fixture(scope='module')
def documents(tmp_path_factory, text):
    """A data set of short documents, each ended by a token."""
    folder = tmp_path_factory.mktemp('data') / 'documents'
    pieces = [
        write.Piece('val' if i % 9 == 8 else 'train', text[at : at + 70], True)
        for i, at in enumerate(range(0, 20000, 70))
    ]
    write.write_dataset(folder, pieces, train_bpe([text[:20000]], 300), 'test')
    return folder


def losses(out_dir):
    return [loss for _, loss, _ in step_losses(out_dir)]


def assert_same_losses(out_dir, reference, tolerance=ROUNDING):
    """The same losses and gradient norms, up to rounding."""
    assert losses(out_dir) == pytest.approx(losses(reference), rel=0, abs=tolerance)
    norms = [[norm for *_, norm in step_losses(path)] for path in (out_dir, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)


# One process --------------------------------------------------------------------------------------


@pytest.mark.parametrize('compile', [False, True], ids=['eager', 'compiled'])
def test_deterministic_resume_is_bitwise_exact(run, gpu, train_args, tmp_path, compile):
    """20 steps, against 10 and a resumed run."""
    keys = (*train_args, f'--device={gpu.type}', '--deterministic', f'--compile={compile}')
    keys += ('--eval_interval=10', '--save_interval=10')
    whole = run('train.py', f'--out_dir={tmp_path}/whole', *keys)
    run('train.py', f'--out_dir={tmp_path}/parts', *keys, '--max_iters=10')
    resume = ('--init_from=resume', '--max_iters=20')
    parts = run('train.py', f'--out_dir={tmp_path}/parts', *resume)
    assert COMPILE_FAILED not in whole.stdout + parts.stdout
    assert len(losses(tmp_path / 'whole')) == 20
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_fp16_trains_like_fp32(run, char_data, on_gpu, tmp_path):
    keys = (f'--dataset={char_data}', *TINY, '--max_iters=30', *on_gpu)
    for dtype in ('float32', 'float16'):
        run('train.py', f'--out_dir={tmp_path}/{dtype}', *keys, f'--dtype={dtype}')
    assert_same_losses(tmp_path / 'float16', tmp_path / 'float32', BF16_ROUNDING)
    assert losses(tmp_path / 'float16')[-1] < losses(tmp_path / 'float16')[0] - 0.3
    scaler = ckpt.load(tmp_path / 'float16').scaler
    assert scaler['scale'] == 2**16 and scaler['_growth_tracker'] == 30  # no step was skipped


@pytest.mark.parametrize('keys', [(), ('--optimizer=muon', *DOCUMENTS)],
                         ids=['adamw', 'muon with documents'])
def test_compiled_run_matches_eager(run, gpu, documents, tmp_path, keys):
    """Muon's step is compiled too, and documents are masked by flex attention."""
    common = (f'--dataset={documents}', *TINY, '--max_iters=8', '--dtype=float32', *keys)
    common += (f'--device={gpu.type}', '--learning_rate=1e-3', '--muon_learning_rate=2e-3')
    run('train.py', f'--out_dir={tmp_path}/eager', *common, '--compile=False')
    result = run('train.py', f'--out_dir={tmp_path}/compiled', *common, '--compile=True')
    assert 'compiling the model' in result.stdout and COMPILE_FAILED not in result.stdout
    assert len(losses(tmp_path / 'compiled')) == 8
    tolerance = BF16_ROUNDING if keys else ROUNDING
    assert_same_losses(tmp_path / 'compiled', tmp_path / 'eager', tolerance)


# activations of a micro-batch take gigabytes, everything else megabytes
LARGE_BATCH = (
    '--block_size=512',
    '--n_layer=4',
    '--n_head=4',
    '--n_embd=256',
    '--max_iters=4',
    '--eval_interval=4',
    '--deterministic',
)
NOTE_PEAK = """
import atexit, torch
def note():
    with open(PATH, 'w') as file:
        file.write(str(torch.cuda.max_memory_reserved()))
atexit.register(note)
"""
LIMIT_MEMORY = """
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(LIMIT / total)
"""


def test_out_of_memory_cuts_batch_and_preserves_step(
    run, char_data, on_gpu, patched_env, tmp_path
):
    """A real one: 1.4 times the memory of the small batch cannot hold one of twice the size."""
    keys = (f'--dataset={char_data}', *TINY, *LARGE_BATCH, *on_gpu)
    small = ('--batch_size=24', '--gradient_accumulation_steps=2', '--eval_iters=2')
    peak = tmp_path / 'peak'
    env = patched_env(NOTE_PEAK, PATH=str(peak))
    run('train.py', f'--out_dir={tmp_path}/small', *keys, *small, env=env)
    env = patched_env(LIMIT_MEMORY, LIMIT=1.4 * int(peak.read_text()))
    large = ('--batch_size=48', '--gradient_accumulation_steps=1', '--eval_iters=1')
    result = run('train.py', f'--out_dir={tmp_path}/cut', *keys, *large, env=env)
    message = 'out of memory with batch_size = 48: going on with 24, and 2 times as many'
    assert message in result.stdout
    assert_same_run(tmp_path / 'cut', tmp_path / 'small')


def test_auto_batch_size_grows_and_preserves_step(run, char_data, on_gpu, tmp_path):
    keys = (f'--dataset={char_data}', *TINY, '--max_iters=4', '--dtype=float32', *on_gpu)
    keys += ('--gradient_accumulation_steps=12', '--eval_iters=8')
    run('train.py', f'--out_dir={tmp_path}/asked', *keys)
    result = run('train.py', f'--out_dir={tmp_path}/auto', *keys, '--batch_size=auto')
    assert 'batch_size = 16, gradient_accumulation_steps = 3' in result.stdout
    for key in ('samples_seen', 'val_loss'):
        asked, auto = (
            [line[key] for line in log_lines(tmp_path / name, key)] for name in ('asked', 'auto')
        )
        assert auto == pytest.approx(asked, rel=0, abs=ROUNDING) and len(auto) in (2, 4)
    assert_same_losses(tmp_path / 'auto', tmp_path / 'asked')


@pytest.mark.parametrize('keys', [(), ('--num_beams=2',), ('--compile',)], ids=str)
def test_nonfinite_logits_end_sampling_with_one_sentence(run, gpu, trained, tmp_path, keys):
    """No device-side assert, after which the GPU is lost to the process."""
    save_overflowing(trained, tmp_path / 'out')
    common = (f'--out_dir={tmp_path}/out', f'--device={gpu.type}', '--max_new_tokens=8', *keys)
    result = run('sample.py', *common, '--start=d', '--num_samples=2', code=2)
    assert 'the logits are not finite' in error_line(result)
    assert COMPILE_FAILED not in result.stderr and 'assert' not in result.stderr


# Several processes --------------------------------------------------------------------------------


@pytest.fixture
def parallel_run(gpu, char_data):
    """The flags of a run whose losses do not depend on the split of a step."""
    return f'--dataset={char_data}', *PARALLEL_RUN, f'--device={gpu.type}'


@pytest.mark.parametrize('compile', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_nccl_with_one_process_matches_plain_run(
    run, ranks, parallel_run, tmp_path, parallel, compile
):
    # dropout is another one where it is compiled
    keys = (*parallel_run, '--dropout=0', '--optimizer=muon')
    run('train.py', f'--out_dir={tmp_path}/plain', *keys, '--compile=False')
    keys += (f'--parallel={parallel}', f'--compile={compile}')
    assert COMPILE_FAILED not in ranks(1, f'--out_dir={tmp_path}/one', *keys)
    assert len(losses(tmp_path / 'one')) == 8
    assert_same_losses(tmp_path / 'one', tmp_path / 'plain')


def test_torchrun_with_one_process(gpu, clone, parallel_run, tmp_path):
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1')
    keys = (f'--out_dir={tmp_path}/out', *parallel_run, '--parallel=fsdp', '--compile=False')
    with start_train(clone, *keys, command=torchrun) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert len(losses(tmp_path / 'out')) == 8


@pytest.mark.parametrize(
    'keys',
    [
        ('--compile=False',),
        ('--compile=False', '--optimizer=muon'),
        ('--compile=True', '--optimizer=muon', '--activation_checkpointing'),
        ('--compile=True', *DOCUMENTS),
    ],
    ids=['adamw', 'muon', 'compiled checkpointing', 'compiled documents'],
)
def test_two_gpus_match_one_process(run, ranks, gpu, parallel_run, documents, tmp_path, keys):
    if gpu.type == 'cuda' and torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    tolerance = BF16_ROUNDING if '--doc_mask' in keys else ROUNDING
    keys = (*parallel_run, f'--dataset={documents}', '--dropout=0', *keys)
    run('train.py', f'--out_dir={tmp_path}/one', *keys)
    for parallel in ('ddp', 'fsdp'):
        output = ranks(2, f'--out_dir={tmp_path}/{parallel}', *keys, f'--parallel={parallel}')
        assert COMPILE_FAILED not in output
        assert len(losses(tmp_path / parallel)) == 8
        assert_same_losses(tmp_path / parallel, tmp_path / 'one', tolerance)
