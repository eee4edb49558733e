"""SCAN: its grammar, and a model that generalizes to unseen commands."""

import random
import re

import pytest

from data.scan.prepare import commands


def train_scan(run, prepare_pairs, out_dir, *options):
    """({command: actions}, output) of a run on 900 commands without turn, around and opposite."""
    simple = [
        pair for pair in commands() if not {'turn', 'around', 'opposite'} & set(pair[0].split())
    ]
    data = prepare_pairs(
        random.Random(0).sample(simple, 1000),
        '--vocab_size=300',
        '--val_fraction=0.1',
        name='some-scan',
    )
    small = ('--device=cpu', '--n_head=4', '--eval_interval=1000', '--eval_iters=1')
    command = ('train.py', 'config/scan.py', f'--dataset={data}', f'--out_dir={out_dir}')
    output = run(*command, *small, *options).stdout
    assert f'sample.py --out_dir={out_dir} --interactive\n' in output
    return dict(simple), output


def evaluate_scan(run, out_dir, *options):
    """(targets, exact match, chrF, output) of tools/evaluate.py."""
    output = run('tools/evaluate.py', f'--out_dir={out_dir}', *options).stdout
    pattern = r'pairs: (\d+) targets, beam \d: exact match ([\d.]+)%, chrF ([\d.]+)'
    return *map(float, re.search(pattern, output).groups()), output


@pytest.mark.slow
def test_scan_model_can_be_trained_evaluated_and_sampled(run, prepare_pairs):
    options = ('--n_layer=1', '--n_embd=32', '--max_iters=4')
    meanings, output = train_scan(run, prepare_pairs, 'out-tiny-scan', *options)
    # the sample of the last evaluation
    source, _ = re.findall(r'^  \| (.*)$', output, re.MULTILINE)[-2:]
    assert source in meanings
    for num_beams in (1, 2):
        options = (f'--num_beams={num_beams}', '--limit=5', '--show=2', '--batch_size=3')
        n, exact, chrf, output = evaluate_scan(run, 'out-tiny-scan', *options)
        assert n == 5 and exact < 100 and chrf < 100 and f'beam {num_beams}' in output
        shown = re.findall(r'source: (.*)\ntarget: (.*)\nanswer: (.*)\n', output)
        assert len(shown) == 2 and all(meanings[source] == target for source, target, _ in shown)
    options = ('--start=jump left', '--num_samples=1', '--temperature=0')
    output = run('sample.py', '--out_dir=out-tiny-scan', *options).stdout
    assert output.startswith('jump left\n') and output.endswith('-' * 15 + '\n')


@pytest.mark.slow
def test_scan_training_generalizes_to_unseen_commands(run, prepare_pairs):
    out_dir = 'out-some-scan'
    options = ('--n_layer=2', '--n_embd=128', '--max_iters=300', '--weight_decay=1')
    meanings, output = train_scan(run, prepare_pairs, out_dir, *options)
    # the sample of the last evaluation
    source, answer = re.findall(r'^  \| (.*)$', output, re.MULTILINE)[-2:]
    assert meanings[source] == answer
    n, exact, chrf, output = evaluate_scan(run, out_dir, '--show=5')
    assert 80 < n < 120 and exact >= 99 and chrf >= 99
    assert 'beam 1: ' in output
    shown = re.findall(r'source: (.*)\ntarget: (.*)\nanswer: (.*)\n', output)
    assert len(shown) == 5 and all(meanings[source] == target for source, target, _ in shown)
    _, _, _, output = evaluate_scan(run, out_dir, '--num_beams=3', '--limit=20', '--batch_size=7')
    assert 'pairs: 20 targets, beam 3: exact match 100.00%' in output
    command = 'jump left thrice after walk'
    options = (f'--start={command}', '--num_samples=1', '--temperature=0')
    output = run('sample.py', f'--out_dir={out_dir}', *options).stdout
    assert output == f'{command}\n{meanings[command]}\n{"-" * 15}\n'


def test_scan_grammar_matches_paper():
    pairs = dict(commands())
    assert len(commands()) == len(pairs) == 20910  # Lake & Baroni 2018, section 2
    assert pairs['jump'] == 'JUMP' and pairs['turn left'] == 'LTURN'  # their examples, figure 1
    assert pairs['jump left'] == 'LTURN JUMP'
    assert pairs['jump around right'] == ' '.join(['RTURN JUMP'] * 4)
    assert pairs['turn left twice'] == 'LTURN LTURN' and pairs['jump thrice'] == 'JUMP JUMP JUMP'
    assert pairs['jump opposite left and walk thrice'] == 'LTURN LTURN JUMP WALK WALK WALK'
    assert (
        pairs['jump opposite left after walk around left']
        == ' '.join(['LTURN WALK'] * 4) + ' LTURN LTURN JUMP'
    )
    assert max(len(actions.split()) for actions in pairs.values()) == 48
