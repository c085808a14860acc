# Fine-tunes GPT-2 XL on Shakespeare. A smaller card takes init_from = "gpt2".
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False  # keep the best only

# 1 sequence × 32 micro-batches × 1,024 tokens = 32,768 tokens an update; the text holds 301,966: 20 updates, 2 epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
