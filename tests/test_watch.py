"""serve.py --watch: a run's checkpoints as they come, whole, cut or gone, and its curves."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
import time

import pytest
from conftest import assert_user_error, flags
from server import httpx, served, until, write_model

from quartz import run_folder
from quartz.watch import POINTS, SECONDS, Watch

BODY = {"prompt": "the", "max_tokens": 12, "seed": 5, "return_token_ids": True, "ignore_eos": True}


@pytest.fixture
def states(tmp_path, monkeypatch):
    """The iterator over a folder's checkpoints, which sleeps by asking `then` what happens meanwhile."""

    def of(*events):
        happening = (event() for event in events)
        monkeypatch.setattr("quartz.watch.time.sleep", lambda seconds: next(happening))
        watch = Watch(tmp_path)
        return watch, watch.states()

    return of


def save(folder, nth: int, name: str = run_folder.BEST) -> None:
    """The nth checkpoint of a run, put in its place as a run does."""
    write_model(folder / f"of-{nth}-{name}", seed=nth, iter_num=nth)
    os.replace(folder / f"of-{nth}-{name}" / "tiny" / "ckpt.pt", folder / name)
    # Times of files are coarse on some systems
    os.utime(folder / name, ns=(nth * 10**9 + 10**18, nth * 10**9 + 10**18))


