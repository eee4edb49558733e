# A small GPT learns Python from the standard library's source, found on your machine: nothing to
# download. About a minute on 2 CPU cores. Then:
#   python sample.py --out_dir=out-quickstart --start="def main("

out_dir = 'out-quickstart'
dataset = 'python_stdlib'  # prepared if it is missing: BPE with 2048 tokens

# 4,096 tokens per step, 1.6 million in total: over half of the data
batch_size = 32
block_size = 128
gradient_accumulation_steps = 1
max_iters = 400

# what has changed since GPT-2: configurator.py names the papers, model.py has the code
n_layer = 2
n_head = 4
n_embd = 128
ngram = 2  # bigram embeddings; --ngram=1 to export to Hugging Face or llama.cpp
position = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
zero_init = True
tie_weights = False

# Muon for the matrices in the blocks, AdamW for the rest: optimizer.py
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

eval_interval = 100
eval_iters = 20
log_interval = 10
sample_every_eval = True  # watch it learn
