# What `make demo` trains: a GPT that writes Python, on the standard library. A minute and a half on 2 cores.
#   python data/pystdlib_char/prepare.py
#   python train.py config/demo.py
#   python sample.py --out_dir=out-demo --start="def "

out_dir = "out-demo"
dataset = "pystdlib_char"
eval_interval = 250
eval_iters = 20
log_interval = 50

n_layer = 3
n_head = 4
n_embd = 256
block_size = 96
batch_size = 24
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
max_iters = 1000
lr_decay_iters = 1000
compile = False  # a compiler needs longer to start than it would save here
