# Evaluate OpenAI's gpt2 (12 layers, 12 heads, n_embd 768: 124M parameters)
# on data in GPT-2's tokens.

init_from = 'gpt2'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500  # more, for a better estimate
batch_size = 8
