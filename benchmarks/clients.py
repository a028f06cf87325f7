"""Tokens a second of a server's clients: one alone, and several at once.

    python benchmarks/clients.py BUNDLE [--clients 1,2,4,8] [--tokens 128] [--prompt-tokens 128] [--threads 2]

Every client streams its answers over a connection of its own. Speculation is off: it would make the one alone
faster. The numbers of clients take turns, `--rounds` times, so that all see the same machine; given is
the best round. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ask(port: int, seed: int, prompt_tokens: int, tokens: int, temperature: float) -> tuple[int, list[float]]:
    """(tokens of one streamed answer, when each piece of it came)"""
    rng = random.Random(seed)
    body = {
        "prompt": [rng.randrange(100, 40_000) for _ in range(prompt_tokens)],
        "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": temperature, "seed": seed,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    times: list[float] = []
    received = b""
    # Read raw: a client that understands every event takes as much of the processor as the server.
    with socket.create_connection(("127.0.0.1", port), 600) as connection:
        connection.sendall(head.encode() + content)
        while part := connection.recv(1 << 16):
            times += [time.perf_counter()] * part.count(b"data: {")
            received += part
    if not received.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"The server answered: {received[:500].decode()}")
    return int(re.findall(rb'"completion_tokens": ?([0-9]+)', received)[-1]), times


def crowd(port: int, count: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of `count` clients together: of all their time, and while all are being written."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(ask, port, seed + i, options.prompt_tokens, options.tokens, options.temperature)
            for i in range(count)
        ]
        answers = [job.result() for job in jobs]
    seconds = time.perf_counter() - begin
    first, last = max(times[0] for _, times in answers), min(times[-1] for _, times in answers)
    together = sum(first <= at <= last for _, times in answers for at in times)
    return {
        "tokens_per_second": sum(tokens for tokens, _ in answers) / seconds,
        "decode_tokens_per_second": together / (last - first) if last > first else 0.0,
        "first_token_seconds": max(times[0] for _, times in answers) - begin,
    }


def measure(port: int, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    counts = [int(item) for item in options.clients.split(",")]
    best: dict[int, dict[str, float]] = {}
    crowd(port, max(counts), 0, argparse.Namespace(**{**vars(options), "tokens": 8}))  # warm
    for turn in range(options.rounds):
        for count in counts:
            found = crowd(port, count, 1000 * (turn + 1), options)
            kept = best.setdefault(count, dict(found))
            for key, value in found.items():
                kept[key] = (min if key == "first_token_seconds" else max)(kept[key], value)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--clients", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    command = [
        sys.executable, "-m", "lawcat_edge", "serve", options.bundle, "--port", "0", "--json",
        "--threads", str(options.threads), "--states", "0", "--parallel", "64", "--speculate", "off",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        results = measure(int(url.rsplit(":", 1)[1].split("/")[0]), options)
    finally:
        process.terminate()
        process.wait(20)
    one = min(results)
    print(f"{'clients':>8} {'tokens/s':>9} {'of one':>7} {'decode/s':>9} {'of one':>7} {'first token s':>14}")
    for count, row in results.items():
        whole, decode = row["tokens_per_second"], row["decode_tokens_per_second"]
        print(
            f"{count:>8} {whole:>9.1f} {whole / results[one]['tokens_per_second']:>7.2f} {decode:>9.1f} "
            f"{decode / results[one]['decode_tokens_per_second']:>7.2f} {row['first_token_seconds']:>14.2f}"
        )
    report: dict[str, Any] = {**vars(options), "results": {str(k): v for k, v in results.items()}}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
