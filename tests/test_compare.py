"""--compare and the training step of explain.py: against torch.optim, autograd and formulas."""
import copy

import pytest
import torch
from torch.nn import functional as F

import checkpoint as ckpt
import explain
import interpret
from browser import NO_RUN, assert_close, opened, table, wait_until_drawn, write_page
from helpers import (
    ARCHITECTURES,
    POST,
    TEXT,
    TINY,
    awake,
    char_tokenizer,
    deep_equal,
    folder_contents,
    log_lines,
    served,
    tiny,
    tokens,
)
from interpret import step as training_step
from interpret.compare import collect_comparison
from lib.page_weights import pack_weights
from test_explain import get, unpack

NAMES = char_tokenizer(48, 40)


def collect_step(model, ids, checkpoint=None):
    target = torch.tensor([*ids[1:], 0])
    facts, arrays = training_step.collect_step(model, ids, target, 40, checkpoint)
    return facts['step'], arrays


def losses(model, ids):
    logits = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction='none')


# One training step --------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_step_is_that_of_the_run(name):
    """A checkpoint whose optimizer is torch's own, after three steps."""
    model = tiny(label_smoothing=0.1)
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    in_muon = {id(p) for p in matrices} if name == 'muon' else set()
    rest = [p for p in model.parameters() if id(p) not in in_muon]
    groups = [{'params': [p for p in rest if p.dim() > 1], 'weight_decay': 0.1},
              {'params': [p for p in rest if p.dim() == 1], 'weight_decay': 0.0}]
    theirs = [torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))]
    if in_muon:
        theirs.append(torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95,
                                       adjust_lr_fn='original'))

    def step(ids):
        logits = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(ids[1:]), label_smoothing=0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), norm.item()

    for seed in range(3):
        step(tokens(16, seed=seed).tolist())
    states = [optimizer.state[p] for optimizer in theirs
              for group in optimizer.param_groups for p in group['params']]
    sizes = [len(group['params']) for optimizer in theirs for group in optimizer.param_groups]
    state = copy.deepcopy({'state': dict(enumerate(states)),
                           'param_groups': [{'params': [0] * n} for n in sizes]})
    config = {'optimizer': name, 'learning_rate': 3e-3, 'muon_learning_rate': 0.01,
              'decay_lr': False, 'grad_clip': 0.5, 'max_iters': 9, 'dropout': 0.2}
    saved = ckpt.Checkpoint(vars(model.config).copy(), copy.deepcopy(model.state_dict()), step=3,
                            config=config, optimizer=state)
    given = saved.build_model(dropout=0.0).eval().requires_grad_(False)
    ids = tokens(12, seed=7).tolist()
    facts, arrays = collect_step(given, ids, saved)
    before = losses(model, ids)
    loss, norm = step(ids)
    assert facts['optimizer'] == name and not facts['is_over'] and facts['dropout'] == 0.2
    assert facts['losses'][0] == pytest.approx(loss, abs=1e-5)
    assert facts['gradient'] == pytest.approx(norm, rel=1e-4) and norm > 0.5
    atol = 1e-4 if name == 'adamw' else 5e-3  # Muon is in bf16
    torch.testing.assert_close(arrays['step_losses'][0], before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(arrays['step_losses'][1], losses(model, ids), atol=atol, rtol=atol)
    assert (arrays['step_losses'][1] - before).abs().max() > 0.05
    assert deep_equal(given.state_dict(), saved.model)
    assert not any(p.requires_grad or p.grad is not None for p in given.parameters())


def test_step_without_optimizer_is_gradient_descent():
    """Of pairs: sources, with the <|endoftext|> before them, have no loss."""
    model = awake(eot_token=3, turns=2, label_smoothing=0.1, prefix_lm=True)
    before = copy.deepcopy(model.state_dict())
    ids = [3, 9, 7, 8, 3, 5, 6, 3]
    is_target = [0, 0, 0, 0, 1, 1, 1]
    facts, arrays = collect_step(model, ids)
    assert arrays['is_target'].tolist() == is_target
    assert (facts['optimizer'], facts['n_targets']) == ('sgd', 3)

    def training_loss():
        log_p = model(torch.tensor([ids]), torch.tensor([ids]))[0][0].log_softmax(dim=-1)
        each = [0.9 * log_p[t, ids[t + 1]] + 0.1 * log_p[t].mean() for t in range(7)]
        return -sum(x * counts for x, counts in zip(each, is_target)) / 3

    loss = training_loss()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    total = sum(g.square().sum() for g in gradients).sqrt()
    assert facts['losses'][0] == pytest.approx(loss.item(), abs=1e-5)
    assert facts['gradient'] == pytest.approx(total.item(), rel=1e-5)
    assert deep_equal(model.state_dict(), before)
    with torch.no_grad():
        for p, gradient in zip(model.parameters(), gradients):
            p.sub_(0.01 * gradient)
    assert facts['losses'][1] == pytest.approx(training_loss().item(), abs=1e-5)
    torch.testing.assert_close(arrays['step_losses'][1], losses(model, ids))
    probs = model(torch.tensor([ids]), torch.tensor([ids]))[0][0].softmax(dim=-1)
    torch.testing.assert_close(arrays['step_probs'][1], probs.gather(1, arrays['step_ids']))
    for t in range(7):
        assert ids[t + 1] in arrays['step_ids'][t]
        assert probs[t].argmax() in arrays['step_ids'][t]


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST], ids=str)
def test_gradient_norms_are_those_of_autograd(options):
    model = awake(**options)
    ids = tokens(9).tolist()
    facts, arrays = collect_step(model, ids)
    params = dict(model.named_parameters())
    logits = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :-1]
    x, y = training_step.targets_of(model.config, torch.tensor([ids]))
    loss = F.cross_entropy(logits, y[0], ignore_index=-1)
    gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
    norms = dict(zip(facts['parts'], arrays['gradients'].tolist()))
    total = sum(g.square().sum() for g in gradients.values())
    assert sum(x**2 for x in norms.values()) == pytest.approx(total.item(), rel=1e-4)

    def norm(*prefixes):
        return sum(g.square().sum() for n, g in gradients.items() if n.startswith(prefixes))**0.5

    mlp = norm('transformer.h.1.mlp').item()
    assert norms['L1 MLP'] == pytest.approx(mlp, rel=1e-4)
    assert norms['L0 attention'] == pytest.approx(norm('transformer.h.0.attn').item(), rel=1e-4)
    embedding = norms.get('embedding', norms.get('embedding, head'))
    assert embedding == pytest.approx(norm('transformer.wte').item(), rel=1e-4)

    nh, nkv, hs = model.config.n_head, model.config.kv_heads, model.config.head_dim
    for layer in range(2):
        prefix = f'transformer.h.{layer}.attn.'
        for head in range(nh):
            squares = gradients[prefix + 'c_proj.weight'][:, head * hs:][:, :hs].square().sum()
            shared = head // (nh // nkv)
            for first in (head, nh + shared, nh + nkv + shared):  # q, k, v
                for name in ('c_attn.weight', 'c_attn.bias'):
                    if prefix + name in gradients:
                        squares += gradients[prefix + name][first * hs:][:hs].square().sum()
            shown = arrays['head_gradients'][layer, head].item()
            assert shown == pytest.approx(squares.sqrt().item(), rel=1e-4)


