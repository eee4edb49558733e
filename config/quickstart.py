# A small GPT learns to write Python from the standard library's own source, found on your machine: nothing to download.
# About two minutes on 2 CPU cores. Then: python sample.py --out_dir=out-quickstart --start="def main("

out_dir = 'out-quickstart'
dataset = 'python_stdlib'  # prepared when it is missing: BPE with 2048 tokens

# 2,048 tokens a step, 1.1 million in all: a third of the data once
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 550

# The architecture has moved on since GPT-2; each of these is explained in model.py
n_layer = 4
n_head = 4
n_embd = 256
position = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
zero_init = True

learning_rate = 4e-3  # high, as suits a small model and a short run
warmup_iters = 40
schedule = 'linear'
min_lr = 0.0

eval_interval = 110
eval_iters = 20
log_interval = 10
sample_every_eval = True  # watch it learn
