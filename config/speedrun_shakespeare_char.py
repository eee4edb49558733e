# Tiny Shakespeare at character level, plainGPT's recipe: a minute on 2 CPU cores. What each choice
# is worth: docs/speed.md. nanoGPT's settings are in config/train_shakespeare_char.py.

out_dir = 'out-speedrun-shakespeare'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 20
log_interval = 10

# 2,048 tokens per step, 1 million in total: one epoch
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256
max_iters = 500

n_layer = 2
n_head = 3
n_embd = 192
ngram = 6  # hashed embeddings of the last 2, 3, ..., 6 characters; 1: to export it
position = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
zero_init = True
tie_weights = False

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.9
learning_rate = 0.005
embedding_learning_rate = 0.02
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 0
schedule = 'wsd'  # constant, then linear decay to 0 over the second half
decay_fraction = 0.5
min_lr = 0.0
