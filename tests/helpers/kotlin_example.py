"""The Kotlin of docs/mobile.md, compiled and run: its calls to onnxruntime and to the tokenizer come here.

The compiler is that of the package kotlin-jupyter-kernel, in an environment of its own; it needs java. What
was compiled is kept in pytest's cache folder under the hash of its sources.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import IO

import numpy as np
import onnxruntime
import pytest
import tokenizers
from environments import ROOT, environment, its_turn

SOURCES = Path(__file__).parent / "kotlin"
COMPILER = "kotlin-jupyter-kernel==0.19.0.944"
_TYPES = {b"F": ">f4", b"L": ">i8", b"I": ">i4"}


def example() -> str:
    """The source in the guide."""
    text = (ROOT / "docs" / "mobile.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```kotlin\n(.*?)```", text, re.DOTALL)
    return source


def classpath(config: pytest.Config) -> list[str]:
    """Of the compiled example with its standard library; skips the test where it cannot be compiled."""
    if shutil.which("java") is None:
        pytest.skip("java is missing")
    python = environment(config, COMPILER)
    (jars,) = python.parent.parent.glob("lib/python*/site-packages/run_kotlin_kernel/jars")
    library = next(jars.glob("kotlin-stdlib-*.jar"))
    sources = sorted(SOURCES.glob("*.kt"))
    digest = hashlib.sha256(b"\0".join([example().encode(), *(path.read_bytes() for path in sources)]))
    assert config.cache is not None
    place = Path(str(config.cache.mkdir("kotlin"))) / digest.hexdigest()[:16]
    with its_turn(place):
        if not place.is_dir():
            _compile(place, jars, [library, *sources])
    return [str(place / "classes"), str(library)]


def _compile(place: Path, jars: Path, given: list[Path]) -> None:
    """given: the standard library, then the sources beside the example."""
    library, *sources = given
    building = place.with_name(f".{place.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    (building / "Lawcat.kt").write_text(example(), encoding="utf-8")
    tools = [*jars.glob("kotlin-*.jar"), *jars.glob("annotations-*.jar")]
    subprocess.run(
        ["java", "-XX:TieredStopAtLevel=1", "-cp", ":".join(map(str, tools)),
         "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib", "-no-reflect", "-classpath", library,
         "-d", building / "classes", building / "Lawcat.kt", *sources],
        check=True, capture_output=True, timeout=400,
    )  # fmt: skip
    building.rename(place)


def converse(config: pytest.Config, bundle: Path, questions: list[str], most: int) -> tuple[list[str], int]:
    """(the example's answers in one conversation, how often it ran the graph)."""
    command = [
        "java",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        ":".join(classpath(config)),
        "MainKt",
        str(bundle),
        str(most),
    ]
    tokenizer = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))
    answers, runs, session = [], 0, None
    with subprocess.Popen([*command, *questions], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pipe = _Pipe(process.stdout, process.stdin)
        while call := process.stdout.read(1):
            if call == b"S":
                session = onnxruntime.InferenceSession(pipe.text(), providers=["CPUExecutionProvider"])
            elif call == b"R":
                assert session is not None
                runs += 1
                names = [output.name for output in session.get_outputs()]
                feeds = {pipe.text(): pipe.tensor() for _ in range(pipe.number(">i"))}
                pipe.reply_tensors(dict(zip(names, session.run(names, feeds), strict=True)))
            elif call == b"E":
                special = pipe.read(1) == b"\1"
                ids = tokenizer.encode(pipe.text(), add_special_tokens=special).ids
                pipe.reply(struct.pack(f">i{len(ids)}q", len(ids), *ids))
            elif call == b"D":
                skip = pipe.read(1) == b"\1"
                ids = [pipe.number(">q") for _ in range(pipe.number(">i"))]
                data = tokenizer.decode(ids, skip_special_tokens=skip).encode()
                pipe.reply(struct.pack(">i", len(data)) + data)
            else:
                assert call == b"A", call
                answers.append(pipe.text())
    assert process.returncode == 0
    return answers, runs


class _Pipe:
    """The protocol of tests/helpers/kotlin/Onnxruntime.kt: Java's data streams, big end first."""

    def __init__(self, source: IO[bytes], target: IO[bytes]) -> None:
        self.source, self.target = source, target

    def read(self, count: int) -> bytes:
        data = self.source.read(count)
        assert len(data) == count, "the example ended"
        return data

    def number(self, form: str) -> int:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.read(self.number(">i")).decode()

    def tensor(self) -> np.ndarray:
        kind = np.dtype(_TYPES[self.read(1)])
        shape = [self.number(">q") for _ in range(self.number(">i"))]
        data = self.read(kind.itemsize * int(np.prod(shape)))
        return np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("="))

    def reply(self, data: bytes) -> None:
        self.target.write(data)
        self.target.flush()

    def reply_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        parts = [struct.pack(">i", len(tensors))]
        for name, value in tensors.items():
            parts.append(struct.pack(">i", len(name)) + name.encode())
            parts.append(struct.pack(f">i{value.ndim}q", value.ndim, *value.shape))
            parts.append(value.astype(">f4").tobytes())
        self.reply(b"".join(parts))
