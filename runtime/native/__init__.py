"""The project's own operators for onnxruntime on CPUs: one node for all of a linear-attention layer.

``operators.c`` says what they compute. They are compiled when the package is built, where there is a C
compiler, and loaded from the package alone, never from a bundle. Without them a bundle's other graphs run.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from lawcat_edge.runtime.engine.processor import has_vector_products

DOMAIN = "lawcat_edge"
OPERATORS = ("LawcatAttention", "BlockProduct", "SwiGlu")


@cache
def library() -> Path | None:
    """The compiled operators; None where the package was built without, and on a processor for which their
    products are plain C.

    LAWCAT_EDGE_NATIVE in the environment: 0 does without them, 1 takes them on any processor.
    """
    asked = os.environ.get("LAWCAT_EDGE_NATIVE")
    if asked == "0" or (asked != "1" and not has_vector_products()):
        return None
    found = sorted(Path(__file__).parent.glob("_operators*.so"))
    return found[0] if found else None
