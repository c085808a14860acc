"""Generates text with a trained model, or with GPT-2.

python sample.py --out_dir=out-shakespeare-char
python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0
python sample.py --init_from=gpt2-xl --start="FILE:prompt.txt" --max_new_tokens=100 --quantize=int8
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
init_from = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with those
out_dir = "out"  # folder of the checkpoint; ignored if init_from is not resume
start = "\n"  # the prompt ($'\n' in a shell); FILE:prompt.txt reads a file; <|endoftext|> is GPT-2's marker
prompt_per_line = False  # every line of the file that start names is a prompt of its own
num_samples = 10  # texts to generate for each prompt
max_new_tokens = 500  # tokens in each
stop = ""  # a text ends before this string, or before any of several that are separated by ||
temperature = 0.8  # 0 takes the likeliest token each time; 1 draws as the model predicts; above 1 is more random
top_k = 200  # draw among the k likeliest tokens only; 0 is off
top_p = 1.0  # draw among the likeliest tokens that together have this probability; 1 is off
min_p = 0.0  # draw among tokens that have this share of the likeliest one's probability; 0 is off
repetition_penalty = 1.0  # above 1, tokens that the text already holds become less likely; 1 is off
seed = 1337  # sample k draws with seed + k, so that it is the same text however many there are
logprobs = ""  # a file to write: for each text a line of JSON with its tokens and the model's log-probability of each
device = "auto"  # auto, cpu, cuda, cuda:N, mps
dtype = "auto"  # auto, float32, bfloat16, float16; auto is float32 on CPUs, bfloat16 on GPUs that compute in it
quantize = ""  # int8 keeps the weights in 8 bits, with a scale for each row (CPUs; faster where the step is compiled)
compile = True  # on CPUs, for up to 8 texts at once: compile the step, where that pays or was done before
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, Sampling
from quartz import compiled, files, machine, sources, tokenizer

GPU_CHUNK = 16  # tokens that a GPU is ahead of what is shown, so that it need not wait
SEPARATOR = "---------------"


def how() -> Sampling:
    return Sampling(repetition_penalty, temperature, top_k, top_p, min_p)


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    rules = configurator.ranges(globals())
    rules += [(False, problem) for problem in how().problems()]
    rules += [
        (start != "", "start must hold at least one character"),
        (not prompt_per_line or start.startswith("FILE:"), "prompt_per_line needs start=FILE:…"),
        (all(stops()), f"stop={stop!r} holds an empty string"),
        (
            not logprobs.endswith(".pt") and f"FILE:{logprobs}" != start,
            f"logprobs={logprobs} would overwrite a checkpoint or the prompt",
        ),
    ]
    looks = [lambda: machine.check_machine(device, dtype), read_prompts]
    if quantize:
        looks.append(check_quantize)
    if logprobs:
        looks.append(check_report)
    looks.append(lambda: sources.check(init_from, out_dir))
    configurator.check(rules, looks)


def check_quantize() -> None:
    if (place := machine.pick_device(device)).type != "cpu":
        raise UserError(f"quantize={quantize} is for CPUs, not for {place.type}: leave it out, or add --device=cpu")


def stops() -> list[str]:
    return stop.split("||") if stop else []


@functools.cache  # once: it may be a pipe
def read_prompts() -> list[str]:
    """start itself, or the text of the file that it names, or each of its lines."""
    if not start.startswith("FILE:"):
        return [start]
    path = Path(start.removeprefix("FILE:"))
    try:
        text = tokenizer.decode_text(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"start={start}: {getattr(error, 'strerror', None) or error}") from error
    if not prompt_per_line:
        return [text]
    lines = text.removesuffix("\n").split("\n")
    if empty := [str(n) for n, line in enumerate(lines, 1) if not line]:
        raise UserError(f"start={start}: each line is a prompt, and empty is line {', '.join(empty)}")
    return lines


def encode(prompts: list[str], tokens: tokenizer.Tokenizer, block_size: int) -> list[list[int]]:
    """The ids of the prompts. Raises UserError for what the tokenizer lacks; tells of a prompt that is too long."""
    if impossible := [s for s in stops() if not tokens.can_write(s)]:
        raise UserError(f"stop={impossible[0]!r} can never come: the tokenizer lacks one of its characters")
    ids = [tokens.encode(prompt, special=True) for prompt in prompts]
    if (longest := max(map(len, ids))) > block_size:
        print(f"note: of a prompt of {longest} tokens the model sees the last {block_size}", file=sys.stderr)
    return ids


def check_memory(model: GPT, rows: int, length: int, place: torch.device) -> None:
    """Raises UserError where the cache, and the logits with what is drawn from them, would not fit."""
    c, there = model.config, machine.available_memory(place)
    element = 4 if place.type == "cpu" else machine.pick_dtype(dtype, place).itemsize
    cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * min(length, c.block_size) * element
    needed = rows * (cache + 8 * c.vocab_size * 4 + 3 * max_new_tokens * 4)
    if there is not None and needed > there:
        raise UserError(
            f"{rows} texts of {length} tokens need {needed / 2**30:.1f} GiB (a cache of {rows * cache / 2**30:.1f}), "
            f"and {there / 2**30:.1f} GiB are free: take fewer samples or prompts, or a smaller max_new_tokens"
        )


def generate(model: GPT, engine, rows: list[list[int]], vocab_size: int, ahead: int) -> Iterator[tuple[list, list]]:
    """Yields, token for token, the ids and the log-probabilities of all rows; reads them `ahead` tokens at a time."""
    seeds = [seed + n % num_samples for n in range(len(rows))]
    ids, given = [], []
    for n, (tokens, logits) in enumerate(model.stream(rows, max_new_tokens, how(), vocab_size, seeds, engine), 1):
        if n == 1 and not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or too large for this dtype")
        ids.append(tokens)
        given.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0] if logprobs else tokens)
        if len(ids) == ahead or n == max_new_tokens:
            yield from zip(torch.stack(ids).tolist(), torch.stack(given).tolist(), strict=True)
            ids, given = [], []


def check_report() -> None:
    """Raises UserError where logprobs can't be written: that is to show before the work, not after it."""
    if os.path.isdir(logprobs):
        raise UserError(f"logprobs={logprobs} is a folder: name a file")
    with files.writing(f"logprobs={logprobs}"):
        Path(f"{logprobs}.tmp").touch()
        Path(f"{logprobs}.tmp").unlink()


