"""The server under parallel clients that answer, cancel, dawdle and talk nonsense.

    python tests/tools/load.py --seconds 600 --clients 50            a tiny bundle made for it (extra test)
    python tests/tools/load.py --bundle BUNDLE --seconds 600         a real one

First every question is asked alone; then every whole answer of the crowd must be the same, to the byte. The
last line is JSON: requests by kind and status, wrong answers, the server's resident bytes (between a tenth
and a fifth of the time, and in the last tenth), and how it ended on SIGTERM. Exit code 1 where something is
off.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers")]
WORDS = ["the", "keeper", "lit", "lamp", "at", "dusk", "wrote", "weather", "down", "while", "ships", "passed"]
BUSY = (429, 503)


def questions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    asked = []
    for i in range(count):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.choice([3, 20, 80, 300])))
        body: dict[str, Any] = {"max_tokens": rng.choice([1, 8, 24, 48]), "ignore_eos": True, "seed": i}
        body["temperature"] = rng.choice([0, 0.8])
        if i % 2:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        asked.append(body)
    return asked


class Client:
    """Requests by hand over bare sockets: a real client would not misbehave."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def open(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        path = "chat/completions" if "messages" in body else "completions"
        data = json.dumps(body).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        return reader, writer

    async def whole(self, body: dict[str, Any]) -> tuple[int, str]:
        """(status, text of the answer)"""
        reader, writer = await self.open(body)
        try:
            status, data = _split(await reader.read())
            if status != 200:
                return status, ""
            choice = json.loads(data)["choices"][0]
            return status, choice["message"]["content"] if "message" in choice else choice["text"]
        finally:
            writer.close()

    async def stream(self, body: dict[str, Any], pause: float = 0.0, stop_after: int = 0) -> tuple[int, str]:
        """The same, streamed; pause: seconds between small reads. stop_after: hang up after so many bytes."""
        reader, writer = await self.open({**body, "stream": True})
        data = b""
        try:
            while piece := await reader.read(64 if pause or stop_after else 1 << 16):
                data += piece
                if stop_after and len(data) >= stop_after:
                    return 0, ""
                if pause:
                    await asyncio.sleep(pause)
        finally:
            writer.close()
        status, events = _split(data)
        if status != 200:
            return status, ""
        text = ""
        ended = False
        for event in events.split(b"\n\n"):
            if event == b"data: [DONE]":
                ended = True
            elif event.startswith(b"data: "):
                found = json.loads(event[6:])
                if "error" in found:
                    return 503, ""
                for choice in found["choices"]:
                    text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
        return (200 if ended else 0), text

    async def nonsense(self, rng: random.Random) -> int:
        """Bytes that are no request, or none that the server should take; the status, 0 for none."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        bodies = [
            b"{",
            b'{"prompt": 3}',
            b"[" * 5000,
            b'{"prompt":"a","max_tokens":1e99}',
            rng.randbytes(200),
        ]
        body = rng.choice(bodies)
        ways = [
            rng.randbytes(500),
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01" + rng.randbytes(100),
            f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body,
            f"{head}Content-Length: 99999999999\r\n\r\n".encode(),
            f"{head}Content-Length: 100\r\n\r\nhalf".encode(),
            b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        ]
        try:
            writer.write(rng.choice(ways))
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.write_eof()
            data = await asyncio.wait_for(reader.read(), 90)
            return _split(data)[0] if data else 0
        except (OSError, TimeoutError):
            return 0
        finally:
            writer.close()


def _split(data: bytes) -> tuple[int, bytes]:
    """(status, body) of a response that ended with the connection, chunks put together."""
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return 0, b""
    if b"transfer-encoding: chunked" in head.lower():
        parts = []
        while body:
            size, _, rest = body.partition(b"\r\n")
            count = int(size, 16)
            parts.append(rest[:count])
            body = rest[count + 2 :]
            if not count:
                break
        body = b"".join(parts)
    return int(head[9:12]), body


class Crowd:
    def __init__(self, client: Client, asked: list[dict[str, Any]], expected: list[str], end: float) -> None:
        self.client, self.asked, self.expected, self.end = client, asked, expected, end
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    async def member(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.end:
            k = rng.randrange(len(self.asked))
            body, way = self.asked[k], rng.random()
            try:
                if way < 0.35:
                    name, (status, text) = "whole", await self.client.whole(body)
                elif way < 0.65:
                    name, (status, text) = "stream", await self.client.stream(body)
                elif way < 0.75:
                    name, (status, text) = (
                        "slow",
                        await self.client.stream(body, pause=rng.choice([0.01, 0.1])),
                    )
                elif way < 0.85:
                    name, (status, text) = (
                        "cancel",
                        await self.client.stream(body, stop_after=rng.randrange(2000)),
                    )
                else:
                    name, status, text = "nonsense", await self.client.nonsense(rng), ""
            except (OSError, asyncio.IncompleteReadError) as error:
                name, status, text = f"broken ({type(error).__name__})", 0, ""
            self.seen[f"{name} {status}"] += 1
            if name in ("whole", "stream", "slow") and status == 200 and text != self.expected[k]:
                self.wrong.append(f"{name} {k}: {text[:60]!r} for {self.expected[k][:60]!r}")
            if name in ("whole", "stream", "slow") and status not in (200, *BUSY):
                self.wrong.append(f"{name} {k} ended with status {status}")
            if name == "nonsense" and (status == 200 or status >= 500):
                self.wrong.append(f"nonsense got status {status}")
            if status in BUSY:
                await asyncio.sleep(rng.uniform(0.05, 0.5))


def resident(process: subprocess.Popen[str]) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


async def drive(
    process: subprocess.Popen[str], port: int, seconds: float, clients: int, count: int
) -> dict[str, Any]:
    client, asked = Client(port), questions(count)
    alone = [await client.whole(body) for body in asked]
    assert all(status == 200 for status, _ in alone), alone
    crowd = Crowd(client, asked, [text for _, text in alone], time.monotonic() + seconds)
    memory: list[tuple[float, int]] = []
    began = time.monotonic()

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - began, resident(process)))
            await asyncio.sleep(min(2.0, seconds / 50))

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*(crowd.member(i) for i in range(clients)))
    watching.cancel()
    settled = [size for at, size in memory if seconds / 10 < at < seconds / 5]
    last = [size for at, size in memory if at > seconds * 0.9]
    first_mean, last_mean = (sum(sizes) / max(len(sizes), 1) for sizes in (settled, last))
    # After the storm the server must still answer, and the same.
    again = [(await client.whole(body))[1] for body in asked]
    crowd.wrong += [f"{k} afterwards" for k, text in enumerate(again) if text != alone[k][1]]
    return {
        "seconds": round(time.monotonic() - began),
        "clients": clients,
        "requests": sum(crowd.seen.values()),
        "compared": sum(n for name, n in crowd.seen.items() if name.split()[-1] == "200"),
        "by_kind": dict(sorted(crowd.seen.items())),
        "wrong": len(crowd.wrong),
        "wrong_examples": crowd.wrong[:5],
        "resident_settled": round(first_mean),
        "resident_end": round(last_mean),
        "growth": round(last_mean / max(first_mean, 1) - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--bundle", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load") as place:
        bundle = given.bundle
        if bundle is None:
            from tiny_bundle import build_tiny_bundle

            bundle = build_tiny_bundle(Path(place) / "bundle", window=2, rope=True, span=6)
        command = [
            sys.executable,
            "-m",
            "lawcat_edge",
            "serve",
            str(bundle),
            "--port",
            "0",
            "--threads",
            "1",
            "--json",
        ]
        with open(Path(place) / "log", "w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                assert process.stdout is not None
                line = ""
                while "http://" not in line:
                    line = process.stdout.readline()
                    assert line, "the server did not start"
                port = int(line.split("http://", 1)[1].split("/")[0].rsplit(":", 1)[1])
                result = asyncio.run(drive(process, port, given.seconds, given.clients, given.questions))
                ended = time.monotonic()
                process.send_signal(signal.SIGTERM)
                result["exit_code"] = process.wait(60)
                result["shutdown_seconds"] = round(time.monotonic() - ended, 2)
            finally:
                process.kill()
            log.seek(0)
            text = log.read()
        result["tracebacks"] = text.count("Traceback")
        if result["tracebacks"]:
            result["log"] = text[-1500:]
    print(json.dumps(result))
    off = result["wrong"] or result["exit_code"] or result["tracebacks"] or result["growth"] > 0.05
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
