"""Hugging Face's names and layout of GPT-2, Qwen3 and Llama: config.json as a dict, and tensors by name, both ways.

Read it when a model from elsewhere does not load, or to add an architecture. hf_folder.py reads and writes the files.
"""

from dataclasses import fields

import torch

from model import GPT, GPTConfig
from quartz import machine

GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of the hub, by name
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # not weights, though older code kept them among the weights
# Hugging Face keeps GPT-2's names, and these weights transposed.
GPT2_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def hf_config(config: GPTConfig) -> dict:
    """The config.json of GPT2LMHeadModel, Qwen3ForCausalLM or LlamaForCausalLM that computes what GPT(config) does."""
    c = config
    if c.arch == "gpt2":
        sizes = {"n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head}
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), c.dropout)
        theirs = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": c.n_embd, **sizes, **dropouts}
        return theirs | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "vocab_size": c.vocab_size}
    return {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[c.arch]],
        "model_type": c.arch,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # up to transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }


# What must not be otherwise, since nothing else is computed here. A key that is missing has its library's default,
# which is the first of the values.
_HF_NEEDS = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "is_causal": (True,),
    },
    "llama": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0,),
        "use_sliding_window": (False,),
        "rope_interleaved": (False,),
        "is_causal": (True,),
    },
}


