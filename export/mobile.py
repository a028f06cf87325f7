"""ORT format for mobile apps: one file with its weights inside, and the operators that a reduced build needs.

A graph of the bundle is optimised and saved by the onnxruntime at hand, for any processor. Phones read the
result with that version of onnxruntime or a newer one (see docs/mobile.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lawcat_edge.runtime.bundle.flavours import FLAVOURS, ranked
from lawcat_edge.runtime.errors import LawcatError

GRAPH = "model.ort"
OPERATORS = "required_operators.config"
_LIMIT = (2 << 30) - (64 << 20)  # a flatbuffer holds 2 GiB; some is for the graph


def ort_flavour(ops: Sequence[str]) -> str:
    """The flavour that is saved in ORT format; LawcatError where there is none that phones can run."""
    able = [name for name in ranked(FLAVOURS) if FLAVOURS[name].phones]
    found = next((name for name in able if name in ops), None)
    if found is None:
        raise LawcatError(
            f"ORT format is made of the operators {' or '.join(able)}; add one of them with --ops."
        )
    return found


def write_ort(folder: Path, source: str) -> None:
    """Write model.ort from the graph ``source`` of ``folder``, and the operators it needs.

    LawcatError when the weights are too large for the format.
    """
    import onnxruntime

    with _quiet():
        from onnxruntime.tools.ort_format_model import create_config_from_models
    size = sum(path.stat().st_size for path in folder.glob("*.data"))
    if size > _LIMIT:
        raise LawcatError(
            f"The weights are {size / 1e9:.1f} GB and an ORT format file holds 2 GB; "
            "export without --ort-format, or with a smaller scheme."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / GRAPH)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        # The blocked layout of convolutions suits the processor at hand, not every one
        onnxruntime.InferenceSession(
            str(folder / source),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["NchwcTransformer"],
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise LawcatError(f"onnxruntime cannot save ORT format ({reason}); export without it.") from error
    with _quiet():
        create_config_from_models([folder / GRAPH], folder / OPERATORS, True)
    lines = (folder / OPERATORS).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("#")]  # the tool notes where the file lay
    header = f"# {GRAPH}, written by onnxruntime {onnxruntime.__version__}"
    (folder / OPERATORS).write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's tool sets up logging as a program of its own would, and prints what it does."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = before
        root.setLevel(level)
