"""What a user would run instead: the teacher itself in torch, and as a GGUF file in llama.cpp.

The models here are read for accuracy in the comparison's own process; their speed and memory are measured in
a fresh one, by ``python -m lawcat_edge.calibration.comparison.peers``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.calibration.comparison.measure import fresh_process
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import sha256_file, user_path
from lawcat_edge.runtime.generate.stats import peak_memory

GGUF_TYPES = {"gguf-q8_0": 7, "gguf-q4_0": 2}
"""Row name: llama.cpp's file type."""
_QUIET: list[Any] = []  # callbacks live as long as llama.cpp may call them


class GgufModel:
    """A GGUF file in llama.cpp, one sequence at a time, as ``evaluate`` asks for a model."""

    kind = "gguf"

    def __init__(self, file: Path, tokenizer: Path, context: int, threads: int | None = None) -> None:
        import llama_cpp

        self.name = file.name
        self.tokenizer = load_tokenizer(tokenizer)
        # logits_all keeps the logits of the whole context: context x vocabulary x 4 bytes
        self.model = llama_cpp.Llama(
            str(file),
            n_ctx=context,
            logits_all=True,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def max_batch(self, length: int) -> int:
        return 1

    def prefill(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        assert len(ids) == 1
        self.model.reset()
        return self._read(ids[0])[-1:], None

    def step(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        return self._read(ids), None

    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        assert len(ids) == 1
        self.model.reset()
        for start in range(0, ids.shape[1], chunk):
            yield self._read(ids[0, start : start + chunk])[None]

    def _read(self, ids: np.ndarray) -> np.ndarray:
        before = self.model.n_tokens
        self.model.eval(ids.tolist())
        return self.model.scores[before : self.model.n_tokens]


def need_llama_cpp() -> None:
    """Raise LawcatError where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise LawcatError("llama-cpp-python is not installed; run pip install llama-cpp-python for this row.")


def teacher_gguf(teacher: str, given: Path | None) -> Path:
    """The teacher as a GGUF file: the one given, or the teacher itself where it came as one."""
    if given is not None:
        if not given.is_file():
            raise LawcatError(f"There is no GGUF file {given}; check --gguf.")
        return given
    if teacher == "smollm2":
        from lawcat_edge.teacher import _embedded

        return _embedded()
    path = user_path(teacher)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    raise LawcatError("The teacher is no GGUF file; convert it with llama.cpp and name the file with --gguf.")


def gguf_rows(teacher: str) -> list[str]:
    """Names of the rows: the teacher's own file too, where it came as one."""
    came_so = teacher == "smollm2" or teacher.lower().endswith(".gguf")
    return [*GGUF_TYPES, "gguf-as-given"] if came_so else list(GGUF_TYPES)


def requantise(source: Path, folder: Path, row: str, threads: int | None = None) -> Path:
    """``source`` in the GGUF type of a row, kept in ``folder``: made once of each source."""
    if row not in GGUF_TYPES:
        return source
    target = folder / f"{row}-{sha256_file(source)[:12]}.gguf"
    if target.is_file():
        return target
    need_llama_cpp()
    import llama_cpp

    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.tmp")
    _QUIET.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_QUIET[-1], ctypes.c_void_p(0))  # a line for each tensor, else
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = GGUF_TYPES[row], True
    settings.nthread = threads or 0
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(building).encode(), ctypes.byref(settings)
    )
    if failed:
        building.unlink(missing_ok=True)
        raise LawcatError(f"llama.cpp could not requantise {source.name}; give another file with --gguf.")
    os.replace(building, target)
    return target


def peer_speed(
    kind: str, path: Path, context: int, decode_tokens: int, threads: int | None
) -> dict[str, Any]:
    """Speed and peak memory of a teacher folder (kind torch) or a GGUF file (kind gguf)."""
    sizes = [str(context), str(decode_tokens), str(threads or 0)]
    return fresh_process(["lawcat_edge.calibration.comparison.peers", kind, str(path), *sizes])


def _main(kind: str, path: str, context: int, decode_tokens: int, threads: int) -> None:
    began = time.perf_counter()
    read, forget, vocabulary, threads = (_torch if kind == "torch" else _llama)(
        path, context + decode_tokens + 1, threads
    )
    loaded = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, vocabulary, context)
    read(ids[:16])  # warm
    forget()
    began = time.perf_counter()
    read(ids)
    prefill = time.perf_counter() - began
    began = time.perf_counter()
    for k in range(decode_tokens):
        read(ids[k % context : k % context + 1])
    decode = time.perf_counter() - began
    result = {
        "context": context,
        "threads": threads,
        "prefill_tokens_per_second": context / prefill,
        "decode_tokens_per_second": decode_tokens / decode,
        "peak_memory_bytes": peak_memory(),
        "load_seconds": loaded,
    }
    print(json.dumps(result))


def _torch(
    folder: str, context: int, threads: int
) -> tuple[Callable[[np.ndarray], Any], Callable[[], None], int, int]:
    import torch
    from transformers import DynamicCache

    from lawcat_edge.teacher import resolve, state_name

    if threads:
        torch.set_num_threads(threads)
    model = resolve(folder).load_model()
    held: dict[str, Any] = {"cache": DynamicCache(config=model.config)}

    @torch.inference_mode()
    def read(ids: np.ndarray) -> None:
        tokens = torch.as_tensor(ids)[None]
        output = model(tokens, use_cache=True, logits_to_keep=1, **{state_name(): held["cache"]})
        int(output.logits[0, -1].argmax())

    def forget() -> None:
        held["cache"] = DynamicCache(config=model.config)

    return read, forget, model.config.vocab_size, torch.get_num_threads()


def _llama(
    file: str, context: int, threads: int
) -> tuple[Callable[[np.ndarray], Any], Callable[[], None], int, int]:
    import llama_cpp

    from lawcat_edge.runtime.engine.processor import physical_cores

    count = threads or physical_cores()
    model = llama_cpp.Llama(file, n_ctx=context, n_threads=count, n_threads_batch=count, verbose=False)
    return lambda ids: model.eval(ids.tolist()), model.reset, model.n_vocab(), count


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
