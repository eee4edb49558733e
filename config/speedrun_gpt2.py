# GPT-2 124M's size by plainGPT's recipe, on 1.7 billion tokens of FineWeb-Edu: for one
# GPU or a few; not run on one yet.
#   pip install datasets
#   python data/fineweb_edu/prepare.py --max_tokens=2e9
#   torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2.py

depth = 12  # 12 blocks, n_embd 768, Muon, 131,072 tokens per step (lib/recipe.py)

out_dir = 'out-speedrun'
dataset = 'fineweb_edu'
block_size = 1024
batch_size = 16  # x 8 micro-batches
ngram = 2
ngram_rows = 2**17

eval_interval = 500
eval_iters = 100
log_interval = 10
save_interval = 1000
