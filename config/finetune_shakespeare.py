# Finetune GPT-2 on Shakespeare. The smallest one fits on any machine; nanoGPT finetunes gpt2-xl:
# --init_from=gpt2-xl.

out_dir = 'out-shakespeare'
init_from = 'gpt2'
dataset = 'shakespeare'

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits quickly: keep the best
wandb_project = 'shakespeare'
wandb_run_name = 'ft-gpt2'

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per step; the data set has 301,966
# tokens: 9 steps per epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
