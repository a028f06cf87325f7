"""The server, spoken to by OpenAI's own client (extras `serve`, `test`), by bare sockets, and from within."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import Running, load, running, until
from tiny_bundle import build_tiny_bundle

openai = pytest.importorskip("openai", reason="the server's tests need the extras `serve` and `test`")
pytest.importorskip("uvicorn", reason="the server's tests need the extra `serve`")

from lawcat_edge import cli  # noqa: E402
from lawcat_edge.runtime import LawcatError, Model  # noqa: E402
from lawcat_edge.runtime.generate.request import Request  # noqa: E402
from lawcat_edge.runtime.generate.text import TokenTexts  # noqa: E402
from lawcat_edge.runtime.server.app import Options, listen, serve  # noqa: E402
from lawcat_edge.runtime.server.prefix_cache import StateCache  # noqa: E402
from lawcat_edge.runtime.server.replies import token_bytes  # noqa: E402
from lawcat_edge.runtime.server.worker import Closing, Job, Piece, QueueFull, Worker  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = "The keeper lit the lamp at dusk and wrote the weather down. " * 3
LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("server") / "bundle")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """A model for the expected answers; a server owns its own."""
    return load(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder, max_request_bytes=20_000, names=("tiny", "other"), states=0) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return server.client()


def chat_prompt(model: Model, *contents: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return model.tokenizer.encode(model.template.render(messages), special=False)


def ask(client: Any, *contents: str, **options: Any) -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    options = {"max_completion_tokens": 24, "temperature": 0, "extra_body": LONG, **options}
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_a_chat_is_answered_as_by_the_model_itself(client: Any, model: Model) -> None:
    expected = model.generate(chat_prompt(model, "Hello"), max_new_tokens=24, ignore_eos=True).result()
    answer = ask(client, "Hello")
    choice = answer.choices[0]
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage.prompt_tokens == len(chat_prompt(model, "Hello"))
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (24, 0)
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"


def test_a_stream_gives_the_same_text_roles_usage_and_end(client: Any) -> None:
    whole = ask(client, "Stream, please").choices[0].message.content
    chunks = list(ask(client, "Stream, please", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole
    assert len([text for text in texts if text]) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions_take_text_or_tokens_stop_strings_and_seeds(client: Any, model: Model) -> None:
    def complete(prompt: Any, **options: Any) -> Any:
        options = {
            "max_tokens": 40,
            "temperature": 0.9,
            "top_p": 0.9,
            "seed": 5,
            "extra_body": LONG,
            **options,
        }
        return client.completions.create(model="other", prompt=prompt, **options)

    sampling: Any = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "ignore_eos": True}
    expected = model.generate("Once", max_new_tokens=40, **sampling).text
    answer = complete("Once")
    assert answer.choices[0].text == expected
    assert answer.id.startswith("cmpl-")
    assert complete(model.encode("Once")).choices[0].text == expected
    assert complete(["Once"]).choices[0].text == expected
    assert complete("Once", seed=6).choices[0].text != expected
    assert "".join(chunk.choices[0].text for chunk in complete("Once", stream=True)) == expected
    stop = next(letter for letter in expected[5:] if letter != "\ufffd")
    stopped = complete("Once", stop=[stop, "not in it"])
    assert stopped.choices[0].text == expected[: expected.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert (
        client.completions.create(model="tiny", prompt="Once", extra_body=LONG).usage.completion_tokens == 16
    )


def test_logprobs_are_the_models_in_both_forms_whole_and_streamed(client: Any, model: Model) -> None:
    ids = chat_prompt(model, "Why?")
    expected = model.generate(ids, max_new_tokens=24, ignore_eos=True, logprobs=3).result()
    assert expected.logprobs is not None
    answer = ask(client, "Why?", logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx([c.logprob for c in expected.logprobs])
    assert [len(entry.top_logprobs) for entry in content] == [3] * 24
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode("utf-8", "replace") == expected.text
    streamed = list(ask(client, "Why?", logprobs=True, top_logprobs=3, stream=True))
    parts = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert [entry for part in parts for entry in part] == content
    old = client.completions.create(
        model="tiny", prompt=ids, max_tokens=24, temperature=0, logprobs=2, extra_body=LONG
    ).choices[0].logprobs  # fmt: skip
    assert old.token_logprobs == pytest.approx([c.logprob for c in expected.logprobs])
    assert len(old.tokens) == len(old.top_logprobs) == len(old.text_offset) == 24


def test_the_bytes_of_part_of_a_character_are_known(model: Model) -> None:
    halves = model.tokenizer.encode("é")
    texts = TokenTexts(model.tokenizer)

    def data(token: int) -> list[int] | None:
        return token_bytes(model.tokenizer, token, texts.of(token))

    assert [data(token) for token in halves] == [[0xC3], [0xA9]]
    assert data(model.tokenizer.id_of("<|im_end|>") or 0) == list(b"<|im_end|>")


def test_models_are_listed_and_others_are_not_found(client: Any, server: Running) -> None:
    assert [item.id for item in client.models.list().data] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "lawcat-edge"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="--name") as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    status, _, body = server.raw("GET", "/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "invalid_request_error")
    assert server.raw("GET", "/v1/completions")[0] == 405


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 20}, "max_tokens"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ],
)
def test_a_wrong_field_is_named(server: Running, change: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **change}
    status, _, answer = server.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].endswith(".")


def test_harmless_and_unknown_fields_are_ignored(server: Running) -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ],
        "max_tokens": 1, "n": 1, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "user": "me",
        "store": False, "metadata": None, "tools": [], "no_such_field": {"a": 1},
    }  # fmt: skip
    status, _, answer = server.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert (status, answer["usage"]["completion_tokens"]) == (200, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"temperature": NaN}', b"[" * 15_000,
        b'{"max_tokens": 1' + b"0" * 5000 + b"}",
    ],
)  # fmt: skip
def test_garbage_is_refused_as_such(server: Running, body: bytes) -> None:
    status, _, answer = server.raw("POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("prompt", ["", [], [-1], [10**6], ["a", ""], [1.5], None, "\ud800"])
def test_prompts_that_are_none_are_refused(server: Running, prompt: Any) -> None:
    status, _, answer = server.raw("POST", "/v1/completions", json.dumps({"prompt": prompt}).encode())
    assert status == 400
    assert answer["error"]["message"]


def test_too_large_a_request_is_refused_whether_it_says_so_or_not(server: Running, client: Any) -> None:
    with pytest.raises(openai.APIStatusError, match="more than 20,000 bytes") as caught:
        ask(client, "x" * 30_000)
    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"
    chunks = (b"x" * 5_000 for _ in range(5))
    assert server.raw("POST", "/v1/completions", chunks)[0] == 413  # type: ignore[arg-type]
    assert ask(client, "x" * 10_000, max_completion_tokens=1).usage.prompt_tokens > 10_000


def test_web_pages_get_nothing(server: Running) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    status, headers, _ = server.raw("POST", "/v1/completions", body, Origin="https://evil.example")
    assert status == 200
    assert not any(name.startswith("access-control") for name in headers)
    assert server.raw("POST", "/v1/completions", body, Content_Type="text/plain")[0] == 415
    status, _, answer = server.raw("POST", "/v1/completions", body, Host="evil.example")
    assert (status, answer["error"]["code"]) == (403, "invalid_host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert server.raw("POST", "/v1/completions", body, Host=host)[0] == 200


def test_a_key_and_an_origin_can_be_asked_for(folder: Path) -> None:
    with running(folder, api_key="sésame", cors=("https://my.example",)) as found:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            found.client().models.list()
        headers = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
        assert found.raw("GET", "/v1/models", None, **headers)[0] == 200
        assert found.raw("GET", "/v1/models", None, Authorization="Bearer sesame")[0] == 401
        assert found.health()["status"] == "ok"
        answer = found.raw("GET", "/health", Origin="https://my.example")
        assert answer[1]["access-control-allow-origin"] == "https://my.example"
        assert (
            "access-control-allow-origin" not in found.raw("GET", "/health", Origin="https://no.example")[1]
        )
    with running(folder, api_key="secret") as found:
        assert found.client(api_key="secret").models.list().data
    with pytest.raises(LawcatError, match="empty"):
        Options(api_key=" ")


def test_parallel_clients_get_what_a_single_one_gets(folder: Path, model: Model) -> None:
    prompts = [f"Client {i} says {'so ' * i}" for i in range(8)]
    options: Any = {"temperature": 0.8, "seed": 3}
    expected = [
        model.generate(chat_prompt(model, p), max_new_tokens=24, ignore_eos=True, **options).text
        for p in prompts
    ]
    assert len(set(expected)) > 4
    with running(folder, parallel=3) as found:
        client = found.client()
        ask(client, "warm")
        with ThreadPoolExecutor(8) as pool:
            whole = list(pool.map(lambda p: ask(client, p, **options).choices[0].message.content, prompts))

            def streamed(prompt: str) -> str:
                chunks = ask(client, prompt, stream=True, **options)
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

            assert list(pool.map(streamed, prompts)) == expected
        assert whole == expected


def test_a_full_queue_says_when_to_come_back_and_empties_again(folder: Path) -> None:
    with running(folder, parallel=1, queue=1) as found:
        client = found.client()
        first = ask(client, "one", stream=True, max_completion_tokens=30_000)
        next(iter(first))
        second = ask(client, "two", stream=True, max_completion_tokens=30_000)
        until(lambda: (found.health()["running"], found.health()["waiting"]) == (1, 1))
        with pytest.raises(openai.RateLimitError, match="busy") as caught:
            ask(client, "three")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "queue_full"
        first.close()
        second.close()
        until(lambda: found.health()["running"] + found.health()["waiting"] == 0)
        assert ask(client, "three").usage.completion_tokens == 24


def test_work_for_a_client_that_left_is_ended(folder: Path) -> None:
    with running(folder, parallel=2) as found:
        stream = ask(found.client(), "one", stream=True, max_completion_tokens=30_000)
        next(iter(stream))
        until(lambda: found.health()["running"] == 1)
        stream.close()
        until(lambda: found.health()["running"] == 0, 5)
        with pytest.raises(openai.APITimeoutError):
            ask(found.client(timeout=0.5), "two", max_completion_tokens=30_000)
        until(lambda: found.health()["running"] == 0, 5)


def test_a_reader_that_does_not_read_keeps_nobody_waiting(folder: Path) -> None:
    with running(folder, parallel=1, queue=4, stall_seconds=5.0) as found:
        body = json.dumps({
            "prompt": "x", "max_tokens": 30_000, "stream": True, "logprobs": 20, "ignore_eos": True,
        }).encode()  # fmt: skip
        lazy = socket.create_connection(("127.0.0.1", found.port))
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        lazy.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)
        until(lambda: found.health()["running"] == 1)
        # One turn at a time, and the lazy one's answer would take many seconds: this waits for its blocking.
        assert ask(found.client(), "me").usage.completion_tokens == 24
        assert found.health()["running"] >= 1  # the other's place may not be free yet
        until(lambda: found.health()["running"] == 0, 40)  # dropped, though its client is still there
        lazy.close()


def test_what_begins_alike_is_read_once_and_answered_the_same(folder: Path) -> None:
    questions = [f"{DOCUMENT}\n\n{question}" for question in ("Who?", "What did they light?", "When?")]
    with running(folder, states=0) as found:
        plain = [ask(found.client(), q).choices[0].message.content for q in questions]
        again = ask(found.client(), questions[0])
        assert again.usage.prompt_tokens_details.cached_tokens == 0
    with running(folder, states=6) as found:
        client = found.client()
        answers = [ask(client, q) for q in questions]
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
        # The first question reads all, the second finds where they part, the third starts there.
        assert cached[:2] == [0, 0]
        assert len(DOCUMENT) < cached[2] < answers[2].usage.prompt_tokens
        assert [answer.choices[0].message.content for answer in answers] == plain
        same = ask(client, questions[2])
        assert same.usage.prompt_tokens_details.cached_tokens == same.usage.prompt_tokens
        assert same.choices[0].message.content == plain[2]
        assert found.health()["kept_states"] == 6
        assert found.health()["kept_bytes"] > 0


def test_a_conversation_goes_on_from_the_state_after_its_answer(model: Model) -> None:
    tokens = model.encode("Dear reader, ")
    worker = Worker(load(model.bundle.folder), states=4)
    first = run_job(worker, tokens, max_new_tokens=20)
    longer = [*tokens, *first[1], *model.encode("And then?")]
    pieces = run_job(worker, longer, max_new_tokens=20)
    assert pieces[2].reused_tokens == len(tokens) + 19
    expected = model.generate(longer, max_new_tokens=20, ignore_eos=True, logprobs=0).result()
    assert pieces[0] == expected.text
    worker.close()


def job_of(
    model_or_tokens: Any, wake: Callable[[], None] = lambda: None, room: int = 64, **options: Any
) -> Job:
    request = Request.of(**{"ignore_eos": True, "logprobs": 0, **options})
    return Job([array("I", model_or_tokens)], request, wake, room)


def run_job(worker: Worker, tokens: list[int], **options: Any) -> tuple[str, list[int], Job]:
    ready = threading.Event()
    job = job_of(tokens, ready.set, **options)
    worker.submit(job)
    text, ids = read(job, ready)
    return text, ids, job


def read(job: Job, ready: threading.Event) -> tuple[str, list[int]]:
    text, ids = "", []
    while True:
        assert ready.wait(20)
        ready.clear()
        for piece in job.take():
            assert piece.reason != "error", piece.text
            text += piece.text
            ids += [choice.token for choice in piece.choices]
            if piece.reason:
                return text, ids


def test_a_job_without_a_reader_waits_for_it_and_others_go_on(model: Model) -> None:
    worker = Worker(load(model.bundle.folder), parallel=1, states=0)
    lazy_ready = threading.Event()
    lazy = job_of(model.encode("lazy"), lazy_ready.set, room=4, max_new_tokens=200)
    worker.submit(lazy)
    until(lambda: not lazy.has_room)
    expected = model.generate("eager", max_new_tokens=50, ignore_eos=True).text
    assert run_job(worker, model.encode("eager"), max_new_tokens=50)[0] == expected
    assert not lazy.done
    assert len(lazy._pieces) == 4  # a turn is only given when there is room
    assert read(lazy, lazy_ready)[0] == model.generate("lazy", max_new_tokens=200, ignore_eos=True).text
    worker.close()


def test_a_job_whose_reader_never_comes_is_dropped(model: Model) -> None:
    worker = Worker(load(model.bundle.folder), parallel=1, stall_seconds=0.1)
    job = job_of(model.encode("lazy"), room=1, max_new_tokens=200)
    worker.submit(job)
    until(lambda: job.done)
    assert job.take()[-1] == Piece("", reason="cancelled")
    assert worker.load.running == 0
    worker.close()


def test_a_long_prompt_does_not_keep_short_answers_waiting(model: Model) -> None:
    worker = Worker(load(model.bundle.folder), parallel=2, states=0)
    reader = job_of([1] * 400_000, max_new_tokens=1)
    worker.submit(reader)
    assert run_job(worker, model.encode("short"), max_new_tokens=20)[2].new_tokens == 20
    assert not reader.done
    reader.cancel()
    until(lambda: reader.done)
    worker.close()


def test_a_failing_request_ends_alone(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    own = load(model.bundle.folder)
    worker = Worker(own, states=0)
    forward = own.engine.forward

    def fail(ids: Any, state: Any) -> Any:
        if (ids == 7).any():
            raise RuntimeError("a bug")
        if (ids == 8).any():
            raise LawcatError("The model is broken.")
        return forward(ids, state)

    monkeypatch.setattr(own.engine, "forward", fail)
    for token, message in (
        (7, "The server failed on this request; see its log."),
        (8, "The model is broken."),
    ):
        job = job_of([token], max_new_tokens=3)
        worker.submit(job)
        until(lambda job=job: job.done)  # type: ignore[misc]
        until(lambda job=job: job._pieces)  # type: ignore[misc]
        assert job.take() == [Piece(message, reason="error")]
    assert "a bug" in capsys.readouterr().err
    assert run_job(worker, model.encode("fine"), max_new_tokens=3)[2].new_tokens == 3
    worker.close()


def test_clients_are_written_for_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    own, sizes = load(model.bundle.folder), []
    forward = own.engine.forward

    def count(ids: Any, state: Any, *rest: Any) -> Any:
        sizes.append(ids.shape)
        return forward(ids, state, *rest)

    monkeypatch.setattr(own.engine, "forward", count)
    worker = Worker(own, parallel=4, states=0)
    with worker._changed:  # nobody is let in before all are there
        readies = [threading.Event() for _ in range(4)]
        jobs = [job_of([i + 1, 2], ready.set, 400, max_new_tokens=200) for i, ready in enumerate(readies)]
        for job in jobs:
            worker.submit(job)
    for i, (job, ready) in enumerate(zip(jobs, readies, strict=True)):
        expected = model.generate([i + 1, 2], max_new_tokens=200, ignore_eos=True).result()
        assert read(job, ready) == (expected.text, expected.tokens)
    worker.close()
    # Four prompts of one chunk, then at most a few steps more than the 200 that all share.
    assert sizes.count((4, 1)) > 190
    assert len(sizes) < 215


def test_a_client_alone_is_drafted_for_and_the_usage_tells(folder: Path, model: Model) -> None:
    prompt = [7, 8, 9] * 20
    body = json.dumps({"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True}).encode()
    expected = model.generate(prompt, max_new_tokens=60, ignore_eos=True).result()
    assert expected.stats.accepted_tokens > 0
    for speculate in (8, 0):
        with running(folder, speculate=speculate) as found:
            _, _, answer = found.raw("POST", "/v1/completions", body)
        assert answer["choices"][0]["text"] == expected.text
        details = answer["usage"]["completion_tokens_details"]
        taken = expected.stats.accepted_tokens if speculate else 0
        drafted = expected.stats.drafted_tokens if speculate else 0
        assert details["accepted_prediction_tokens"] == taken
        assert details["rejected_prediction_tokens"] == drafted - taken


def test_one_at_a_time_if_it_must_be_the_same_to_the_last_bit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, batches = load(model.bundle.folder), set()
    forward = own.engine.forward

    def count(ids: Any, state: Any, *rest: Any) -> Any:
        batches.add(len(ids))
        return forward(ids, state, *rest)

    monkeypatch.setattr(own.engine, "forward", count)
    worker = Worker(own, parallel=4, deterministic=True)
    lazy_ready = threading.Event()
    lazy = job_of(model.encode("lazy"), lazy_ready.set, room=4, max_new_tokens=60)
    worker.submit(lazy)
    until(lambda: not lazy.has_room)
    ready = threading.Event()
    eager = job_of(model.encode("eager"), ready.set, room=400, max_new_tokens=300)
    worker.submit(eager)
    # The lazy one comes back while the other is being written.
    assert read(lazy, lazy_ready)[0] == model.generate("lazy", max_new_tokens=60, ignore_eos=True).text
    assert read(eager, ready)[0] == model.generate("eager", max_new_tokens=300, ignore_eos=True).text
    same = run_job(worker, model.encode("eager"), max_new_tokens=5)[2]
    assert same.reused_tokens == 0
    worker.close()
    assert batches == {1}


def test_a_closed_worker_ends_its_jobs_and_takes_no_more(model: Model) -> None:
    worker = Worker(load(model.bundle.folder), parallel=1, queue=1)
    jobs = [job_of([1, 2], room=1, max_new_tokens=1000) for _ in range(2)]
    for job in jobs:
        worker.submit(job)
    with pytest.raises(QueueFull) as caught:
        worker.submit(job_of([1]))
    assert caught.value.retry_after >= 1
    worker.close()
    worker.close()
    assert [job.take()[-1].reason for job in jobs] == ["cancelled"] * 2
    with pytest.raises(Closing):
        worker.submit(job_of([1]))


def test_the_cache_keeps_the_states_used_last(model: Model) -> None:
    cache = StateCache(2)

    def context(*tokens: int) -> Any:
        made = model.new_context()
        made.tokens.extend(tokens)
        model._feed(made, len(made))
        return made

    cache.add(context(1, 2, 3))
    cache.add(context(4, 5))
    assert cache.find(array("I", [1, 2, 3]))[0] is None  # its logits were not kept: nothing to go on from
    found, logits, _ = cache.find(array("I", [1, 2, 3, 4]))
    assert found is not None
    assert (found.fed, logits) == (3, None)
    cache.add(context(6, 7))  # drops 4, 5
    assert cache.find(array("I", [4, 5, 6]))[0] is None
    assert cache.find(array("I", [1, 2, 3, 9]))[0] is not None
    cache.add(context(6, 7))
    assert len(cache) == 2
    cache.add(context(*range(100)))
    branch = cache.find(array("I", [*range(60), 7, 7]))
    assert (branch[0], branch[2]) == (None, 60)
    assert cache.find(array("I", [*range(20), 7, 7]))[2] is None


class Held:
    """Holds a server's model after some calls, in the middle of a turn, until it is released."""

    def __init__(self, found: Running, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        engine = found.server.service.model.engine
        forward, self.calls, self.after = engine.forward, 0, after
        self.held, self.release = threading.Event(), threading.Event()

        def hold(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls > self.after:
                self.held.set()
                assert self.release.wait(60)
            return forward(*args, **options)

        monkeypatch.setattr(engine, "forward", hold)


def test_every_reader_is_told_of_the_end_while_the_model_is_in_the_middle_of_a_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(folder, parallel=2) as found:
        client = found.client()
        ask(client, "warm")
        held = Held(found, monkeypatch, after=20)
        try:
            streams = [ask(client, f"s{i}", stream=True, max_completion_tokens=30_000) for i in range(3)]
            heads = [next(iter(stream)).choices[0].delta.role for stream in streams]
            assert heads == ["assistant"] * 3  # two take turns, and the third waits for one
            with ThreadPoolExecutor(2) as pool:
                whole = pool.submit(ask, client, "whole")
                until(lambda: found.health()["waiting"] == 2)
                slow = socket.create_connection(("127.0.0.1", found.port))
                slow.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b'Content-Length: 1000\r\n\r\n{"prompt":'
                )
                until(lambda: len(found.server.service.reading) == 1)
                assert held.held.wait(20)
                found.server.should_exit = True
                for stream in streams:
                    with pytest.raises(openai.APIError, match="ended this answer"):
                        for _ in stream:
                            pass
                with pytest.raises(openai.InternalServerError) as caught:
                    whole.result(20)
            assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
            assert slow.recv(65536).startswith(b"HTTP/1.1 503")
            slow.close()
            assert not held.release.is_set()
        finally:
            held.release.set()


def test_a_reader_far_behind_is_told_of_the_end_too(folder: Path) -> None:
    with running(folder, parallel=1) as found:
        service = found.server.service
        body = json.dumps({
            "prompt": "x", "max_tokens": 30_000, "stream": True, "logprobs": 20, "ignore_eos": True,
        }).encode()  # fmt: skip
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", found.port))
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        lazy.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)
        until(lambda: len(service.answers) == 1)
        (answer,) = service.answers
        until(lambda: not answer.job.has_room, 40)
        found.server.should_exit = True
        until(lambda: service.ended)
        data = b""
        while part := lazy.recv(65536):
            data += part
        lazy.close()
        assert data.endswith(b"0\r\n\r\n")
        last = data.split(b"data: ")[-1].split(b"\n\n")[0]
        assert json.loads(last)["error"]["code"] == "cancelled"
        # What may wait for a reader must be little, or one that is slow could not be told in time.
        assert len(data) < 1 << 20


