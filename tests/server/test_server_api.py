"""What clients of OpenAI's API, vLLM and llama.cpp send is done, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import TEMPLATES
from tiny_bundle import build_tiny_bundle, tiny_tokenizer

pytest.importorskip("openai", reason="the server's tests need the extras `serve` and `test`")
pytest.importorskip("uvicorn", reason="the server's tests need the extra `serve`")

from served import Running, load, running

from lawcat_edge import cli
from lawcat_edge.runtime import LawcatError, Model
from lawcat_edge.runtime.server.app import Options, create_app, listen
from lawcat_edge.runtime.server.requests import BadRequest, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("api") / "bundle")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder, cors=("https://my.example",), allowed_hosts=("llm.example.com", "*.home")) as found:
        yield found


def post(server: Running, path: str, **body: Any) -> tuple[int, Any]:
    status, _, answer = server.raw("POST", f"/v1/{path}", json.dumps(body).encode())
    return status, answer


def complete(server: Running, prompt: Any, **body: Any) -> list[Any]:
    status, answer = post(
        server, "completions", **{"prompt": prompt, "temperature": 0, "ignore_eos": True, **body}
    )
    assert status == 200, answer
    return answer["choices"]


def scores(model: Model, ids: list[int]) -> list[np.ndarray]:
    """Log-probabilities [V] after each token, in float64 from the model's own logits."""
    logits = model.engine.forward(np.asarray([ids]), model.engine.new_state(), all_positions=True)[0]
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return list(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


REFUSED: dict[str, Any] = {
    "grammar": 'root ::= "x"', "json_schema": {"type": "object"}, "guided_json": {"type": "object"},
    "guided_choice": ["a"], "structured_outputs": {"json": {}}, "min_tokens": 8, "stop_token_ids": [0],
    "bad_words": ["a"], "length_penalty": 2, "use_beam_search": True, "typical_p": 0.1, "prompt_logprobs": 1,
    "modalities": ["text", "audio"], "mirostat": 2, "allowed_token_ids": [1], "logit_bias": {"5": 1},
    "frequency_penalty": 0.1, "dry_multiplier": 0.8, "include_stop_str_in_output": True, "suffix": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_the_answer_is_refused_by_name(name: str) -> None:
    for parse, asked in ((parse_chat, {"messages": HELLO}), (parse_completion, {"prompt": "x"})):
        with pytest.raises(BadRequest, match=f"^{name} is not supported") as caught:
            parse({**asked, name: REFUSED[name]}, 100)
        assert (caught.value.param, caught.value.status) == (name, 400)


@pytest.mark.parametrize(
    "harmless",
    [
        {"grammar": None}, {"min_tokens": 0}, {"stop_token_ids": []}, {"typical_p": 1.0},
        {"cache_prompt": False}, {"length_penalty": 1.0}, {"use_beam_search": False},
        {"modalities": ["text"]}, {"n": 1.0}, {"function_call": "none"}, {"parallel_tool_calls": True},
    ],
)  # fmt: skip
def test_a_field_that_asks_for_nothing_is_taken(harmless: dict[str, Any]) -> None:
    assert parse_chat({"messages": HELLO, **harmless}, 100) == parse_chat({"messages": HELLO}, 100)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"max_tokens": 4.0}, {"max_tokens": 4}),
        ({"max_new_tokens": 4}, {"max_tokens": 4}),
        ({"n_predict": 4}, {"max_tokens": 4}),
        ({"n_predict": -1}, {"max_tokens": 100}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"seed": 7.0}, {"seed": 7}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"logprobs": None, "top_logprobs": 0}, {}),
        ({"max_tokens": 3, "max_completion_tokens": 5}, {"max_tokens": 5}),
    ],
)
def test_a_number_is_taken_under_its_names_and_forms(given: dict[str, Any], same: dict[str, Any]) -> None:
    assert parse_chat({"messages": HELLO, **given}, 100) == parse_chat({"messages": HELLO, **same}, 100)