def test_step_says_why_there_is_none(monkeypatch):
    assert 'no token to learn' in collect_step(tiny(), [5])[0]['skipped']
    pairs = tiny(eot_token=3, turns=2)
    assert 'no token to learn' in collect_step(pairs, [3, 5, 6, 3])[0]['skipped']
    monkeypatch.setattr(training_step, 'MAX_PARAMETERS', 1000)
    assert 'too much memory' in collect_step(tiny(), [5, 6])[0]['skipped']


# Two checkpoints ----------------------------------------------------------------------------------

def test_comparison_matches_formulas():
    model, other = awake(), awake(n_layer=3, n_head=2, position='rope', tie_weights=False)
    ids = tokens(9).tolist()
    logits, theirs = (m(torch.tensor([ids]), torch.tensor([ids]))[0][0].detach()
                      for m in (model, other))
    target = torch.tensor([*ids[1:], 0])
    _, arrays = collect_comparison(other, ids, logits, target)
    torch.testing.assert_close(arrays['other_loss'], losses(other, ids).detach())
    p, q = (torch.distributions.Categorical(logits=x) for x in (logits, theirs))
    torch.testing.assert_close(arrays['kl'], torch.distributions.kl_divergence(p, q))
    for t in range(9):
        shown = arrays['both_ids'][t].tolist()
        assert {target[t].item(), logits[t].argmax().item(), theirs[t].argmax().item()} <= {*shown}
        torch.testing.assert_close(arrays['both_probs'][0, t], p.probs[t, shown])
        torch.testing.assert_close(arrays['both_probs'][1, t], q.probs[t, shown])


