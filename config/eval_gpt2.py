# The loss of OpenAI's gpt2 (12 layers, 12 heads, 768 wide: 124M parameters) on a data set in GPT-2's tokens

init_from = 'gpt2'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
