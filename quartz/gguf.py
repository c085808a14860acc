"""GGUF: one file with weights, sizes and tokenizer, which llama.cpp and what is built on it (ollama, LM Studio) run.

In f32 llama.cpp's greedy text is ours, but where two tokens are equally likely to its rounding: that of its cache of
keys and values, which is in half precision unless it is told otherwise (-ctk f32 -ctv f32), and with gpt2 that of a
GELU which it looks up in half precision. A gpt2 has no positions beyond block_size, and llama.cpp, which rounds its
context up to a multiple of 256, aborts in between: bound the text (-n).

Rows of the embeddings beyond the tokenizer's vocabulary are left out, so that they are never drawn. llama.cpp wants to
know which token ends a text, and takes 11, whatever that is, where a file names none. A vocabulary without
<|endoftext|> is therefore given one, behind all others. Its row is the mean of theirs, and so is its logit, which the
likeliest one always exceeds; besides, it is marked as one never to draw, which recent programs of llama.cpp heed.

Text has the ids in llama.cpp that it has here, special tokens included, but for these:
- llama.cpp's tables end at Unicode 15.1: letters and digits that came later are split from their neighbours there. So
  is "ſ" (U+017F) after an apostrophe here, by the pattern gpt4, and not there.
- A character tokenizer raises on characters that it lacks; llama.cpp drops them.
- With the pattern gpt2, a token that no two others make (BPETokenizer.merges) is never found.
Its `llama_detokenize` removes spaces before punctuation, as it does for GPT-2 itself; text that it generates has them.
"""

import contextlib
import errno
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import GPTConfig
from quartz import files
from quartz.errors import UserError
from quartz.extras import needs
from quartz.hf_layout import GPT2_TRANSPOSED, state_to_hf
from quartz.tokenizer import END_OF_TEXT, CharTokenizer, Tokenizer, printable

DTYPES = ("f32", "f16", "bf16", "q8_0")
# Where llama.cpp splits text before it merges bytes. What it calls llama-bpe is GPT-4's pattern, and takes a word that
# is a token as it is, as tiktoken does.
PRE_TOKENIZERS = {"gpt2": "gpt-2", "gpt4": "llama-bpe", "qwen2": "qwen2", "smollm": "smollm"}
NO_MERGE = "<none> <none>"  # llama.cpp wants a list of merges that is not empty; no byte is called <none>


def write(
    path: Path, config: GPTConfig, state: dict[str, Tensor], tokenizer: Tokenizer | None, dtype: str, name: str
) -> None:
    """Writes the weights `state` of GPT(config), whole or not at all, in one of DTYPES; `name` is the model's in it.

    Matrices are of that dtype; norms, biases and position embeddings stay f32. Biases that a gpt2 lacks are zeros.
    Without a tokenizer llama.cpp runs on ids alone. Raises UserError where the gguf package is missing, the disk
    refuses, a weight is too large for f16, or two tokens look the same to llama.cpp.
    """
    assert dtype in DTYPES
    gguf = needs("gguf", "writing GGUF", "gguf")
    writer = gguf.GGUFWriter(None, config.arch)
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[dtype]]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    if tokenizer is None:
        rows = (config.vocab_size, config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
    else:
        rows = (tokenizer.vocab_size, _add_vocabulary(writer, tokenizer))
    writer.add_vocab_size(rows[1])
    narrow = []
    for target, tensor in _tensors(config, state, rows):
        kind = "F32" if tensor.dim() == 1 or target == "position_embd.weight" else dtype.upper()
        if kind == "Q8_0" and tensor.size(-1) % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
            kind = "F16"
            narrow.append(target)
        kind = gguf.GGMLQuantizationType[kind]
        with np.errstate(over="ignore"):
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        if data.dtype == np.float16 and not np.isfinite(data).all():
            raise UserError(f"{target} holds weights that f16 has no room for: take dtype=bf16")
        writer.add_tensor(target, data, raw_dtype=kind)
    if narrow:
        why = "q8_0 takes rows in multiples of 32 weights"
        print(f"warning: {why}: {len(narrow)} matrices are written in f16, such as {narrow[0]}", file=sys.stderr)
    _save(writer, path)


def _add_sizes(writer, config: GPTConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    if config.arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _tensors(config: GPTConfig, state: dict[str, Tensor], rows: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """The weights under llama.cpp's names. rows: how many of the embeddings' count, and how many there have to be."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.arch.upper()], config.n_layer)
    theirs = state_to_hf(config, state)
    for name in [*theirs]:
        target, tensor = names.get_name(name, (".weight", ".bias")), theirs.pop(name)
        if name.endswith(GPT2_TRANSPOSED):
            tensor = tensor.t()
        if target in ("token_embd.weight", "output.weight"):
            tensor = tensor[: rows[0]]
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat((tensor, mean.expand(rows[1] - rows[0], -1)))
        if config.arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # There, adjacent channels turn together; here, a channel and the one half a head further on.
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        yield target, tensor


def _add_vocabulary(writer, tokenizer: Tokenizer) -> int:
    """Adds the tokenizer as llama.cpp's byte-level BPE; returns its number of tokens."""
    from gguf import TokenType

    if isinstance(tokenizer, CharTokenizer):
        pattern, chars = "gpt2", [None if c is None else c.encode("utf-8", "surrogatepass") for c in tokenizer.chars]
        ids = {char: i for i, char in enumerate(chars) if char is not None}
        # The bytes of each character from left to right. No other pair of bytes merges, so no two characters do.
        merges = dict.fromkeys((c[:n], c[n : n + 1]) for c in chars if c for n in range(1, len(c)))
    else:
        pattern, ids, merges = tokenizer.pattern, tokenizer.ranks(), tokenizer.merges()
    specials = {END_OF_TEXT: tokenizer.vocab_size} | tokenizer.specials
    size = max(tokenizer.vocab_size, specials[END_OF_TEXT] + 1)
    texts, types = [f"<unused {i}>" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in ids.items():
        texts[i], types[i] = printable(token), TokenType.NORMAL
    for special, i in specials.items():
        texts[i], types[i] = special, TokenType.CONTROL
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"llama.cpp tells tokens apart by their text, and {count} of this tokenizer's are {text!r} there"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[pattern])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([f"{printable(a)} {printable(b)}" for a, b in merges] or [NO_MERGE])
    writer.add_bos_token_id(texts.index(END_OF_TEXT))
    writer.add_eos_token_id(texts.index(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if len(texts) > tokenizer.vocab_size:  # gguf has no method for it yet
        writer.add_array("tokenizer.ggml.suppress_tokens", [tokenizer.vocab_size])
    return len(texts)


def _save(writer, path: Path) -> None:
    with files.writing(path), files.whole(path) as partial:
        try:
            with contextlib.closing(writer):
                writer.write_header_to_file(partial)
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
                end = writer.fout[0].tell()
            is_short = partial.stat().st_size < end
        except OSError as error:
            if error.errno is not None:
                raise
            is_short = True
        if is_short:  # numpy does not say why, or nothing at all where the last bytes find no room
            with open(partial, "ab", buffering=0) as file:
                for _ in range(2):  # the first may be written in part
                    file.write(bytes(2**16))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