def test_explain_compares_with_a_step_of_the_same_run(run, trained):
    other = trained / 'ckpt_00000010.pt'
    before = folder_contents(trained)
    run('explain.py', f'--out_dir={trained}', f'--start={TEXT}', f'--compare={other}')
    after = folder_contents(trained)
    facts, arrays = unpack(after.pop('explain.html').decode())
    before.pop('explain.html', None)
    assert after == before  # the step is not saved
    model, chars = ckpt.load_model(other)
    ids = chars.encode(TEXT)[-32:]
    assert arrays['other_loss'] == pytest.approx(losses(model, ids).tolist(), abs=1e-5)
    scores, _ = interpret.head_scores(model, chars.vocab_size)
    torch.testing.assert_close(torch.tensor(arrays['other_scores'][1]), scores['induction'])
    assert facts['other']['step'] == 10 and facts['step']['is_over']
    assert facts['step']['rates'] == {'adamw': 3e-3, 'gains': 3e-3}  # the peak

    run('explain.py', f'--init_from={other}', f'--out_dir={trained}', f'--start={TEXT}')
    facts, _ = unpack((trained / 'explain.html').read_text(encoding='utf-8'))
    log = {line['step']: line for line in log_lines(trained, 'lr')}
    rate = log[10]['lr']
    assert rate < 2e-3 and facts['step']['rates']['adamw'] == pytest.approx(rate)


def test_explain_rejects_what_it_cannot_compare(refused, trained, tmp_path):
    def check(other, *says, more=()):
        refused('explain.py', f'--init_from={trained}', f'--out_dir={tmp_path}/new', '--start=a',
                f'--compare={other}', *more, says=says)
        assert not (tmp_path / 'new').exists()

    check(tmp_path / 'nowhere', 'nowhere', 'there is no checkpoint')
    check(tmp_path / 'nowhere', 'nowhere', 'there is no checkpoint', more=['--serve'])
    checkpoint = ckpt.load(trained)
    characters = checkpoint.tokenizer['characters']
    checkpoint.tokenizer['characters'] = characters[:-1] + 'é'
    (tmp_path / 'renamed').mkdir()
    ckpt.save(tmp_path / 'renamed', checkpoint)
    i = len(characters) - 1
    check(tmp_path / 'renamed', f"token {i} is 'é', not {characters[-1]!r}", 'same tokenizer')
    checkpoint.tokenizer['characters'] = characters[:-1]
    (tmp_path / 'fewer').mkdir()
    ckpt.save(tmp_path / 'fewer', checkpoint)
    check(tmp_path / 'fewer', f'char with {i} tokens, not char with {i + 1} tokens',
          more=['--serve'])


# The page -----------------------------------------------------------------------------------------

def page_of(path, model, ids, other):
    facts, arrays = explain.collect_weights(model, NAMES)
    text_facts, text_arrays = explain.collect_text(model, NAMES, ids, other=other)
    checkpoint = ckpt.Checkpoint(vars(other.config).copy(), other.state_dict(), path='other.pt')
    other_facts, other_arrays = explain.collect_other(checkpoint, other, 40)
    engine, weights, _ = pack_weights(model, NAMES, 'float32')
    facts |= NO_RUN | text_facts | other_facts | {'engine': engine | {'difference': 0.0}}
    arrays |= text_arrays | other_arrays
    return write_page(path, facts, arrays, weights), arrays


def probabilities(tab, name):
    return {token: (float(p), float(other)) for token, _, p, other in table(tab, name)}


