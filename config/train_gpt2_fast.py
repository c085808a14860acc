# A network of GPT-2's size (124M and an untied head) by the recipe of the Muon records, on OpenWebText or FineWeb.
# One GPU or eight; with eight:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
#
# Batch, Muon's rate, momentum, weight decay and the linear decay over the last 60% are those of the published records
# (github.com/KellerJordan/modded-nanogpt, tracks 1 and 3), which reach a FineWeb validation loss of 3.28 with 1.7 to
# 1.84 B tokens where AdamW at 6e-4 needs 9 to 10 B. The rates of embeddings and head follow nanochat's rule for the
# head. The whole has not been run at this size yet.

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M-fast"

arch = "qwen3"
tie_embeddings = False
n_layer = 12
n_head = 6
n_embd = 768

# 32 sequences × 1,024 tokens × 16 micro-batches = 524,288 tokens an update, 1.84 B tokens in all
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 2 * 8
max_iters = 3500
lr_decay_iters = 3500

optimizer = "muon"
muon_lr = 0.02
learning_rate = 0.01
beta1 = 0.8
weight_decay = 0.05
grad_clip = 0.0
schedule = "wsd"
decay_fraction = 0.6
warmup_iters = 0
min_lr = 0.0

eval_interval = 125
eval_iters = 200
log_interval = 10
