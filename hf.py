"""Our GPT as a model of transformers: for its generate() with beam search, its Trainer, PEFT, and the Auto classes.

    import hf
    model = hf.NanoGPTLMHeadModel.from_nanogpt_ckpt("out-shakespeare-char")  # or the file in it
    model.save_pretrained("folder")  # which AutoModelForCausalLM.from_pretrained reads once this file is imported
    model.to_nanogpt_ckpt("out-tuned")  # python train.py --init_from=resume --out_dir=out-tuned

The modules are model.py's own, so all that it computes is computed here: GPT-2 with and without biases, Qwen3, Llama.
Weights keep nanoGPT's names, in safetensors too. Nothing else imports this file, and only this file needs transformers:
5.6 to 5.24 are tried. From 5.24 on it calls the cache of keys and values `cache`, before that `past_key_values`; either
name is taken here. What a caller passes and is not computed here raises, in any release.
"""

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path

import torch

from model import GPT, GPTConfig
from quartz import checkpoint, kernels, machine, optim, run_folder, shards, tokenizer
from quartz.errors import UserError

try:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
except ModuleNotFoundError as missing:
    raise ImportError(f"hf.py needs the {missing.name} package: pip install -e .[transformers]") from missing


_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"  # from 5.24 on, and before
# What goes to the loss. No parameters of forward's own: the Trainer would ask for each that has label in its name.
LOSS_KEYWORDS = ("shift_labels", "num_items_in_batch")


class NanoGPTConfig(PreTrainedConfig):
    """GPTConfig's fields under their names; transformers' names for them (hidden_size, …) work too."""

    model_type = "nanogpt"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
        "intermediate_size": "n_hidden",
        "tie_word_embeddings": "tie_embeddings",
        "rms_norm_eps": "norm_eps",
    }

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    arch: str = "gpt2"
    n_kv_head: int = 0
    head_dim: int = 0
    n_hidden: int = 0
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    use_cache: bool = True  # of generate()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tokenizer: dict | None = None  # of the text that the model was trained on, as tokenizer.from_data reads it
    dataset: str = ""  # the name of that text, by which nanoGPT finds the tokenizer

    def __post_init__(self, **others):
        for name in self.attribute_map.keys() & others.keys():
            setattr(self, name, others.pop(name))
        for name, value in dataclasses.asdict(self.to_gpt()).items():  # what is 0 gets the value that it stands for
            setattr(self, name, value)
        super().__post_init__(**others)
        # transformers keeps names that it does not know as attributes. A file may have such notes; a person means more.
        is_file = "model_type" in others
        if unknown := [n for n in others if n.startswith("rope_") or (n in vars(self) and not is_file)]:
            raise TypeError(f"NanoGPTConfig does not know {' and '.join(unknown)}")

    @classmethod
    def from_gpt(cls, config: GPTConfig, **others) -> "NanoGPTConfig":
        return cls(**dataclasses.asdict(config), **others)

    def to_gpt(self) -> GPTConfig:
        return GPTConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)})


class SeenTokens:
    """What model.py's attention asks of a cache: to keep keys and values, and to say which of them a query sees.

    Keys and values are kept by a cache of transformers, or where that is None not at all. The first `length` count: a
    static cache gives out room that is not filled yet, too.
    """

    def __init__(self, cache: Cache | None, mask: torch.Tensor | None, length: int):
        self.cache, self.mask, self.length = cache, mask, length

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """As model.KVCache.extend: k, v (B, n_kv, T, head_dim) -> those of all tokens so far, and the mask."""
        k = k.to(v.dtype)  # rotated in float32, which attention leaves, too
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        return k[:, :, : self.length], v[:, :, : self.length], self.mask


