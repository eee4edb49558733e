"""The KV cache, generate, sampling filters and beam search."""

import itertools
import math

import pytest
import torch
import transformers

from helpers import ARCHITECTURES, POSITIONS, POST, tiny, tokens
from lib.generation import KVCache, beam_search, filter_logits
from model import GPT


def test_generate_greedy_matches_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            vocab_size=60,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    theirs.eval().save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    idx = tokens(2, 5, vocab_size=60)
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False, pad_token_id=0
    )
    assert ours.generate(idx, 50, temperature=0).tolist() == expected.tolist()


@pytest.mark.parametrize('options', [*ARCHITECTURES, POST], ids=str)
def test_kv_cache_matches_uncached_logits(options):
    model = tiny(**options)
    idx = tokens(2, 16)
    expected, _ = model(idx, idx)
    cache = KVCache(model.config, 2, 16)
    with torch.no_grad():
        # five tokens, then one at a time, then four at once
        actual = (
            [model(idx[:, :5], cache=cache)[0]]
            + [model(idx[:, t : t + 1], cache=cache)[0] for t in range(5, 12)]
            + [model(idx[:, 12:], cache=cache)[0]]
        )
    torch.testing.assert_close(
        torch.cat(actual, dim=1), expected[:, [*range(4, 12), 15]], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize('ngram', [1, 4])
@pytest.mark.parametrize('position', POSITIONS)
def test_kv_cache_padding_preserves_logits(position, ngram):
    model = tiny(position=position, ngram=ngram)
    long, short = tokens(10), tokens(3, seed=5)
    padded = torch.stack((long, torch.cat((torch.zeros(7, dtype=torch.long), short))))
    cache = KVCache(model.config, 2, 16, padding=torch.tensor([0, 7]))
    with torch.no_grad():
        together = [model(padded, cache=cache)[0], model(tokens(2, 1), cache=cache)[0]]
    for row, alone in ((0, long), (1, short)):
        for step, logits in enumerate(together):
            idx = torch.cat((alone, tokens(2, 1)[row]))[: len(alone) + step][None]
            torch.testing.assert_close(logits[row, -1], model(idx)[0][0, -1], atol=1e-5, rtol=0)


def generate_greedy_like_nanogpt(model, ids, n):
    """nanoGPT's loop: one forward pass over the last block_size tokens for each new token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids[-model.config.block_size :]]))[0][0, -1].argmax().item())
    return ids


@pytest.mark.parametrize(
    'options',
    [{'position': p} for p in POSITIONS]
    + [{'n_kv_head': 2, 'attention': 'math', 'position': 'rope'}],
)
def test_generate_matches_plain_loop_beyond_block_size(options):
    model = tiny(**options)
    prompts = [[1, 2, 3, 4, 5], [7], list(range(20))]
    expected = [generate_greedy_like_nanogpt(model, prompt, 40) for prompt in prompts]
    assert model.generate(prompts, 40, temperature=0) == expected
    assert model.generate(prompts, 40, temperature=0, use_cache=False) == expected
    for slide in (3, 16):
        cached = model.generate(prompts, 40, temperature=0, slide=slide)
        assert (
            cached
            == model.generate(prompts, 40, temperature=0, slide=slide, use_cache=False)
            != expected
        )
    with pytest.raises(ValueError, match='vocab_size = 40'):
        model.generate([[1, 40]], 1)
    assert model.generate(torch.tensor(prompts[:1]), 40, temperature=0)[0].tolist() == expected[0]


@pytest.mark.parametrize('position', ['learned', 'rope'])
def test_generate_sliding_window_sees_documented_context(position):
    model, slide, block_size = tiny(position=position), 5, 16
    ids, seen = [3, 1, 2], 3
    # by hand: a full window restarts with its last block_size - slide + 1 tokens
    for _ in range(40):
        ids.append(model(torch.tensor([ids[-seen:]]))[0][0, -1].argmax().item())
        seen = seen + 1 if seen < block_size else block_size - slide + 1
    assert model.generate([[3, 1, 2]], 40, temperature=0, slide=slide) == [ids]


def test_generate_is_reproducible_and_preserves_global_rng():
    model = tiny().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate(tokens(3, 4), 12, temperature=1.0, top_k=10, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(first, model.generate(tokens(3, 4), 12, temperature=1.0, top_k=10, seed=7))
    assert not torch.equal(
        first, model.generate(tokens(3, 4), 12, temperature=1.0, top_k=10, seed=8)
    )
    assert (
        len({tuple(row.tolist()) for row in model.generate(tokens(1, 4).repeat(5, 1), 12, seed=1)})
        > 1
    )
    assert model.generate(tokens(1, 4), 200, temperature=5.0, seed=1, vocab_size=7)[0, 4:].max() < 7
    assert torch.equal(
        model.generate(tokens(1, 4), 9, temperature=1e-50),
        model.generate(tokens(1, 4), 9, temperature=0),
    )


def test_generate_samples_follow_softmax():
    model = tiny()
    probs = (model(tokens(1, 4))[0][0, -1] / 2).softmax(0)
    drawn = model.generate(tokens(1, 4).repeat(20000, 1), 1, temperature=2.0, seed=3)[:, -1]
    frequency = torch.bincount(drawn, minlength=40) / 20000
    assert (frequency - probs).abs().max() < 5 * math.sqrt(0.25 / 20000)  # five standard deviations


def test_generate_stops_each_sequence_at_stop_token():
    model = tiny()
    plain = model.generate([[1, 2], [3, 4]], 20, temperature=0)
    stop = plain[0][6]
    stopped = model.generate([[1, 2], [3, 4]], 20, temperature=0, stop_tokens=(stop,))
    assert stopped[0] == plain[0][: plain[0].index(stop, 2) + 1]
    assert stopped[1] == (
        plain[1][: plain[1].index(stop, 2) + 1] if stop in plain[1][2:] else plain[1]
    )


def test_filter_logits_matches_transformers():
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits, ids = torch.randn(6, 50) * 3, torch.randint(50, (6, 9))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, ids, True)
    for ours, theirs in (
        ({'temperature': 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({'top_k': 5}, [TopKLogitsWarper(5)]),
        ({'top_p': 0.8}, [TopPLogitsWarper(0.8)]),
        ({'top_p': 0.01}, [TopPLogitsWarper(0.01)]),
        ({'min_p': 0.1}, [MinPLogitsWarper(0.1)]),
        ({'repetition_penalty': 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        (
            {
                'repetition_penalty': 1.3,
                'temperature': 0.7,
                'top_k': 20,
                'top_p': 0.9,
                'min_p': 0.05,
            },
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                TemperatureLogitsWarper(0.7),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ):
        expected = logits
        for step in theirs:
            expected = step(ids, expected)
        torch.testing.assert_close(
            filter_logits(logits, seen=seen, **ours).softmax(-1), expected.softmax(-1)
        )


def test_generate_shares_prefill_of_equal_prompts():
    model = tiny(ngram=3)
    read = []
    model.transformer.wte.register_forward_hook(
        lambda module, args, output: read.append(tuple(args[0].shape))
    )
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2, 3]]
    together = model.generate(prompts, 6, temperature=0)
    assert read == [(2, 3)] + [(4, 1)] * 5
    assert together == [model.generate([prompt], 6, temperature=0)[0] for prompt in prompts]


@pytest.mark.slow
def test_generate_compiled_matches_eager():
    model = tiny(ngram=3, position='rope', n_layer=1)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 3]]
    assert model.generate(prompts, 30, temperature=0, compile=True) == model.generate(
        prompts, 30, temperature=0
    )


def all_continuations(model, prompt, n, stop):
    """{tokens: log p} of all continuations that end with stop or have n tokens, without a cache."""
    results = {}
    for sequence in itertools.product(range(model.config.vocab_size), repeat=n):
        end = sequence.index(stop) + 1 if stop in sequence else n
        if sequence[:end] not in results:
            text = torch.tensor([prompt + list(sequence[:end])])
            logp = model(text, text)[0][0].log_softmax(-1)
            results[sequence[:end]] = sum(
                logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence[:end])
            )
    return results


@pytest.mark.parametrize('length_penalty', [0.0, 0.6, 2.0])
def test_beam_search_with_full_width_is_exhaustive(length_penalty):
    model = tiny(vocab_size=4, position='rope')
    prompts = [[1, 2, 3], [2]]
    results = beam_search(model, 
        prompts, 4, num_beams=4**4, length_penalty=length_penalty, stop_tokens=[0]
    )
    for prompt, result in zip(prompts, results):
        expected = all_continuations(model, prompt, 4, stop=0)
        scored = {
            text: logp / ((5 + len(text)) / 6) ** length_penalty for text, logp in expected.items()
        }
        assert len(result) == len(scored) and tuple(result[0][0]) == max(scored, key=scored.get)
        for text, score in result:
            assert score == pytest.approx(scored[tuple(text)], abs=1e-4)
        assert [score for _, score in result] == sorted(
            (score for _, score in result), reverse=True
        )


@pytest.mark.parametrize(
    'options',
    [{}, {'eot_token': 3}, {'ngram': 3, 'position': 'rope', 'n_kv_head': 1}],
    ids=str,
)
def test_beam_search_with_one_beam_is_greedy(options):
    model = tiny(**options)
    prompts = [[5, 6, 7, 8], [9], [3, 4]]
    greedy = model.generate(prompts, 10, temperature=0, stop_tokens=[1])
    results = beam_search(model, prompts, 10, num_beams=1, stop_tokens=[1])
    assert [prompt + result[0][0] for prompt, result in zip(prompts, results)] == greedy
    together = beam_search(model, prompts, 6, num_beams=3)
    for prompt, result in zip(prompts, together):
        alone = beam_search(model, [prompt], 6, num_beams=3)[0]
        assert [text for text, _ in alone] == [text for text, _ in result] and len(result) == 3
        assert [score for _, score in result] == pytest.approx(
            [score for _, score in alone], abs=1e-4
        )
        # all texts have the same length
        assert result[0][1] >= beam_search(model, [prompt], 6, num_beams=1)[0][0][1] - 1e-4


@pytest.mark.parametrize('n_beams', [2, 5])
def test_beam_search_does_not_refill_finished_beams(n_beams):
    model, stop = tiny(vocab_size=8, position='rope'), 3
    for prompt in ([1, 2], [5], [7, 0, 6]):
        beams, expected = [((), 0.0)], []
        # by hand: extend all beams, keep the best, set the finished ones aside
        for length in range(1, 7):
            longer = []
            for text, score in beams:
                ids = torch.tensor([prompt + list(text)])
                logp = model(ids, ids)[0][0, -1].log_softmax(-1).tolist()
                longer += [((*text, token), score + logp[token]) for token in range(8)]
            best = sorted(longer, key=lambda beam: -beam[1])[: n_beams - len(expected)]
            ends = [beam for beam in best if beam[0][-1] == stop or length == 6]
            expected += [(text, score / ((5 + length) / 6) ** 0.6) for text, score in ends]
            beams = [beam for beam in best if beam not in ends]
        results = beam_search(model, [prompt], 6, num_beams=n_beams, stop_tokens=[stop])[0]
        expected.sort(key=lambda beam: -beam[1])
        assert [tuple(text) for text, _ in results] == [text for text, _ in expected]
        assert [score for _, score in results] == pytest.approx(
            [score for _, score in expected], abs=1e-4
        )
        assert any(text[-1] == stop for text, _ in expected) or n_beams == 2


def test_beam_search_matches_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        vocab_size=50,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=49,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    prompt = tokens(1, 5, vocab_size=49)
    options = {
        'max_new_tokens': 8,
        'do_sample': False,
        'num_beams': 4,
        'num_return_sequences': 4,
        'length_penalty': 0.0,
    }
    options |= {
        'eos_token_id': None,
        'pad_token_id': 0,
        'output_scores': True,
        'return_dict_in_generate': True,
    }
    expected = theirs.generate(prompt, **options)
    result = beam_search(ours, prompt, 8, num_beams=4, length_penalty=0.0)[0]
    assert [prompt[0].tolist() + text for text, _ in result] == expected.sequences.tolist()
    assert [score for _, score in result] == pytest.approx(
        expected.sequences_scores.tolist(), abs=1e-4
    )
