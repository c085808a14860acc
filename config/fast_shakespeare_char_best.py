# The loss that nanoGPT reports from three minutes of an A100 on Shakespeare's characters, in less on two CPU cores.
# python data/shakespeare_char/prepare.py && python train.py config/fast_shakespeare_char_best.py

out_dir = "out-fast-shakespeare-char-best"
dataset = "shakespeare_char"
eval_interval = 525
eval_iters = 55  # the whole validation split
log_interval = 10
always_save_checkpoint = False

arch = "qwen3"
tie_embeddings = False
n_layer = 4
n_head = 6
n_embd = 192
block_size = 256
batch_size = 8  # more updates are worth more than more rows
gradient_accumulation_steps = 1
dropout = 0.0  # two passes over the text are too few for it to help

optimizer = "muon"
muon_lr = 0.02
embedding_lr = 0.024
learning_rate = 0.01
beta1 = 0.8
weight_decay = 0.1
grad_clip = 0.0
max_iters = 1050
lr_decay_iters = 1050
schedule = "wsd"
warmup_iters = 0
min_lr = 0.0

compile = False  # which would take longer than it saves