class NanoGPTLMHeadModel(PreTrainedModel, GenerationMixin):
    config: NanoGPTConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    # What GPT does with weights and settings of these names
    configure_optimizers, decay_groups = GPT.configure_optimizers, GPT.decay_groups
    _initialise, _rope = GPT._initialise, GPT._rope

    def __init__(self, config: NanoGPTConfig, gpt: GPT | None = None):
        """A new network, or `gpt`, which it then shares its weights with. Raises ValueError for a config of none."""
        super().__init__(config)
        gpt = gpt or GPT(config.to_gpt())
        kernels.install(gpt)
        self.transformer, self.lm_head = gpt.transformer, gpt.lm_head
        self._rope_table: torch.Tensor | None = None
        self.gradient_checkpointing, self.loss_type = False, "ForCausalLM"
        for parameter in self.parameters():
            parameter._is_hf_initialized = not parameter.is_meta  # post_init leaves them, then, as they are
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Gives weights that a file lacked the values of a new GPT's. What is flagged as initialised stays."""
        place = next((name for name, its in self.named_modules() if its is module), None)
        if place is None:  # a table of another size, before it takes its place
            return super()._init_weights(module)
        for name, parameter in module.named_parameters(place, recurse=False):
            self._initialise(name, parameter)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.transformer.wte = value

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *arguments, **keywords):
        inputs = super().prepare_inputs_for_generation(*arguments, **keywords)
        if (cache := inputs.get("cache")) is not None:  # PEFT 0.21 finds it, before each token, by its older name alone
            inputs["past_key_values"] = cache
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **others,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), of the last `logits_to_keep` positions where that is not 0, and the mean loss in nats.

        input_ids (B, T), or inputs_embeds (B, T, C) in their place. attention_mask (B, P + T) is 0 where a token is
        padding, left or right, P being the tokens that the cache, by either of its names, holds; a mask (B, 1, T, …) is
        taken as it is. position_ids (B or 1, T) count, by default, the tokens that are no padding. Without a mask, and
        at the start of a row, a new text begins where they do not go on by one: it does not see those before. labels
        (B, T) are the input_ids again, -100 where there is nothing to predict. LOSS_KEYWORDS: shift_labels (B, T) are
        targets as train.py has them, each the token that follows; num_items_in_batch divides the sum of the losses, in
        place of their number.

        Raises ValueError where tokens do not fit in block_size, or for what is not computed, TypeError for any other
        keyword that is not None.
        """
        for_loss = {name: others.pop(name, None) for name in LOSS_KEYWORDS}
        if unknown := [name for name, value in others.items() if value is not None]:
            raise TypeError(f"{type(self).__name__} does not know {' and '.join(unknown)}")
        for name, value in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if getattr(self.config, name, False) if value is None else value:
                raise ValueError(f"{name}: only logits are given out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        cache = _one_of(cache, past_key_values)
        is_recomputed = self.gradient_checkpointing and self.training
        if is_recomputed and cache is not None:
            raise ValueError("with gradient checkpointing a cache would take in the same tokens twice: leave it out")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None and not is_recomputed:
            cache = DynamicCache()
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        before = 0 if cache is None else int(cache.get_seq_length())
        length, block_size = before + x.size(1), self.config.block_size
        mask, position = _mask_and_position(attention_mask, position_ids, before, length, x.device)
        if length > block_size and (count := int(position.max()) + 1) > block_size:
            raise ValueError(f"{count} tokens do not fit in block_size {block_size}")
        rope = None
        if self.config.arch == "gpt2":
            x = x + self.transformer.wpe(position)
        else:
            rope = tuple(table[position].unsqueeze(-2) for table in self._rope(x.device))
        x = self.transformer.drop(x)
        seen = None if cache is None and mask is None else SeenTokens(cache, mask, length)
        for block in self.transformer.h:
            x = self._gradient_checkpointing_func(block, x, rope, seen) if is_recomputed else block(x, rope, seen)
        x = self.transformer.ln_f(x)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(x[:, kept]), None
        if labels is not None or for_loss["shift_labels"] is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.size(-1), **for_loss)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache if use_cache else None})

    @classmethod
    def from_nanogpt_ckpt(cls, path: str | Path) -> "NanoGPTLMHeadModel":
        """The model in a checkpoint, ours or nanoGPT's: a file, or a folder with one. In evaluation mode, on the CPU.

        Its tokenizer and the name of its data set come along in the config, and generate() never draws ids that the
        tokenizer lacks. Raises UserError where the checkpoint is missing, damaged, or describes no GPT.
        """
        path = Path(path)
        is_run = path.is_dir() and not (path / "plain.pt").is_file()  # and no checkpoint in shards
        state = run_folder.load_to_use(str(path)) if is_run else checkpoint.load(path)
        gpt = checkpoint.build_model(state, state["model_args"].get("dropout", 0.0))
        name, data = str(state["config"].get("dataset") or ""), state.get("tokenizer")
        if data is None:
            with contextlib.suppress(UserError):  # the data set need not be here
                data = shards.tokenizer_of(name, gpt.config.vocab_size)
        if data is not None:
            tokenizer.check_data(data, gpt.config.vocab_size)
        model = cls(NanoGPTConfig.from_gpt(gpt.config, tokenizer=data, dataset=name), gpt).eval()
        if data is not None:
            is_gpt2 = data["type"] == "gpt2"  # whose tokens need not be fetched to count them
            known = tokenizer.GPT2Tokenizer.vocab_size if is_gpt2 else tokenizer.from_data(data).vocab_size
            model.generation_config.suppress_tokens = list(range(known, gpt.config.vocab_size)) or None
        return model

    def to_nanogpt_ckpt(self, path: str | Path) -> Path:
        """Writes a checkpoint at iteration 0, which train.py, sample.py and, of arch='gpt2', nanoGPT's scripts read.

        path: a file *.pt, or a folder that gets a ckpt.pt. Returns the file. Raises FileExistsError where it is there
        already, ValueError where there are weights that a GPT lacks, UserError where the disk refuses.
        """
        path = Path(path)
        path = path if path.suffix == ".pt" else path / run_folder.BEST
        if path.exists():
            raise FileExistsError(f"{path} is there already: move it away, or name another")
        with machine.no_memory():
            gpt = GPT(self.config.to_gpt())
        weights = self.state_dict()
        if unknown := weights.keys() ^ gpt.state_dict().keys():
            raise ValueError(f"a checkpoint has no place for {min(unknown)}: merge adapters first (merge_and_unload)")
        # nanoGPT does not resume without an optimizer: this is one that has made no step, with nanoGPT's settings
        updater = gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "meta")
        optim.refine(updater, gpt, {}, "")  # names the parameters, so that Muon takes it, too
        moments = updater.state_dict()
        for group in moments["param_groups"]:
            group["fused"] = None  # nanoGPT takes this, too, from here: whatever suits its machine
        contents = {
            "model": weights,
            "optimizer": moments,
            "model_args": gpt.config.to_args(),
            "iter_num": 0,
            "best_val_loss": math.inf,
            "config": {"dataset": self.config.dataset} if self.config.dataset else {},
            "tokenizer": self.config.tokenizer,
        }
        os.makedirs(path.parent, exist_ok=True)
        checkpoint.save(path, contents)
        return path


def _one_of(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, by whichever name it came. Raises ValueError for two that are not one."""
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    # With prefix tuning PEFT adds one that holds the prefix to that of generate(), which is still empty
    filled = [each for each in (cache, past_key_values) if each.get_seq_length()]
    if len(filled) != 1:
        raise ValueError("past_key_values and cache are two names of one thing: give one of them")
    return filled[0]


