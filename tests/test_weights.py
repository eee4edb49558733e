"""Weights and tokenizers as other programs leave them: right, or refused in a sentence."""

import itertools
import json
import random
import struct
import zipfile

import numpy as np
import pytest
import tokenizers as hf
import torch
import transformers

import checkpoint as ckpt
from helpers import SHAPE, TINY, error_line, nanogpt_state, save_overflowing
from lib import formats, tokenizer
from lib.errors import UserError
from model import GPT, GPTConfig


def save(state, path):
    torch.save(state, path)
    return path


# Token ids of Hugging Face's tokenizers -----------------------------------------------------------


@pytest.fixture(scope='module')
def byte_level(tmp_path_factory, text):
    """byte_level(special_tokens) -> (their tokenizer, a folder with vocab.json and merges.txt)."""

    def byte_level(special_tokens):
        theirs = hf.ByteLevelBPETokenizer()
        theirs.train_from_iterator(
            [text], vocab_size=400, show_progress=False, special_tokens=special_tokens
        )
        folder = tmp_path_factory.mktemp('tok')
        theirs.save_model(str(folder))
        return theirs, folder

    return byte_level


@pytest.mark.parametrize(
    'special',
    [
        ['<|endoftext|>'],
        [],
        ['<s>', '<pad>', '</s>', '<unk>'],
        ['<pad>', '<|endoftext|>', '<mask>'],
    ],
)
@pytest.mark.parametrize('files', ['both', 'vocab.json', 'tokenizer.json'])
def test_ids_are_those_of_the_file(byte_level, special, files, text):
    """Special tokens come first in these vocabularies; ids are not the order of merges."""
    theirs, folder = byte_level(special)
    if files == 'tokenizer.json':
        theirs.save(str(folder / 'tokenizer.json'))
    if files == 'vocab.json':
        (folder / 'merges.txt').unlink()
    ours = tokenizer.from_huggingface(folder)
    again = tokenizer.Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    for sample in ('the cat', 'naïve 日本 🙂\n\n  x', text[:5000]):
        for tok in (ours, again):
            assert tok.encode(sample) == theirs.encode(sample).ids
            assert tok.decode(tok.encode(sample)) == sample
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.eot == theirs.token_to_id('<|endoftext|>')
    if ours.eot is not None:
        assert ours.encode('a<|endoftext|>b')[1] == ours.eot


def test_added_tokens_are_recognized_as_huggingface_does(byte_level):
    theirs, folder = byte_level(['<|endoftext|>'])
    theirs.add_special_tokens(['<|im_start|>', '<|im_end|>'])
    theirs.save(str(folder / 'tokenizer.json'))
    ours, sample = tokenizer.from_huggingface(folder), '<|im_start|>user\nhi<|im_end|>\n'
    assert ours.encode(sample) == theirs.encode(sample).ids
    assert ours.text_bytes()[ours.encode(sample)[0]] == 0


def test_added_tokens_of_a_slow_tokenizer_are_recognized(byte_level):
    """vocab.json and merges.txt, with the files of tokens that were added later."""
    chat = '<|im_start|>user\nhi<|im_end|>'
    for name, content in (
        ('added_tokens.json', {'<|im_start|>': 400, '<|im_end|>': 401}),
        ('tokenizer_config.json', {'added_tokens_decoder': {
            '400': {'content': '<|im_start|>'}, '401': {'content': '<|im_end|>'}}}),
    ):  # fmt: skip
        theirs, folder = byte_level(['<|endoftext|>'])
        theirs.add_special_tokens(['<|im_start|>', '<|im_end|>'])
        (folder / name).write_text(json.dumps(content))
        assert tokenizer.from_huggingface(folder).encode(chat) == theirs.encode(chat).ids
    for name, content in (
        ('special_tokens_map.json', {'pad_token': '<pad>'}),
        ('tokenizer_config.json', {'add_prefix_space': True}),
    ):
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=name):
            tokenizer.from_huggingface(folder)


