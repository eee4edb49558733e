# SCAN (Lake & Baroni 2018): commands to actions, `jump twice after look left` -> `LTURN LOOK JUMP JUMP`. Made from its grammar.
#   python train.py config/scan.py
#   python tools/evaluate.py --out_dir=out-scan
#   python sample.py --out_dir=out-scan --start="jump around left twice and walk" --temperature=0 --num_samples=1

out_dir = 'out-scan'
dataset = 'scan'  # prepared when it is missing

# several pairs in a row of 128, 2,048 tokens a step
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 800

# 3 million parameters; a source is read both ways
prefix_lm = True
n_layer = 4
n_head = 8
n_embd = 256
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
beta1 = 0.8
weight_decay = 0.1  # of fewer commands a rule is learnt only with more: of 1,000 with 1.0
grad_clip = 0.0
warmup_iters = 0
schedule = 'wsd'  # constant, then down to 0 over the second half
decay_fraction = 0.5
min_lr = 0.0

eval_interval = 200
eval_iters = 20
log_interval = 10
sample_every_eval = True  # a command of the val split, and what the model makes of it
