"""What this program takes from libraries that is not theirs to keep: private names, and such as were renamed before.

Each test asks the library alone for what is leant on, and says by whom. One that fails after an upgrade so names what
has to follow it; the tests of the parts that lean tell what else the upgrade breaks.
"""

import functools
import inspect
import json
import pickle
import platform
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quartz.optim import AdamW

# ----------------------------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_gives_out_the_backward_pass_of_softmax(dtype):
    """torch._softmax_backward_data: attention in tiles, in training on CPUs."""
    scores = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    weights, grad = scores.softmax(-1), torch.randn(3, 5, dtype=dtype)
    (expected,) = torch.autograd.grad(weights, scores, grad)
    assert torch.equal(torch._softmax_backward_data(grad, weights.detach(), -1, dtype), expected)


def test_torch_computes_on_lists_of_tensors():
    """torch._foreach_*: Muon's step."""
    a, b = ([torch.randn(n, 3) for n in (1, 4)] for _ in range(2))
    into, added, scaled = ([t.clone() for t in a] for _ in range(3))
    torch._foreach_lerp_(into, b, 0.3)
    torch._foreach_mul_(scaled, 0.5)
    torch._foreach_add_(added, b, alpha=-2.0)
    expected = [x + 0.3 * (y - x) for x, y in zip(a, b, strict=True)]
    for found in (into, torch._foreach_lerp(a, b, 0.3)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scaled, [0.5 * x for x in a])
    torch.testing.assert_close(added, [x - 2 * y for x, y in zip(a, b, strict=True)])


def test_torchs_adamw_is_the_same_without_what_it_is_wrapped_in():
    """inspect.unwrap on the methods of torch.optim.AdamW: ours, which load no compiler."""

    def trained(kind, **how):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
        updater = kind([{"params": weights[:1], "weight_decay": 0.1}], lr=0.1, betas=(0.8, 0.9), fused=True, **how)
        updater.add_param_group({"params": weights[1:], "weight_decay": 0.0})
        for turn in range(4):
            if turn == 2:
                state = updater.state_dict()
                updater = kind(weights, lr=1.0)
                updater.param_groups[0]["params"] = weights[:1]
                updater.add_param_group({"params": weights[1:]})
                updater.load_state_dict(state)
            updater.zero_grad()
            sum((w**2).sum() for w in weights).backward()
            updater.step()
        return torch.stack([w.detach() for w in weights])

    assert torch.equal(trained(AdamW), trained(torch.optim.AdamW))
    for other in ({"maximize": True}, {"amsgrad": True}):
        assert torch.equal(trained(AdamW, **other), trained(torch.optim.AdamW, **other))


def test_torchs_adamw_is_a_function_too():
    """torch.optim.adamw.adamw: what Muon leaves to AdamW."""
    from torch.optim.adamw import adamw

    p = torch.nn.Parameter(torch.randn(5))
    p.grad, other = torch.randn(5), torch.nn.Parameter(p.detach().clone())
    other.grad = p.grad.clone()
    moments = [torch.zeros(5), torch.zeros(5)]
    how = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-10, "fused": True}
    with torch.no_grad():
        adamw(
            [p], [p.grad], *([m] for m in moments), [], [torch.zeros(())],
            beta1=0.8, beta2=0.9, amsgrad=False, maximize=False, **how,
        )  # fmt: skip
    torch.optim.AdamW([other], betas=(0.8, 0.9), **how).step()
    assert torch.equal(p, other)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_multiplies_as_a_linear_layer_does():
    """torch.ops.mkldnn._linear_pointwise: large layers of a step that is not compiled. Without it they are slower."""
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise")
    x, weight = torch.randn(2, 1, 64), torch.randn(32, 64)
    for bias in (torch.randn(32), None):
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-4, rtol=0)


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="others list features otherwise")
def test_torch_says_whether_the_cpu_computes_in_bfloat16():
    """torch.cpu.get_capabilities, or _is_*_supported before it: what dtype 'auto' is on a CPU."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        assert {name: bool(found[name]) for name in ("avx512_bf16", "amx_bf16")} == {
            name: name in flags for name in ("avx512_bf16", "amx_bf16")
        }
    else:
        assert bool(torch.cpu._is_avx512_bf16_supported()) == ("avx512_bf16" in flags)
        assert bool(torch.cpu._is_amx_tile_supported()) == ("amx_tile" in flags)


def test_torch_says_whether_it_can_compile():
    """torch.utils._triton.has_triton and cpp_builder.get_cpp_compiler: one line, where there is no compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    assert has_triton() in (True, False)
    try:
        assert get_cpp_compiler()
    except Exception as error:  # each platform has its own
        assert "compiler" in str(error).lower()  # noqa: PT017


