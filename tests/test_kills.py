"""SIGKILL at chosen and at random moments: the resumed run equals the uninterrupted one."""

import os
import signal
import subprocess
import sys

import pytest

import checkpoint as ckpt
from helpers import TINY, assert_same_run
from lib import bins

KILL_AT = """
import os, signal

def kill_at(name, suffix, after=False):
    real = getattr(os, name)
    def patched(*args, **kwargs):
        path = os.readlink(f'/proc/self/fd/{args[0]}') if name == 'fsync' else str(args[-1])
        result = real(*args, **kwargs) if after else None
        if path.endswith(suffix):
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else real(*args, **kwargs)
    setattr(os, name, patched)

kill_at(*POINT)
"""


KILL_IN_EVALUATION = """
import numpy, os, signal
pad, calls = numpy.pad, []
def patched(*args, **kwargs):
    calls.append(1)
    # an evaluation makes 8 calls (2 splits, 2 batches, 2 arrays): this is in the second, at step 8
    if len(calls) == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return pad(*args, **kwargs)
numpy.pad = patched
"""


# (case, where the process is killed, step from which the next one resumes); saves: every 4 steps
KILLS = (
    ('while writing the data', ('fsync', 'ckpt_00000008.pt.tmp'), 4),
    ('while writing the manifest', ('fsync', 'ckpt_00000008.json.tmp'), 4),
    ('before renaming the data', ('replace', 'ckpt_00000008.pt'), 4),
    ('between data and manifest', ('replace', 'ckpt_00000008.json'), 4),
    ('just after the manifest', ('replace', 'ckpt_00000008.json', True), 8),
    ('before deleting an old checkpoint', ('replace', 'ckpt_00000004.json.tmp'), 12),
    ('while deleting an old checkpoint', ('replace', 'ckpt_00000008.json.tmp', True), 16),
    ('after deleting the data of an old checkpoint', ('unlink', 'ckpt_00000012.json.tmp'), 20),
)


@pytest.mark.slow
def test_resume_continues_from_last_save_after_repeated_sigkill(
    run, train_args, patched_env, reference_run, tmp_path
):
    # synchronous saves, so that the step of each kill is known
    command = ('train.py', f'--out_dir={tmp_path}/out', '--async_save=False', '--max_iters=20')
    options = train_args
    for case, point, step in KILLS:
        run(*command, *options, env=patched_env(KILL_AT, POINT=point), code=-signal.SIGKILL)
        options = ('--init_from=resume',)
        assert ckpt.manifests(tmp_path / 'out')[0]['step'] == step, case
    result = run(*command, *options)
    assert 'half-written: ckpt_00000012.json.tmp' in result.stdout
    assert_same_run(tmp_path / 'out', reference_run)


def test_resume_continues_after_sigkill_during_evaluation(
    run, train_args, patched_env, reference_run, tmp_path
):
    run(
        'train.py',
        f'--out_dir={tmp_path}/out',
        *train_args,
        '--async_save=False',
        env=patched_env(KILL_IN_EVALUATION),
        code=-signal.SIGKILL,
    )
    result = run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/out')
    assert 'step 4:' in result.stdout and 'step 3:' not in result.stdout
    assert_same_run(tmp_path / 'out', reference_run)


def test_resume_survives_sigkill_while_resuming(run, patched_env, reference_run, out_dir):
    (out_dir / 'ckpt_00000020.json').unlink()
    (out_dir / 'ckpt_00000020.pt').unlink()
    for name in ('config.py', 'log.jsonl'):
        killed = patched_env(KILL_AT, POINT=('replace', name))
        run(
            'train.py',
            '--init_from=resume',
            f'--out_dir={out_dir}',
            env=killed,
            code=-signal.SIGKILL,
        )
    result = run('train.py', '--init_from=resume', f'--out_dir={out_dir}')
    assert 'removed what a killed process left half-written: log.jsonl.tmp' in result.stdout
    assert_same_run(out_dir, reference_run)


