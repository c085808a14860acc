# 1.52 on Shakespeare's characters, in the time of nanoGPT's CPU quick start (93 to 103 s on 2 cores).
# python data/shakespeare_char/prepare.py && python train.py config/fast_shakespeare_char_better.py

out_dir = "out-fast-shakespeare-char-better"
dataset = "shakespeare_char"
eval_interval = 350
eval_iters = 8
log_interval = 10
always_save_checkpoint = False

arch = "qwen3"
tie_embeddings = False
n_layer = 4
n_head = 5
n_embd = 160
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
dropout = 0.0

optimizer = "muon"
muon_lr = 0.02
embedding_lr = 0.024
learning_rate = 0.01
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
max_iters = 700
lr_decay_iters = 700
schedule = "wsd"
warmup_iters = 0
min_lr = 0.0

compile = False