def test_shards_are_described_by_a_pickle_of_known_classes(tmp_path):
    """.metadata of torch.distributed.checkpoint, where a checkpoint in shards admits these classes and no others."""
    import torch.distributed.checkpoint as dcp

    found = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(name)
            return super().find_class(module, name)

    kinds = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in kinds}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(tensors, checkpoint_id=tmp_path / "x")
        back = {name: torch.zeros_like(t) for name, t in tensors.items()}
        dcp.load(back, checkpoint_id=tmp_path / "x")
    assert all(torch.equal(back[name], t) for name, t in tensors.items())
    Unpickler((tmp_path / "x" / ".metadata").open("rb")).load()
    found -= {str(dtype).removeprefix("torch.") for dtype in kinds}
    assert found <= {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING", "PosixPath", "WindowsPath", "_StorageInfo", "_get_layout",
        "Size",
    }  # fmt: skip


@pytest.fixture
def alone():
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_exchanges_gradients_when_it_is_told_to(alone):
    """DistributedDataParallel.require_backward_grad_sync: once in an update. Otherwise every micro-batch would wait."""
    layer, exchanged = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)), []

    def exchange(_, bucket):
        exchanged.append(bucket)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    layer.register_comm_hook(None, exchange)
    for wanted, count in ((False, 0), (True, 1)):
        layer.require_backward_grad_sync = wanted
        layer(torch.ones(1, 2)).sum().backward()
        assert len(exchanged) == count


