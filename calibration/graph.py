"""A recurrent graph in onnxruntime that is no bundle: some outputs more, or weights in several files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime.bundle.manifest import expected_spans, expected_state
from lawcat_edge.runtime.engine import rotary
from lawcat_edge.runtime.engine.state import State


class RecurrentGraph:
    """Reads texts in chunks, one at a time, and carries the state along.

    model: the serialised graph, whose weights lie in files of ``folder``. geometry, lawcat: as in a manifest.
    """

    def __init__(
        self,
        model: bytes,
        folder: Path,
        geometry: dict[str, Any],
        lawcat: dict[str, Any],
        threads: int | None,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # What is done with the outputs needs the processor that idle threads would spin on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.path.abspath(folder)
        )
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.state = expected_state(geometry, lawcat)
        self.spans = expected_spans(geometry, lawcat)
        rotated = lawcat.get("rope", False) or self.spans
        self.frequencies = rotary.inverse_frequencies(geometry) if rotated else None

    def empty_state(self) -> State:
        return State(self.state, [False] * len(self.state), 1, self.spans, frequencies=self.frequencies)

    def run(self, ids: np.ndarray, state: State) -> dict[str, np.ndarray]:
        """ids int64 [1,T] -> every output by name; the state goes on."""
        found = self.session.run(self.outputs, state.feeds(ids))
        seen = dict(zip(self.outputs, found, strict=True))
        state.take(seen, ids.shape[1])
        return seen

    def read(self, text: np.ndarray, chunk: int) -> Iterator[dict[str, np.ndarray]]:
        """The outputs for each chunk of a text [T], read from an empty state."""
        for _, ids, state in self.pieces(text, chunk):
            yield self.run(ids, state)

    def pieces(
        self, text: np.ndarray, chunk: int, keep_state: bool = True
    ) -> Iterator[tuple[int, np.ndarray, State]]:
        """(start, ids [1,n], the state to ``run`` them on) of each chunk of a text [T], as its turn comes.

        keep_state: False begins every chunk from an empty state.
        """
        state, start = self.empty_state(), 0
        while start < len(text):
            if not keep_state:
                state = self.empty_state()
            ids = text[None, start : start + min(chunk, state.room)].astype(np.int64)
            yield start, ids, state
            start += ids.shape[1]
