"""tools/gpu_report.py, on a CPU."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

import gpu_report
from gpu_report import Job, kind_of, read_tests


def test_report_needs_a_gpu(refused, tmp_path):
    refused('tools/gpu_report.py', '--device=cpu', f'--out_dir={tmp_path}/out', says='device = cpu')
    refused('tools/gpu_report.py', '--parts=speed', says="parts = 'speed': give some of tests")
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_quick_report_has_every_part(run, clone, tmp_path):
    folder = tmp_path / 'out'
    options = ('--device=cpu', '--quick', f'--out_dir={folder}', '--minutes=3')
    result = run('tools/gpu_report.py', *options, stdin=subprocess.DEVNULL)
    report = json.loads((folder / 'gpu_report.json').read_text())
    assert report['missing'] == [], result.stderr
    assert {row['part'] for row in report['rows']} == set(gpu_report.PARTS)
    assert len(report['rows']) == 15
    for row in report['rows']:
        if row['part'] == 'training':
            assert row['tokens/s'] > 0 and row['MFU %'] is None and row['estimated GB'] > 0
    (ratio,) = (row['ratio'] for row in report['rows'] if row['part'] == 'nanogpt')
    assert 0.01 < ratio < 100
    assert result.stdout.strip() == (folder / 'gpu_report.md').read_text().strip()
    assert '| GPT-2 124M | compiled | 2 x 2 x 64 |' in result.stdout


@pytest.mark.parametrize(
    'name, shapes, kind',
    [
        ('void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64...', [], 'attention'),
        ('cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16', [], 'attention'),
        ('fmha_cutlassF_bf16_aligned_64x64_rf_sm80', [], 'attention'),
        ('nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT', [[12288, 768], [768, 2304]], 'matmul'),
        ('sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n', [[12288, 768], [768, 768]], 'matmul'),
        ('nvjet_hsh_256x128_64x4_2x1_v_bz', [[6144, 768], [768, 50304]], 'loss and logits'),
        ('triton_red_fused_logsumexp_sub_exp_5', [], 'loss and logits'),
        ('void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>',
         [[50257, 768]], 'optimizer and clipping'),
        ('triton_poi_fused_gelu_2', [[12288, 3072]], 'other'),
        ('Memcpy HtoD (Pinned -> Device)', None, 'other'),
    ],
)  # fmt: skip
def test_kernels_are_sorted_by_name_and_shape(name, shapes, kind):
    assert kind_of(name, shapes, 50257) == kind


PYTEST = """\
[gw0] [  1%] PASSED tests/test_cuda.py::test_a[compiled muon]
tests/test_cuda.py::test_b
[gw1] [  2%] FAILED tests/test_cuda.py::test_b
[gw1] [ 66%] SKIPPED tests/test_cuda.py::test_c
"""


def test_results_of_tests_are_read_even_if_they_were_killed(tmp_path):
    path = tmp_path / 'pytest.txt'
    assert read_tests(path) is None
    path.write_text(PYTEST)
    found = read_tests(path)
    assert found['counts'] == {'passed': 1, 'failed': 1, 'skipped': 1}
    assert found['failures'] == ['tests/test_cuda.py::test_b']
    path.write_text(PYTEST + 'FAILED tests/test_cuda.py::test_b - AssertionError: off by 1\n')
    assert read_tests(path)['failures'] == ['tests/test_cuda.py::test_b - AssertionError: off by 1']


# jobs, see gpu_report.py


def good(config):
    yield
    yield {'speed': 1.0}


def crashing(config):
    yield
    os.abort()


def wrong(config):
    yield from ()
    raise RuntimeError('no such kernel')


def hanging(config):
    time.sleep(100)
    yield


def full(config):
    """Out of memory, as long as others share it."""
    others = list(open(config.out_dir / 'full', 'a+'))
    with open(config.out_dir / 'full', 'a') as file:
        file.write('tried\n')
    if not os.path.getsize(config.out_dir / 'full') > len('tried\n'):
        raise torch.OutOfMemoryError('CUDA out of memory')
    yield
    yield {'speed': 2.0, 'others': len(others)}


@pytest.mark.slow
def test_failing_job_costs_its_row_only(monkeypatch, tmp_path):
    (tmp_path / 'log').mkdir()
    monkeypatch.setattr(gpu_report, 'PREPARE_SECONDS', 20)
    config = SimpleNamespace(out_dir=tmp_path, minutes=5, quick=True)
    jobs = [Job(f.__name__, f) for f in (good, crashing, wrong, full, hanging)]
    monkeypatch.setattr(gpu_report, 'n_at_once', lambda device: len(jobs))
    device = torch.device('cpu')
    report = gpu_report.Report(config, device, jobs)
    gpu_report.run_jobs(jobs, device, report)
    assert [(row['job'], row['speed']) for row in report.rows] == [('good', 1.0), ('full', 2.0)]
    reasons = {entry['job']: entry['reason'] for entry in report.missing}
    assert list(reasons) == ['crashing', 'wrong', 'hanging']
    assert reasons['wrong'] == 'exit code 1: RuntimeError: no such kernel'
    assert reasons['crashing'].startswith('exit code ') and 'not done' in reasons['hanging']
    config.minutes = 0
    gpu_report.run_jobs(jobs[:1], device, report)
    assert report.missing[-1] == {'job': 'good', 'reason': 'not begun: --minutes=0 were over'}
