# SCAN (Lake & Baroni 2018): commands to actions, generated from its grammar:
# `jump twice after look left` -> `LTURN LOOK JUMP JUMP`
#   python train.py config/scan.py
#   python tools/evaluate.py --out_dir=out-scan
#   python sample.py --out_dir=out-scan --start="jump around left twice and walk" \
#     --temperature=0 --num_samples=1

depth = 4  # 4 blocks, n_embd 256, 3 million parameters (lib/recipe.py); keys below override it

out_dir = 'out-scan'
dataset = 'scan'  # prepared if it is missing
# 16 rows of 128 tokens per step; each row packs several pairs
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 800

prefix_lm = True  # bidirectional attention within a source
n_head = 8
learning_rate = 0.005
embedding_learning_rate = None
weight_decay = 0.1  # use more with fewer commands: 1.0 with 1,000

eval_interval = 200
eval_iters = 20
log_interval = 10
sample_every_eval = True  # a command of the val split and the model's actions
