# The loss of GPT-2 (124M) as OpenAI trained it, on the data set's two splits.
#   python train.py config/eval_gpt2.py
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2"
