"""Tokenised corpora on disk: one flat array of token ids and a JSON sidecar, read by memory map.

``NAME.bin`` holds the train documents, then the held-out ones; ``NAME.bin.json`` says how many tokens of
each, the type, and the fingerprint of the tokenizer. An ``.npy`` file with such a sidecar is read too. A
window of the array is found by its index alone, so a run resumes at once and ranks share no work, at any
size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lawcat_edge.data.readers import HELDOUT_SHARE, ChatForm, Part, expand, read_parts
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json

ARRAY_SUFFIXES = (".bin", ".npy")
BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at once; bounds its memory."""

_PROBE = "The pass key is 12345.\n\nEl niño — “quoted” and\ttabbed; x_1 = {a: 0.5}"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


def tokenizer_fingerprint(tokenizer: tokenizers.Tokenizer) -> str:
    """sha256 over the vocabulary and the ids of a probe text: the same for every version of the tokenizers
    package."""
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items())
    probe = tokenizer.encode(_PROBE, add_special_tokens=True).ids
    return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()


def start_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """What the tokenizer puts before every text by itself: ``[bos]`` for Llama and Mistral, nothing for
    SmolLM2."""
    return tokenizer.encode("", add_special_tokens=True).ids


def separator_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The ids between two documents: the end-of-text token, then what starts a text.

    Raises LawcatError for a tokenizer without any known end token.
    """
    for name in END_TOKENS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            starts = [i for i in start_ids(tokenizer) if i != token]
            return [token, *starts]
    raise LawcatError(
        f"The tokenizer has none of the end tokens {', '.join(END_TOKENS)}; add one to its tokenizer.json."
    )


def encode_parts(
    parts: Iterable[Part], tokenizer: tokenizers.Tokenizer, separate_all: bool = False
) -> Iterator[tuple[Part, np.ndarray]]:
    """(part, int32 ids) in order, the separator appended where a document ends.

    separate_all: also after a part that is not the last of its document (for parts that will be shuffled).
    """
    separator = separator_ids(tokenizer)

    def encoded(batch: list[Part]) -> Iterator[tuple[Part, np.ndarray]]:
        results = tokenizer.encode_batch_fast([part.text for part in batch], add_special_tokens=False)
        for part, result in zip(batch, results, strict=True):
            ids = result.ids + separator if part.last or separate_all else result.ids
            yield part, np.asarray(ids, np.int32)

    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH_CHARACTERS:
            yield from encoded(batch)
            batch, size = [], 0
    if batch:
        yield from encoded(batch)


def tokenise_corpus(
    files: Sequence[str | Path],
    tokenizer: tokenizers.Tokenizer,
    out: str | Path,
    heldout_share: float = HELDOUT_SHARE,
    chat_template: ChatForm | None = None,
) -> dict[str, Any]:
    """Tokenise ``files`` (as for ``sequences``) once into ``out`` (``NAME.bin``) and its sidecar.

    Returns the sidecar. Memory stays bounded; the disk needs twice the result for a moment. Raises
    LawcatError for data without usable text.
    """
    target = Path(out)
    if target.suffix != ".bin":
        raise LawcatError(f"A tokenised corpus is written as NAME.bin, not {target.name!r}.")
    sources = expand(files)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    target.parent.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "heldout": 0}
    documents = {"train": 0, "heldout": 0}
    # The temporary folder lies beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        paths = {side: Path(folder) / side for side in counts}
        with open(paths["train"], "wb") as train, open(paths["heldout"], "wb") as heldout:
            parts = (
                part for name in sources for part in read_parts(name, "all", heldout_share, chat_template)
            )
            for part, ids in encode_parts(parts, tokenizer):
                side = "heldout" if part.heldout else "train"
                (heldout if part.heldout else train).write(ids.astype(dtype).tobytes())
                counts[side] += len(ids)
                documents[side] += part.last
        if sum(counts.values()) == 0:
            raise LawcatError("The data holds no usable text; check that the files are not empty.")
        with open(paths["train"], "ab") as train, open(paths["heldout"], "rb") as heldout:
            shutil.copyfileobj(heldout, train, 1 << 22)
            train.flush()
            os.fsync(train.fileno())
        sidecar = {
            "format": 1,
            "dtype": np.dtype(dtype).name,
            "tokens": sum(counts.values()),
            "train_tokens": counts["train"],
            "train_documents": documents["train"],
            "heldout_documents": documents["heldout"],
            "heldout_share": heldout_share,
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            "sources": [Path(name).name for name in sources],
        }
        note = Path(folder) / "sidecar"
        with open(note, "w", encoding="utf-8") as file:
            json.dump(sidecar, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(paths["train"], target)
        os.replace(note, sidecar_path(target))
    return sidecar


def sidecar_path(array: Path) -> Path:
    return array.with_name(array.name + ".json")


class TokenArray:
    """A tokenised corpus opened for reading; nothing but the windows asked for enters memory."""

    def __init__(self, path: str | Path, tokenizer: tokenizers.Tokenizer) -> None:
        self.path = Path(path)
        self.vocab_size = tokenizer.get_vocab_size()
        note = self._read_sidecar()
        if note["tokenizer_sha256"] != tokenizer_fingerprint(tokenizer):
            raise LawcatError(
                f"{self.path} was tokenised with another tokenizer; run tokenise_corpus with the teacher's."
            )
        self.tokens, self.train_tokens = note["tokens"], note["train_tokens"]
        self.ids = self._map(note["dtype"])
        if self.ids.ndim != 1 or len(self.ids) != self.tokens:
            raise LawcatError(
                f"{self.path} does not hold the {self.tokens:,} tokens its sidecar states; tokenise again."
            )

    def _read_sidecar(self) -> dict[str, Any]:
        path = sidecar_path(self.path)
        if not path.exists():
            raise LawcatError(f"{self.path} has no sidecar {path.name}; write it with tokenise_corpus.")
        note = read_json(path)
        numbers = ("tokens", "train_tokens")
        good = (
            isinstance(note, dict)
            and note.get("format") == 1
            and all(type(note.get(name)) is int and note[name] >= 0 for name in numbers)
            and note["train_tokens"] <= note["tokens"]
            and note.get("dtype") in ("uint16", "uint32")
            and isinstance(note.get("tokenizer_sha256"), str)
        )
        if not good:
            raise LawcatError(f"{path} is not the sidecar of a tokenised corpus of format 1; tokenise again.")
        return note

    def _map(self, dtype: str) -> np.ndarray:
        try:
            if self.path.suffix == ".npy":
                array = np.load(self.path, mmap_mode="r", allow_pickle=False)
                if array.dtype != np.dtype(dtype):
                    raise LawcatError(
                        f"{self.path} holds {array.dtype}, its sidecar says {dtype}; tokenise again."
                    )
                return array
            if self.path.stat().st_size != self.tokens * np.dtype(dtype).itemsize or not self.tokens:
                raise LawcatError(f"{self.path} has not the size its sidecar states; tokenise again.")
            return np.memmap(self.path, dtype=dtype, mode="r")
        except (OSError, ValueError) as error:
            raise LawcatError(f"{self.path} cannot be read: {error}.") from None

    def bounds(self, split: str) -> tuple[int, int]:
        """[begin, end) of a split, in tokens."""
        return {
            "train": (0, self.train_tokens),
            "heldout": (self.train_tokens, self.tokens),
            "all": (0, self.tokens),
        }[split]

    def read(self, begin: int, end: int) -> np.ndarray:
        """int32 ids [end - begin]. Raises LawcatError for an id outside the vocabulary."""
        ids = np.asarray(self.ids[begin:end], np.int32)
        if len(ids) and int(ids.max()) >= self.vocab_size:
            raise LawcatError(
                f"{self.path} holds token {int(ids.max())}, beyond the vocabulary; tokenise again."
            )
        return ids