def _mask_and_position(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    before: int,
    length: int,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """For the T tokens from `before` up to `length`: which keys each sees, None if all up to its own; its position.

    The mask is (T, length) or (B, 1, T, length), positions are (1, T) or (B, T): position_ids, where they are given.
    """
    keys = torch.arange(length, device=device)
    queries = keys[before:]
    position = queries[None] if position_ids is None else torch.atleast_2d(position_ids)
    if position.size(-1) != len(queries):
        raise ValueError(f"position_ids are of {position.size(-1)} tokens, and there are {len(queries)}")
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :length], position
    if attention_mask is not None and attention_mask.shape[1:] != (length,):
        shape = " x ".join(map(str, attention_mask.shape[1:]))
        raise ValueError(f"attention_mask is of {shape} tokens, and there are {length}")
    is_whole = attention_mask is None or bool(attention_mask.all())
    if attention_mask is None and position_ids is not None and before == 0:
        text = (position.diff(prepend=position[:, :1] - 1) != 1).cumsum(-1)  # which of those in its row
        if text.any():
            return (keys <= queries[:, None]) & (text[:, None, None] == text[:, None, :, None]), position
    if is_whole and (before == 0 or len(queries) == 1):
        return None, position
    mask = keys <= queries[:, None]
    if is_whole:
        return mask, position
    # Padding sees itself: to some kernels what sees nothing is NaN, and that would spread
    mask = mask & attention_mask[:, None, None].bool() | (keys == queries[:, None])
    if position_ids is None:
        position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
    return mask, position


AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTLMHeadModel, exist_ok=True)
