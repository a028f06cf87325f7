"""Teacher and student in torch, read in chunks so that memory does not follow the length of the text.

The teacher's key/value cache does grow with the text: its batch is bounded by ``cache_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lawcat_edge.adapter import Adapter
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.model import LawcatModel, load_student
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import Teacher, state_name


def choose_device(device: str = "auto") -> str:
    """``auto``: CUDA where there is one. Raises LawcatError for a device torch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LawcatError(f"torch cannot use the device {device!r}: {str(error).splitlines()[0]}") from None
    return device


class _TorchModel:
    """Reading in chunks, for both."""

    kind: str

    def __init__(self, name: str, tokenizer_path: Path, device: str, chunk_tokens: int | None) -> None:
        self.name = name
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.device = torch.device(device)
        # Tokens (batch × length) of one pass; activations take about 0.2 MB each for a 135M model.
        self.chunk_tokens = chunk_tokens or (65_536 if self.device.type == "cuda" else 4_096)

    def _chunk(self, batch: int) -> int:
        return max(64, min(4096, self.chunk_tokens // batch))

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(ids, np.int64), device=self.device)

    def _begin(self, batch: int) -> Any:
        raise NotImplementedError

    def _hidden(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """ids [B,T] -> final hidden states [B,T,D], state."""
        raise NotImplementedError

    def _head(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> tuple[Tensor, Any]:
        if ids.ndim != 2 or 0 in ids.shape:
            raise LawcatError("There is nothing to read: the prompt has no tokens.")
        tokens = self._tensor(ids)
        state = self._begin(len(ids))
        for piece in tokens.split(self._chunk(len(ids)), dim=1):
            hidden, state = self._hidden(piece, state)
        return self._head(hidden[:, -1]), state

    @torch.inference_mode()
    def step(self, ids: np.ndarray, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self._hidden(self._tensor(ids)[:, None], state)
        return self._head(hidden[:, -1]), state

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[Tensor]:
        tokens = self._tensor(ids)
        state = self._begin(len(ids))
        for piece in tokens.split(chunk, dim=1):
            hidden, state = self._hidden(piece, state)
            yield self._head(hidden)


class StudentModel(_TorchModel):
    """A LAWCAT student: constant state, so any length at any batch."""

    kind = "student"

    def __init__(
        self,
        model: LawcatModel,
        tokenizer_path: Path,
        name: str = "student",
        device: str = "auto",
        chunk_tokens: int | None = None,
    ) -> None:
        device = choose_device(device)
        super().__init__(name, tokenizer_path, device, chunk_tokens)
        self.model = model.to(device).eval()

    @classmethod
    def load(
        cls,
        teacher: Teacher,
        adapter: Adapter | None,
        name: str = "student",
        backend: str = "auto",
        **options: Any,
    ) -> StudentModel:
        """``adapter`` None: the untrained student."""
        return cls(load_student(teacher, adapter, backend=backend), teacher.tokenizer_path, name, **options)

    def max_batch(self, length: int) -> int:
        return 64 if self.device.type == "cuda" else 8

    def _begin(self, batch: int) -> Any:
        return self.model.empty_state(batch)

    def _hidden(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.model.hidden(ids, state)

    def _head(self, hidden: Tensor) -> Tensor:
        return cast(nn.Module, self.model.lm_head)(hidden)


class TeacherModel(_TorchModel):
    """The teacher as its transformers class, with its key/value cache."""

    kind = "teacher"

    def __init__(
        self,
        hf_model: Any,
        tokenizer_path: Path,
        name: str = "teacher",
        device: str = "auto",
        chunk_tokens: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        device = choose_device(device)
        super().__init__(name, tokenizer_path, device, chunk_tokens)
        self.model = hf_model.to(device).eval()
        # Tokens whose keys and values are kept at once: 46 kB each for SmolLM2-135M in float32.
        self.cache_tokens = cache_tokens or (524_288 if self.device.type == "cuda" else 32_768)

    @classmethod
    def load(cls, teacher: Teacher, **options: Any) -> TeacherModel:
        return cls(teacher.load_model(), teacher.tokenizer_path, teacher.name, **options)

    def max_batch(self, length: int) -> int:
        most = 64 if self.device.type == "cuda" else 8
        return max(1, min(most, self.cache_tokens // max(length, 1)))

    def _begin(self, batch: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _hidden(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = self.model.model(input_ids=ids, use_cache=True, **{state_name(): state})
        return output.last_hidden_state, state  # which grew in place

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)
