# Evaluate OpenAI's gpt2-medium (24 layers, 16 heads, n_embd 1024: 350M parameters)
# on data in GPT-2's tokens.

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500  # more, for a better estimate
batch_size = 8
