"""How long a run trains: budgets in steps, tokens, FLOPs or minutes."""
from lib.errors import require

BUDGETS = ('max_iters', 'target_tokens', 'target_flops', 'max_minutes')


def choose_budget(config, given):
    """Drop all budgets but the one that was given last. Raises UserError if two flags give one."""
    keys = [key for key in given if key in BUDGETS and getattr(config, key) is not None]
    flags = [f'--{key}' for key in keys if given[key] is None]
    require(len(flags) < 2, f'{" and ".join(flags)}: give one of them')
    for key in BUDGETS[1:]:
        if key not in keys[-1:]:
            setattr(config, key, None)


def set_max_iters(config, flops_per_token, tokens_per_sample, step=0, samples_seen=0):
    """Derive max_iters from target_tokens or target_flops, so that schedules follow; step and
    samples_seen of them are done. Raises UserError if the budget is less than a step."""
    key = 'target_tokens' if config.target_tokens else 'target_flops'
    target = getattr(config, key)
    if target is None:
        return
    per_sample = tokens_per_sample * (flops_per_token if key == 'target_flops' else 1)
    per_step = config.batch_size * config.gradient_accumulation_steps  # samples
    # in whole samples, half a step rounded up: the same from wherever the run is resumed
    left = round(target / per_sample) - samples_seen
    config.max_iters = step + max(0, (2 * left + per_step) // (2 * per_step))
    require(config.max_iters > 0, f'{key} = {target:,}: a step takes {per_step * per_sample:,.0f}: '
                                  f'give more, or a smaller batch_size')


def tokens_per_step(config):
    return config.batch_size * config.gradient_accumulation_steps * config.block_size


def schedule_step(config, step, seconds):
    """Where a run is on its schedule, 0 to max_iters: with max_minutes, by the share of the time
    that is used; else its step. seconds: of training so far."""
    if config.max_minutes is None:
        return step
    return min(1.0, seconds / (60 * config.max_minutes)) * config.max_iters


def describe_budget(config):
    key = next((key for key in BUDGETS[1:] if getattr(config, key) is not None), 'max_iters')
    return f'{key} = {getattr(config, key)}'
