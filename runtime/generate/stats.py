"""What a generation cost: tokens, seconds, bytes."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Stats:
    """prompt_tokens were read now, reused_tokens were in the state already, new_tokens were generated.

    drafted_tokens were proposed by what the text repeats, accepted_tokens of them are in the text.
    first_token_seconds: from the call to the first token. context_tokens: length of the whole text so far.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float | None = None
    context_tokens: int = 0
    state_bytes: int = 0
    peak_memory_bytes: int | None = None
    seed: int | None = None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which the prefill already gave."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def peak_memory() -> int | None:
    """Largest resident size of this process so far, bytes; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        # macOS counts bytes, the others kilobytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def resident_memory() -> int | None:
    """Resident size of this process now, bytes; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None
