# English to Italian: `I love you very much` -> `Ti amo molto`. Minutes on 2 CPU cores for 30,000
# pairs; ita.txt is in ita-eng.zip of https://www.manythings.org/anki/
#   python data/pairs/prepare.py --input=ita.txt --dataset=en_it
#   python train.py config/translate_en_it.py
#   python tools/evaluate.py --out_dir=out-translate --num_beams=4
#   python sample.py --out_dir=out-translate --start="I love you very much" --num_beams=4 \
#     --num_samples=1

depth = 4  # 4 blocks, n_embd 256 (lib/recipe.py); keys below override it

out_dir = 'out-translate'
dataset = 'en_it'
# 16 rows of 128 tokens per step; each row packs several pairs
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 1500

# as in 2017 the source is read bidirectionally and the target attends to all of it; here one stack
# of blocks does both
prefix_lm = True
ngram = 2
learning_rate = 0.005
embedding_learning_rate = 0.02

eval_interval = 250
eval_iters = 20
log_interval = 10
sample_every_eval = True  # a source of the val split and its translation
