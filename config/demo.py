# What `make demo` trains: a GPT that writes Python, on the standard library. A good minute on 2 cores.
#   python data/pystdlib_char/prepare.py
#   python train.py config/demo.py
#   python sample.py --out_dir=out-demo --start="def "

out_dir = "out-demo"
dataset = "pystdlib_char"
eval_interval = 200
eval_iters = 20
log_interval = 20

arch = "qwen3"
tie_embeddings = False
n_layer = 3
n_head = 6
n_embd = 192
block_size = 96
batch_size = 24
gradient_accumulation_steps = 1

optimizer = "muon"
embedding_lr = 0.024
learning_rate = 0.01
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
max_iters = 400
lr_decay_iters = 400
schedule = "wsd"
warmup_iters = 0
min_lr = 0.0
compile = False  # a compiler needs longer to start than it would save here
