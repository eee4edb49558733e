# Evaluate OpenAI's gpt2-xl (48 layers, 25 heads, n_embd 1600: 1558M parameters)
# on data in GPT-2's tokens.

init_from = 'gpt2-xl'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500  # more, for a better estimate
batch_size = 8