def test_numbers_that_are_none_are_still_refused() -> None:
    for wrong in (
        {"max_tokens": 4.5},
        {"max_tokens": True},
        {"top_k": -2},
        {"n_predict": -2},
        {"max_tokens": 0},
    ):
        with pytest.raises(BadRequest, match=next(iter(wrong))):
            parse_chat({"messages": HELLO, **wrong}, 100)
    with pytest.raises(BadRequest, match="echo"):
        parse_chat({"messages": HELLO, "echo": True}, 100)


def test_template_variables_and_a_message_to_continue(folder: Path, tmp_path: Path) -> None:
    thinking = (
        "{% for m in messages %}<{{ m.role }}{{ m.name }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<no>{% endif %}{% endif %}"
        "{{ reasoning_effort }}"
    )
    other = build_tiny_bundle(tmp_path / "other", template=thinking)
    app = create_app(load(other))
    service = app.state.service

    def rendered(**more: Any) -> str:
        messages = [{"role": "user", "content": "Q", "name": "Bo"}, *more.pop("then", [])]
        _, prompts, _, _ = service._read(json.dumps({"messages": messages, **more}).encode(), parse_chat)
        return service.model.tokenizer.decode(list(prompts[0]), skip_special=False)

    end = service.model.template._tokens["eos_token"]
    assert rendered() == f"<userBo>Q{end}<assistant>"
    assert rendered(chat_template_kwargs={"enable_thinking": False}) == f"<userBo>Q{end}<assistant><no>"
    assert rendered(reasoning_effort="low") == f"<userBo>Q{end}<assistant>low"
    assert rendered(add_generation_prompt=False) == f"<userBo>Q{end}"
    start = [{"role": "assistant", "content": "It is"}]
    assert rendered(then=start, continue_final_message=True) == f"<userBo>Q{end}<assistant>It is"
    with pytest.raises(BadRequest, match="cannot both"):
        rendered(continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(BadRequest, match="cannot hold messages"):
        rendered(chat_template_kwargs={"messages": [1]})


def test_a_templates_own_fault_is_the_servers(tmp_path: Path) -> None:
    broken = build_tiny_bundle(
        tmp_path / "b",
        template="{% if messages[0].content == 'x' %}{{ raise_exception('not x') }}{% endif %}{{ 1 / 0 }}",
    )
    with running(broken) as found:
        status, answer = post(found, "chat/completions", messages=HELLO)
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (
            500,
            "server_error",
            "bundle_fault",
        )
        status, answer = post(found, "chat/completions", messages=[{"role": "user", "content": "x"}])
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "not x" in answer["error"]["message"]
    uncompiled = build_tiny_bundle(tmp_path / "u", template="{% if %}")
    with pytest.raises(LawcatError, match="chat template is not valid"):
        create_app(load(uncompiled))


def test_a_browser_with_openais_headers_may_ask(server: Running) -> None:
    wanted = "authorization,content-type,user-agent,x-stainless-arch,x-stainless-retry-count"
    connection = {"Origin": "https://my.example", "Access-Control-Request-Method": "POST"}
    status, headers = server.preflight({**connection, "Access-Control-Request-Headers": wanted})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://my.example")
    assert headers["access-control-allow-headers"] == wanted
    status, headers = server.preflight({**connection, "Origin": "https://no.example"})
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("localhost.", 200), ("my.localhost:8080", 200),
        ("127.0.0.1", 200), ("[::1]:9", 200), ("llm.example.com", 200), ("LLM.example.com:443", 200),
        ("a.b.home", 200), ("home", 403), ("evilhome", 403), ("x.llm.example.com", 403),
        ("evil.example", 403), ("localhost.evil.example", 403), ("", 403),
    ],
)  # fmt: skip
def test_only_allowed_host_names_are_answered(server: Running, host: str, status: int) -> None:
    assert server.raw("GET", "/v1/models", None, Host=host)[0] == status


