# English to Italian, from pairs of your own: `I love you very much` -> `Ti amo molto`. Some minutes on 2 CPU cores for 30,000
# pairs.
#   python data/pairs/prepare.py --input=ita.txt --dataset=en_it      # ita-eng.zip of https://www.manythings.org/anki/
#   python train.py config/translate_en_it.py
#   python tools/evaluate.py --out_dir=out-translate --num_beams=4
#   python sample.py --out_dir=out-translate --start="I love you very much" --num_beams=4 --num_samples=1

depth = 4  # 4 blocks of 256 by plainGPT's recipe (turn_dial in train.py); keys below it override what it sets

out_dir = 'out-translate'
dataset = 'en_it'
# several pairs in a row of 128, 2,048 tokens a step
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 1500

# of 2017: the source is read both ways, and the target sees all of it; here one stack of blocks does both
prefix_lm = True
ngram = 2
learning_rate = 0.005
embedding_learning_rate = 0.02

eval_interval = 250
eval_iters = 20
log_interval = 10
sample_every_eval = True  # a source of the val split, and what the model makes of it
