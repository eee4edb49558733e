"""The page of tools/runs.py in a real browser: numbers against logs, controls, accessibility."""
import csv
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import runs
from browser import opened, table, wait_until_drawn
from helpers import TINY, log_lines, served

EVIL = '<img src=x onerror=alert(1)>#?%41'


@pytest.fixture(scope='module')
def folder(run, trained, char_data, tmp_path_factory):
    """A folder with three runs; the name and a key of one of them look like HTML, and it has a page
    of explain.py."""
    folder = tmp_path_factory.mktemp('runs')
    shutil.copytree(trained, folder / 'first')
    run('train.py', f'--dataset={char_data}', f'--out_dir={folder}/second', '--max_iters=20', *TINY,
        '--learning_rate=1e-3', '--sample_every_eval')
    evil = shutil.copytree(trained, folder / EVIL)
    text = (evil / 'config.py').read_text()
    (evil / 'config.py').write_text(f'{text}gpu = {EVIL!r}\n')
    (evil / 'status').write_text('stopped\n')
    (evil / 'explain.html').write_text('')
    return folder


@pytest.fixture(scope='module')
def page(run, folder):
    run('tools/runs.py', folder, f'--out={folder}/page.html')
    return folder / 'page.html'


@pytest.fixture(scope='module')
def ids(folder):
    """{name of the run: its id in the URL}"""
    found = runs.find_runs([folder])
    return {name: runs.read_run(path, name)['id']
            for path, name in zip(found, runs.short_names(found))}


def cells(tab):
    """{name: {heading: text}} of the table of runs."""
    headings, *rows = tab.locator('.run-table table').evaluate(
        'table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))')
    headings = [re.sub(' [↑↓]$', '', heading) for heading in headings]
    return {row[1]: dict(zip(headings, row)) for row in rows}


def number(text):
    return float(text.replace('−', '-').replace(',', ''))


def points(tab, chart):
    """{run: [(x, y)]} of a chart's table."""
    found = {}
    for name, x, y in table(tab, chart):
        found.setdefault(name, []).append((float(x), float(y)))
    return found


# Numbers ------------------------------------------------------------------------------------------

def test_runs_page_shows_numbers_of_logs(chromium, page, folder, tmp_path):
    with opened(chromium, page, accept_downloads=True) as tab:
        shown = cells(tab)
        assert shown.keys() == {'first', 'second', EVIL}
        for name in ('first', 'second'):
            lines, evaluations = (log_lines(folder / name, key) for key in ('loss', 'val_loss'))
            last = evaluations[-1]
            best = min(evaluations, key=lambda line: line['val_loss'])
            row = shown[name]
            assert row['step'] == '20 / 20' and row['status'] == 'done'
            assert row['val loss'] == f'{last["val_loss"]:.4f}'
            assert row['train loss'] == f'{last["train_loss"]:.4f}'
            assert row['best val loss'] == f'{best["val_loss"]:.4f}'
            assert row['at step'] == str(best['step'])
            assert row['bits per byte'] == f'{last["val_bits_per_byte"]:.4f}'
            for chart, key in (('val-loss', 'val_loss'), ('train-evaluated', 'train_loss'),
                               ('bits', 'val_bits_per_byte')):
                expected = [(line['step'], line[key]) for line in evaluations]
                assert points(tab, chart)[name] == expected, chart  # to the last bit
            for chart, key in (('train-loss', 'loss'), ('lr', 'lr'), ('grad-norm', 'grad_norm'),
                               ('speed', 'tokens_per_second'),
                               ('ratio-adamw', 'update_ratio_adamw'),
                               ('ratio-gains', 'update_ratio_gains'), ('memory', 'peak_memory')):
                xs, ys = zip(*points(tab, chart)[name])
                assert list(xs) == [line['step'] for line in lines]
                assert ys == pytest.approx([line[key] for line in lines], rel=1e-4, abs=1e-12)
        assert float(shown['first']['learning_rate']) == 3e-3
        assert tab.locator('#figure-ratio-adamw').is_visible()
        assert tab.locator('#figure-noise-scale').is_hidden()  # one micro-batch per step
        assert 'n_layer' not in shown['first']  # the same in all runs
        with tab.expect_download() as download:
            tab.get_by_role('button', name='All runs: save CSV').click()
        download.value.save_as(tmp_path / 'runs.csv')
    with open(tmp_path / 'runs.csv', encoding='utf-8', newline='') as file:
        saved = {row['run']: row for row in csv.DictReader(file)}
    assert float(saved['second']['val loss']) == log_lines(folder / 'second', 'val_loss')[-1][
        'val_loss']


