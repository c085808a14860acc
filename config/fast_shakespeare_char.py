out_dir = "out-fast-shakespeare-char"
dataset = "shakespeare_char"
arch, tie_embeddings, optimizer, schedule = "qwen3", False, "muon", "wsd"
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
gradient_accumulation_steps, batch_size = 1, 12
max_iters = lr_decay_iters = 300
warmup_iters, min_lr, learning_rate = 10, 0.0, 0.01
weight_decay, grad_clip = 0.0, 0.0
eval_interval, eval_iters, log_interval = 1000, 20, 100
compile = False
