"""The device side: open a bundle, run it, chat with it, save its state. Needs numpy, onnxruntime, tokenizers.

    from lawcat_edge.runtime import Model

    model = Model.load("my-bundle")
    for text in model.generate("The three laws of"):
        print(text, end="", flush=True)
    print(model.chat("What is a ring buffer?").text)
    model.snapshot("after.state")

Importing this package is cheap; its parts load at their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lawcat_edge.runtime.errors import CheckFailed, LawcatError

if TYPE_CHECKING:
    from lawcat_edge.runtime.bundle.manifest import Bundle
    from lawcat_edge.runtime.engine.session import Engine
    from lawcat_edge.runtime.generate.context import Context, Generation, Result
    from lawcat_edge.runtime.generate.model import Model
    from lawcat_edge.runtime.generate.sampling import SamplingOptions
    from lawcat_edge.runtime.generate.snapshot import Snapshot

_HOMES = {
    "Bundle": "bundle.manifest",
    "Context": "generate.context",
    "Engine": "engine.session",
    "Generation": "generate.context",
    "Model": "generate.model",
    "Result": "generate.context",
    "SamplingOptions": "generate.sampling",
    "Snapshot": "generate.snapshot",
}

__all__ = [
    "Bundle",
    "CheckFailed",
    "Context",
    "Engine",
    "Generation",
    "LawcatError",
    "Model",
    "Result",
    "SamplingOptions",
    "Snapshot",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
