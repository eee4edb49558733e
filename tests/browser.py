"""The page of explain.py in a tab of Chromium; the fixture `chromium` is in conftest.py."""

import contextlib

import numpy as np
import torch

import explain

NO_RUN = {'run': {'path': 'x', 'step': 0, 'val_loss': None, 'curves': {}}, 'live': False}
PANELS = ('next', 'flow', 'embedding', 'heads', 'head', 'mlp', 'lens', 'why', 'ablation',
          'graph', 'circuits', 'bigrams', 'step', 'training', 'compare')


def write_page(path, facts, arrays, weights=b''):
    path.write_text(explain.build_page(NO_RUN | facts, arrays, weights), encoding='utf-8')
    return path


@contextlib.contextmanager
def opened(chromium, path, state='', width=1280, **options):
    """The page at a path or URL in a new tab, fully drawn. Fails on console messages and on
    requests to anything else."""
    tab = chromium.new_page(viewport={'width': width, 'height': 900}, **options)
    problems = []
    url = path if str(path).startswith('http:') else f'file://{path}'

    def check_request(request):
        if not request.url.startswith((url, 'data:', 'blob:')):
            problems.append(request.url)

    tab.on('console', lambda message: problems.append(message.text))
    tab.on('pageerror', lambda error: problems.append(str(error)))
    tab.on('request', check_request)
    tab.goto(f'{url}{state}')
    wait_until_drawn(tab)
    yield tab
    tab.close()
    assert not problems


def wait_until_drawn(tab):
    tab.wait_for_selector('html[data-ready][data-settled]', timeout=60_000)


def table(tab, name):
    """The rows of a figure's data table, as text."""
    figure = tab.locator(f'#figure-{name}')
    if figure.locator('.data-table').is_hidden():
        figure.get_by_role('button', name='table').click()
    return figure.locator('.data-table tbody').evaluate(
        'body => [...body.rows].map(row => [...row.cells].map(cell => cell.textContent))')


def columns(tab, name):
    """The columns of a data table of numbers."""
    return np.array(table(tab, name), dtype=float).T


def assert_close(shown, expected, atol=2e-3):
    """Numbers on the page, as text, against a tensor."""
    shown = [float(x) for x in shown]
    np.testing.assert_allclose(shown, torch.as_tensor(expected).detach(), atol=atol, rtol=2e-3)
