"""The commands and the Python code in README and docs run, word for word.

They run in a clone in which the config files ask for small models and few steps, and the data sets
are small. What needs a network, a GPU or minutes is left out: tests/test_docs.py checks its keys.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from lib.bpe import train_bpe, train_char
from lib.text import split_at_end
from lib.write import write_dataset
from pages import PAGES, blocks, commands

# weights or data from elsewhere, and what is trained from them
NETWORK = r'gpt2|nanoGPT|Qwen|openwebtext|fineweb|finetune_|out-(shakespeare|lora|chat)\b(?!-)'
MINUTES = (r'bench|crashtest|compare_rnn|gpu_report|scale|sweep|evaluate.py --out_dir=out-scan|'
           r'max_minutes|max_iters=(15|20)00|target_flops|slide')
LEFT_OUT = re.compile(f'{NETWORK}|{MINUTES}|--serve|--nnodes')
SMALL = """
n_layer = 2
n_head = 4
n_embd = 32
batch_size = 1
gradient_accumulation_steps = 1
warmup_iters = 2
max_iters = {}
eval_interval = {}
eval_iters = 1
keep_last = 20
"""


@pytest.fixture(scope='module')
def folder(clone, tmp_path_factory, text):
    """A clone with small config files and data, and with the files that a user brings."""
    folder = shutil.copytree(clone, tmp_path_factory.mktemp('docs') / 'plaingpt')
    for path in folder.glob('config/*.py'):
        steps = (300, 100) if path.name == 'quickstart.py' else (4, 2)
        small = SMALL.format(*steps)
        if path.name == 'quickstart.py' or 'shakespeare_char' in path.name:  # rows have a length
            small += 'block_size = 64\n'
        path.write_text(path.read_text() + small)
    tokenizers = {'python_stdlib': train_bpe([text], 300), 'shakespeare_char': train_char([text])}
    for name, tokenizer in tokenizers.items():
        pieces = split_at_end([(text[:20_000], True)], 20_000)
        write_dataset(folder / 'data' / name, pieces, tokenizer, name)
    (folder / 'PATH').write_text(text * 2)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    (folder / 'ita.txt').write_text('\n'.join(map('\t'.join, zip(lines, lines[1:]))))
    return folder


def run_command(command, folder, forked):
    """Raises AssertionError, with the output, if the exit code is not 0."""
    words = [str(folder / command.script), *command.arguments]
    env = {'WANDB_MODE': 'offline'}
    if command.script == 'tools/export.py':  # another page exports the same
        for path in folder.glob('out-*/*/'):
            if path.name in ('hf', 'gguf', 'onnx', 'safetensors'):
                shutil.rmtree(path)
    if command.torchrun:
        words = [sys.executable, '-m', 'torch.distributed.run', *command.torchrun, *words]
        result = subprocess.run(words, cwd=folder, env=os.environ | env, text=True,
                                capture_output=True, timeout=200)
    else:
        result = forked(words[0], words[1:], folder, env)
    output = f'{result.stdout}\n{result.stderr}'
    assert result.returncode == 0, f'{command}: {result.returncode}\n{output}'


@pytest.mark.slow
def test_commands_run(folder, forked):
    done = set()
    for command in (command for name in PAGES for command in commands(name)):
        words = ' '.join([*command.torchrun, command.script, *command.arguments])
        if words in done or LEFT_OUT.search(words):
            continue
        run_command(command, folder, forked)
        done.add(words)
        if words == 'train.py config/quickstart.py':
            shutil.copytree(folder / 'out-quickstart', folder / 'out-other')
    assert len(done) > 40
    for name in PAGES:
        for code in blocks(name, 'python'):
            result = subprocess.run([sys.executable, '-c', code], cwd=folder, text=True,
                                    capture_output=True, timeout=200)
            assert result.returncode == 0 and result.stdout, f'{name}\n{code}\n{result.stderr}'
