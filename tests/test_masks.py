"""Attention masks: documents in one row, and the prefix LM's sources and targets."""

import pytest
import torch

from helpers import tiny
from lib.generation import KVCache, beam_search

DOCUMENTS = [
    {'position': 'rope'},
    {'position': 'none', 'ngram': 4, 'ngram_rows': 97},
    {'position': 'rope', 'attention': 'math'},
]


@pytest.mark.parametrize('options', DOCUMENTS, ids=str)
def test_doc_mask_isolates_documents(options):
    model = tiny(eot_token=3, **options)
    first, second = torch.tensor([7, 8, 9, 10, 11]), torch.tensor([3, 8, 9, 7, 9])
    alone = model(second[None], second[None])[0][0]
    together = torch.cat((first, second, second))[None]
    logits = model(together, together)[0][0]
    torch.testing.assert_close(logits[5:10], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[10:], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(
        tiny(**options)(together, together)[0][0, 10:], logits[10:], atol=1e-2
    )


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('options', [*DOCUMENTS, {}], ids=str)
def test_doc_mask_isolates_documents_with_cache_and_padding(options, static):
    model = tiny(eot_token=3, **options)
    long, short = [5, 3, 8, 3, 9, 10, 3, 3, 4, 3], [4, 3, 6, 7, 8, 9]
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 4]), static=static)
    padded = torch.tensor([long[:7], [0, 0, 0, 0] + short[:3]])
    with torch.no_grad():
        actual = [model(padded, cache=cache)[0]]
        cache = cache.select([1, 0])
        actual += [
            model(torch.tensor([[short[t - 4]], [long[t]]]), cache=cache)[0].flip(0)
            for t in (7, 8, 9)
        ]
        for step, logits in enumerate(actual):
            for row, text in enumerate((long, short)):
                idx = torch.tensor([text[: len(text) - 3 + step]])
                torch.testing.assert_close(logits[row, 0], model(idx)[0][0, 0], atol=1e-5, rtol=0)


def reference_mask(ids, prefix_lm):
    """The mask of sources and targets from its definition, (query, key); 3 separates documents."""
    # (document, part) of each token; every part begins with a 3, and odd ones (from 1) are sources
    places = []
    document = part = 0
    for t, token in enumerate(ids):
        if token == 3 and (t == 0 or ids[t - 1] == 3):
            document, part = document + 1, 1
        elif token == 3:
            part += 1
        places.append((document, part))
    return [
        [
            query[0] == key[0] and (j <= i or prefix_lm and query == key and query[1] % 2 == 1)
            for j, key in enumerate(places)
        ]
        for i, query in enumerate(places)
    ]


TURNS = [
    [3, 5, 6, 7, 3, 8, 9, 3, 3, 4, 3, 8, 8, 3, 3, 3],
    [3, 5, 3, 8, 3, 6, 6, 6, 3, 9, 9, 3, 3, 5, 5, 3],
]


@pytest.mark.parametrize('prefix_lm', [False, True])
def test_prefix_lm_mask_matches_definition(prefix_lm):
    model = tiny(eot_token=3, turns=2, prefix_lm=prefix_lm)
    idx = torch.tensor(TURNS)
    expected = torch.tensor([reference_mask(ids, prefix_lm) for ids in TURNS])[:, None]
    assert torch.equal(model.attention_mask(idx, torch.arange(16)), expected)


@pytest.mark.parametrize(
    'options',
    [{}, {'attention': 'math'}, {'ngram': 3, 'ngram_rows': 97}, {'n_kv_head': 1}],
    ids=str,
)
def test_prefix_lm_source_is_bidirectional_and_blind_to_target(options):
    model = tiny(eot_token=3, turns=1, prefix_lm=True, position='rope', **options)
    ids = torch.tensor([[3, 5, 6, 7, 3, 8, 9, 4, 3]])  # the source is 3, 5, 6, 7

    def states(ids):
        return model(ids, ids)[0][0]

    plain = states(ids)
    for place, same in ((3, []), (1, []), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 2, 3, 4, 5, 6])):
        changed = ids.clone()
        changed[0, place] = 11
        equal = [t for t in range(9) if torch.equal(states(changed)[t], plain[t])]
        assert equal == same, f'the token at {place} was changed'


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('ngram', [1, 3])
@pytest.mark.parametrize('prefix_lm', [False, True])
def test_prefix_lm_generation_matches_with_and_without_cache(prefix_lm, ngram, static):
    model = tiny(eot_token=3, turns=2, prefix_lm=prefix_lm, ngram=ngram, ngram_rows=97)
    # one source has 3 tokens, the other 1
    long, short = ([3, 5, 6, 7, 3, 8, 9, 10, 11], [3, 4, 3, 9, 9, 10, 11])
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 2]), static=static)
    steps = [model(torch.tensor([long[:5], [0, 0, *short[:3]]]), cache=cache)[0]]
    steps += [model(torch.tensor([[long[t]], [short[t - 2]]]), cache=cache)[0] for t in range(5, 9)]
    for row, text in enumerate((long, short)):
        alone = model(torch.tensor([text]), torch.tensor([text]))[0][0]
        torch.testing.assert_close(torch.cat(steps, dim=1)[row], alone[-5:], atol=1e-5, rtol=0)
    prompts = [[3, *range(20, 20 + n), 3] for n in (1, 4, 9)]
    with_cache = model.generate(prompts, 4, temperature=0)
    assert with_cache == model.generate(prompts, 4, temperature=0, use_cache=False)
    assert [row for p in prompts for row in model.generate([p], 4, temperature=0)] == with_cache
    assert [found[0][0] for found in beam_search(model, prompts, 4, num_beams=1)] == [
        row[-4:] for row in with_cache
    ]


def test_prefix_lm_handles_unfinished_and_missing_source():
    model = tiny(eot_token=3, turns=1, prefix_lm=True)
    # an unfinished source: the unused rest of the static buffer is not part of it
    ids = torch.tensor([[3, 5, 6, 7]])
    expected = model(ids, ids)[0][:, -1:]
    actual = model(ids, cache=KVCache(model.config, 1, 16, static=True))[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    ids = torch.tensor([[5, 6, 7, 8]])  # no source: plain causal attention
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert torch.equal(model.attention_mask(ids, torch.arange(4)), causal)


def test_prefix_lm_isolates_packed_documents():
    model = tiny(eot_token=3, turns=2, prefix_lm=True, position='none', ngram=3, ngram_rows=97)
    first, second = [3, 5, 6, 3, 7, 3], [3, 8, 9, 3, 10, 3, 11, 3, 12, 3]
    row = torch.tensor([first + second])
    logits = model(row, row)[0][0]
    for ids, part in ((first, logits[:6]), (second, logits[6:])):
        torch.testing.assert_close(
            part, model(torch.tensor([ids]), torch.tensor([ids]))[0][0], atol=1e-5, rtol=0
        )
