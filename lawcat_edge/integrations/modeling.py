"""A bundle as a causal language model of transformers: ``generate`` and text-generation pipelines run on it.

    from transformers import AutoTokenizer, pipeline
    from lawcat_edge.integrations.modeling import LawcatModelForCausalLM

    model = LawcatModelForCausalLM.from_pretrained("bundle")
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained("bundle"))
    pipe("The sea", max_new_tokens=20)

The arithmetic is onnxruntime's; torch only carries tokens and logits. The device side needs none of this:
there, use ``lawcat_edge.runtime``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.modeling_base import OptimizedModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from lawcat_edge.runtime.bundle.hub import fetch
from lawcat_edge.runtime.bundle.manifest import GENERATION_CONFIG, MANIFEST, Bundle
from lawcat_edge.runtime.bundle.signature import SIGNATURE
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import atomic_folder, parse_json
from lawcat_edge.teacher import state_name

CACHE = state_name()


class LawcatBundleConfig(PretrainedConfig):
    """What transformers asks of a config, read from a bundle's manifest."""

    model_type = "lawcat"

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> LawcatBundleConfig:
        geometry, tokens = bundle.manifest.geometry, bundle.manifest.tokens
        fields: dict[str, Any] = {
            "vocab_size": geometry["vocab_size"],
            "hidden_size": geometry["hidden_size"],
            "num_hidden_layers": geometry["num_layers"],
            "num_attention_heads": geometry["num_heads"],
            "num_key_value_heads": geometry["num_kv_heads"],
            "bos_token_id": tokens["bos"],
            "eos_token_id": tokens["eos"] or None,
        }
        return cls(**fields)


class RecurrentCache:
    """The cache of this model: one constant-size state a sequence.

    A state may have read fewer tokens than its row is long, because padding is never read.
    """

    is_compileable = False

    def __init__(self, states: list[State]) -> None:
        self.states = states
        self.length = 0  # tokens of a row, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The sequences ``beam_idx`` in this order, any of them several times (beam search)."""
        self.states = [self.states[int(i)].copy() for i in beam_idx]


class LawcatModelForCausalLM(OptimizedModel, GenerationMixin):
    """A bundle behind transformers' generation, on the CPU; sequences of a batch run one after another."""

    main_input_name = "input_ids"
    config_name = MANIFEST
    config_class = LawcatBundleConfig
    input_modalities = ("text",)
    output_modalities = ("text",)
    _is_stateful = True  # the state cannot go back: transformers then refuses assisted generation

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        model: Any = engine
        super().__init__(model=model, config=LawcatBundleConfig.from_bundle(bundle))
        self.bundle = bundle
        self.engine = engine
        eos = bundle.manifest.eos
        settings = {"bos_token_id": bundle.manifest.tokens["bos"], "eos_token_id": eos or None}
        settings["pad_token_id"] = eos[0] if eos else None
        if bundle.has(GENERATION_CONFIG):
            settings |= parse_json(bundle.read(GENERATION_CONFIG, 1 << 20), GENERATION_CONFIG)
        self.generation_config = GenerationConfig.from_dict(settings)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> LawcatModelForCausalLM:
        """Open the bundle in a folder, or fetch one from the hub first.

        options: threads, flavour, chunk (see ``Engine``). Raises LawcatError for what is no bundle.
        """
        folder = Path(model_id)
        if not folder.is_dir():
            folder = fetch(str(model_id), revision, token, Path(cache_dir) if cache_dir else None)
        return cls._from_pretrained(folder, **options)

    @classmethod
    def _from_pretrained(cls, model_id: str | Path, **options: Any) -> LawcatModelForCausalLM:
        unknown = sorted(set(options) - {"threads", "flavour", "chunk"})
        if unknown:
            raise LawcatError(f"There is no option {unknown[0]!r}; known are threads, flavour and chunk.")
        bundle = Bundle.open(model_id)
        return cls(bundle, Engine(bundle, **options))

    def _save_config(self, save_directory: Any) -> None:
        """The manifest is the config; it is written with the rest."""

    def _save_pretrained(self, save_directory: Any) -> None:
        """Copy the files of the bundle; an older bundle there is replaced as a whole."""
        self.bundle.check_unchanged()
        with atomic_folder(Path(save_directory), MANIFEST) as target:
            signed = (SIGNATURE,) if (self.bundle.folder / SIGNATURE).is_file() else ()
            for name in (MANIFEST, *signed, *self.bundle.manifest.files):
                shutil.copyfile(self.bundle.folder / name, target / name)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: RecurrentCache | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V] float32 of input_ids [B,T] (the last position alone with logits_to_keep = 1).

        attention_mask: [B, all tokens so far], 0 for padding, which may only come before a text.
        cache: of the call before, which this call advances in place; its name is past_key_values before
        transformers 5.24.
        """
        ids = input_ids.detach().cpu().numpy().astype(np.int64)
        B, T = ids.shape
        cache = cache or past_key_values or RecurrentCache([self.engine.new_state() for _ in range(B)])
        if len(cache.states) != B:
            raise LawcatError(f"The cache holds {len(cache.states)} sequences and the input has {B}.")
        real = np.ones((B, T), bool)
        if attention_mask is not None:
            real = attention_mask.detach().cpu().numpy().astype(bool)[:, -T:]
        last = logits_to_keep == 1
        logits = np.zeros((B, 1 if last else T, self.engine.vocab_size), np.float32)
        for row, state in enumerate(cache.states):
            tokens = ids[row, real[row]]
            if not real[row, T - len(tokens) :].all() or (not real[row].all() and state.position):
                raise LawcatError(
                    "Padding must come before a text; set the tokenizer's padding_side to left."
                )
            if last and len(tokens):
                logits[row] = self.engine.prefill(tokens, state)
            else:
                for at in range(0, len(tokens), self.engine.chunk):
                    piece = tokens[None, at : at + self.engine.chunk]
                    first = T - len(tokens) + at
                    logits[row, first : first + piece.shape[1]] = self.engine.forward(piece, state, True)[0]
        cache.length += T
        carried: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), **carried)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the state has not read; without ``use_cache`` the whole text, from nothing."""
        cache = cache if cache is not None else kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False:
            cache = next_sequence_length = None
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        elif cache is not None:
            input_ids = input_ids[:, cache.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ``forward`` makes the cache

    def can_generate(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def to(self, *arguments: Any, **named: Any) -> LawcatModelForCausalLM:
        """For transformers' sake; anything but the CPU is an error."""
        wanted = [*arguments, *named.values()]
        if any(isinstance(item, (str, torch.device)) and torch.device(item).type != "cpu" for item in wanted):
            raise LawcatError("A bundle runs on the CPU; leave the device of the pipeline at cpu.")
        return self

    def eval(self) -> LawcatModelForCausalLM:
        return self

    def get_experts_implementation(self) -> dict[str, str]:
        return {}  # asked by transformers' generation


# Else a pipeline warns that it does not know the model
AutoConfig.register(LawcatBundleConfig.model_type, LawcatBundleConfig)
AutoModelForCausalLM.register(LawcatBundleConfig, LawcatModelForCausalLM)
