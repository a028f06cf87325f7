"""A snapshot: the state after some text, in a file. Its size is that of the state, plus four bytes a token.

Layout: ``LAWCATS1`` | u32 length of the header | header, JSON | tokens, u32 | tensors, float32 in the
manifest's order, of keys and values the rows that later tokens see | sha256 of all before. Little-endian
throughout. The header names the bundle by its hash: a state means nothing to other weights, so a snapshot of
another bundle is refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError

MAGIC = b"LAWCATS1"
_MAX_HEADER = 16 << 20
_MAX_TOKENS = 1 << 26


@dataclass
class Snapshot:
    """State after the first `fed` of `tokens` (the rest are still to be fed: usually one, the last chosen).

    tensors: float32 arrays without the batch, in the manifest's order. extra: JSON that a caller keeps with
    it (the messages of a chat).
    """

    bundle_sha256: str
    tokens: array[int]
    fed: int
    tensors: list[np.ndarray]
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path | str) -> int:
        """Write the file whole or not at all; its size in bytes."""
        header = json.dumps(
            {
                "bundle": self.bundle_sha256,
                "tokens": len(self.tokens),
                "fed": self.fed,
                "shapes": [list(tensor.shape) for tensor in self.tensors],
                "extra": self.extra,
            },
            ensure_ascii=False,
            allow_nan=False,
        ).encode("utf-8")
        if len(header) > _MAX_HEADER:
            raise LawcatError("The conversation is too long to be kept in a snapshot; use /reset.")
        parts = [MAGIC, struct.pack("<I", len(header)), header, np.asarray(self.tokens, "<u4").tobytes()]
        parts += [np.ascontiguousarray(tensor, "<f4").tobytes() for tensor in self.tensors]
        digest, size = hashlib.sha256(), 0
        with files.atomic_file(path) as file:
            for part in parts:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.write(digest.digest())
        return size + 32

    @classmethod
    def load(cls, path: Path | str, bundle: Bundle) -> Snapshot:
        """Read and check a snapshot made with `bundle`; LawcatError for another bundle's or a damaged one."""
        path = Path(path)
        manifest = bundle.manifest
        limit = manifest.state_bytes() + 4 * _MAX_TOKENS + _MAX_HEADER + 64
        data = memoryview(files.read_bytes(path, limit))
        if len(data) < 44 or data[:8] != MAGIC:
            raise LawcatError(f"{path} is not a snapshot; make one with --save-snapshot.")
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise LawcatError(f"{path} is damaged (its checksum differs); copy or make it again.")
        (size,) = struct.unpack("<I", data[8:12])
        if size > min(_MAX_HEADER, len(data) - 44):
            raise LawcatError(f"{path} is damaged (its header is cut off); copy or make it again.")
        header = files.parse_json(bytes(data[12 : 12 + size]), str(path))
        if not isinstance(header, dict) or set(header) != {"bundle", "tokens", "fed", "shapes", "extra"}:
            raise LawcatError(f"{path} has an unknown header; make it again with this version.")
        if header["bundle"] != bundle.sha256:
            raise LawcatError(
                f"{path} belongs to another bundle (or another export of it) than {bundle.folder}; "
                "load it with the bundle that made it."
            )
        count, fed = header["tokens"], header["fed"]
        if type(count) is not int or type(fed) is not int or not 0 <= fed <= count <= _MAX_TOKENS:
            raise LawcatError(f"{path} has wrong token counts; make it again.")
        shapes = [t.sizes(manifest.kept(t.buffer, fed) if t.buffer else 0) for t in manifest.state]
        if header["shapes"] != [list(shape) for shape in shapes] or not isinstance(header["extra"], dict):
            raise LawcatError(f"{path} has tensors of other shapes than the bundle's state; make it again.")
        if len(data) != 12 + size + 4 * count + manifest.state_bytes(fed) + 32:
            raise LawcatError(
                f"{path} has {len(data):,} bytes, which is not what its header says; make it again."
            )
        at = 12 + size
        ids = np.frombuffer(data, "<u4", count, at)
        if count and ids.max() >= manifest.vocab_size:
            raise LawcatError(f"{path} holds token ids outside the vocabulary; make it again.")
        tokens = array("I")
        tokens.frombytes(ids.astype(np.uint32).tobytes())
        at += 4 * count
        tensors = []
        for tensor, shape in zip(manifest.state, shapes, strict=True):
            values = np.frombuffer(data, "<f4", int(np.prod(shape)), at).reshape(shape)
            if not np.isfinite(values).all():
                raise LawcatError(
                    f"{path} holds numbers that are not finite in {tensor.input}; make it again."
                )
            tensors.append(values)
            at += values.nbytes
        return cls(bundle.sha256, tokens, fed, tensors, header["extra"])
