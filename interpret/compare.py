"""Two checkpoints on the same text: losses, next tokens, KL divergence, head scores."""
import torch
from torch.nn import functional as F

import checkpoint as ckpt
import interpret
from lib.errors import plural, require
from lib.files import printable

N_LIKELY = 12  # tokens to show at each position


def load_other(where, tokenizer, path):
    """(Checkpoint, model in eval mode) of explain.py's --compare; tokenizer: of the one at path.
    Raises UserError, also if its tokenizer is another."""
    other = ckpt.load(where, 'auto', mmap=True)
    difference = tokenizer_difference(other.get_tokenizer(), tokenizer)
    require(not difference, f'compare = {where}: its tokenizer is not that of {path} '
                            f'({difference}), so no token is the same: name a checkpoint that was '
                            f'trained with the same tokenizer')
    return other, other.build_model(dropout=0.0).eval().requires_grad_(False)


def tokenizer_difference(other, tokenizer):
    """How the first tokenizer differs from the second, or '' if they make the same tokens."""
    if other.to_dict() == tokenizer.to_dict():
        return ''
    if (other.kind, other.vocab_size) != (tokenizer.kind, tokenizer.vocab_size):
        names = [f'{t.kind} with {plural(t.vocab_size, "token")}' for t in (other, tokenizer)]
        return f'{names[0]}, not {names[1]}'
    for i, (theirs, ours) in enumerate(zip(other.token_bytes, tokenizer.token_bytes)):
        if theirs != ours:
            return f'token {i} is {theirs.decode(errors="replace")!r}, ' \
                   f'not {ours.decode(errors="replace")!r}'
    return 'it splits text in another way'


def collect_other(checkpoint, model, vocab_size):
    """(facts, arrays) of the other checkpoint that depend on its weights only."""
    scores, _ = interpret.head_scores(model, vocab_size)
    facts = {'other': {
        'path': printable(checkpoint.path), 'step': checkpoint.step,
        'val_loss': checkpoint.val_loss, 'parameters': model.get_num_params(False),
        'n_layer': model.config.n_layer, 'n_head': model.config.n_head,
    }}
    return facts, {'other_scores': torch.stack(list(scores.values()))}  # (4, L, nh)


@torch.no_grad()
def collect_comparison(other, ids, logits, target):
    """(facts, arrays) of the other model on the token ids (T of them). logits: (T, V) of the first.
    target: (T,), the tokens to explain. other: None if there is none. Raises UserError if its
    logits are not finite."""
    if other is None:
        return {}, {}
    idx = torch.tensor([ids])
    other_logits = other(idx, idx)[0][0, :, :logits.size(1)]
    require(other_logits.isfinite().all(),
            'the logits of the model to compare are not finite: its weights are too large')
    log_p = torch.stack((logits, other_logits)).log_softmax(dim=-1)  # (2, T, V)
    kl = F.kl_div(log_p[1], log_p[0], reduction='none', log_target=True).sum(dim=-1)
    both_ids, both_probs = likely_tokens(log_p.exp(), target)
    return {}, {
        'other_loss': F.nll_loss(log_p[1, :-1], idx[0, 1:], reduction='none'),  # (T - 1,)
        'kl': kl.clamp(min=0),  # (T,) of the other from the first, in nats
        'both_ids': both_ids,
        'both_probs': both_probs,
    }


def likely_tokens(probs, target):
    """Of two models, the tokens that either finds likely, and target (T,): ids (T, n) and their
    probabilities (2, T, n). probs: (2, T, V)"""
    rank = probs.amax(dim=0).scatter(1, target[:, None], 2.0)  # target always belongs to them
    ids = rank.topk(min(N_LIKELY, rank.size(1))).indices
    return ids, probs.gather(2, ids.expand(2, -1, -1))
