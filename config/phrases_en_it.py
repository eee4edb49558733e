# English to Italian in one minute on 2 CPU cores: `I love you very much` -> `Ti amo molto`. The
# sentences come from a small grammar; nothing is downloaded. Then:
#   python tools/evaluate.py --out_dir=out-phrases
#   python explain.py --out_dir=out-phrases --start="I love you very much<|endoftext|>Ti amo molto"

depth = 2  # 2 blocks, n_embd 128 (lib/recipe.py); keys below override it

out_dir = 'out-phrases'
dataset = 'phrases'  # prepared if it is missing
# 32 rows of 64 tokens per step; each row packs several sentences
batch_size = 32
block_size = 64
gradient_accumulation_steps = 1
max_iters = 400

prefix_lm = True  # the source is read in both directions
n_head = 4
learning_rate = 0.005
embedding_learning_rate = None
weight_decay = 0.1

eval_interval = 200
eval_iters = 20
log_interval = 10
sample_every_eval = True  # a sentence of the val split and its translation