def main() -> None:
    check_settings()
    place = machine.pick_device(device)
    kept = torch.float32 if dtype == "auto" and place.type == "cpu" else machine.pick_dtype(dtype, place)
    model, tokenizer_data, _ = sources.model_and_tokenizer(init_from, out_dir)
    if tokenizer_data is None:
        raise UserError(
            f"{out_dir if init_from == 'resume' else init_from} has no tokenizer: put its tokenizer.json there"
        )
    tokens = tokenizer.from_data(tokenizer_data)
    prompts = read_prompts()
    ids = encode(prompts, tokens, model.config.block_size)
    check_memory(model, len(ids) * num_samples, max(map(len, ids)) + max_new_tokens, place)
    rows = [prompt for prompt in ids for _ in range(num_samples)]
    engine = compiled.prepare(model.eval(), place, kept, quantize == "int8", len(rows), max_new_tokens, compile)
    streams = [tokenizer.TextStream(tokens, stops()) for _ in rows]
    texts = [prompts[n // num_samples] for n in range(len(rows))]  # what is still to be shown of each
    drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in rows]
    began, steps, shown = time.perf_counter(), 0, 0

    def show(is_end: bool = False) -> None:
        """Writes what is certain: one text after the other, each as far as it is known."""
        nonlocal shown
        while shown < len(rows):
            sys.stdout.write(texts[shown])
            texts[shown] = ""
            if not (is_end or streams[shown].is_done):
                break
            sys.stdout.write(f"\n{SEPARATOR}\n")
            shown += 1
        if sys.stdout.isatty():
            sys.stdout.flush()

    show()
    for new_ids, new_logprobs in generate(
        model, engine, rows, tokens.vocab_size, 1 if place.type == "cpu" else GPU_CHUNK
    ):
        steps += 1
        for row, stream in enumerate(streams):
            if not stream.is_done:
                texts[row] += stream.feed(new_ids[row])
                if logprobs:
                    drawn[row][0].append(new_ids[row])
                    drawn[row][1].append(new_logprobs[row])
        show()
        if shown == len(rows):
            break
    seconds = time.perf_counter() - began
    for row, stream in enumerate(streams):
        texts[row] += stream.finish()
    show(is_end=True)
    if logprobs:
        lines = []
        for row, (its_ids, its_logprobs) in enumerate(drawn):
            pieces = [tokens.token_bytes(i).decode("utf-8", "replace") for i in its_ids]
            line = {"prompt": prompts[row // num_samples], "ids": its_ids, "tokens": pieces, "logprobs": its_logprobs}
            lines.append(json.dumps(line) + "\n")
        with files.writing(f"logprobs={logprobs}", "what was there is untouched"):
            files.write(Path(logprobs), "".join(lines).encode())
    rate = len(rows) * steps / seconds
    print(f"{len(rows)} x {steps} tokens in {seconds:.2f} s, {rate:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