def test_added_tokens_that_overlap_are_found_as_huggingface_does_or_refused(byte_level):
    """Theirs looks for all tokens that are not normalized first, then for the others in the rest.
    """
    base, folder = byte_level(['<|endoftext|>'])
    base, rng, counts = base._tokenizer.to_str(), random.Random(0), {True: 0, False: 0}
    texts = [''.join(text) for n in (2, 3, 4) for text in itertools.product('~^', repeat=n)]
    for _ in range(60):
        theirs = hf.Tokenizer.from_str(base)
        theirs.add_tokens([
            hf.AddedToken(text, normalized=rng.random() < 0.5) for text in rng.sample(texts, 3)
        ])
        theirs.save(str(folder / 'tokenizer.json'))
        try:
            ours = tokenizer.from_huggingface(folder)
        except UserError as error:
            assert 'overlap, but one is normalized' in str(error)
            counts[False] += 1
            continue
        counts[True] += 1
        for sample in (''.join(rng.choices('~^', k=12)) for _ in range(40)):
            assert ours.encode(sample) == theirs.encode(sample).ids, theirs.to_str()[:999]
    assert min(counts.values()) > 9, counts
    saved = json.loads(base)
    saved['added_tokens'] += [dict(saved['added_tokens'][0], content='Ġthe', id=400)]
    (folder / 'tokenizer.json').write_text(json.dumps(saved))
    with pytest.raises(UserError, match="the added token 'Ġthe' has two ids"):
        tokenizer.from_huggingface(folder)


def test_a_token_that_is_only_in_the_vocabulary_is_plain_text_in_a_prompt(byte_level):
    theirs, folder = byte_level(['<|endoftext|>'])
    vocab = json.loads((folder / 'vocab.json').read_text())
    (folder / 'vocab.json').write_text(json.dumps(vocab | {'<|im_start|>': 400}))
    ours = tokenizer.from_huggingface(folder)
    assert ours.encode('<|im_start|>x') == theirs.encode('<|im_start|>x').ids
    assert ours.decode([400]) == '<|im_start|>'


def test_merges_in_another_order_are_refused(byte_level):
    _, folder = byte_level(['<|endoftext|>'])
    lines = (folder / 'merges.txt').read_text().splitlines()
    (folder / 'merges.txt').write_text('\n'.join([lines[0], *lines[:0:-1]]))
    with pytest.raises(UserError, match='merges'):
        tokenizer.from_huggingface(folder)


@pytest.mark.parametrize(
    'theirs',
    [
        hf.Tokenizer(hf.models.Unigram([('<unk>', 0.0), ('a', -1.0)], 0)),
        hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 1}, 'a')),
        hf.Tokenizer(hf.models.WordPiece({'a': 0, '##b': 1}, unk_token='a')),
        hf.Tokenizer(hf.models.BPE({'a': 0, 'b': 1, 'ab': 2}, [('a', 'b')])),
    ],
    ids=['Unigram', 'WordLevel', 'WordPiece', 'BPE of characters'],
)
def test_tokenizers_of_another_kind_are_refused(theirs, tmp_path):
    theirs.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(UserError, match='tokenizer.json: cannot read a byte-level BPE'):
        tokenizer.from_huggingface(tmp_path)


def test_a_byte_level_tokenizer_that_changes_the_text_is_refused(byte_level):
    for part, value in (
        ('pre_tokenizer', hf.pre_tokenizers.ByteLevel(add_prefix_space=True)),
        ('normalizer', hf.normalizers.Lowercase()),
        ('pre_tokenizer', hf.pre_tokenizers.Whitespace()),
        ('post_processor', hf.processors.RobertaProcessing(('a', 0), ('b', 1))),
        ('decoder', hf.decoders.WordPiece()),
    ):
        theirs, folder = byte_level(['<|endoftext|>'])
        setattr(theirs._tokenizer, part, value)
        theirs.save(str(folder / 'tokenizer.json'))
        with pytest.raises(UserError, match=part) as error:
            tokenizer.from_huggingface(folder)
        parts = ('pre_tokenizer', 'normalizer', 'post_processor', 'decoder')
        assert [name for name in parts if name in str(error.value)] == [part]


def test_tokenizer_larger_than_the_model_is_refused(tmp_path, byte_level):
    _, folder = byte_level(['<|endoftext|>'])
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=350)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match='350 tokens.*400'):
        ckpt.load(folder).get_tokenizer()


def test_a_pattern_that_leaves_out_text_is_refused():
    tok = tokenizer.BPETokenizer('bpe', r'[a-z]+', [bytes([b]) for b in range(256)])
    assert tok.encode('abc') == [97, 98, 99]
    with pytest.raises(UserError, match='leaves out'):
        tok.encode('abc DEF')