def test_train_survives_sigkill_while_moving_earlier_run(run, train_args, patched_env, out_dir):
    killed = patched_env(KILL_AT, POINT=('rename', 'log.jsonl'))
    run('train.py', f'--out_dir={out_dir}', *train_args, env=killed, code=-signal.SIGKILL)
    run('train.py', f'--out_dir={out_dir}', *train_args, '--max_iters=0')
    kept = {path.name for path in out_dir.glob('earlier-*/*')}
    assert kept == {
        'ckpt_00000016.pt',
        'ckpt_00000016.json',
        'ckpt_00000020.pt',
        'ckpt_00000020.json',
        'log.jsonl',
        'config.py',
        'status',
    }


@pytest.mark.parametrize(
    'point', [('fsync', 'train.bin.tmp'), ('replace', 'train.bin'), ('replace', 'val.bin')]
)
def test_prepare_leaves_no_dataset_when_killed(
    run, refused, clone, patched_env, text, tmp_path, point
):
    (tmp_path / 'text.txt').write_text(text)
    name = 'killed_' + tmp_path.name.replace('.', '_')
    prepare = (
        'data/text/prepare.py',
        f'--input={tmp_path}/text.txt',
        '--tokenizer=char',
        f'--dataset={name}',
    )
    run(*prepare, env=patched_env(KILL_AT, POINT=point), code=-signal.SIGKILL)
    refused('train.py', f'--dataset={name}', *TINY, says=name)
    run(*prepare)
    assert sorted(path.name for path in (clone / 'data' / name).iterdir()) == [
        '.lock',
        'meta.json',
        'train.bin',
        'val.bin',
    ]
    bins.open_dataset(clone / 'data' / name, 32)


PREPARE = """
import os, signal, sys
from lib import write
from lib.bpe import train_bpe
text, kill_at = open(sys.argv[2], encoding='utf-8').read(), int(sys.argv[3])
write.COMMIT_BYTES, write.SHARD_BYTES = 20_000, 30_000
def pieces():
    for i in range(0, len(text), 1000):
        if i // 1000 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        split = 'val' if i // 1000 % 10 == 9 else 'train'
        yield write.Piece(split, text[i:i + 1000], ends_document=i // 1000 % 7 == 0)
real = write.encode_pieces
write.encode_pieces = lambda pieces, encode, pool: real(pieces, encode, pool, size=3000)
write.write_dataset(sys.argv[1], pieces(), train_bpe([text[:4000]], 300), sys.argv[4],
                    ordinary=bool(sys.argv[5]))
"""


@pytest.mark.slow
def test_prepare_resumes_to_identical_bins_after_sigkill(clone, text, tmp_path):
    text = text[:500] + '<|endoftext|>' + text[500:]
    (tmp_path / 'text.txt').write_text(text)

    def prepare(folder, kill_at=-1, source='a text', ordinary=False):
        command = [
            sys.executable,
            '-c',
            PREPARE,
            tmp_path / folder,
            tmp_path / 'text.txt',
            str(kill_at),
            source,
            '1' * ordinary,
        ]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True)

    assert prepare('whole').returncode == 0
    for kill_at in (30, 31, 55, 90):
        assert prepare('killed', kill_at).returncode == -signal.SIGKILL
        assert not (tmp_path / 'killed' / 'val.bin').exists()
    result = prepare('killed')
    assert 'continuing after the' in result.stdout and result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / 'whole').iterdir())
    assert sorted(path.name for path in (tmp_path / 'killed').iterdir()) == names
    assert 'train_00001.bin' in names
    for name in names:
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()

    # committed data are missing: start over
    prepare('torn', 60)
    os.truncate(tmp_path / 'torn' / 'train.bin.tmp', 10)
    assert 'going on' not in prepare('torn').stdout
    assert (tmp_path / 'torn' / 'train.bin').read_bytes() == (
        tmp_path / 'whole' / 'train.bin'
    ).read_bytes()

    # a prepare of another source discards the first one's progress, even if killed before a commit
    prepare('mixed', 60)
    assert prepare('mixed', 5, source='another').returncode == -signal.SIGKILL
    assert 'going on' not in prepare('mixed').stdout
    assert (tmp_path / 'mixed' / 'train.bin').read_bytes() == (
        tmp_path / 'whole' / 'train.bin'
    ).read_bytes()

    # so does one to which <|endoftext|> is plain text
    prepare('ordinary', 60)
    result = prepare('ordinary', ordinary=True)
    assert result.returncode == 0 and 'continuing after' not in result.stdout
    assert prepare('ordinary too', ordinary=True).returncode == 0
    written = [(tmp_path / folder / 'train.bin').read_bytes()
               for folder in ('ordinary', 'ordinary too', 'whole')]
    assert written[0] == written[1] != written[2]

    prepare('changed', 60)
    (tmp_path / 'text.txt').write_text(text[:5000] + 'x' + text[5000:])
    result = prepare('changed')
    assert 'a text has changed since its prepare was interrupted' in result.stderr
    assert prepare('changed').returncode == 0


