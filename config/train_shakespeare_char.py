# A small GPT that writes Shakespeare character by character: minutes on a GPU.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the best only

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small network bears a high rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # higher, because an update sees few tokens
warmup_iters = 100