def config_from_hf(theirs: dict) -> GPTConfig:
    """The inverse of hf_config. Raises ValueError that names whatever in it is not computed here, or missing."""
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    if kind not in ("gpt2", "qwen3", "llama"):
        raise ValueError(f"model_type is {kind!r}, and only gpt2, qwen3 and llama are read here")
    if theirs.get("quantization_config"):
        raise ValueError("its weights are quantized (quantization_config), which is not read here")
    for key, values in _HF_NEEDS["gpt2" if kind == "gpt2" else "llama"].items():
        if theirs.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {theirs[key]!r}, and only {values[0]!r} is computed here")
    try:
        if kind == "gpt2":
            if theirs.get("n_inner") not in (None, 4 * theirs["n_embd"]):
                raise ValueError(f"n_inner is {theirs['n_inner']}, and only 4 * n_embd is computed here")
            sizes = {name: theirs[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
            config = GPTConfig(block_size=theirs["n_positions"], **sizes, bias=True)
        else:
            rope = theirs.get("rope_parameters") or {}
            kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
            if kind_of_rope != "default":
                raise ValueError(f"rope_type is {kind_of_rope!r}, and only 'default' is computed here")
            if any(layer != "full_attention" for layer in theirs.get("layer_types") or ()):
                raise ValueError(f"layer_types has {theirs['layer_types']}, and only full_attention is computed here")
            heads = theirs["num_attention_heads"]
            config = GPTConfig(
                block_size=theirs["max_position_embeddings"],
                vocab_size=theirs["vocab_size"],
                n_layer=theirs["num_hidden_layers"],
                n_head=heads,
                n_embd=theirs["hidden_size"],
                bias=False,
                arch=kind,
                n_kv_head=theirs.get("num_key_value_heads") or heads,
                head_dim=theirs.get("head_dim") or (128 if kind == "qwen3" else theirs["hidden_size"] // heads),
                n_hidden=theirs["intermediate_size"],
                tie_embeddings=bool(theirs.get("tie_word_embeddings", False)),
                rope_theta=float(rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0),
                norm_eps=float(theirs.get("rms_norm_eps", 1e-6)),
            )
        for field in fields(config):
            if type(getattr(config, field.name)) is not field.type:
                raise ValueError(f"{field.name} is {getattr(config, field.name)!r}, which is no {field.type.__name__}")
        if problems := config.problems():
            raise ValueError("; ".join(problems))
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"it describes no network ({error})") from error
    return config


def _hf_layout(config: GPTConfig) -> dict[str, list[tuple[str, int]]]:
    """For each of our weights: theirs, of which it is made one below the other, and the rows of each."""
    c, queries, keys = config, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    if c.arch == "gpt2":
        with machine.no_memory():
            names = GPT(c).state_dict()
        return {name: [(name, -1)] for name in names if name != "lm_head.weight"}
    layout = {
        "transformer.wte.weight": [("model.embed_tokens.weight", c.vocab_size)],
        "transformer.ln_f.weight": [("model.norm.weight", c.n_embd)],
    }
    if not c.tie_embeddings:
        layout["lm_head.weight"] = [("lm_head.weight", c.vocab_size)]
    block = {
        "ln_1": [("input_layernorm", c.n_embd)],
        "ln_2": [("post_attention_layernorm", c.n_embd)],
        "attn.c_attn": [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)],
        "attn.c_proj": [("self_attn.o_proj", c.n_embd)],
        "mlp.c_fc": [("mlp.gate_proj", c.n_hidden), ("mlp.up_proj", c.n_hidden)],
        "mlp.c_proj": [("mlp.down_proj", c.n_embd)],
    }
    if c.arch == "qwen3":
        block |= {f"attn.{name}": [(f"self_attn.{name}", c.head_dim)] for name in ("q_norm", "k_norm")}
    for n in range(c.n_layer):
        for ours, theirs in block.items():
            parts = [(f"model.layers.{n}.{name}.weight", rows) for name, rows in theirs]
            layout[f"transformer.h.{n}.{ours}.weight"] = parts
    return layout


def state_to_hf(config: GPTConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under their names and in their layout. What GPT-2 has and a model without biases lacks is zeros."""
    tensors = {}
    for ours, parts in _hf_layout(config).items():
        if config.arch == "gpt2":
            tensors[ours] = state[ours].t() if ours.endswith(GPT2_TRANSPOSED) else state[ours]
            if not config.bias and "wte" not in ours and "wpe" not in ours:
                tensors[ours.replace(".weight", ".bias")] = state[ours].new_zeros(state[ours].size(0))
        else:
            rows = state[ours].split([rows for _, rows in parts])
            tensors |= {name: its for (name, _), its in zip(parts, rows, strict=True)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def state_from_hf(config: GPTConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of state_to_hf. Raises ValueError that names tensors that are missing, misshapen or unknown."""
    if config.arch == "gpt2":  # the bare GPT2Model has no prefix
        tensors = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t
            for name, t in tensors.items()
        }
    layout = _hf_layout(config)
    known = {name for parts in layout.values() for name, _ in parts}
    missing = sorted(known - tensors.keys())
    unknown = [
        name for name in tensors if name not in known and not name.endswith((*CAUSAL_MASKS, "rotary_emb.inv_freq"))
    ]
    embedding = layout["transformer.wte.weight"][0][0]
    if config.tie_embeddings and "lm_head.weight" in unknown and not missing:
        if not torch.equal(tensors["lm_head.weight"], tensors[embedding]):
            raise ValueError("lm_head.weight differs from the input embeddings, though the two are said to be tied")
        unknown.remove("lm_head.weight")
    if missing or unknown:
        told = [
            f"{what} {', '.join(names[:4])}{' …' * (len(names) > 4)}"
            for what, names in (("it lacks", missing), ("it has also", unknown))
            if names
        ]
        raise ValueError("; ".join(told))
    with machine.no_memory():
        expected = GPT(config).state_dict()
    state = {}
    for ours, parts in layout.items():
        found = [
            tensors[name].t() if ours.endswith(GPT2_TRANSPOSED) and config.arch == "gpt2" else tensors[name]
            for name, _ in parts
        ]
        shape = tuple(expected[ours].shape)
        for (name, rows), tensor in zip(parts, found, strict=True):
            if tuple(tensor.shape) != (shape if rows < 0 else (rows, *shape[1:])):
                raise ValueError(f"{name} is of shape {tuple(tensors[name].shape)}, which is not what its config says")
        state[ours] = torch.cat(found) if len(found) > 1 else found[0]
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    return state
