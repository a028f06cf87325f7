"""Options that several commands have: one name, one help, one default."""

from __future__ import annotations

from typing import Annotated

import typer

from lawcat_edge.calibration import TOKENS as CALIBRATION_TOKENS

__all__ = ["CALIBRATION_TOKENS", "CalibrationFiles", "CalibrationTokens"]

CalibrationFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Text files or globs for schemes that are calibrated; without any, the teacher writes it.",
    ),
]
CalibrationTokens = Annotated[
    int,
    typer.Option("--calibration-tokens", help="Tokens of it that are read; more takes longer.", min=1024),
]