def test_runs_page_axes_are_tokens_time_and_flops(chromium, page, folder):
    first = runs.read_run(folder / 'first', 'first')
    with opened(chromium, page) as tab:
        axes = tab.get_by_role('group', name='Horizontal axis', exact=True)
        for axis, factor in (('Tokens', 1), ('FLOPs', first['flops_per_token'])):
            axes.get_by_role('button', name=axis).click()
            wait_until_drawn(tab)
            xs = [x for x, _ in points(tab, 'val-loss')['first']]
            assert xs == [factor * 32 * 4 * step for step in (0, 10, 20)]
        axes.get_by_role('button', name='Epochs').click()
        wait_until_drawn(tab)
        epochs = [line['epoch'] for line in log_lines(folder / 'first', 'epoch')]
        xs = [x for x, _ in points(tab, 'val-loss')['first']]
        assert xs == pytest.approx([0, epochs[9], epochs[19]])
        axes.get_by_role('button', name='Time').click()
        wait_until_drawn(tab)
        assert points(tab, 'val-loss')['first'][-1][0] == pytest.approx(first['seconds'])
        for name in ('Log x', 'Log y'):
            tab.get_by_role('button', name=name).click()
        wait_until_drawn(tab)
        assert tab.locator('#curves canvas').count() == 10


def test_runs_page_shows_differences_to_baseline(chromium, page, folder):
    losses = {name: [line['val_loss'] for line in log_lines(folder / name, 'val_loss')]
              for name in ('first', 'second')}
    with opened(chromium, page) as tab:
        tab.get_by_role('button', name='Pin second as the baseline').click()
        wait_until_drawn(tab)
        value, shown = re.fullmatch(r'(\S+) \((\S+)\)', cells(tab)['first']['val loss']).groups()
        assert number(value) == pytest.approx(losses['first'][-1], abs=6e-5)
        expected = losses['first'][-1] - losses['second'][-1]
        assert number(shown) == pytest.approx(expected, abs=6e-5)
        assert '(' not in cells(tab)['second']['val loss']
        tab.get_by_role('button', name='Minus baseline').click()
        wait_until_drawn(tab)
        assert tab.locator('#figure-val-loss h3').text_content() == 'Val loss minus that of second'
        differences = [y for _, y in points(tab, 'val-loss')['first']]
        assert differences == pytest.approx([a - b for a, b in zip(*losses.values())])
        tab.locator('#one-run').select_option(label='first')
        wait_until_drawn(tab)
        rows = tab.locator('#run-card [aria-label="Differences"] tbody tr').all_text_contents()
        assert 'learning_rate0.0010.003' in rows
        state = '#' + tab.url.split('#')[1]
    with opened(chromium, page, state) as tab:  # the URL restores the state
        assert '(' in cells(tab)['first']['val loss']
        assert tab.locator('#figure-val-loss h3').text_content() == 'Val loss minus that of second'


# Controls -----------------------------------------------------------------------------------------

def test_runs_page_hides_filters_and_sorts(chromium, page, ids):
    with opened(chromium, page) as tab:
        tab.get_by_role('checkbox', name='Show first').click()
        wait_until_drawn(tab)
        assert tab.evaluate('document.activeElement.ariaLabel') == 'Show first'  # keeps the focus
        assert points(tab, 'val-loss').keys() == {'second', EVIL}
        assert f'hidden={ids["first"]}' in tab.url
        tab.get_by_role('button', name='Show all').click()
        tab.locator('#filter').fill('done learning_rate=0.001')
        wait_until_drawn(tab)
        assert list(cells(tab)) == ['second'] and points(tab, 'val-loss').keys() == {'second'}
        tab.locator('#filter').fill('')
        for order in ('ascending', 'descending'):
            tab.get_by_role('button', name='learning_rate').click()
            wait_until_drawn(tab)
            heading = tab.locator('th[aria-sort]')
            assert heading.get_attribute('aria-sort') == order
            rates = [float(row['learning_rate']) for row in cells(tab).values()]
            assert rates == sorted(rates, reverse=order == 'descending')
    wrong = '#zoom=step:x:1&base=zz&hidden=1&sort=nothing&smooth=7&x=weight&sample=-9'
    with opened(chromium, page, wrong) as tab:
        assert len(cells(tab)) == 3 and tab.locator('#curves canvas').count() == 10


