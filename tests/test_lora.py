"""LoRA: against full finetuning, PEFT and the profiler; and as a run that is saved and resumed."""

import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import checkpoint as ckpt
from configurator import TrainConfig
from helpers import (
    TINY,
    assert_same_run,
    awake,
    deep_equal,
    peak_bytes,
    step_losses,
    tiny,
    tokens,
)
from lib import bins, memory, write_huggingface
from lib.errors import UserError
from lib.lora import add_lora, load_lora, lora_layers, merge_lora
from lib.loss import chunked_cross_entropy
from lib.recipe import check
from lib.resume import MODEL_KEYS, take_saved_config
from lib.write_peft import write_adapter
from model import GPT, GPTConfig
from optimizer import block_matrices, make_optimizer, n_trained

LORA = (
    *TINY,
    '--lora_rank=4',
    '--lora_dropout=0.1',
    '--gradient_accumulation_steps=2',
    '--max_iters=8',
    '--eval_interval=4',
    '--lr_decay_iters=8',
    '--learning_rate=1e-2',
)
# of peft 0.21, with transformers 5.23
pytestmark = pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing` is deprecated')
KINDS = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')


def merged_copy(model, alpha):
    """A plain GPT with the merged weights, and what LoRA keeps."""
    weights, lora = merge_lora(model.state_dict(), alpha)
    plain = GPT(model.config).eval()
    plain.load_state_dict(weights)
    return plain, lora


def with_random_updates(model, rank=3, alpha=2.0):
    add_lora(model, rank, alpha, 0.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model


# Arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, {'activation': 'swiglu', 'n_kv_head': 2}, {'bias': False}])
def test_merged_weights_compute_the_same(options):
    model = tiny(**options)
    before = model(tokens(2, 16))[0]
    with_random_updates(model)
    names = {f'transformer.h.{i}.{kind}' for i in range(2) for kind in KINDS}
    assert lora_layers(model).keys() == names
    plain, _ = merged_copy(model, 2.0)
    after = model(tokens(2, 16))[0]
    assert not torch.allclose(before, after, atol=0.1)
    torch.testing.assert_close(plain(tokens(2, 16))[0], after, atol=1e-4, rtol=1e-4)


def test_updates_start_at_zero_and_everything_else_is_frozen():
    model = awake(tie_weights=False, ngram=2, ngram_rows=97)
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    before = model(x, y)[1]
    add_lora(model, 4, 16.0, 0.0)
    loss = model(x, y)[1]
    assert torch.equal(before, loss)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        f'{layer}.{name}' for layer in lora_layers(model) for name in ('lora_A', 'lora_B')
    }
    sizes = 4 * sum(sum(p.shape) for p in block_matrices(tiny()))
    assert n_trained(model) == sizes
    config = TrainConfig(lora_rank=4, embedding_learning_rate=0.1)
    groups = make_optimizer(model, config).param_groups
    assert sum(p.numel() for group in groups for p in group['params']) == sizes


def test_dropout_is_on_the_input_of_the_updates_alone():
    model = tiny().train()
    add_lora(model, 4, 16.0, 0.5)
    first = model(tokens(2, 16))[0]
    assert torch.equal(first, model(tokens(2, 16))[0])  # B is 0
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    assert not torch.equal(model(tokens(2, 16))[0], model(tokens(2, 16))[0])
    model.eval()
    assert torch.equal(model(tokens(2, 16))[0], model(tokens(2, 16))[0])


def test_one_sgd_step_of_full_rank_is_that_of_full_finetuning():
    """With alpha / rank = 1 the gradient of B is G A^T, that of A is B^T G. So if one of them is
    orthogonal and the other one 0, a step changes B A by -lr G, as full finetuning does W."""
    torch.manual_seed(0)
    x, y, full, lora = tokens(4, 16), tokens(4, 16, seed=2), awake(), awake()
    add_lora(lora, 32, 32.0, 0.0)
    for layer in lora_layers(lora).values():
        wide = layer.in_features > 32  # rows of A, columns of B: the side of 32 is orthogonal
        torch.nn.init.zeros_(layer.lora_A if wide else layer.lora_B)
        torch.nn.init.orthogonal_(layer.lora_B if wide else layer.lora_A)
    for model in (full, lora):
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.1)
        model(x, y)[1].backward()
        optimizer.step()
    merged, _ = merge_lora(lora.state_dict(), 32.0)
    start, trained = awake().state_dict(), full.state_dict()
    for layer in lora_layers(lora):
        change = trained[f'{layer}.weight'] - start[f'{layer}.weight']
        theirs = merged[f'{layer}.weight'] - start[f'{layer}.weight']
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(theirs, change, atol=1e-6, rtol=1e-4)


def fit(model, x, y):
    """The loss after 60 steps of AdamW on one batch."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_full_rank_learns_by_heart_what_full_finetuning_does():
    """of the same matrices; rank 1 does not"""
    x, y = tokens(4, 16), tokens(4, 16, seed=2)
    full = tiny().requires_grad_(False)
    for p in block_matrices(full):
        p.requires_grad_()
    losses = {'full': fit(full, x, y)}
    for rank in (1, 32):
        lora = tiny()
        add_lora(lora, rank, 16.0, 0.0)
        losses[rank] = fit(lora, x, y)
    assert losses[32] < losses['full'] + 0.02 < 0.1 < 0.3 < losses[1], losses


@pytest.mark.parametrize('cap', [0.0, 5.0])
def test_chunked_loss_with_a_frozen_head(cap):
    """as much as a head in training passes on to the blocks"""
    x, weight, targets = torch.randn(40, 8), torch.randn(30, 8), tokens(40, vocab_size=30)
    gradients = []
    for frozen in (True, False):
        leaf = x.clone().requires_grad_()
        head = weight.clone().requires_grad_(not frozen)
        chunked_cross_entropy(leaf, head, targets, cap, at_once=300).backward()
        gradients.append(leaf.grad)
        assert (head.grad is None) == frozen
    assert torch.equal(*gradients)


def test_activation_checkpointing_and_autocast_keep_the_gradients():
    gradients = []
    for options in ({}, {'activation_checkpointing': True}):
        model = with_random_updates(tiny(**options))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            model(tokens(2, 16), tokens(2, 16, seed=2))[1].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert deep_equal(*gradients)


@pytest.mark.slow
def test_compiled_model_is_one_graph():
    model = with_random_updates(tiny())
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=False)
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    torch.testing.assert_close(compiled(x, y)[1], model(x, y)[1])


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_memory_estimate_matches_torch_profiler(dropout):
    config = TrainConfig(
        n_layer=2, n_head=4, n_embd=256, block_size=128, batch_size=8, lora_rank=16
    )
    keys = {key: getattr(config, key) for key in MODEL_KEYS} | {'bias': True}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        model = GPT(GPTConfig(**keys, vocab_size=2048))
        add_lora(model, 16, 16.0, dropout)
        optimizer = make_optimizer(model, config)
        for _ in range(2):
            idx = torch.randint(2048, (config.batch_size, config.block_size))
            model(idx, idx, return_logits=False)[1].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    peak = peak_bytes(events)
    sizes = memory.Sizes(model.config, idx.device, 16, dropout)
    parts = memory.step_bytes(sizes, config, half=False)
    assert sum(parts.values()) == pytest.approx(peak, rel=0.15)
    assert parts['optimizer'] == 8 * n_trained(model)


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def lora_run(run, trained, char_data, tmp_path_factory):
    """(folder, output) of a tiny run with LoRA, with checkpoints at steps 4 and 8."""
    out_dir = tmp_path_factory.mktemp('lora') / 'out'
    files = (f'--init_from={trained}', f'--dataset={char_data}', f'--out_dir={out_dir}')
    done = run('train.py', *files, *LORA)
    return out_dir, done.stdout


def printed_val_loss(result):
    return float(re.search(r'val loss ([\d.]+)', result.stdout)[1])


def test_run_trains_updates_of_that_rank_only(lora_run, trained):
    out_dir, output = lora_run
    base, tuned = ckpt.load(trained), ckpt.load(out_dir)
    assert tuned.model.keys() == base.model.keys()
    n = 4 * sum(sum(p.shape) for p in block_matrices(base.build_model()))
    assert f'LoRA trains {n:,}' in output
    for name, weight in base.model.items():
        change = tuned.model[name] - weight
        if any(name.endswith(f'{kind}.weight') for kind in KINDS):
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4, name
            assert torch.equal(tuned.lora[name], weight)
        else:
            assert torch.equal(tuned.model[name], weight), name
    state = tuned.optimizer['state'].values()
    assert sum(values['exp_avg'].numel() for values in state) == n


def test_merged_checkpoint_is_a_model_like_any_other(run, lora_run, char_data, tmp_path):
    """resumed for an evaluation, sampled, finetuned: everywhere it has the loss that was saved."""
    out_dir, _ = lora_run
    val_loss = ckpt.load(out_dir).val_loss
    evaluated = run('train.py', '--init_from=resume', f'--out_dir={out_dir}', '--eval_only')
    assert printed_val_loss(evaluated) == pytest.approx(val_loss, abs=1e-4)
    run('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=5')
    finetuned = run(
        'train.py', f'--init_from={out_dir}', f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
        *TINY, '--lora_rank=2', '--max_iters=1',
    )  # fmt: skip
    assert printed_val_loss(finetuned) == pytest.approx(val_loss, abs=1e-4)
    again, before = ckpt.load(tmp_path / 'out'), ckpt.load(out_dir)
    name = 'transformer.h.0.mlp.c_fc.weight'
    assert torch.equal(again.lora[name], before.model[name])
    assert ckpt.load(out_dir, average_last=2).lora is None  # a mean of updates has a higher rank


def test_resume_is_bitwise_exact(run, lora_run, tmp_path):
    out_dir, _ = lora_run
    shutil.copytree(out_dir, tmp_path / 'out')
    for path in (tmp_path / 'out').glob('ckpt_00000008.*'):
        path.unlink()
    run('train.py', '--init_from=resume', f'--out_dir={tmp_path}/out')
    assert_same_run(tmp_path / 'out', out_dir)
    assert deep_equal(ckpt.load(tmp_path / 'out').lora, ckpt.load(out_dir).lora)


def test_refused_before_it_starts(refused, trained, lora_run, char_data, tmp_path):
    new = (f'--dataset={char_data}', f'--out_dir={tmp_path}/out', *LORA)
    old = ('--init_from=resume', f'--out_dir={lora_run[0]}')
    base = f'--init_from={trained}'
    for arguments, says in (
        (new, ('lora_rank = 4', '--init_from')),
        ((base, *new, '--lora_rank=33'), ('lora_rank = 33', 'at most 32')),
        ((*old, '--lora_rank=8'), ('lora_rank = 8', 'has 4', 'leave it out')),
    ):
        refused('train.py', *arguments, says=says)
    assert not (tmp_path / 'out').exists()
    with pytest.raises(UserError, match='lora_rank = 4: .*--optimizer=adamw'):
        check(TrainConfig(lora_rank=4, init_from='gpt2', optimizer='muon'))


@pytest.mark.parametrize('key, value, then', [('lora_alpha', 8.0, '16.0'), ('lora_rank', 8, '0')])
def test_resumed_run_keeps_rank_and_scale(lora_run, trained, key, value, then):
    checkpoint = ckpt.load(lora_run[0] if key == 'lora_alpha' else trained)
    config = TrainConfig(init_from='resume', **{key: value})
    with pytest.raises(UserError, match=f'{key} = {value} but .* has {then}: leave it out'):
        take_saved_config(config, {key: None}, checkpoint)


def test_checkpoint_of_an_earlier_version_loads(trained, tmp_path):
    state = torch.load(next(trained.glob('*.pt')), weights_only=True)
    assert state.pop('lora') is None
    torch.save(state, tmp_path / 'old.pt')
    assert ckpt.load(tmp_path / 'old.pt').lora is None


def test_checkpoint_whose_updates_do_not_fit_is_refused(lora_run):
    checkpoint = ckpt.load(lora_run[0])
    model = checkpoint.build_model()
    add_lora(model, 4, 16.0, 0.0)
    del checkpoint.lora['transformer.h.1.mlp.c_fc.lora_B']
    for wrong in (checkpoint.lora, None):
        checkpoint.lora = wrong
        with pytest.raises(UserError, match='do not fit its lora_rank'):
            load_lora(model, checkpoint)


@pytest.mark.parametrize(
    'flags', [(), ('--parallel=fsdp',), ('--deterministic_sum',)], ids=['ddp', 'fsdp', 'tree']
)
def test_two_processes_compute_what_one_does(ranks, lora_run, trained, char_data, tmp_path, flags):
    ranks(
        2, f'--init_from={trained}', f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
        *LORA, *flags,
    )  # fmt: skip
    losses = [[loss for _, loss, _ in step_losses(d)] for d in (tmp_path / 'out', lora_run[0])]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    ours, theirs = ckpt.load(tmp_path / 'out'), ckpt.load(lora_run[0])
    assert ours.lora.keys() == theirs.lora.keys()
    for name, weight in ours.model.items():
        torch.testing.assert_close(weight, theirs.model[name], atol=1e-4, rtol=0)


# PEFT ---------------------------------------------------------------------------------------------

ARCHITECTURES = {
    'gpt2': {},
    'llama': {'position': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'n_kv_head': 2},
    'apertus': {'position': 'rope', 'norm': 'rmsnorm', 'activation': 'relu2', 'qk_norm': True},
    'starcoder2': {'position': 'rope', 'activation': 'gelu_tanh'},
    'openai-gpt': {'norm_position': 'post', 'activation': 'relu'},
}


def save_adapter(model, folder, alpha, dtype=torch.float32):
    """Write the adapter of a model with LoRA; returns the merged model."""
    plain, lora = merged_copy(model, alpha)
    rank = next(iter(lora_layers(model).values())).lora_A.shape[0]
    config = {'lora_rank': rank, 'lora_alpha': alpha, 'lora_dropout': 0.0, 'init_from': 'gpt2'}
    checkpoint = ckpt.Checkpoint(vars(model.config), plain.state_dict(), config=config, lora=lora)
    folder.mkdir()
    write_adapter(checkpoint, folder, dtype)
    return plain


def assert_peft_computes(theirs, folder, plain):
    adapted = peft.PeftModel.from_pretrained(theirs, folder)
    idx = tokens(2, 16)
    with torch.no_grad():
        logits = adapted(idx).logits
        torch.testing.assert_close(logits, plain(idx, idx)[0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(adapted.unload()(idx).logits, logits, atol=0.1)


@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_peft_loads_the_adapter_with_equal_logits(tmp_path, kind):
    model = tiny(**{'bias': False} | ARCHITECTURES[kind])
    saved, tensors = write_huggingface.convert(model.config, model.state_dict())
    assert saved['model_type'] == kind
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    write_huggingface.write_safetensors(tmp_path / 'model.safetensors', tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain = save_adapter(with_random_updates(model), tmp_path / 'adapter', 2.0)
    assert_peft_computes(theirs, tmp_path / 'adapter', plain)


def test_adapter_of_a_model_of_transformers(run, char_data, tmp_path):
    """A GPT-2 that transformers has saved is finetuned by train.py; the adapter alone, exported,
    turns their model into ours."""
    torch.manual_seed(0)
    vocab_size = bins.open_tokenizer(char_data).vocab_size
    options = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'n_positions': 32}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab_size, **options)
    ).eval()
    theirs.save_pretrained(tmp_path / 'base')
    run(
        'train.py', f'--init_from={tmp_path}/base', f'--dataset={char_data}',
        f'--out_dir={tmp_path}/out', *LORA, '--learning_rate=0.1',
    )  # fmt: skip
    exported = run('tools/export.py', '--format=peft', f'--out_dir={tmp_path}/out')
    assert str(tmp_path / 'base') in exported.stdout
    plain, _ = ckpt.load_model(tmp_path / 'out')
    assert_peft_computes(theirs, tmp_path / 'out' / 'peft', plain)


def test_no_adapter_without_lora(refused, trained, tmp_path):
    refused(
        'tools/export.py', '--format=peft', f'--out_dir={trained}',
        f'--export_dir={tmp_path}/adapter', says=('has no adapter', '--lora_rank'),
    )  # fmt: skip
    assert not (tmp_path / 'adapter').exists()