def test_each_checkpoint_comes_once_and_what_is_damaged_is_told(states, tmp_path, capsys):
    def cut():
        save(tmp_path, 3)
        data = (tmp_path / "ckpt.pt").read_bytes()
        (tmp_path / "ckpt.pt").write_bytes(data[: len(data) // 2])

    watch, found = states(
        lambda: None,  # a run that has just begun
        lambda: save(tmp_path, 1),
        lambda: None,
        lambda: save(tmp_path, 2, run_folder.LAST),
        cut,
        lambda: (tmp_path / "ckpt.pt").unlink(),
        lambda: save(tmp_path, 4),
    )
    assert next(found)["iter_num"] == 1
    assert next(found)["iter_num"] == 2
    assert watch.problem is None
    # What is cut is passed over; once it is gone, the one before is the newest again
    assert next(found)["iter_num"] == 2
    assert "ckpt.pt" in capsys.readouterr().err
    assert next(found)["iter_num"] == 4
    assert not [path for path in tmp_path.glob("*") if path.suffix == ".tmp"]


def test_a_checkpoint_that_is_no_model_of_ours_is_told_of(states, tmp_path):
    watch, found = states(lambda: save(tmp_path, 2))
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    assert next(found)["iter_num"] == 2
    watch.serves({"iter_num": 2, "best_val_loss": 1.5, "config": {"max_iters": 10}})
    assert watch.told()["iter"] == 2 and watch.told()["best_val_loss"] == 1.5 and watch.told()["max_iters"] == 10


def test_what_is_wrong_is_told_in_one_line(tmp_path, capsys):
    watch = Watch(str(tmp_path))
    watch.fail("sizes differ:\n\tone\n\ttwo")
    assert watch.problem == "sizes differ: one two"
    assert capsys.readouterr().err.count("\n") == 1


def test_curves_are_the_logs_and_grow_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("quartz.watch.PAUSE", 0)
    watch = Watch(tmp_path)
    assert watch.told() == {
        **dict.fromkeys(("iter", "best_val_loss", "max_iters", "problem")),
        **{"updates": {}, "evaluations": {}},
    }
    lines = [{"iter": n, "loss": 5 - n / 1000, "lr": 0.1, "tokens": n, "seconds": n} for n in range(3000)]
    lines.insert(0, {"step": 0, "train_loss": 5, "val_loss": None, "tokens": 0, "seconds": 0})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    told = watch.told()
    assert told["evaluations"]["val_loss"] == [None] and told["evaluations"]["iter"] == [0]
    iterations, losses = told["updates"]["iter"], told["updates"]["loss"]
    assert len(iterations) == POINTS and iterations[0] == 0 and iterations[-1] == 2999
    assert losses == [5 - n / 1000 for n in iterations]
    assert max(b - a for a, b in itertools.pairwise(iterations)) <= 4
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps({"iter": 3000, "loss": 1.0, "tokens": 1, "seconds": 1}) + "\n")
    assert watch.told()["updates"]["loss"][-1] == 1.0
    json.dumps(watch.told(), allow_nan=False)


def first_text(folder, nth: int) -> list[int]:
    """What a server of the nth checkpoint alone writes."""
    write_model(folder / f"alone-{nth}", seed=nth, iter_num=nth)
    with contextlib.contextmanager(served)(folder / f"alone-{nth}") as server:
        return server.post(**BODY).json()["choices"][0]["token_ids"]


@pytest.fixture
def folder(tmp_path):
    """Of a run that has just begun."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def server(tmp_path, folder):
    yield from served(tmp_path, waits=False, out_dir=folder, watch=True)


def told(server) -> dict:
    return server.http.get("/run").json()


class Reading(threading.Thread):
    """Reads a stream, and keeps what it tells."""

    def __init__(self, server, **body):
        super().__init__()
        self.server, self.body, self.ids, self.ends = server, {**body, "stream": True}, [], []
        self.start()
        until(lambda: self.ids)

    def run(self):
        url = f"{self.server.url}/v1/completions"
        with httpx.stream("POST", url, json=self.body, timeout=60, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    self.ids += choice["token_ids"]
                    self.ends.append(choice["finish_reason"])


def test_a_run_is_served_while_it_trains(server, folder, tmp_path):
    assert server.first_health.status_code == 503 and told(server)["iter"] is None
    save(folder, 1)
    until(lambda: server.http.get("/health").status_code == 200)
    first = server.post(**BODY).json()
    assert first["choices"][0]["token_ids"] == first_text(tmp_path, 1)
    assert told(server)["fingerprint"] == first["system_fingerprint"]

    save(folder, 2)
    until(lambda: told(server)["iter"] == 2)
    second = server.post(**BODY).json()
    assert second["system_fingerprint"] != first["system_fingerprint"]
    assert second["choices"][0]["token_ids"] == first_text(tmp_path, 2)


def test_a_text_ends_with_the_model_that_began_it(server, folder):
    save(folder, 1)
    until(lambda: server.http.get("/health").status_code == 200)
    long = {**BODY, "max_tokens": 8000}
    expected = server.post(**long).json()["choices"][0]["token_ids"]
    reading, statuses = Reading(server, **long), set()
    save(folder, 2)
    while told(server)["iter"] != 2:
        statuses.add(server.http.get("/health").status_code)
    assert server.post(**BODY).json()["system_fingerprint"] == told(server)["fingerprint"]
    assert reading.ends[-1] is None, "the long text was over before the new checkpoint came: the test shows nothing"
    reading.join()
    assert reading.ids == expected and reading.ends[-1] == "length" and statuses == {200}
    until(server.is_idle)
    assert server.metric("generation_tokens_total") == 2 * 8000 + 12
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_a_checkpoint_that_is_cut_harms_nobody(server, folder):
    save(folder, 1)
    until(lambda: server.http.get("/health").status_code == 200)
    before = server.post(**BODY).json()["choices"]
    save(folder, 2)
    data = (folder / "ckpt.pt").read_bytes()
    until(lambda: told(server)["iter"] == 2)
    for length in (0, 100, len(data) - 1000):
        (folder / "ckpt.pt").write_bytes(data[:length])
        until(lambda: told(server)["problem"])
        assert server.post(**BODY).json()["choices"] != before and told(server)["iter"] == 2
    save(folder, 1, run_folder.LAST)
    os.utime(folder / "last.pt")  # now
    until(lambda: told(server)["iter"] == 1)
    assert told(server)["problem"] is None and server.post(**BODY).json()["choices"] == before
    shutil.rmtree(folder)  # the run is over, and its folder gone
    time.sleep(1.5 * SECONDS)
    assert server.post(**BODY).json()["choices"] == before


def test_memory_stays_flat_over_many_checkpoints(server, folder):
    sizes = []
    for nth in range(1, 13):
        save(folder, nth)
        until(lambda: told(server)["iter"] == nth)  # noqa: B023 - before it changes
        server.post(**BODY)
        sizes.append(server.memory())
    assert max(sizes[8:]) < 1.05 * max(sizes[4:8]), sizes


def test_settings_that_watch_does_not_go_with(run, tmp_path):
    result = run("serve.py", *flags(watch=True, init_from="gpt2", out_dir=tmp_path / "none"))
    assert_user_error(result, "leave out init_from", "there is no folder")


def test_without_watch_there_is_no_run(tmp_path):
    write_model(tmp_path)
    with contextlib.contextmanager(served)(tmp_path) as server:
        answer = server.http.get("/run")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_watched"
