"""The README refers to things that exist."""

import os
import re

from helpers import ROOT


def test_readme_refers_to_existing_files_and_tests():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    command = 'pip install -r requirements-dev.txt && python -m pytest'
    assert command in readme and command in (ROOT / '.ci' / 'run').read_text()
    for path in set(re.findall(r'(?:config|data|tests)/[\w/]+\.(?:py|md)', readme)):
        assert (ROOT / path).exists(), path
    tests = ''.join(path.read_text(encoding='utf-8') for path in (ROOT / 'tests').glob('*.py'))
    promised = re.findall(r'`(test_\w+?)(_?\.\.\.)?`', readme)  # tests that back the promises
    assert len(promised) > 20 and all(f'def {name}' in tests for name, _ in promised)
    requirements = (ROOT / 'requirements.txt').read_text().split()
    assert [r.split('==')[0] for r in requirements] == [
        'torch',
        'numpy',
        'tiktoken',
        'tqdm',
        'wandb',
    ]
    assert os.access(ROOT / '.ci' / 'run', os.X_OK)
