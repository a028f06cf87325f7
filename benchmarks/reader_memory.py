#!/usr/bin/env python3
"""Peak memory of the streaming text reader: the same for a small file and one that is ten times as large.

    python benchmarks/reader_memory.py TOKENIZER.json [--megabytes 50,500] [--seq-len 1024]

Each size is read to its end in a process of its own: shuffled, tokenised and packed into sequences, as
``distill`` does. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers

from lawcat_edge.data.mix import sequences
from lawcat_edge.data.tasks.words import ADJECTIVES, NOUNS

WORDS = (*ADJECTIVES, *NOUNS)


def write_text(path: Path, megabytes: int) -> None:
    """Documents of a few hundred to a few thousand words, and every fiftieth as long as a book."""
    draw = random.Random(0)
    size, document = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            document += 1
            words = 400_000 if document % 50 == 0 else draw.randint(200, 3000)
            size += file.write(" ".join(draw.choices(WORDS, k=words)) + "\n\f\n")


def read(path: Path, tokenizer: Path, seq_len: int) -> dict[str, float]:
    # KiB on Linux
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    rows = sequences([path], tokenizers.Tokenizer.from_file(str(tokenizer)), seq_len, 0, epochs=1)
    count = sum(1 for _ in rows)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "megabytes": round(path.stat().st_size / 1e6),
        "sequences": count,
        "tokens_s": round(count * seq_len / seconds),
        "rss_before_mib": round(before / 1024),
        "rss_peak_mib": round(peak / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--megabytes", default="50,500")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read, args.tokenizer, args.seq_len)))
        return
    found = []
    print(f"{'MB':>6} {'sequences':>10} {'tokens/s':>10} {'start MiB':>10} {'peak MiB':>9}")
    for megabytes in map(int, args.megabytes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            write_text(path, megabytes)
            command = [sys.executable, __file__, str(args.tokenizer), "--read", str(path)]
            command += ["--seq-len", str(args.seq_len)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout)
        found.append(row)
        print("{:>6} {:>10} {:>10} {:>10} {:>9}".format(*row.values()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
