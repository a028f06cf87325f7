"""The project's own operators for onnxruntime on CPUs: one node for all of a linear-attention layer.

``operators.c`` says what they compute. They are compiled when the package is built, where there is a C
compiler, and loaded from the package alone, never from a bundle. Without them a bundle's other graphs run.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

DOMAIN = "lawcat_edge"
OPERATORS = ("LawcatAttention", "BlockProduct", "SwiGlu")


@cache
def library() -> Path | None:
    """The compiled operators; None where the package was built without, or LAWCAT_EDGE_NATIVE is 0."""
    if os.environ.get("LAWCAT_EDGE_NATIVE") == "0":
        return None
    found = sorted(Path(__file__).parent.glob("_operators*.so"))
    return found[0] if found else None