def test_divided_models_have_the_methods_that_they_are_known_by(alone):
    """FSDPModule.set_requires_gradient_sync and DTensor.full_tensor tell a divided model or tensor from others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import distribute_tensor

    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    assert not hasattr(layer, "set_requires_gradient_sync") and not hasattr(layer.weight, "full_tensor")
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(layer, FSDPModule)
    for wanted in (False, True):
        layer.set_requires_gradient_sync(wanted)
        layer(torch.ones(1, 3)).sum().backward()
        assert (layer.weight.grad is not None) == wanted
    layer.reshard()
    weight = layer.weight
    assert torch.equal(weight.full_tensor(), before) and torch.equal(weight.to_local(), before)
    assert torch.equal(weight.grad.full_tensor(), torch.full((2, 3), 2.0))
    twin = distribute_tensor(before, weight.device_mesh, weight.placements, src_data_rank=None)
    assert torch.equal(twin.full_tensor(), before)


# ----------------------------------------------------------------------------------------------------------------------
# transformers, accelerate and PEFT: hf.py


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def small_gpt2(transformers):
    sizes = {"vocab_size": 11, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=None))


@pytest.fixture
def handed(small_gpt2):
    """The keywords that small_gpt2 is called with, but None."""
    keywords, forward = set(), small_gpt2.forward

    @functools.wraps(forward)
    def recording(*arguments, **given):
        assert not arguments[1:]
        keywords.update(name for name, value in given.items() if value is not None)
        return forward(*arguments, **given)

    small_gpt2.forward = recording
    return keywords


def assert_known(keywords: set[str]) -> None:
    import hf

    parameters = inspect.signature(hf.NanoGPTLMHeadModel.forward).parameters
    named = {name for name, its in parameters.items() if its.kind is not its.VAR_KEYWORD}
    named |= {"return_dict", *hf.LOSS_KEYWORDS}  # the first is its decorator's
    assert keywords <= named, "hf.py's model is handed what it does not know"
    assert hf.CACHE in named


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": -1},
        {"use_cache": False, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=["beams", "static", "assisted", "sampled", "told"],
)
def test_what_generate_hands_to_a_model_is_known(small_gpt2, handed, how):
    mask = torch.tensor([[0, 1, 1, 1]])
    small_gpt2.generate(torch.ones(1, 4).long(), attention_mask=mask, max_new_tokens=4, pad_token_id=0, **how)
    assert_known(handed)
    assert {"input_ids", "attention_mask"} <= handed
    import hf

    assert (hf.CACHE in handed) == how.get("use_cache", True)


def test_what_the_trainer_hands_to_a_model_is_known(transformers, small_gpt2, handed, tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": [1, 2, 3, n], "labels": [1, 2, 3, n]} for n in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, gradient_accumulation_steps=2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(small_gpt2, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    assert_known(handed)
    assert {"labels", "num_items_in_batch"} <= handed


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_hands_to_a_model_is_known(small_gpt2, handed):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_gpt2, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]))
    idx = torch.ones(1, 4).long()
    model(input_ids=idx, attention_mask=idx, labels=idx).loss.backward()
    model.generate(input_ids=idx, max_new_tokens=3, pad_token_id=0)
    assert_known(handed)


def test_caches_of_transformers_give_back_what_they_were_given(transformers, small_gpt2):
    """Cache.update and get_seq_length. A static cache gives more than it holds: what it holds comes first."""
    k, v = torch.randn(2, 2, 1, 5, 8)
    static = transformers.StaticCache(config=small_gpt2.config, max_cache_len=9)
    for cache, room in ((transformers.DynamicCache(), 5), (static, 9)):
        assert int(cache.get_seq_length()) == 0
        for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
            keys, values = cache.update(k[:, :, part], v[:, :, part], 0)
            assert int(cache.get_seq_length()) == part.stop
        assert keys.size(2) == values.size(2) == room
        assert torch.equal(keys[:, :, :5], k) and torch.equal(values[:, :, :5], v)


# ----------------------------------------------------------------------------------------------------------------------
# Files of others, and what is told to others


def test_gguf_has_llama_cpps_names_for_our_weights(tmp_path):
    """gguf.get_tensor_name_map, and the open file of a GGUFWriter, by whose place a full disk is known."""
    gguf = pytest.importorskip("gguf")
    names = {
        ("GPT2", "transformer.wte.weight"): "token_embd.weight",
        ("GPT2", "transformer.wpe.weight"): "position_embd.weight",
        ("GPT2", "transformer.h.1.attn.c_attn.bias"): "blk.1.attn_qkv.bias",
        ("QWEN3", "model.layers.1.self_attn.q_norm.weight"): "blk.1.attn_q_norm.weight",
        ("LLAMA", "model.layers.0.mlp.gate_proj.weight"): "blk.0.ffn_gate.weight",
        ("LLAMA", "lm_head.weight"): "output.weight",
    }
    for (arch, ours), theirs in names.items():
        found = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 2)
        assert found.get_name(ours, (".weight", ".bias")) == theirs
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0] == 32
    writer = gguf.GGUFWriter(None, "gpt2")
    writer.add_tensor("a", np.ones((3, 32), np.float32), raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file(tmp_path / "x.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    end = writer.fout[0].tell()
    writer.close()
    assert (tmp_path / "x.gguf").stat().st_size == end > 3 * 32 * 4


def test_tokenizer_json_has_the_keys_that_are_read_and_written():
    """The tokenizers package's own layout: tokenizers that come from elsewhere, and go there."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    theirs = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex("[ab]+"), "isolated")
    bytes_shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_shown])
    data = json.loads(theirs.to_str())
    assert data["model"]["type"] == "BPE" and data["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2}
    assert data["model"]["merges"] in ([["a", "b"]], ["a b"]) and data["normalizer"] is None
    first, last = data["pre_tokenizer"]["pretokenizers"]
    assert first == {"type": "Split", "pattern": {"Regex": "[ab]+"}, "behavior": "Isolated", "invert": False}
    assert (last["type"], last["use_regex"], last["add_prefix_space"]) == ("ByteLevel", False, False)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": 7, "content": "<|x|>", **flags}]
    assert tokenizers.Tokenizer.from_str(json.dumps(data)).encode("ab<|x|>").ids in ([2, 7], [2, 3])
    words = json.loads(tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).to_str())
    assert words["model"] == {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}


