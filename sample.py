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
quantize = ""  # int8 keeps the weights in 8 bits, with a scale for each row (CPUs)
compile = True  # on CPUs: compile the step, where that pays or was done before
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import functools
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError
from quartz import compiled, files, machine, sources, tokenizer
from quartz.decoder import NOT_FINITE, Decoder, Drawn, Sampling

GPU_CHUNK = 16  # tokens that a GPU is ahead of what is shown, so that it need not wait
SEPARATOR = "---------------"


def how() -> Sampling:
    return Sampling(repetition_penalty, temperature, top_k, top_p, min_p)


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    overwrites = logprobs and start.startswith("FILE:") and files.is_same(logprobs, start.removeprefix("FILE:"))
    rules = configurator.ranges(globals()) + [(False, problem) for problem in how().problems()]
    rules += [
        (start != "", "start must hold at least one character"),
        (not prompt_per_line or start.startswith("FILE:"), "prompt_per_line needs start=FILE:…"),
        (all(stops()), f"stop={stop!r} holds an empty string"),
        (not logprobs.endswith(".pt"), f"logprobs={logprobs} would overwrite a checkpoint"),
        (not overwrites, f"logprobs={logprobs} would overwrite the prompt"),
    ]
    looks = [
        lambda: machine.check_machine(device, dtype),
        lambda: compiled.check_quantize(quantize, device),
        read_prompts,
        lambda: files.check_writable("logprobs", logprobs),
        lambda: sources.check(init_from, out_dir),
    ]
    configurator.check(rules, looks)


def stops() -> list[str]:
    return stop.split("||") if stop else []


@functools.cache  # once: it may be a pipe
def read_prompts() -> list[str]:
    """start itself, or the text of the file that it names, or each of its lines."""
    if not start.startswith("FILE:"):
        return [start]
    text = tokenizer.read_text(start.removeprefix("FILE:"), f"start={start}")
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


@dataclass
class Text:
    """A prompt and its continuation, as far as it is known."""

    prompt: str
    stream: tokenizer.TextStream
    unshown: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    is_over: bool = False

    def take(self, drawn: Drawn) -> None:
        self.ids.append(drawn.token)
        self.logprobs.append(drawn.logprob)
        self.unshown += self.stream.feed(drawn.token) + (self.stream.finish() if drawn.end else "")
        self.is_over = self.stream.is_done or drawn.end is not None


def show(texts: deque[Text]) -> None:
    """Writes what is certain, one text after the other, each as far as it is known; takes off what is over."""
    while texts:
        sys.stdout.write(texts[0].unshown)
        texts[0].unshown = ""
        if not texts[0].is_over:
            break
        sys.stdout.write(f"\n{SEPARATOR}\n")
        texts.popleft()
    if sys.stdout.isatty():
        sys.stdout.flush()


def report(text: Text, tokens: tokenizer.Tokenizer) -> str:
    """A line of JSON."""
    pieces = [tokens.token_bytes(i).decode("utf-8", "replace") for i in text.ids]
    return json.dumps({"prompt": text.prompt, "ids": text.ids, "tokens": pieces, "logprobs": text.logprobs}) + "\n"


def main() -> None:
    check_settings()
    machine.keep_freed_memory()
    place = machine.pick_device(device)
    kept = machine.sampling_dtype(dtype, place)
    model, tokens = sources.to_sample(init_from, out_dir)
    ids = encode(read_prompts(), tokens, model.config.block_size)
    rows, length = len(ids) * num_samples, max(map(len, ids)) + max_new_tokens
    compiled.check_memory(model.config, rows, length, place, kept)

    # Each prompt is read once, for as many rows as it has samples
    engine = compiled.prepare(model, place, kept, quantize == "int8", rows, max_new_tokens, compile, gives_up=True)
    ahead = 1 if place.type == "cpu" else GPU_CHUNK
    decoder = Decoder(engine, rows, length, tokens.vocab_size, ahead=ahead, logprobs=bool(logprobs))
    texts: dict[int, Text] = {}
    for prompt, its_ids in zip(read_prompts(), ids, strict=True):
        for row in decoder.admit(its_ids, range(seed, seed + num_samples), max_new_tokens, how()):
            texts[row] = Text(prompt, tokenizer.TextStream(tokens, stops()), prompt)

    # Each step adds tokens to every text that is not over
    waiting, began, is_first = deque(texts.values()), time.perf_counter(), True
    show(waiting)
    while found := decoder.step():
        if is_first and not all(drawn.logits.isfinite().all() for drawn in found):
            raise UserError(NOT_FINITE)
        is_first = False
        for drawn in found:
            text = texts[drawn.row]
            if not text.is_over:
                text.take(drawn)
            if text.is_over and not drawn.end:
                decoder.release(drawn.row)
        show(waiting)
    seconds, steps = time.perf_counter() - began, max(len(text.ids) for text in texts.values())
    if logprobs:
        with files.writing(f"logprobs={logprobs}", "what was there is untouched"):
            files.write(Path(logprobs), "".join(report(text, tokens) for text in texts.values()).encode())
    count = sum(len(text.ids) for text in texts.values())
    print(f"{rows} x {steps} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
