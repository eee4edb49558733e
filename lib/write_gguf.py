"""Write a GPT as a GGUF file, for llama.cpp and what is built on it. Needs the package gguf.

llama.cpp has the layouts of lib/huggingface.py except openai-gpt, each with one activation (its
src/models/*.cpp). Its own converter knows tokenizers by a list of hashes, which a new one is not
in; here the file has what llama.cpp tokenizes with: GPT-2's pattern, tokens and merges.
"""
import contextlib
import math

from torch.nn import functional as F

from lib.errors import UserError, os_errors, require
from lib.huggingface import add_zero_biases, without_usual
from lib.tokenizer import GPT2_PATTERN, bpe_merges, printable_bytes
from lib.write_huggingface import choose_layout, convert, require_common
from lib.write_tokenizer import CHAT_TEMPLATE

ACTIVATIONS = {'gpt2': 'gelu_tanh', 'llama': 'swiglu', 'qwen3': 'swiglu', 'apertus': 'relu2',
               'arcee': 'relu2', 'starcoder2': 'gelu_tanh'}


def write_gguf(checkpoint, model, path, dtype, name):
    """Write a Checkpoint and its GPT as path. dtype: float32, bfloat16 or q8_0, of the matrices.
    Returns the name of llama.cpp's architecture. Raises UserError before it writes."""
    try:
        import gguf
    except ImportError:
        raise UserError('--format=gguf needs a package: pip install gguf') from None
    config = model.config
    kind = choose_architecture(config)
    vocabulary = Vocabulary(checkpoint.get_tokenizer(), config.vocab_size)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{'float32': 'ALL_F32', 'bfloat16': 'MOSTLY_BF16',
                                             'q8_0': 'MOSTLY_Q8_0'}[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    if kind == 'apertus':
        # xIELU is squared ReLU if its alphas are 1 above 0 and 0 below; llama.cpp takes the
        # softplus of what is in the file, log(e - 1) and -1000
        writer.add_xielu_alpha_p(config.n_layer * [math.log(math.e - 1)])
        writer.add_xielu_alpha_n(config.n_layer * [-1000.0])
        writer.add_xielu_beta(config.n_layer * [0.0])
        writer.add_xielu_eps(config.n_layer * [-1e-6])
    vocabulary.add_to(writer)
    if config.turns:
        writer.add_chat_template(CHAT_TEMPLATE)
    matrices = gguf.GGMLQuantizationType[{'float32': 'F32', 'bfloat16': 'BF16'}.get(dtype, 'Q8_0')]
    for key, tensor in rename(kind, config, model.state_dict(), len(vocabulary.tokens)).items():
        type_ = gguf.GGMLQuantizationType.F32
        if tensor.dim() == 2 and key != 'position_embd.weight':
            whole = dtype != 'q8_0' or tensor.size(1) % 32 == 0  # q8_0 has blocks of 32
            type_ = matrices if whole else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    with os_errors(path), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return kind


def choose_architecture(config):
    """llama.cpp's architecture that computes what a GPTConfig does. Raises UserError."""
    require_common(config, 'llama.cpp has')
    require(config.norm_position == 'pre', f'norm_position = {config.norm_position}: llama.cpp has '
                                           f'no such GPT: train with --norm_position=pre')
    kind, _ = choose_layout(config)
    usual, found = {'activation': ACTIVATIONS[kind]}, without_usual(config)
    if kind == 'arcee':
        usual['bias'] = False
    if kind == 'starcoder2':
        usual['head_size'] = None
    for key, value in usual.items():
        require(found[key] == value, f'{key} = {found[key]}: llama.cpp\'s {kind}, which comes '
                                     f'closest, has {key} = {value}: train with --{key}={value}')
    return kind


def add_sizes(writer, config):
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == 'rmsnorm':
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.position == 'rope':
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)


# Weights -----------------------------------------------------------------------------------------