STREAM = """
import os, signal, sys
from lib import tokenizer, write
from lib.text import hub_documents
kill_at, read = int(sys.argv[3]), 0
write.COMMIT_BYTES = 50_000
(pieces, source), encoded = hub_documents(sys.argv[2], None, val_every=7), write.encode_pieces
def counted(state):
    global read
    for read, piece in enumerate(pieces(state), 1):
        if read == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
write.encode_pieces = lambda pieces, tokenizer, pool: encoded(pieces, tokenizer, pool, size=3000)
write.write_dataset(sys.argv[1], counted, tokenizer.ByteTokenizer(), source)
print(read, 'documents read')
"""


@pytest.mark.slow
def test_prepare_stream_resumes_without_rereading_documents(clone, text, tmp_path):
    import datasets

    documents = [text[i : i + 1000] for i in range(0, 120_000, 1000)]
    for shard in range(3):
        datasets.Dataset.from_dict({'text': documents[shard * 40 :][:40]}).to_parquet(
            tmp_path / 'hub' / f'{shard}.parquet'
        )

    def prepare(folder, kill_at=-1):
        command = [sys.executable, '-c', STREAM, tmp_path / folder, tmp_path / 'hub', str(kill_at)]
        return subprocess.run(
            command,
            cwd=clone,
            capture_output=True,
            text=True,
            env=os.environ | {'HF_HOME': str(tmp_path)},
        )

    assert '120 documents read' in prepare('whole').stdout
    assert prepare('killed', 70).returncode == -signal.SIGKILL
    result = prepare('killed')
    assert 'continuing after' in result.stdout and '70 documents read' in result.stdout, (
        result.stdout + result.stderr
    )
    for name in ('meta.json', 'train.bin', 'val.bin'):
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    data = bins.open_dataset(tmp_path / 'killed', 16)
    ids = data.train.read([0], data.train.n_tokens)[0]
    assert data.tokenizer.decode(ids) == ''.join(d for i, d in enumerate(documents) if i % 7)
    result = subprocess.run(
        [sys.executable, '-c', STREAM, tmp_path / 'x', tmp_path / 'nowhere', '-1'],
        cwd=clone,
        capture_output=True,
        text=True,
        env=os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)},
    )
    assert 'UserError' in result.stderr and 'nowhere: cannot be read' in result.stderr


@pytest.mark.slow
def test_crashtest_survives_one_random_kill(run):
    assert run('tools/crashtest.py', '--kills=1').stdout.endswith('OK\n')


@pytest.mark.slow
def test_crashtest_survives_random_kills(run):
    assert run('tools/crashtest.py', '--kills=3').stdout.endswith('OK\n')
