"""SCAN: its grammar, and a model that generalizes to unseen commands."""

import random
import re

from data.scan.prepare import commands


def test_scan_training_generalizes_to_unseen_commands(run, prepare_pairs):
    """Trains on 9 of 10 out of 1,000 commands without turn, around and opposite."""
    simple = [
        pair for pair in commands() if not {'turn', 'around', 'opposite'} & set(pair[0].split())
    ]
    data = prepare_pairs(
        random.Random(0).sample(simple, 1000),
        '--vocab_size=300',
        '--val_fraction=0.1',
        name='some-scan',
    )
    small = (
        '--n_layer=2',
        '--n_embd=128',
        '--n_head=4',
        '--max_iters=300',
        '--eval_interval=1000',
        '--eval_iters=1',
        '--weight_decay=1',
    )
    meanings = dict(simple)
    trained = run(
        'train.py',
        'config/scan.py',
        f'--dataset={data}',
        '--out_dir=out-some-scan',
        '--device=cpu',
        *small,
    ).stdout
    assert trained.endswith('sample.py --out_dir=out-some-scan --interactive\n')
    # the sample of the last evaluation
    source, answer = re.findall(r'^  \| (.*)$', trained, re.MULTILINE)[-2:]
    assert meanings[source] == answer
    output = run('tools/evaluate.py', '--out_dir=out-some-scan', '--show=5').stdout
    n, exact, chrf = re.search(
        r'pairs: (\d+) targets, beam 1: exact match ([\d.]+)%, chrF ([\d.]+)', output
    ).groups()
    assert 80 < int(n) < 120 and float(exact) >= 99 and float(chrf) >= 99
    beam = run(
        'tools/evaluate.py',
        '--out_dir=out-some-scan',
        '--num_beams=3',
        '--limit=20',
        '--batch_size=7',
    ).stdout
    assert 'pairs: 20 targets, beam 3: exact match 100.00%' in beam
    shown = re.findall(r'source: (.*)\ntarget: (.*)\nanswer: (.*)\n', output)
    assert len(shown) == 5 and all(meanings[source] == target for source, target, _ in shown)
    command = 'jump left thrice after walk'
    output = run(
        'sample.py',
        '--out_dir=out-some-scan',
        f'--start={command}',
        '--num_samples=1',
        '--temperature=0',
    ).stdout
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
