# Finetune GPT-2 on tens or hundreds of your own chats.
#   python data/pairs/prepare.py --input=chats.jsonl --tokenizer=gpt2 --block_size=1024 \
#     --dataset=chat
#   python train.py config/finetune_chat.py
#   python sample.py --out_dir=out-chat --interactive
# Or finetune your own model: --init_from=out-quickstart --learning_rate=1e-3 (and --init_from
# instead of --tokenizer for prepare.py).

out_dir = 'out-chat'
init_from = 'gpt2'
dataset = 'chat'

eval_interval = 10
eval_iters = -1
log_interval = 5
always_save_checkpoint = False  # it overfits quickly: keep the best

# 8 rows of 1,024 tokens per step; each row packs several chats
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 60

learning_rate = 5e-5
warmup_iters = 5
dropout = 0.1
