"""README, docs and CONTRIBUTING refer to things that exist."""

import os
import re

from helpers import ROOT
from pages import ANCHORS, PAGES, links, page


def test_readme_is_short_and_its_commands_are_those_of_ci():
    readme = page('README.md')
    assert len(readme.splitlines()) <= 220
    command = 'pip install -r requirements-dev.txt && python -m pytest'
    assert command in readme and command in (ROOT / '.ci' / 'run').read_text()
    assert os.access(ROOT / '.ci' / 'run', os.X_OK)
    requirements = (ROOT / 'requirements.txt').read_text().split()
    assert [r.split('==')[0] for r in requirements] == [
        'torch',
        'numpy',
        'tiktoken',
        'tqdm',
        'wandb',
    ]


def test_pages_refer_to_existing_files_and_tests():
    pages = ''.join(map(page, PAGES))
    folders = 'config|data|docs|interpret|lib|tests|tools|web'
    paths = re.findall(rf'\b(?:{folders})/[\w/]+\.(?:py|md|js|html|yaml|sbatch)\b', pages)
    assert len(paths) > 100
    for path in set(paths):
        assert (ROOT / path).exists(), path
    tests = ''.join(path.read_text(encoding='utf-8') for path in (ROOT / 'tests').glob('*.py'))
    promised = re.findall(r'`(test_\w+?)(_?\.\.\.)?`', page('docs/checkpoints.md'))
    assert len(promised) > 20 and all(f'def {name}' in tests for name, _ in promised)


def test_links_lead_somewhere():
    n = 0
    for name in PAGES:
        for target in links(name):
            if re.match(r'https?://', target):
                continue
            path, _, anchor = target.partition('#')
            found = (ROOT / name).parent / path if path else ROOT / name
            assert found.exists(), f'{name}: {target}'
            found = found.resolve().relative_to(ROOT).as_posix()
            assert not anchor or anchor in ANCHORS[found], f'{name}: {target}'
            # the site has docs/ only
            assert not name.startswith('docs/') or found.startswith('docs/'), f'{name}: {target}'
            n += 1
    assert n > 80


def test_every_page_is_in_readme_index_and_navigation():
    pages = {name.removeprefix('docs/') for name in PAGES if name.startswith('docs/')}
    from_readme = {target.removeprefix('docs/').partition('#')[0] for target in links('README.md')}
    assert pages - {'index.md'} <= from_readme
    assert pages - {'index.md'} <= set(links('docs/index.md'))
    navigation = re.findall(r'^ +- (\S+\.md)$', page('mkdocs.yml'), re.M)
    assert sorted(navigation) == sorted(pages)
