"""Sequences of token ids that are taken from text files: to calibrate on, and to compare on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lawcat_edge.data.readers import expand
from lawcat_edge.evaluate.perplexity import text_sequences
from lawcat_edge.runtime.errors import LawcatError


def spread(names: Sequence[str], tokenizer: Any, length: int, samples: int) -> np.ndarray:
    """``samples`` sequences of ``length`` ids, as many from each file: int32 [≤samples,length].

    One domain alone says little of another, and the first file may be long enough for all. A file that is too
    short for a sequence is left out; LawcatError when that leaves none.
    """
    files = expand(list(names))[:samples]
    share = -(-samples // len(files))
    found = []
    for k, file in enumerate(files):
        try:
            found.append(text_sequences([file], tokenizer, length, share))
        except LawcatError:
            if not found and k + 1 == len(files):
                raise
    return np.concatenate(found)[:samples]
