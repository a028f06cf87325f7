"""What a comparison measures and on how much, and the sequences that it takes from the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lawcat_edge.calibration.comparison.measure import BUCKETS, TASKS
from lawcat_edge.calibration.texts import spread
from lawcat_edge.data.tasks.filler import Encoder
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.evaluate.run import cell_prompts
from lawcat_edge.runtime.errors import LawcatError


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how much. Lengths in tokens."""

    length: int = 1024
    samples: int = 8
    drift_length: int = 4096
    drift_samples: int = 2
    task_lengths: tuple[int, ...] = (512, 1024)
    task_samples: int = 20
    context: int = 512
    decode_tokens: int = 64
    threads: int | None = None
    seed: int = 0

    def check(self) -> None:
        bounds = {
            "length": (2, self.length),
            "samples": (1, self.samples),
            "drift-length": (2 * BUCKETS, self.drift_length),
            "drift-samples": (1, self.drift_samples),
            "task-samples": (1, self.task_samples),
            "context": (1, self.context),
            "decode-tokens": (2, self.decode_tokens),
        }
        for name, (least, value) in bounds.items():
            if value < least:
                raise LawcatError(f"--{name} must be at least {least}, not {value}.")


class Texts:
    """rows int32 [n,length] and long [n,drift_length+1] of the files' text, by the teacher's tokenizer.

    Raises LawcatError for too little text, and for a length that no retrieval question fits.
    """

    def __init__(self, files: list[str], tokenizer_path: Path, settings: Settings) -> None:
        tokenizer = load_tokenizer(tokenizer_path)
        self.names = [Path(name).name for name in files]
        self.rows = spread(files, tokenizer, settings.length, settings.samples)
        try:
            self.long = spread(files, tokenizer, settings.drift_length + 1, settings.drift_samples)
        except LawcatError as error:
            raise LawcatError(
                f"The text is too short to follow the error over {settings.drift_length:,} tokens; give "
                "more text or a smaller --drift-length."
            ) from error
        for task in TASKS:
            for size in settings.task_lengths:
                try:
                    cell_prompts(task, Encoder(tokenizer), None, size, 1, seed=settings.seed)
                except LawcatError as error:
                    said = str(error).rstrip(".")
                    raise LawcatError(f"{said}; --task-lengths {size:,} is too short for {task}.") from error
