"""What is asked of the model beside the text: how tokens are chosen, how many, where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.draft import LONGEST_DRAFT, MOST_DRAFTED
from lawcat_edge.runtime.generate.sampling import SamplingOptions
from lawcat_edge.runtime.generate.text import StopStrings


@dataclass(frozen=True)
class Request:
    """What to generate: sampling, length, where to stop, what to record. See ``Model.generate``."""

    sampling: SamplingOptions
    max_new_tokens: int
    stop: tuple[str, ...]
    logprobs: int | None
    ignore_eos: bool
    speculate: int = LONGEST_DRAFT  # tokens drafted at most; 0: none
    record_end: bool = False  # the end token too has its log-probability recorded

    @classmethod
    def of(
        cls,
        max_new_tokens: int = 256,
        stop: Sequence[str] | str = (),
        logprobs: int | None = None,
        ignore_eos: bool = False,
        sampling: SamplingOptions | None = None,
        speculate: int = LONGEST_DRAFT,
        **options: Any,
    ) -> Request:
        """Options by name: those above, and the fields of SamplingOptions (or one, as `sampling`)."""
        if type(max_new_tokens) is not int or not 0 <= max_new_tokens <= 1 << 30:
            raise LawcatError(f"max_new_tokens must be a whole number of at least 0, not {max_new_tokens!r}.")
        if type(speculate) is not int or not 0 <= speculate <= MOST_DRAFTED:
            raise LawcatError(f"speculate must be from 0 (off) to {MOST_DRAFTED} tokens, not {speculate!r}.")
        unknown = sorted(set(options) - set(SamplingOptions.__dataclass_fields__))
        if unknown:
            known = ", ".join(["max_new_tokens", "stop", "logprobs", *SamplingOptions.__dataclass_fields__])
            raise LawcatError(f"There is no option {unknown[0]!r}; known are {known}.")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        StopStrings(stops)  # refuses bad ones now, not at the first token
        chosen = sampling or SamplingOptions(**options)
        return cls(chosen, max_new_tokens, stops, logprobs, ignore_eos, speculate)
