"""The notebook runs from top to bottom, in the repository and where it has to clone it."""

import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

import checkpoint as ckpt
from helpers import ROOT
from lib.bpe import train_bpe
from lib.run import read_log
from lib.text import split_at_end
from lib.write import write_dataset

NOTEBOOK = ROOT / 'notebooks' / 'first_steps.ipynb'


@pytest.fixture
def cells():
    """{id: source} of the code."""
    notebook = nbformat.read(NOTEBOOK, 4)
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == 'code'}


@pytest.fixture
def folder(clone, tmp_path, text):
    """A clone with little data of the quickstart's name."""
    folder = shutil.copytree(clone, tmp_path / 'plaingpt')
    pieces = split_at_end([(text, True)], len(text.encode()))
    write_dataset(folder / 'data' / 'python_stdlib', pieces, train_bpe([text], 500), 'test')
    return folder


def printed(cell):
    return ''.join(output.get('text', '') for output in cell.outputs)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(folder, monkeypatch):
    monkeypatch.setenv('QUICK', '1')
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=200, kernel_name='python3',
                   resources={'metadata': {'path': folder / 'notebooks'}}).execute()
    done = {cell.id: cell for cell in notebook.cells}
    for name in ('out-first', 'out-no-ngrams'):
        assert ckpt.load(folder / name).step == 20
        assert name in printed(done['table'])
    assert printed(done['sample']).count('def main(') == 2
    assert re.search(r'step +20  val loss \d', printed(done['train'])) or 'image/png' in str(
        done['train'].outputs)
    page = (folder / 'out-first' / 'explain.html').read_text(encoding='utf-8')
    shown = ''.join(output.get('data', {}).get('text/html', '')
                    for output in done['explain'].outputs)
    assert '<iframe' in shown and len(shown) > len(page)
    assert len(re.findall(r'[+-]0\.\d{3}', printed(done['cause']))) == 8  # 2 layers of 4 heads
    assert re.match(r'layer \d, head \d\n', printed(done['head']))


@pytest.mark.slow
def test_an_interrupted_run_saves(cells, folder, monkeypatch):
    monkeypatch.setenv('QUICK', '1')
    manager, client = start_new_kernel(cwd=folder / 'notebooks')
    try:
        for name in ('settings', 'setup', 'watch'):
            client.execute(cells[name], reply=True, timeout=100)
        number = client.execute("train('out-long', '--max_iters=1000000')")
        for _ in range(600):
            if any(line['step'] > 0 for line in read_log(folder / 'out-long')):
                break
            time.sleep(0.1)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=100)
        while reply['parent_header']['msg_id'] != number:
            reply = client.get_shell_msg(timeout=100)
        assert reply['content']['status'] == 'ok'
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert (folder / 'out-long' / 'status').read_text() == 'stopped\n'
    assert ckpt.load(folder / 'out-long').step > 0


@pytest.mark.slow
def test_setup_clones_where_there_is_no_repository(cells, folder, tmp_path):
    def setup(repo):
        code = cells['settings'].replace("REPO = ''", f'REPO = {repo!r}') + '\n' + cells['setup']
        return subprocess.run([sys.executable, '-c', code + '\nprint(root)'], cwd=alone, text=True,
                              env=os.environ | {'PIP_NO_INDEX': '1'}, capture_output=True)

    alone = tmp_path / 'alone'
    alone.mkdir()
    result = setup('')
    assert result.returncode == 1 and result.stderr.startswith('fill in REPO')
    for command in (['init', '-q'], ['add', '.'], ['-c', 'user.name=x', '-c', 'user.email=x',
                                                   'commit', '-qm', 'x']):  # fmt: skip
        subprocess.run(['git', *command], cwd=folder, check=True)
    for _ in range(2):  # the second time it is there
        result = setup(str(folder))
        assert result.stdout.splitlines()[-1] == str(alone / 'plainGPT'), result.stderr
    assert (alone / 'plainGPT' / 'train.py').exists()


def test_notebook_is_small_and_its_links_lead_somewhere():
    assert NOTEBOOK.stat().st_size < 300_000  # with outputs, for GitHub
    texts = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells]
    links = re.findall(r'\]\(([^()\s]+)\)', '\n'.join(texts))
    assert len(links) > 4
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
