import os
import pickle
import stat
from pathlib import Path

import nanogpt
import numpy as np
import pytest
import torch

from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, run_folder

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 28, "dropout": 0.0}
BEST_LOSSES = [torch.tensor(1.25), np.float64(1.25), np.float32(1.25), 1.25]
FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("best", BEST_LOSSES, ids=["tensor", "float64", "float32", "float"])
def test_a_checkpoint_of_nanogpt_loads(tmp_path, bias, prefix, best):
    reference = nanogpt.write(tmp_path / "ckpt.pt", best, prefix, **ARGS, bias=bias)
    state = checkpoint.load(tmp_path / "ckpt.pt")
    assert state["best_val_loss"] == 1.25 and type(state["best_val_loss"]) is float and state["iter_num"] == 4
    model = checkpoint.build_model(state).eval()
    idx = torch.randint(28, (3, 16))
    torch.testing.assert_close(model(idx, idx)[0], reference(idx), atol=1e-4, rtol=0)
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.99), "cpu")
    checkpoint.load_optimizer(optimizer, state)
    moments = torch.load(tmp_path / "ckpt.pt", weights_only=False)["optimizer"]["state"]
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[index]["exp_avg"])
        assert optimizer.state[parameter]["step"] == 4
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)  # our settings stay


def test_a_causal_mask_among_the_weights_is_left_out(tmp_path):
    nanogpt.write(tmp_path / "ckpt.pt", 1.0, **ARGS, bias=True)
    state = torch.load(tmp_path / "ckpt.pt")
    state["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    torch.save(state, tmp_path / "ckpt.pt")
    checkpoint.build_model(checkpoint.load(tmp_path / "ckpt.pt"))


class Bomb:
    def __reduce__(self):
        return (eval, ("open('bomb', 'w')",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_hides_code_does_not_run_it(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    state = {"model": {}, "model_args": ARGS, "config": {"a": Bomb()}}
    torch.save(state, "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="plain values"):
        checkpoint.load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "bomb").exists()


def damaged(content: bytes):
    yield from (content[:n] for n in (0, 1, 10, 1000, len(content) // 2, len(content) - 1))
    yield b"\x80\x02}q\x00."
    yield b"not a checkpoint at all" * 100
    yield content[: len(content) // 2] + content[len(content) // 2 + 100 :]


def test_a_damaged_checkpoint_is_one_problem(tmp_path):
    path = tmp_path / "ckpt.pt"
    nanogpt.write(path, 1.0, **ARGS, bias=True)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"ckpt\.pt") as error:
            checkpoint.load(path)
        assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model"), "no 'model'"),
        (lambda state: state.pop("model_args"), "model_args"),
        (lambda state: state["model_args"].pop("n_head"), "model_args"),
        (lambda state: state["model_args"].update(rope=True), "rope"),
        (lambda state: state["model_args"].update(n_layer=3), "weights"),
        (lambda state: state["model_args"].update(n_head=3), "n_embd"),
        (lambda state: state["model_args"].update(n_embd="16"), "weights"),
        (lambda state: state["model"].popitem(), "weights"),
        (lambda state: state["model"].update({"lm_head.weight": torch.zeros(28, 16)}), "embeddings differ"),
        (lambda state: state["model"].update({3: torch.zeros(1)}), "no checkpoint"),
        (lambda state: state["model"].update({FC: torch.ones(64, 16, dtype=torch.int8)}), "no tensor of floating"),
        (lambda state: state["model"].update({FC: torch.ones(64, 16, device="meta")}), "no tensor of floating"),
        (lambda state: state["model"].update({FC: torch.ones(1).expand(10**6, 10**6)}), "size mismatch"),
        (lambda state: state["model"].update({"more": torch.ones(1).expand(10**6, 10**6)}), "Unexpected key"),
        (lambda state: state.update(best_val_loss=None), "no checkpoint"),
        (lambda state: state.update(iter_num="x"), "no checkpoint"),
        (lambda state: state.update(config=5), "no checkpoint"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, change, words):
    nanogpt.write(tmp_path / "ckpt.pt", 1.0, **ARGS, bias=True)
    state = torch.load(tmp_path / "ckpt.pt")
    change(state)
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=words):
        checkpoint.build_model(checkpoint.load(tmp_path / "ckpt.pt"))
    torch.save(torch.zeros(3), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "ckpt.pt")


def test_moments_of_another_model_are_refused(tmp_path):
    nanogpt.write(tmp_path / "ckpt.pt", 1.0, **ARGS, bias=True)
    state = checkpoint.load(tmp_path / "ckpt.pt")
    for change in ({"n_layer": 1}, {"n_embd": 8}):
        other = GPT(GPTConfig(**{**ARGS, **change}))
        with pytest.raises(UserError, match="optimizer"):
            checkpoint.load_optimizer(other.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda moments: moments.pop(0),
        lambda moments: moments[0].pop("exp_avg"),
        lambda moments: moments[0].update(exp_avg=1.0),
        lambda moments: moments.update({0: None}),
    ],
)
def test_moments_that_are_incomplete_are_refused(tmp_path, change):
    nanogpt.write(tmp_path / "ckpt.pt", float("nan"), **ARGS, bias=True)
    state = checkpoint.load(tmp_path / "ckpt.pt")
    assert state["best_val_loss"] == float("inf")
    change(state["optimizer"]["state"])
    with pytest.raises(UserError, match="optimizer"):
        checkpoint.load_optimizer(
            checkpoint.build_model(state).configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"), state
        )


def test_moments_follow_a_cropped_context(tmp_path):
    nanogpt.write(tmp_path / "ckpt.pt", 1.0, **ARGS, bias=True)
    state = checkpoint.load(tmp_path / "ckpt.pt")
    model = checkpoint.build_model(state)
    model.crop_block_size(5)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoint.load_optimizer(optimizer, state)
    model(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))[1].backward()
    optimizer.step()
    moments = optimizer.state[model.transformer.wpe.weight]["exp_avg"]
    assert moments.shape == (5, 16)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, {"a": 1})
    before = path.read_bytes()

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_space)
            with pytest.raises(UserError, match="untouched"):
                checkpoint.save(path, {"a": 2})
        assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["ckpt.pt"]


def test_file_and_name_reach_the_disk(tmp_path, monkeypatch):
    kinds, plain = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: kinds.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or plain(fd))
    checkpoint.save(tmp_path / "ckpt.pt", {"a": 1})
    assert kinds == ([False, True] if os.name == "posix" else [False])


