# The loss of OpenAI's gpt2-medium (24 layers, 16 heads, 1024 wide: 350M parameters) on a data set in GPT-2's tokens

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
