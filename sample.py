"""Generates text with a trained model, or with GPT-2.

python sample.py --out_dir=out-shakespeare-char
python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0
python sample.py --init_from=gpt2-xl --start="FILE:prompt.txt" --max_new_tokens=100
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
init_from = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with those
out_dir = "out"  # folder of the checkpoint; ignored if init_from is not resume
start = "\n"  # the prompt ($'\n' in a shell); FILE:prompt.txt reads a file; <|endoftext|> is GPT-2's marker
num_samples = 10  # texts to generate
max_new_tokens = 500  # tokens in each
temperature = 0.8  # 0 takes the likeliest token each time; 1 draws as the model predicts; above 1 is more random
top_k = 200  # draw among the k likeliest tokens only; 0 is off
seed = 1337  # sample k draws with seed + k, so that it is the same text however many there are
device = "auto"  # auto, cpu, cuda, cuda:N, mps
dtype = "auto"  # auto, float32, bfloat16, float16; auto is bfloat16 where the device computes in it
compile = False  # accepted, as in nanoGPT, and without effect: one token at a time is not compiled
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import math
import os
import sys
import time
from pathlib import Path

import torch

import checkpoint
import dataset
import runtime
import tokenizer
from configurator import UserError
from model import GPT, GPT2_MODELS


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    rules = [
        (num_samples >= 1, f"num_samples must be at least 1, not {num_samples}"),
        (max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {max_new_tokens}"),
        (0 <= temperature < math.inf, f"temperature must be 0 (greedy) or a positive number, not {temperature}"),
        (top_k >= 0, f"top_k must be 0 (off) or a positive number, not {top_k}"),
        (0 <= seed < 2**32, f"seed must be from 0 to {2**32 - 1}, not {seed}"),
        (start != "", "start must hold at least one character"),
        (
            init_from in ("resume", *GPT2_MODELS) or os.path.isdir(init_from),
            f"init_from={init_from} is not resume, {', '.join(GPT2_MODELS)}, nor a folder",
        ),
    ]
    looks = [lambda: runtime.check_machine(device, dtype), read_start]
    if init_from == "resume":
        looks.append(lambda: checkpoint.to_use(out_dir))
    configurator.check(rules, looks)


def read_start() -> str:
    """The prompt itself, or the text of the file that it names."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return tokenizer.decode_text(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"start={start}: {getattr(error, 'strerror', None) or error}") from error


def load() -> tuple[GPT, tokenizer.Tokenizer]:
    """The model that init_from asks for, and its tokenizer."""
    if init_from != "resume":
        return checkpoint.pretrained(init_from), tokenizer.GPT2Tokenizer()
    state = checkpoint.load(checkpoint.to_use(out_dir))
    model = checkpoint.build_model(state)
    size = model.config.vocab_size
    data = state.get("tokenizer") or dataset.tokenizer_of(str(state["config"].get("dataset")), size)
    tokenizer.check_data(data, size)
    return model, tokenizer.from_data(data)


def main() -> None:
    check_settings()
    place = runtime.pick_device(device)
    model, tokens = load()
    prompt = tokens.encode(read_start(), special=True)
    model.eval().to(place, runtime.pick_dtype(dtype, place))
    if compile:
        print("note: compile=True changes nothing here, one token at a time is not compiled", file=sys.stderr)
    began = time.perf_counter()
    idx = torch.tensor([prompt] * num_samples, dtype=torch.long, device=place)
    seeds = [seed + k for k in range(num_samples)]
    out = model.generate(idx, max_new_tokens, temperature, top_k, vocab_size=tokens.vocab_size, seeds=seeds).tolist()
    seconds = time.perf_counter() - began
    for ids in out:
        print(tokens.decode(ids))
        print("---------------")
    rate = num_samples * max_new_tokens / seconds
    print(f"{num_samples} x {max_new_tokens} tokens in {seconds:.2f} s, {rate:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
