# GPT-2 (124M) on OpenWebText: validation loss about 2.85 after 300 B tokens.
# Eight A100 40 GB, about five days:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences × 1,024 tokens × 5 micro-batches × 8 GPUs = 491,520 tokens an update, 300 B tokens in all
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