def test_a_value_that_is_not_finite_is_never_written(tmp_path):
    checkpoint.save(tmp_path / "ckpt.pt", {"a": 1})
    for bad in (torch.tensor([1.0, float("nan")]), torch.tensor(float("inf"))):
        with pytest.raises(UserError, match=r"x\.y\.0 is not finite"):
            checkpoint.save(tmp_path / "ckpt.pt", {"x": {"y": {0: bad}}})
    assert torch.load(tmp_path / "ckpt.pt") == {"a": 1}


def test_the_checkpoint_furthest_on_is_resumed(tmp_path, capsys):
    with pytest.raises(UserError, match="no checkpoint"):
        run_folder.to_use(str(tmp_path))
    nanogpt.write(tmp_path / "last.pt", 1.0, iter_num=3, **ARGS, bias=True)
    assert run_folder.to_use(str(tmp_path)).name == "last.pt"
    nanogpt.write(tmp_path / "ckpt.pt", 1.0, iter_num=3, **ARGS, bias=True)
    assert run_folder.to_use(str(tmp_path)).name == "ckpt.pt"
    assert run_folder.load_furthest(str(tmp_path))["path"].name == "last.pt"
    nanogpt.write(tmp_path / "ckpt.pt", 1.0, iter_num=4, **ARGS, bias=True)  # nanoGPT went on in this folder
    assert run_folder.load_furthest(str(tmp_path))["path"].name == "ckpt.pt"
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:3000])
    assert run_folder.load_furthest(str(tmp_path))["path"].name == "last.pt"
    assert "ckpt.pt" in capsys.readouterr().err


class Hidden:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("change", ["none", "missing", "cut", "hidden", "no shard"])
def test_shards_are_read_whole_and_without_what_hides_in_them(tmp_path, monkeypatch, capfd, change):
    monkeypatch.chdir(tmp_path)
    model, path = GPT(GPTConfig(**ARGS, bias=False)), tmp_path / "last.dcp"
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.99), "cpu")
    with pytest.warns(UserWarning, match="save in a single process"):
        checkpoint.save_shards(path, {"model_args": ARGS | {"bias": False}}, model, optimizer, True)
    metadata = path / ".metadata"
    if change == "missing":
        metadata.unlink()
    elif change == "cut":
        metadata.write_bytes(metadata.read_bytes()[:100])
    elif change == "hidden":
        metadata.write_bytes(pickle.dumps(Hidden()))
    elif change == "no shard":
        next(path.glob("*.distcp")).unlink()
    capfd.readouterr()
    state = checkpoint.load(path)
    if change == "none":
        back = checkpoint.build_model(state).state_dict()
        assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    else:
        words = "does not hold what this run needs" if change == "no shard" else "damaged or not whole"
        with pytest.raises(UserError, match=words):
            checkpoint.build_model(state)
    assert not Path("ran").exists() and capfd.readouterr().err == ""