def test_page_shows_both_checkpoints_and_the_step(chromium, tmp_path):
    model, other = awake(), awake(position='rope')
    ids = tokens(9).tolist()
    path, arrays = page_of(tmp_path / 'page.html', model, ids, other)
    with opened(chromium, path, '#t=4') as tab:
        rows = table(tab, 'compare-loss')
        ours, theirs = losses(model, ids), losses(other, ids)
        assert rows[-1][3:6] == ['', '', '']  # no next token
        for column, expected in ((3, ours), (4, theirs), (5, theirs - ours)):
            assert_close([row[column] for row in rows[:-1]], expected)
        assert_close([row[6] for row in rows], arrays['kl'])
        summary = tab.locator('#compare-summary').inner_text()
        assert f'{ours.mean():.4f}' in summary and f'{theirs.mean():.4f}' in summary
        p, q = (m(torch.tensor([ids]), torch.tensor([ids]))[0][0, 4].softmax(-1).detach()
                for m in (model, other))
        shown = probabilities(tab, 'compare-other')
        assert list(shown) == sorted(shown, key=lambda token: -shown[token][0])
        assert shown.keys() == probabilities(tab, 'compare-this').keys() and len(shown) == 12
        for token, pair in shown.items():
            assert_close(pair, [q[ord(token) - 48], p[ord(token) - 48]])
        tab.locator('#compare-kind').select_option('copying')
        scores = [interpret.head_scores(m)[0]['copying'].flatten() for m in (model, other)]
        assert_close([row[1] for row in table(tab, 'compare-scores-this')], scores[0])
        assert_close([row[1] for row in table(tab, 'compare-scores-other')], scores[1])
        assert_close([row[1] for row in table(tab, 'compare-scores-difference')],
                     scores[1] - scores[0])

        gradients = torch.autograd.grad(losses(model, ids).mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.sub_(0.01 * gradient)
        after = losses(model, ids)
        rows = table(tab, 'step-loss')[:-1]
        for column, expected in ((3, ours), (4, after), (5, after - ours)):
            assert_close([row[column] for row in rows], expected)
        result = tab.locator('#step-result').inner_text()
        assert f'{ours.mean():.4f}' in result and f'{after.mean():.4f}' in result
        trained = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, 4].softmax(-1).detach()
        for token, pair in probabilities(tab, 'step-after').items():
            assert_close(pair, [trained[ord(token) - 48], p[ord(token) - 48]])
        norms = [float(row[1]) for row in table(tab, 'gradients')]
        total = sum(g.square().sum() for g in gradients).sqrt().item()
        assert sum(x**2 for x in norms)**0.5 == pytest.approx(total, rel=1e-3)
        assert 'Plain gradient descent' in tab.locator('#step-method').text_content()
        tab.locator('#figure-compare-loss canvas').focus()
        for key in ('ArrowRight', 'ArrowRight', 'Enter'):  # to the prediction at position 1
            tab.keyboard.press(key)
        assert tab.locator('#where').text_content().startswith('Position 1 ')


@pytest.mark.slow
@pytest.mark.parametrize('T', [1, 9])
def test_page_compares_models_of_other_shapes(chromium, tmp_path, T):
    other = awake(n_layer=3, n_head=2)
    path, arrays = page_of(tmp_path / 'page.html', awake(), tokens(T).tolist(), other)
    with opened(chromium, path, width=360) as tab:
        assert len(table(tab, 'compare-scores-other')) == 6
        assert not tab.locator('#figure-compare-scores-difference').count()
        assert 'no pairs of heads' in tab.locator('#compare').text_content()
        assert_close([row[6] for row in table(tab, 'compare-loss')], arrays['kl'])
        assert ('no token to learn' in tab.locator('#step').text_content()) == (T == 1)
        assert tab.evaluate('document.documentElement.scrollWidth') == 360
        tab.locator('#live-text').fill('456')  # another text, computed in the page
        wait_until_drawn(tab)
        for panel in ('step', 'compare'):
            text = tab.locator(f'#{panel}').text_content()
            assert 'computed when the page is written' in text
        assert not tab.locator('#figure-compare-loss').count()
        assert len(table(tab, 'compare-scores-other')) == 6  # of the weights


@pytest.mark.slow
def test_served_page_compares_each_text(clone, trained):
    other = trained / 'ckpt_00000010.pt'
    model, chars = ckpt.load_model(other)
    with served(clone, f'--out_dir={trained}', '--start=def', f'--compare={other}') as (_, url):
        facts, arrays = unpack(get(url + '?start=return')[1])
        expected = losses(model, chars.encode('return')).tolist()
        assert arrays['other_loss'] == pytest.approx(expected, abs=1e-5)
        assert facts['other']['step'] == 10 and facts['step']['n_targets'] == 5


@pytest.mark.slow
def test_step_of_a_lora_run_says_what_it_is(run, trained, char_data, tmp_path):
    out_dir = tmp_path / 'out'
    run('train.py', f'--init_from={trained}', f'--dataset={char_data}', f'--out_dir={out_dir}',
        '--lora_rank=2', '--max_iters=2', *(x for x in TINY if 'n_' not in x))
    run('explain.py', f'--out_dir={out_dir}', f'--start={TEXT}')
    facts, _ = unpack((out_dir / 'explain.html').read_text(encoding='utf-8'))
    assert (facts['step']['optimizer'], facts['step']['reason']) == ('sgd', 'lora')