def test_tiktoken_encodes_to_arrays_and_says_which_ids_are_free():
    import tiktoken

    ranks = {bytes([n]): n for n in range(256)} | {b"ab": 300}
    bpe = tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|x|>": 400})
    found = bpe.encode_to_numpy("abc", disallowed_special=())
    assert (found.tolist(), found.dtype) == ([300, 99], np.uint32)
    assert bpe.encode("<|x|>", allowed_special={"<|x|>"}, disallowed_special=()) == [400]
    assert bpe.encode_single_token(b"\xff") == 255 and bpe.decode_single_token_bytes(300) == b"ab"
    for decode in (bpe.decode_single_token_bytes, lambda i: bpe.decode_bytes([i])):
        with pytest.raises(KeyError):
            decode(299)


def test_pyarrow_compares_the_sums_of_a_parquet_file(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, text = tmp_path / "x.parquet", "a text that is not in order"
    table = pyarrow.table({"text": [text]})
    parquet.write_table(table, path, write_page_checksum=True, write_statistics=False, compression="none")
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    (batch,) = file.iter_batches(batch_size=256, columns=["text"])
    assert batch.column(0)[0].as_py() == text and file.metadata.num_rows == 1
    data = bytearray(path.read_bytes())
    data[data.index(b"not in order")] ^= 1
    path.write_bytes(data)
    with pytest.raises((pyarrow.ArrowException, OSError), match="(?i)checksum|crc"):
        list(parquet.ParquetFile(path, page_checksum_verification=True).iter_batches())


def test_wandb_takes_what_train_py_tells_it():
    import wandb

    def takes(function, *names):
        return {*names} <= inspect.signature(function).parameters.keys()

    assert takes(wandb.init, "project", "name", "config") and issubclass(wandb.Error, Exception)
    Run = wandb.sdk.wandb_run.Run  # which before 0.19 is not wandb.Run
    assert takes(Run.define_metric, "name", "step_metric") and takes(Run.log, "data") and callable(Run.finish)


def test_numpy_numbers_in_a_checkpoint_are_known_by_their_names(tmp_path):
    """numpy's scalars are pickled as a function of its private module: best_val_loss in checkpoints of nanoGPT."""
    scalar = np.float64(0).__reduce__()[0]
    assert f"{scalar.__module__}.{scalar.__name__}" in ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    torch.save({"best": np.float64(1.25), "other": np.float32(0.5)}, tmp_path / "x.pt")
    allowed = [(scalar, f"{name}.multiarray.scalar") for name in ("numpy._core", "numpy.core")]
    allowed += [np.dtype, type(np.dtype(np.float32)), type(np.dtype(np.float64))]
    with torch.serialization.safe_globals(allowed):
        assert torch.load(tmp_path / "x.pt", weights_only=True) == {"best": 1.25, "other": 0.5}


def test_the_hubs_client_can_be_told_to_be_quiet():
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    assert logging.get_verbosity() > before or before >= 40
    logging.set_verbosity(before)
    assert list(inspect.signature(hub.hf_hub_download).parameters)[:2] == ["repo_id", "filename"]
