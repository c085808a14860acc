# nanoGPT's loss on Shakespeare's characters in a thirteenth of its time on a CPU: 2 layers x 128, Muon, 140 updates.
# python data/shakespeare_char/prepare.py && python train.py config/fast_shakespeare_char.py

out_dir = "out-fast-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 1000  # at the beginning and at the end
eval_iters = 10
log_interval = 10
always_save_checkpoint = False

arch = "qwen3"
tie_embeddings = False
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
batch_size = 24
gradient_accumulation_steps = 1

optimizer = "muon"
muon_lr = 0.03  # up to some 300 updates; 0.02 beyond
embedding_lr = 0.024  # at width 768: 0.059 here
learning_rate = 0.01
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
max_iters = 140
lr_decay_iters = 140
schedule = "wsd"
warmup_iters = 0
min_lr = 0.0

compile = False  # it would take longer than the run
