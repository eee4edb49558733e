# Evaluate OpenAI's gpt2-large (36 layers, 20 heads, n_embd 1280: 774M parameters)
# on data in GPT-2's tokens.

init_from = 'gpt2-large'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500  # more, for a better estimate
batch_size = 8
