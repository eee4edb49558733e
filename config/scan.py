# SCAN (Lake & Baroni 2018): commands to actions, `jump twice after look left` -> `LTURN LOOK JUMP JUMP`. Made from its grammar.
#   python train.py config/scan.py
#   python tools/evaluate.py --out_dir=out-scan
#   python sample.py --out_dir=out-scan --start="jump around left twice and walk" --temperature=0 --num_samples=1

depth = 4  # 4 blocks of 256 by plainGPT's recipe, 3 million parameters (turn_dial in train.py); keys below it override that

out_dir = 'out-scan'
dataset = 'scan'  # prepared when it is missing
# several pairs in a row of 128, 2,048 tokens a step
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 800

prefix_lm = True  # a source is read both ways
n_head = 8
learning_rate = 0.005
embedding_learning_rate = None
weight_decay = 0.1  # of fewer commands a rule is learnt only with more: of 1,000 with 1.0

eval_interval = 200
eval_iters = 20
log_interval = 10
sample_every_eval = True  # a command of the val split, and what the model makes of it
