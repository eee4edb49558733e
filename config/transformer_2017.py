# The base model of "Attention Is All You Need" (Vaswani et al. 2017), decoder-only; numbers are
# sections of the paper. To change one ingredient at a time:
#   python train.py config/transformer_2017.py
#   python train.py config/transformer_2017.py --norm_position=pre --out_dir=out-pre

out_dir = 'out-2017'
dataset = 'python_stdlib'
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

n_layer = 6  # table 3, base
n_head = 8
n_embd = 512
bias = True
norm = 'layernorm'  # 3.1: LayerNorm(x + Sublayer(x))
norm_position = 'post'
activation = 'relu'  # 3.3, 4 n_embd wide
tie_weights = True  # 3.4; with sinusoidal positions embeddings are multiplied by sqrt(n_embd)
position = 'sinusoidal'  # 3.5

optimizer = 'adamw'  # 5.3: Adam, hence no weight decay
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-9
schedule = 'inverse_sqrt'  # 5.3: n_embd ** -0.5 * min(step ** -0.5, step * warmup_iters ** -1.5)
warmup_iters = 4000
learning_rate = (n_embd * warmup_iters) ** -0.5
grad_clip = 0.0
dropout = 0.1  # 5.4: on embeddings and sublayer outputs
label_smoothing = 0.1  # 5.4

max_iters = 100000  # 5.2
eval_interval = 1000
keep_last = 5  # 6.1: sample with --average_last=5
eval_iters = 20
log_interval = 10
