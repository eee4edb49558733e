# Tiny Shakespeare, character by character, on 2 CPU cores.

out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 20
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 8
block_size = 256
max_iters = 600

n_layer = 3
n_head = 3
n_embd = 192
ngram = 6
position = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
zero_init = True
tie_weights = False

optimizer = 'muon'
learning_rate = 0.005
embedding_learning_rate = 0.02
muon_momentum = 0.9
weight_decay = 0.0
beta1 = 0.8
grad_clip = 0.0
warmup_iters = 0
schedule = 'wsd'
decay_fraction = 0.5
min_lr = 0.0
