"""What speculative decoding by prompt lookup gains, on 20 prompts that repeat themselves and 5 that do not.

    python benchmarks/speculate.py BUNDLE [--speculate 8] [--tokens 192] [--temperature 0] [--threads 2]

The prompts of speculate_prompts.json (written for this, public domain) ask for quotations, summaries with
quotations, edits of code and repairs of JSON; those of the kind "chat" ask for nothing of the prompt. Each is
answered with and without speculation, in turns, `--rounds` times; the fastest answer of each counts.

Per kind: tokens written, drafted and accepted tokens, decode tokens/s without and with, their
ratio, and how many of the answers were the same to the token (all in fp32; in 8 bits a pass of several tokens
may round in another way than a pass of one). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).with_name("speculate_prompts.json")
COLUMNS = ("kind", "answers", "tokens", "drafted", "accepted", "off/s", "on/s", "on/off", "same")


def answer(model: Any, prompt: str, speculate: int, options: argparse.Namespace) -> Any:
    """One answer from nothing; with the chat template where the bundle has one, unless told otherwise."""
    model.reset()
    arguments: dict[str, Any] = {
        "max_new_tokens": options.tokens, "temperature": options.temperature, "seed": 1,
        "speculate": speculate, "ignore_eos": options.ignore_eos,
    }  # fmt: skip
    if options.plain:
        return model.generate(prompt, **arguments).result()
    return model.chat([{"role": "user", "content": prompt}], **arguments).result()


def measure(model: Any, prompt: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a token of the fastest answers, without (off) and with (on) speculation."""
    seconds = {"off": float("inf"), "on": float("inf")}
    results: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name in ("off", "on"):
            results[name] = result = answer(model, prompt, options.speculate if name == "on" else 0, options)
            if result.stats.new_tokens > 1:
                each = result.stats.decode_seconds / (result.stats.new_tokens - 1)
                seconds[name] = min(seconds[name], each)
    on = results["on"].stats
    return {
        "tokens": on.new_tokens,
        "drafted": on.drafted_tokens,
        "accepted": on.accepted_tokens,
        "off": seconds["off"],
        "on": seconds["on"],
        "same": results["on"].tokens == results["off"].tokens,
        "text": results["on"].text,
    }


def summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    # Answers of one token say nothing of the pace.
    timed = [row for row in rows if row["on"] < float("inf") and row["off"] < float("inf")]
    tokens = sum(row["tokens"] for row in timed)
    off, on = (sum(row[name] * row["tokens"] for row in timed) / max(tokens, 1) for name in ("off", "on"))
    return {
        "kind": kind,
        "answers": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "drafted": sum(row["drafted"] for row in rows),
        "accepted": sum(row["accepted"] for row in rows),
        "off_tokens_per_second": 1 / off if off else None,
        "on_tokens_per_second": 1 / on if on else None,
        "speedup": off / on if on else None,
        "same": sum(row["same"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", default="", help="such as quote,json; default: all")
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument("--ignore-eos", action="store_true", help="write on to --tokens")
    parser.add_argument("--texts", action="store_true", help="print the answers")
    options = parser.parse_args()

    from lawcat_edge.runtime import Model

    model = Model.load(options.bundle, threads=options.threads, check_hashes=False)
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    wanted = options.kinds.split(",") if options.kinds else list(dict.fromkeys(p["kind"] for p in prompts))
    answer(model, "1 2 3 1 2 3 1 2 3", options.speculate, options)  # loads what is loaded at first use
    report = []
    print("{:<8} {:>7} {:>7} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7}".format(*COLUMNS))
    for kind in wanted:
        rows = []
        for item in prompts:
            if item["kind"] == kind:
                rows.append(measure(model, item["prompt"], options))
                if options.texts:
                    print(f"--- {rows[-1]['tokens']} tokens, {rows[-1]['drafted']} drafted, "
                          f"{rows[-1]['accepted']} accepted\n{rows[-1]['text']}")  # fmt: skip
        row = summary(kind, rows)
        report.append(row)
        print(
            f"{kind:<8} {row['answers']:>7} {row['tokens']:>7,} {row['drafted']:>8,} {row['accepted']:>8,} "
            f"{row['off_tokens_per_second'] or 0:>7.1f} {row['on_tokens_per_second'] or 0:>7.1f} "
            f"{row['speedup'] or 0:>7.2f} {row['same']:>5}/{row['answers']}",
            flush=True,
        )
    print(json.dumps({**vars(options), "kinds": report}))


if __name__ == "__main__":
    main()
