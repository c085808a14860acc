"""Serves a trained model, or GPT-2, over HTTP: OpenAI's API, which every client speaks.

python serve.py --out_dir=out-shakespeare-char
python serve.py --init_from=gpt2 --port=8080 --dtype=bfloat16
curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "ROMEO:", "max_tokens": 100}'
"""

import os

import configurator

# What HTTP and clients on this machine do for each token would have the watch of quartz/threads.py put threads to sleep
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # rounds for which a thread waits awake, some 0.1 ms; read by libgomp

# ----------------------------------------------------------------------------------------------------------------------
# Settings
init_from = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with those
out_dir = "out"  # folder of the checkpoint; ignored if init_from is not resume
watch = False  # True serves each new checkpoint of the run in out_dir as it is written, and shows the run's curves
model_name = ""  # what clients call the model; empty is the name of its folder
host = "127.0.0.1"  # where to listen: 127.0.0.1, ::1 or localhost is for this machine's programs alone
port = 8000  # 0 takes a free one
hosts = ""  # names, separated by commas, by which clients may reach it beside addresses and localhost; * is any
api_key = ""  # what clients must know; better in the environment, as QUARTZGPT_API_KEY
public = False  # True listens on other addresses without a key: whoever reaches it can use it, and wear the machine out
max_rows = 16  # texts that are written at once
max_queue = 128  # texts that may wait beside them; more are refused
max_seconds = 600.0  # that a request may take, its waiting included
drain_seconds = 30.0  # after SIGTERM, that what was begun has to be finished in
cache_mb = 256  # memory for the beginnings of prompts, in MiB; 0 keeps none
device = "auto"  # auto, cpu, cuda, cuda:N, mps
dtype = "auto"  # auto, float32, bfloat16, float16; auto is float32 on CPUs, bfloat16 on GPUs that compute in it
quantize = ""  # int8 keeps the weights in 8 bits, with a scale for each row (CPUs)
compile = True  # on CPUs: compile the step, which takes seconds, once for a machine
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import hashlib
import ipaddress
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from model import GPT
from quartz import compiled, errors, extras, machine, sources, threads
from quartz.errors import UserError
from quartz.tokenizer import Tokenizer

STEPS = 10**9  # that a server is to be expected to take
PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def key() -> str:
    return api_key or os.environ.get("QUARTZGPT_API_KEY", "")


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    rules = configurator.ranges(globals())
    rules += [
        (0 <= port < 2**16, f"port must be from 0 to {2**16 - 1}, not {port}"),
        (2 <= max_rows <= 1024, f"max_rows must be from 2 to 1024, not {max_rows}"),
        (0 <= max_queue < 2**20, f"max_queue must be from 0 to {2**20 - 1}, not {max_queue}"),
        (0 < max_seconds < 1e9, f"max_seconds must be a positive number, not {max_seconds}"),
        (0 <= drain_seconds < 1e9, f"drain_seconds must be 0 or a positive number, not {drain_seconds}"),
        (0 <= cache_mb < 2**30, f"cache_mb must be 0 or a positive number, not {cache_mb}"),
        (key().isascii() and key().isprintable() and " " not in key(), "api_key must be of ASCII, without spaces"),
        (
            is_own(host) or key() or public,
            f"host={host} is open to others: set QUARTZGPT_API_KEY to a key, or add --public=True, "
            "and whoever reaches it can use it, and wear the machine out",
        ),
        (not watch or init_from == "resume", "watch is for the run in out_dir: leave out init_from"),
        (not watch or os.path.isdir(out_dir), f"watch: there is no folder {out_dir}"),
    ]
    looks = [
        *(lambda package=package: extras.needs(package, "serve.py", "serve") for package in PACKAGES),
        lambda: machine.check_machine(device, dtype),
        lambda: compiled.check_quantize(quantize, device),
        *([] if watch else [lambda: sources.check(init_from, out_dir)]),
    ]
    configurator.check(rules, looks)


def is_own(name: str) -> bool:
    """Whether only this machine's programs reach that address."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def how() -> tuple[torch.device, torch.dtype]:
    """Where it is computed, and in what."""
    place = machine.pick_device(device)
    return place, machine.sampling_dtype(dtype, place)


def fingerprint(model: GPT) -> str:
    """Of what decides about bits: the weights, by a part of each, the settings and torch."""
    what = model.config, *how(), quantize, compile, torch.__version__, torch.get_num_threads()
    found = hashlib.sha256(repr(what).encode())
    for weight in model.parameters():
        found.update(weight.detach().flatten()[:1024].float().numpy().tobytes())
    return f"fp_{found.hexdigest()[:16]}"


def of_model(model: GPT, tokens: Tokenizer, its: str):
    """The model as clients see it, and the service that computes."""
    from quartz import api, serving

    began = time.monotonic()
    (place, kept), block_size = how(), model.config.block_size
    compiled.check_memory(model.config, max_rows, block_size, place, kept)
    engine = compiled.prepare(model, place, kept, quantize == "int8", max_rows, STEPS, compile, gives_up=True)
    its += f"-{type(engine).__name__.lower()}-{str(engine.model.lm_head.weight.dtype).removeprefix('torch.')}"
    name = model_name or Path(out_dir if init_from == "resume" else init_from).resolve().name
    name = name.encode("utf-8", "replace").decode()  # a folder's name may be any bytes
    served = api.Served(name, tokens, block_size, max_rows, max_queue, its, int(time.time()))
    service = serving.Service(engine, max_rows, tokens.vocab_size, max_queue, cache_mb * 2**20)
    machine.give_back_memory()
    print(f"{name} is ready after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return served, service


def models(run) -> Iterator[tuple]:
    """What is served: one model, or with `run`, a Watch, one after the other, without end."""
    if run is None:
        model, tokens = sources.to_sample(init_from, out_dir)
        yield of_model(model, tokens, fingerprint(model))
        return
    before = ""
    for state in run.states():
        try:
            model, tokens = sources.of_state(state)
            if (its := fingerprint(model)) != before:  # the best and the last may be one and the same
                yield of_model(model, tokens, its)
                before = its
            run.serves(state)
        except UserError as error:
            run.fail(*error.problems)
        except Exception as error:  # memory that runs out ends no server that has a model
            if not (problem := errors.problem_of_machine(error)):
                raise
            run.fail(problem)
        threads.give_back()


def main() -> None:
    check_settings()
    machine.keep_freed_memory()
    from quartz import http
    from quartz.watch import Watch

    names = {"localhost", host.lower(), *filter(None, (name.strip().lower() for name in hosts.split(",")))}
    sock = http.listen(host, port)
    print(http.address(sock), flush=True)
    run = Watch(out_dir) if watch else None
    http.run(http.Site(models(run), key(), names, max_seconds, run), sock, drain_seconds)


if __name__ == "__main__":
    with errors.lossy_output(), configurator.user_errors():
        main()