def test_a_sigterm_at_the_start_ends_the_server(folder: Path) -> None:
    def send(_: str) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    serve(load(folder), Options(), port=0, ready=send)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_serves_until_sigterm_and_ends_cleanly(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lawcat_edge",
        "serve",
        str(folder),
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
        "--max-tokens",
        "1000000",  # an answer that no machine ends within the seconds that are left to it
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["models"] == ["tiny"]
        assert ready["url"].startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=ready["url"], api_key="none", max_retries=0)
        assert ask(client, "Hello").usage.completion_tokens == 24
        stream = ask(client, "Hello", stream=True, max_completion_tokens=1_000_000)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="ended this answer"):
            for _ in stream:
                pass
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parallel", "0"), "--parallel"),
        (("--queue", "-1"), "--queue"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--max-request-mb", "nan"), "--max-request-mb"),
        (("--api-key", " "), "API key"),
        (("--port", "70000"), "--port"),
    ],
)
def test_impossible_options_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.run(["serve", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_named() -> None:
    listener = listen("127.0.0.1", 0)
    with pytest.raises(LawcatError, match="--port"):
        listen("127.0.0.1", listener.getsockname()[1])
    listener.close()
    with pytest.raises(LawcatError, match="65535"):
        listen("127.0.0.1", 70_000)


def test_the_page_is_open_and_the_rest_needs_the_key(folder: Path) -> None:
    with running(folder, api_key="secret") as server:
        for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text/css")):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode()
            connection.close()
            assert response.status == 200
            assert response.headers["Content-Type"].startswith(kind)
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
            assert path != "/" or 'name="lawcat-answers" content="server"' in body
        assert server.raw("GET", "/v1/models")[0] == 401
        assert server.raw("GET", "/worker.js")[0] in (401, 404)  # the page's own model is not for it
        assert server.raw("GET", "/", Host="evil.example")[0] == 403
