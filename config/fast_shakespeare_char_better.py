# 1.49 on Shakespeare's characters, in less than the time of nanoGPT's CPU quick start, which comes to 1.90.
# python data/shakespeare_char/prepare.py && python train.py config/fast_shakespeare_char_better.py

out_dir = "out-fast-shakespeare-char-better"
dataset = "shakespeare_char"
eval_interval = 450
eval_iters = 55  # the whole validation split
log_interval = 10
always_save_checkpoint = False

arch = "qwen3"
tie_embeddings = False
n_layer = 3
n_head = 5
n_embd = 160
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
dropout = 0.0

optimizer = "muon"
muon_lr = 0.02
embedding_lr = 0.024
learning_rate = 0.01
beta1 = 0.8
weight_decay = 0.1
grad_clip = 0.0
max_iters = 900
lr_decay_iters = 900
schedule = "wsd"
warmup_iters = 0
min_lr = 0.0

compile = False  # which would take longer than it saves