def test_runs_page_zooms_by_mouse_and_keyboard(chromium, page, folder):
    lines = log_lines(folder / 'first', 'loss')
    with opened(chromium, page) as tab:
        canvas = tab.locator('#figure-train-loss canvas')
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        svg = canvas.evaluate('canvas => canvas.toSvg()')  # of shapes
        assert svg.count('<path') > 4 and '<image' not in svg and 'step</text>' in svg
        tab.mouse.move(box['x'] + 100, box['y'] + 90)
        tip = tab.locator('#tip').text_content()
        assert 'step' in tip and '▸' in tip and all(name in tip for name in ('first', 'second'))
        tab.mouse.down()
        tab.mouse.move(box['x'] + 250, box['y'] + 90)
        tab.mouse.up()
        wait_until_drawn(tab)
        low, high = map(float, re.search(r'zoom=step%3A([\d.]+)%3A([\d.]+)', tab.url).groups())
        assert 0 < low < high < 19
        tab.get_by_role('button', name='Zoom back').click()
        wait_until_drawn(tab)
        assert 'zoom' not in tab.url
        canvas.focus()
        for key in ('ArrowRight', 'ArrowRight', 'ArrowUp', 'ArrowDown'):
            tab.keyboard.press(key)
        name, value, step = re.fullmatch(
            r'(.+): (\S+) at step (\d+)',
            tab.locator('#figure-train-loss .readout').text_content()).groups()
        assert name in ('first', 'second')
        if name == 'first':
            assert float(value) == pytest.approx(lines[int(step)]['loss'], rel=1e-4)
        tab.keyboard.press('+')
        wait_until_drawn(tab)
        assert 'zoom=step' in tab.url
        tab.keyboard.press('0')  # the new canvas has the focus
        wait_until_drawn(tab)
        assert 'zoom' not in tab.url


def test_runs_page_shows_samples_and_commands(chromium, page, folder):
    samples = runs.read_samples(folder / 'second')
    with opened(chromium, page) as tab:
        tab.get_by_role('button', name='second', exact=True).click()
        wait_until_drawn(tab)
        assert tab.locator('#samples .sample').text_content() == samples[-1]['text']
        tab.locator('#sample').fill('0')
        wait_until_drawn(tab)
        assert tab.locator('#samples h3').text_content() == 'second, step 0'
        assert tab.locator('#samples .sample').text_content() == samples[0]['text']
        assert len(tab.locator('.command').all()) == 1  # it is done
        tab.locator('#one-run').select_option(label=EVIL)
        wait_until_drawn(tab)
        resume, repeat = tab.locator('.command').all_text_contents()
        assert '--init_from=resume' in resume and 'config.py' in repeat
        assert tab.locator('img').count() == 0  # names and values are text
        assert tab.locator('#samples .note').count() == 1
        link = tab.get_by_role('link', name='explain.html').evaluate('link => link.href')
        assert Path(unquote(urlsplit(link).path)) == folder / EVIL / 'explain.html'


@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (360, 'dark')])
def test_runs_page_fits_screen_and_is_accessible(chromium, page, ids, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, page, f'#base={ids["first"]}&smooth=0.5', width=width,
                color_scheme=scheme) as tab:
        tab.get_by_role('button', name='second', exact=True).click()
        table(tab, 'val-loss')
        wait_until_drawn(tab)
        assert tab.evaluate('document.documentElement.scrollWidth') == width
        serious = [f'{x["id"]}: {x["nodes"][0]["html"][:200]}'
                   for x in Axe().run(tab).response['violations']
                   if x['impact'] in ('serious', 'critical')]
        assert not serious, '\n'.join(serious)


@pytest.mark.slow
def test_served_page_follows_running_runs(chromium, clone, trained, tmp_path):
    from playwright.sync_api import expect

    folder = shutil.copytree(trained, tmp_path / 'all' / 'first')
    with served(clone, str(tmp_path / 'all'), script='tools/runs.py') as (server, url), \
            opened(chromium, url) as tab:
        with open(folder / 'log.jsonl', 'a') as log:
            line = {'step': 30, 'train_loss': 1.0, 'val_loss': 1.25, 'val_bits_per_byte': 0.5}
            log.write(json.dumps(line) + '\n')
        expect(tab.locator('.run-table')).to_contain_text('1.2500', timeout=60_000)
        wait_until_drawn(tab)
        assert points(tab, 'val-loss')['first'][-1] == (30, 1.25)
        shutil.copytree(trained, tmp_path / 'all' / 'new')
        expect(tab.locator('.run-table tbody tr')).to_have_count(2, timeout=60_000)


@pytest.mark.slow
def test_page_of_200_runs_opens_in_2_seconds(chromium, tmp_path):
    lines = [{'step': i, 'loss': 3 + 1 / (i + 1), 'lr': 1e-3, 'grad_norm': 1 + i % 7,
              'tokens_per_second': 1e4, 'samples_seen': 4 * (i + 1)} for i in range(5000)]
    log = ''.join(json.dumps(line) + '\n' for line in lines)
    for i in range(200):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / 'log.jsonl').write_text(log)
    page = tmp_path / 'page.html'
    page.write_text(runs.build_page(runs.page_data(runs.read_runs([tmp_path]))), encoding='utf-8')
    tab = chromium.new_page(viewport={'width': 1280, 'height': 900})
    session = tab.context.new_cdp_session(tab)
    # CPU time of the page's main thread: other processes do not count
    session.send('Performance.enable', {'timeDomain': 'threadTicks'})
    tab.goto(f'file://{page}')
    wait_until_drawn(tab)
    metrics = {metric['name']: metric['value']
               for metric in session.send('Performance.getMetrics')['metrics']}
    tab.close()
    assert 0.1 < metrics['TaskDuration'] < 2