def rename(kind, config, weights, n_tokens):
    """{llama.cpp's name: tensor in fp32} of the weights of a GPT, embeddings with n_tokens rows."""
    import gguf

    weights = dict(weights)
    if kind == 'starcoder2':  # llama.cpp requires the biases
        add_zero_biases(weights, ['.c_'])
    _, tensors = convert(config, weights)
    if kind == 'apertus':  # likewise
        tensors.setdefault('lm_head.weight', tensors['model.embed_tokens.weight'])
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    renamed = {}
    for theirs, tensor in tensors.items():
        name = names.get_name(theirs, ('.weight', '.bias'))
        if kind == 'gpt2' and '.c_' in theirs and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        if kind in ('llama', 'arcee') and 'q_proj' in theirs:
            tensor = interleave(tensor, config.n_head)
        if kind in ('llama', 'arcee') and 'k_proj' in theirs:
            tensor = interleave(tensor, config.kv_heads)
        if name in ('token_embd.weight', 'output.weight'):
            tensor = F.pad(tensor, (0, 0, 0, n_tokens - len(tensor)))
        renamed[name] = tensor
    return renamed


def interleave(x, n_head):
    """Queries or keys (n_head * hs, ...), of which RoPE rotates (i, i + hs/2), in the order for
    (2i, 2i + 1)."""
    return x.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


# Tokens ------------------------------------------------------------------------------------------

class Vocabulary:
    """What llama.cpp tokenizes with. A character that a char tokenizer lacks is dropped there.

    tokens: [(text, name of gguf's TokenType)], bytes as the characters of GPT-2's vocab.json.
    merges: [(left, right)]. end: the id that ends a text. suppressed: ids that are not generated.
    """

    def __init__(self, tokenizer, vocab_size):
        """Raises UserError if llama.cpp cannot tokenize like this."""
        require(tokenizer.kind != 'ids', 'tokenizer = ids: nothing makes these ids from text: '
                                         'export with --format=onnx or safetensors')
        found = [getattr(tokenizer, key, None) for key in ('pattern', 'normalizer')]
        require(found in ([None, None], [GPT2_PATTERN, None]),
                'the tokenizer splits text in another way than GPT-2\'s: export with --format=hf, '
                'and convert that with llama.cpp\'s convert_hf_to_gguf.py')
        self.character = {b: c for c, b in printable_bytes().items()}
        found = {i: (self.text(token), 'NORMAL')
                 for i, token in enumerate(tokenizer.token_bytes) if token}
        found |= {i: (text, 'UNUSED') for text, i in getattr(tokenizer, 'unused', {}).items()}
        found |= {i: (text, 'CONTROL') for text, i in tokenizer.special.items()}
        # llama.cpp has an end of text, and id 11 is it unless another is named: here padding
        self.end = tokenizer.vocab_size if tokenizer.eot is None else tokenizer.eot
        n_tokens = max(vocab_size, self.end + 1)
        self.suppressed = [i for i in range(n_tokens) if i not in found]
        self.tokens = [found.get(i, (f'[PAD{i}]', 'UNUSED')) for i in range(n_tokens)]
        merges = []
        if tokenizer.kind == 'char':  # its bytes, one after the other
            merges = [(c[:i], c[i:i + 1]) for c in tokenizer.token_bytes for i in range(1, len(c))]
            merges = list(dict.fromkeys(merges))
        elif tokenizer.kind != 'byte':
            merges = bpe_merges(tokenizer.tokens)
        # llama.cpp wants a list; in this one nothing makes the left part
        self.merges = merges or [(b'\0\0', b'\0')]

    def text(self, token):
        return ''.join(self.character[b] for b in token)

    def add_to(self, writer):
        import gguf

        writer.add_vocab_size(len(self.tokens))
        writer.add_tokenizer_model('gpt2')
        writer.add_tokenizer_pre('gpt-2')
        writer.add_token_list([text for text, _ in self.tokens])
        writer.add_token_types([gguf.TokenType[kind] for _, kind in self.tokens])
        writer.add_token_merges([f'{self.text(a)} {self.text(b)}' for a, b in self.merges])
        writer.add_array('tokenizer.ggml.suppress_tokens', self.suppressed)
        writer.add_bos_token_id(self.end)
        writer.add_eos_token_id(self.end)
        writer.add_add_bos_token(False)