def test_hosts_and_origins_are_checked_and_an_address_in_brackets_is_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (("--allowed-host", "https://a.example"), "--allowed-host must be"),
        (("--cors", "my.example"), "--cors must be"),
        (("--cors", "https://my.example/page"), "--cors must be"),
    ):
        assert cli.run(["serve", str(folder), *options]) == 2
        assert message in capsys.readouterr().err
    # It gets as far as the port, which is in use.
    with listen("::1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert (
            cli.run(
                ["serve", str(folder), "--host", "[::1]", "--cors", "https://my.example/", "--port", port]
            )
            == 2
        )
        assert f"::1 port {port}" in capsys.readouterr().err


def test_several_prompts_are_answered_each_as_alone(server: Running, model: Model) -> None:
    prompts = ["Once", "The sea", "Once"]
    choices = complete(server, prompts, max_tokens=12)
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    expected = [model.generate(p, max_new_tokens=12, ignore_eos=True).text for p in prompts]
    assert [choice["text"] for choice in choices] == expected
    ids = [model.encode(prompt) for prompt in prompts]
    _, answer = post(server, "completions", prompt=ids, temperature=0, ignore_eos=True, max_tokens=12)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 36
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    client = server.client()
    for chunk in client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=12,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert [texts[i] for i in range(3)] == expected
    assert ends == dict.fromkeys(range(3), "length")


@pytest.mark.parametrize("length", [3, 50])
def test_echo_gives_the_prompts_tokens_with_the_models_log_probabilities(
    server: Running, model: Model, length: int
) -> None:
    ids = [int(i) for i in np.random.default_rng(length).integers(0, 200, length)]  # several chunks of 16
    (choice,) = complete(server, [ids], echo=True, logprobs=2, max_tokens=1)
    found = choice["logprobs"]
    table = scores(model, ids)
    new = int(table[-1].argmax())
    expected = [float(table[i][token]) for i, token in enumerate([*ids[1:], new])]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    best = [float(row.max()) for row in table]
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-4)
    assert len(found["tokens"]) == len(found["text_offset"]) == length + 1
    assert choice["text"].startswith(model.tokenizer.decode(ids))
    (alone,) = complete(server, [ids], echo=True, logprobs=2, max_tokens=0)
    assert alone["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]
    assert (alone["text"], alone["finish_reason"]) == (model.tokenizer.decode(ids), "length")


def test_echo_writes_the_text_before_what_follows_it(server: Running, model: Model) -> None:
    rest = model.generate("The sea", max_new_tokens=6, ignore_eos=True).text
    (choice,) = complete(server, "The sea", echo=True, max_tokens=6)
    assert choice["text"] == "The sea" + rest
    (scored,) = complete(server, "The sea", echo=True, max_tokens=6, logprobs=0)
    assert scored["text"] == choice["text"]
    tokens, offsets = scored["logprobs"]["tokens"], scored["logprobs"]["text_offset"]
    for token, at in zip(tokens[:7], offsets, strict=False):
        assert choice["text"][at : at + len(token)] == token


def test_the_end_token_is_scored_too_where_the_prompt_is(tmp_path: Path, model: Model) -> None:
    ids = model.encode("The sea")
    end = int(scores(model, ids)[-1].argmax())
    folder = build_tiny_bundle(tmp_path / "ends", eos=[end])
    with running(folder) as found:
        (choice,) = complete(found, ids, echo=True, logprobs=1, max_tokens=1, ignore_eos=False)
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
    assert math.isfinite(choice["logprobs"]["token_logprobs"][-1])


def test_the_bundles_generation_config_gives_the_defaults(tmp_path: Path, model: Model) -> None:
    settings: dict[str, Any] = {"temperature": 0.6, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.3}
    folder = build_tiny_bundle(tmp_path / "set", generation=settings)
    options: Any = {"max_new_tokens": 16, "ignore_eos": True, "seed": 5}
    with running(folder) as found:
        body = {"prompt": "Once", "max_tokens": 16, "ignore_eos": True, "seed": 5}
        _, answer = post(found, "completions", **body)
        assert answer["choices"][0]["text"] == model.generate("Once", **options, **settings).text
        _, answer = post(found, "completions", **body, top_k=0, temperature=1.0)
        changed = {**settings, "top_k": 0, "temperature": 1.0}
        assert answer["choices"][0]["text"] == model.generate("Once", **options, **changed).text
    plain = load(build_tiny_bundle(tmp_path / "plain", generation={}))
    assert plain.sampling_defaults(1.0).temperature == 1.0
    for given, temperature in (({"do_sample": False, "temperature": 0.7}, 0.0), ({"do_sample": True}, 1.0)):
        own = load(build_tiny_bundle(tmp_path / f"t{temperature}", generation=given))
        assert own.sampling_defaults(0.3).temperature == temperature
    bad = load(build_tiny_bundle(tmp_path / "bad", generation={"top_p": 7}))
    with pytest.raises(LawcatError, match=r"generation_config\.json: top_p"):
        create_app(bad)


def test_options_name_what_is_wrong() -> None:
    with pytest.raises(LawcatError, match="--allowed-host"):
        Options(allowed_hosts=("a b",))


CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Bergen"}'}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it high?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "high"},
]