# Formats of weights -------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64, 'mixed'])
def test_training_keeps_fp32_weights_whatever_the_file_has(run, char_data, tmp_path, dtype):
    """In bf16 a third of the weights do not move: their update is less than half a step."""
    vocab_size = len(json.loads((char_data / 'meta.json').read_text())['tokenizer']['characters'])
    model = GPT(GPTConfig(**SHAPE | {'vocab_size': vocab_size}))
    weights = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        mixed = (torch.float16, torch.float32, torch.bfloat16)[i % 3]
        weights[name] = tensor.to(mixed if dtype == 'mixed' else dtype)
    args = SHAPE | {'vocab_size': vocab_size, 'bias': True}
    state = {'model': weights, 'model_args': args, 'config': {'dataset': str(char_data)}}
    path = save(state, tmp_path / 'ckpt.pt')
    loaded, _ = ckpt.load_model(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    out_dir = tmp_path / 'out'
    run('train.py', f'--init_from={path}', f'--dataset={char_data}', f'--out_dir={out_dir}',
        '--max_iters=2', '--device=cpu', '--dtype=float32', '--learning_rate=1e-5',
        '--warmup_iters=0', '--batch_size=4', '--gradient_accumulation_steps=1',
        '--eval_iters=1', '--eval_interval=2')  # fmt: skip
    trained = ckpt.load(out_dir)
    for name, tensor in trained.model.items():
        assert tensor.dtype == torch.float32
        if 'wte' not in name and 'wpe' not in name and 'lm_head' not in name:
            moved = tensor != weights[name].float()
            assert moved.float().mean() > 0.98, name
    moments = [v for s in trained.optimizer['state'].values() for v in s.values()]
    assert {v.dtype for v in moments} == {torch.float32}


# Untied heads and unknown keys --------------------------------------------------------------------


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path):
    """Whatever the file says of tying."""
    state = nanogpt_state({'tie_weights': False})
    expected = GPT(GPTConfig(**SHAPE, activation='gelu', tie_weights=False)).eval()
    expected.load_state_dict(state['model'])
    model = ckpt.load(save(state, tmp_path / 'ckpt.pt')).build_model().eval()
    idx = torch.randint(300, (2, 16))
    torch.testing.assert_close(model(idx, idx)[0], expected(idx, idx)[0])

    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=300, tie_word_embeddings=False
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / 'hf')
    path = tmp_path / 'hf' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'tie_word_embeddings': True}))
    for model in (
        ckpt.load(tmp_path / 'hf').build_model().eval(),
        GPT.from_pretrained(tmp_path / 'hf').eval(),
    ):
        torch.testing.assert_close(model(idx, idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)
        assert not model.config.tie_weights


@pytest.mark.parametrize(
    'key, value',
    [('use_rope', True), ('n_experts', 8), ('window', [1, 2]), ('causal', False), ('norm', 'rms')],
)
def test_unknown_model_args_are_refused(tmp_path, key, value):
    state = nanogpt_state()
    state['model_args'] = state['model_args'] | {key: value}
    with pytest.raises(UserError, match=f'ckpt.pt.*{key}'):
        ckpt.load(save(state, tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize(
    'key, value',
    [
        ('scale_attn_by_inverse_layer_idx', True),
        ('activation_function', 'silu'),
        ('activation_function', ['gelu']),
        ('scale_attn_weights', False),
        ('add_cross_attention', True),
        ('rope_theta', 10000.0),
        ('quantization_config', {'bits': 4}),
        ('pruned_heads', {'0': [1]}),
    ],
)
def test_unknown_config_json_keys_are_refused(tmp_path, key, value):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    assert ckpt.load(tmp_path).model_config['n_embd'] == 16  # all of transformers' own are known
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f'config.json.*{key}'):
        ckpt.load(tmp_path)
    with pytest.raises(UserError, match=key):
        GPT.from_pretrained(tmp_path)


# Weights that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize('value', [float('nan')])
def test_weights_that_are_not_finite_are_refused_everywhere(
    refused, trained, tmp_path, value, char_data
):
    checkpoint = ckpt.load(trained)
    checkpoint.model['transformer.ln_f.weight'][3] = value
    ckpt.save(tmp_path, checkpoint)
    (text := tmp_path / 'x.txt').write_text('def main(config):\n' * 9)
    says = ('not finite', 'transformer.ln_f.weight')
    where = (f'--init_from={tmp_path}', '--device=cpu')
    for script, *arguments in (
        ('sample.py', *where),
        ('sample.py', *where, '--temperature=0'),
        ('sample.py', *where, '--num_beams=2', '--max_new_tokens=2'),
        ('explain.py', where[0], '--start=def'),
        ('tools/evaluate.py', *where, f'--input={text}'),
        ('train.py', *where, f'--dataset={char_data}', f'--out_dir={tmp_path / "new"}', *TINY[8:]),
    ):
        refused(script, *arguments, says=says)


@pytest.mark.parametrize('options', [(), ('--temperature=0',), ('--num_beams=2',)])
def test_overflow_while_sampling_is_one_sentence(run, trained, tmp_path, options):
    save_overflowing(trained, tmp_path / 'out')
    result = run('sample.py', f'--init_from={tmp_path}/out', '--device=cpu', '--max_new_tokens=3',
                 *options, code=2)  # fmt: skip
    assert 'logits are not finite' in error_line(result)


# Bombs --------------------------------------------------------------------------------------------


def test_files_that_unfold_are_refused(tmp_path):
    state = nanogpt_state()
    path, bomb = save(state, tmp_path / 'a.pt'), tmp_path / 'ckpt.pt'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(UserError, match='compressed or overlap'):
        ckpt.load(bomb)
    # a tensor that is larger than its data
    state['model']['transformer.wte.weight'] = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(UserError, match='larger than its data'):
        ckpt.load(save(state, bomb))
    with pytest.raises(UserError, match='larger than its data'):
        formats.check_weights(formats.load_torch(save(state['model'], bomb)), bomb)


@pytest.mark.parametrize('bad', ['sparse', 'complex', 'scalar', 'text'])
def test_tensors_of_another_kind_are_refused(tmp_path, bad):
    state = nanogpt_state()
    weight = state['model']['transformer.h.0.ln_1.weight']
    state['model']['transformer.h.0.ln_1.weight'] = {
        'sparse': lambda: weight.to_sparse(),
        'complex': lambda: weight.to(torch.complex64),
        'scalar': lambda: weight[0],
        'text': lambda: 'text',
    }[bad]()
    with pytest.raises(UserError, match='ckpt.pt'):
        ckpt.load(save(state, tmp_path / 'ckpt.pt')).build_model()


def test_legacy_files_load_in_every_program(run, tmp_path, char_data, trained):
    """torch.save wrote no zip files before PyTorch 1.6."""
    checkpoint = ckpt.load(trained)
    keys = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bias', 'dropout')
    state = nanogpt_state(model=checkpoint.model)
    state['config'] = {'dataset': str(char_data)}
    state['model_args'] = {key: checkpoint.model_config[key] for key in keys}
    path = tmp_path / 'ckpt.pt'
    torch.save(state, path, _use_new_zipfile_serialization=False)
    for script in ('sample.py', 'explain.py'):
        run(script, f'--init_from={path}', '--start=def', f'--out_dir={tmp_path}')


def test_a_file_with_a_weight_twice_is_refused(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    weights = theirs.state_dict()
    torch.save(weights | {'wte.weight': torch.zeros(50, 16)}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='wte.weight is there twice'):
        ckpt.load(tmp_path)


def test_overlapping_safetensors_are_refused(tmp_path):
    data = np.zeros(2**16, np.uint8).tobytes()
    entry = {'dtype': 'F32', 'shape': [2**14], 'data_offsets': [0, 2**16]}
    header = json.dumps({f't{i}': entry for i in range(20_000)}).encode()
    path = tmp_path / 'model.safetensors'
    path.write_bytes(struct.pack('<Q', len(header)) + header + data)
    with pytest.raises(UserError, match='overlap'):
        formats.read_safetensors(path)


@pytest.mark.parametrize('key, value', [('n_layer', 10**8), ('vocab_size', 2**30), ('ngram', 60)])
def test_sizes_that_the_file_does_not_have_are_refused(tmp_path, key, value):
    state = nanogpt_state()
    state['model_args'] = state['model_args'] | {key: value}
    with pytest.raises(UserError, match='do not fit the model'):
        ckpt.load(save(state, tmp_path / 'ckpt.pt')).build_model()


def test_refused_checkpoints_name_the_line_that_saves_them_again(tmp_path):
    state = nanogpt_state()
    path = tmp_path / 'ckpt.pt'
    torch.save(state | {'when': np.float64(1)}, path)  # numpy's scalars are code to an unpickler
    with pytest.raises(UserError, match='if you trust it.*weights_only=False'):
        ckpt.load(path)
