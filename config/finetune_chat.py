# Finetune GPT-2 on chats of your own, some tens or hundreds of them, so that it answers as they do.
#   python data/pairs/prepare.py --input=chats.jsonl --tokenizer=gpt2 --block_size=1024 --dataset=chat
#   python train.py config/finetune_chat.py
#   python sample.py --out_dir=out-chat --interactive
# Your own weights instead: --init_from=out-quickstart (in prepare.py too, in the place of --tokenizer) --learning_rate=1e-3

out_dir = 'out-chat'
init_from = 'gpt2'
dataset = 'chat'

eval_interval = 10
eval_iters = -1
log_interval = 5
always_save_checkpoint = False  # it overfits soon: keep the best

# 8 rows of up to 1,024 tokens a step; packed, a row has several chats
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 60

learning_rate = 5e-5
warmup_iters = 5
dropout = 0.1