@pytest.mark.parametrize("name", ["qwen 2.5", "llama 3.2"])
def test_tools_that_an_earlier_answer_called_are_written_as_transformers_does(
    name: str, tmp_path: Path
) -> None:
    """With the API's own client: content null, arguments as JSON text, a result."""
    transformers = pytest.importorskip("transformers")
    other = build_tiny_bundle(tmp_path / "other", template=TEMPLATES[name])
    with running(other) as server:
        client = server.client()
        served = client.models.list().data[0].id
        answer = client.chat.completions.create(model=served, messages=CALLED, max_tokens=1)
    service = create_app(load(other)).state.service
    _, prompts, _, _ = service._read(json.dumps({"messages": CALLED}).encode(), parse_chat)
    assert answer.usage.prompt_tokens == len(prompts[0])
    function = {"name": "tide", "arguments": {"port": "Bergen"}}
    messages = [CALLED[0], {**CALLED[1], "tool_calls": [{**CALL, "function": function}]}, CALLED[2]]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), **service.model.template._tokens
    )
    expected = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert service.model.tokenizer.decode(list(prompts[0]), skip_special=False) == expected
    assert "Bergen" in expected


def test_a_message_without_content_is_taken_where_the_api_takes_it() -> None:
    def parsed(*messages: Any) -> list[dict[str, Any]]:
        return parse_chat({"messages": [*HELLO, *messages]}, 100).messages[len(HELLO) :]

    answer, result = parsed(*CALLED[1:])
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"] == {"name": "tide", "arguments": {"port": "Bergen"}}
    assert (result["role"], result["tool_call_id"]) == ("tool", "c1")
    assert parsed({"role": "assistant", "tool_calls": [CALL]})[0]["content"] is None
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    before, after = parsed(older, {"role": "function", "name": "tide", "content": "high"})
    assert before["tool_calls"][0]["function"]["arguments"] == {"port": "Bergen"}
    assert (after["role"], after["name"]) == ("tool", "tide")
    assert parsed({"role": "assistant", "content": None, "refusal": "No."})[0]["content"] == "No."
    parts = [{"type": "text", "text": "I "}, {"type": "refusal", "refusal": "will not."}]
    assert parsed({"role": "assistant", "content": parts})[0]["content"] == "I will not."


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "tool", "tool_call_id": "c1", "content": "high"}, "messages[1]"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": {"id": "c1"}}, "messages[1].tool_calls"),
        (
            {"role": "assistant", "function_call": {"name": "tide", "arguments": "{'port'"}},
            "messages[1].tool_calls",
        ),
    ],
)
def test_a_message_without_content_or_call_is_refused(message: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat({"messages": [*HELLO, message]}, 100)
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_a_template_without_tool_calls_does_not_drop_them_in_silence(folder: Path) -> None:
    service = create_app(load(folder)).state.service
    with pytest.raises(BadRequest, match="chat template has no tool calls") as caught:
        service._read(json.dumps({"messages": CALLED}).encode(), parse_chat)
    assert (caught.value.param, caught.value.code) == ("messages[1].tool_calls", "unsupported_parameter")
