"""The page in a headless Chromium: the same tokens, text and snapshots as the runner. Marked slow.

Skipped, with the reason, where node, npm's packages or Chromium are absent.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from served import running
from tiny_bundle import build_tiny_bundle

from lawcat_edge.adapter import GENERAL
from lawcat_edge.cli import run
from lawcat_edge.runtime import Model
from lawcat_edge.runtime.generate.sampling import SamplingOptions

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("web", ROOT / "benchmarks" / "web.py")
assert _spec is not None
assert _spec.loader is not None
web = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(web)

TEXTS = [
    "A plain sentence, with punctuation: 3.14!",
    "  two  spaces \t tab\n\n newline ",
    "Grüße, 世界 — naïve ﬁ İI ſs",
    "👩‍👩‍👧 emoji 🏳️‍🌈",
    "<|im_start|>user\nhi<|im_end|>",
    "def f(x):\n    return x**2  # it's 'ok'",
    "x" * 300,
]
PLACES: dict[str, Any] = {
    "plain": {},
    "window": {"window": 2},
    "rope": {"rope": True},
    "hybrid": {"window": 3, "span": 30},
    "sinks": {"window": 3, "span": 24, "sinks": 3},
}
LOAD = "await lawcat.load({{url: location.href + '{}/'}});"
TO_BASE64 = (
    "const bytes = await lawcat.ask('snapshot'); let text = '';"
    "for (const byte of bytes) text += String.fromCharCode(byte); return btoa(text);"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The page; the tests that ask for it are skipped where it cannot be built or opened."""
    try:
        web.chromium()
        return web.build(tmp_path_factory.mktemp("web"))
    except web.MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    found = {name: build_tiny_bundle(folder / name, seed=3, **how) for name, how in PLACES.items()}
    found["damaged"] = shutil.copytree(found["plain"], folder / "damaged")
    data = bytearray((found["damaged"] / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (found["damaged"] / "model.onnx.data").write_bytes(data)
    return found


def ok(found: dict[str, Any]) -> list[Any]:
    """The results of jobs that must all succeed, in a page that asked no other site for anything."""
    assert found["outside"] == []
    assert [result for result in found["results"] if "error" in result] == [], found["log"]
    return [result["ok"] for result in found["results"]]


def ask(action: str, **details: Any) -> str:
    return f"lawcat.ask('{action}', {json.dumps(details)})"


def test_same_tokens_for_any_graph_and_seed(built, bundles):
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    drawn: dict[str, Any] = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 2**40 + 7}
    names = {"top_k": "topK", "top_p": "topP", "min_p": "minP", "repetition_penalty": "repetitionPenalty"}
    in_page: dict[str, Any] = {"maxNewTokens": 40, "ignoreEos": True}
    jobs: list[list[Any]] = []
    expected: list[Any] = []
    for name in PLACES:
        for sampling in ({}, drawn, {"temperature": 0.8, "seed": 0, "repetition_penalty": 1.3}):
            spoken = {names.get(key, key): value for key, value in sampling.items()}
            generate = ask("generate", prompt="Grüße an 世界", options={**in_page, **spoken})
            pieces = "const pieces = []; const result = await "
            collect = (
                generate[:-1] + ", piece => pieces.push(piece)); return [result.tokens, pieces.join('')]"
            )
            jobs.append(["eval", LOAD.format(name) + pieces + collect])
            result = Model.load(bundles[name], threads=1).generate(
                "Grüße an 世界", sampling=SamplingOptions(**sampling), **options
            )
            expected.append([result.result().tokens, result.text])
        jobs.append(["eval", f"return (await {ask('verify')}).passed"])
        expected.append(True)
    assert ok(web.drive(built, jobs, bundles)) == expected


def test_conversation_in_the_form_goes_on_from_snapshots(built, bundles, tmp_path):
    """Two turns typed into the page, a snapshot from it to the runner, and one from the runner to it."""
    model = Model.load(bundles["hybrid"], threads=1)
    options: dict[str, Any] = {"max_new_tokens": 24}
    first, second = (model.chat(text, **options).text for text in ("Hello", "And then? 🙂"))
    expected = (model.context.tokens[:], model.context.fed, model.context.mark)
    model.snapshot(tmp_path / "ours")
    saved = base64.b64encode((tmp_path / "ours").read_bytes()).decode()
    third = model.chat("Third", **options).text
    to_bytes = f"const bytes = Uint8Array.from(atob('{saved}'), c => c.charCodeAt(0));"
    set_most = "document.getElementById('most').value = 24;"
    found = ok(
        web.drive(
            built,
            [
                ["eval", LOAD.format("hybrid") + set_most],
                ["say", "Hello"],
                ["say", "And then? 🙂"],
                ["text", "#stats"],
                ["eval", TO_BASE64],
                ["eval", LOAD.format("hybrid") + to_bytes + "return lawcat.ask('restore', {bytes})"],
                ["say", "Third"],
            ],
            bundles,
        )
    )
    assert [found[1]["text"], found[2]["text"]] == [first, second]
    assert found[1]["pieces"] > 3  # it came in pieces
    assert "in the conversation" in found[3]
    assert found[5]["messages"][-1] == {"role": "assistant", "content": second}
    assert found[6]["text"] == third
    (tmp_path / "theirs").write_bytes(base64.b64decode(found[4]))
    other = Model.load(bundles["hybrid"], threads=1)
    context = other.restore(tmp_path / "theirs")
    # The same tokens, and the same knowledge of what text they stand for.
    assert (context.tokens, context.fed, context.mark) == expected
    assert other.chat("Third", **options).text == third


def test_stop_leaves_the_conversation_usable(built, bundles):
    jobs = [
        ["eval", LOAD.format("plain")],
        [
            "eval",
            "const answer = lawcat.say('Long', {maxNewTokens: 100000, ignoreEos: true});"
            "await new Promise(done => setTimeout(done, 500)); document.getElementById('stop').click();"
            "return (await answer).stopReason",
        ],
        ["eval", "return (await lawcat.say('Short', {maxNewTokens: 5, ignoreEos: true})).tokens.length"],
        [
            "eval",
            f"return (await {ask('generate', prompt='ab', options={'maxNewTokens': 60, 'stop': ['e']})})",
        ],
    ]
    _, reason, written, stopped = ok(web.drive(built, jobs, bundles))
    assert (reason, written) == ("closed", 5)
    model = Model.load(bundles["plain"], threads=1)
    same = model.generate("ab", max_new_tokens=60, stop="e").result()
    assert (stopped["tokens"], stopped["stopReason"]) == (same.tokens, same.stop_reason)


def test_mistakes_say_what_to_do(built, bundles, tmp_path):
    model = Model.load(bundles["plain"], threads=1)
    model.generate("abc", max_new_tokens=2).result()
    model.snapshot(tmp_path / "plain")
    saved = base64.b64encode((tmp_path / "plain").read_bytes()).decode()
    restore = (
        f"const bytes = Uint8Array.from(atob('{saved}'), c => c.charCodeAt(0)); CHANGE;"
        "return lawcat.ask('restore', {bytes})"
    )
    jobs = [
        ["eval", f"return {ask('verify')}"],
        ["eval", LOAD.format("nowhere")],
        ["eval", LOAD.format("damaged")],
        ["text", "#about"],
        ["eval", "return lawcat.load({url: location.href + 'plain/', flavour: 'onnx'})"],
        ["eval", LOAD.format("rope") + restore.replace("CHANGE", "")],
        ["eval", LOAD.format("plain") + restore.replace("CHANGE", "bytes[2000] ^= 1")],
        ["eval", f"return {ask('generate', prompt='', options={})}"],
        ["eval", f"return {ask('generate', prompt='a', options={'temperature': -1})}"],
    ]
    found = web.drive(built, jobs, bundles)["results"]
    expected = [
        "Load a bundle first",
        "cannot be read (404)",
        "model.onnx.data is not the file that was exported (sha256 differs); copy it again.",
        "copy it again.",  # what the page shows
        "--ops ort,portable",
        "belongs to another bundle",
        "damaged",
        "prompt is empty",
        "temperature must be",
    ]
    for result, words in zip(found, expected, strict=True):
        assert words in result.get("error", result.get("ok"))


def test_a_folder_from_the_disk(built, bundles):
    jobs = [
        ["files", "#folder", str(bundles["plain"])],
        ["click", "#open button"],
        ["wait", "!document.getElementById('send').disabled"],
        ["text", "#about"],
    ]
    assert "every file as exported" in ok(web.drive(built, jobs, {}))[-1]


def test_real_bundle_gives_the_same_tokens(built, tmp_path):
    """SmolLM2-135M with the published adapter, in the graph that the page chooses, against the runner."""
    bundle = tmp_path / "bundle"
    adapter = GENERAL
    made = [
        "export",
        "smollm2",
        "--adapter",
        adapter,
        "--ops",
        "portable",
        "--no-verify",
        "--temperature",
        "0",
        "--min-p",
        "0",
        "--repetition-penalty",
        "1",
        "--out",
        str(bundle),
    ]
    assert run(made) == 0
    encode = "".join(f"found.push(await {ask('encode', text=text)});" for text in TEXTS)
    again = "Say it in one word."
    restore = (
        "const bytes = await (await fetch('ours')).arrayBuffer();"
        "await lawcat.ask('restore', {bytes: new Uint8Array(bytes)})"
    )
    jobs = [
        ["eval", "return (await lawcat.load({url: location.href + 'bundle/'})).flavour"],
        ["eval", f"const found = []; {encode} return found"],
        ["eval", f"return (await {ask('generate', prompt=web.PROMPT, options={'maxNewTokens': 12})}).tokens"],
        ["eval", "await lawcat.ask('reset'); document.getElementById('most').value = 12"],
        ["say", web.MESSAGE],
        ["say", again],
        ["text", "#stats"],
        ["eval", restore],
        ["say", again],
        ["text", "#stats"],
    ]
    model = Model.load(bundle, threads=1, flavour="portable")
    tokens = model.generate(web.PROMPT, max_new_tokens=12).result().tokens
    model.reset()
    first = model.chat(web.MESSAGE, max_new_tokens=12).text
    model.snapshot(tmp_path / "ours")
    assert model.context.mark is not None
    turn = model.chat(again, max_new_tokens=12).result()
    found = ok(web.drive(built, jobs, {"bundle": bundle, "ours": tmp_path / "ours"}))
    assert found[:3] == ["portable", [model.encode(text) for text in TEXTS], tokens]
    assert [found[4]["text"], found[5]["text"], found[8]["text"]] == [first, turn.text, turn.text]
    # Only the new message was read, after a turn here and after a restore.
    assert found[6].startswith(f"{turn.stats.prompt_tokens} tokens read")
    assert found[9].startswith(f"{turn.stats.prompt_tokens} tokens read")


def source(role: str) -> str:
    """What the last message of a role was written as, in the page."""
    return f"return [...document.querySelectorAll('#talk .{role}')].at(-1)?.dataset.source"


def test_conversations_survive_a_reload(built, bundles):
    """In the page's model: the next answer is that of a model which had the whole conversation."""
    model = Model.load(bundles["hybrid"], threads=1)
    first = model.chat("Hello", max_new_tokens=1).text  # one token: of more the text need not be exact
    again = Model.load(bundles["hybrid"], threads=1)
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    second = again.chat([*talk, {"role": "user", "content": "And then?"}], max_new_tokens=24).text
    most = "document.getElementById('most').value = {};"
    jobs = [
        ["eval", LOAD.format("hybrid") + most.format(1)],
        ["say", "Hello"],
        ["reload"],
        ["eval", source("assistant")],
        ["eval", LOAD.format("hybrid") + most.format(24)],
        ["say", "And then?"],
        ["click", "#reset"],
        ["eval", "return document.querySelectorAll('#talk > *').length"],
        ["click", "#conversations .name"],
        ["eval", source("assistant")],
        ["click", "#conversations .remove"],
        ["reload"],
        ["eval", "return document.querySelectorAll('#talk > *').length"],
    ]
    found = ok(web.drive(built, jobs, bundles))
    assert (found[1]["text"], found[3], found[5]["text"], found[9]) == (first, first, second, second)
    assert (found[7], found[12]) == (0, 0)


def test_the_page_of_the_server(built, bundles, tmp_path):
    """Without a build: it asks for the key, answers, keeps the conversation, and fits a phone."""
    model = Model.load(bundles["plain"], threads=1)
    first = model.chat("Hello", max_new_tokens=24).text
    wide = "return document.documentElement.scrollWidth"
    shown = "return getComputedStyle(document.getElementById('menu')).display"
    jobs: list[list[Any]] = [
        ["size", 375, 720],
        ["wait", "document.getElementById('options').open"],  # asks for the key
        ["eval", "document.getElementById('key').value = 'secret'"],
        ["click", "#options button.main"],
        ["wait", "!document.getElementById('send').disabled"],
        ["eval", "for (const [id, value] of [['most', 24], ['temperature', 0]])"
                 " document.getElementById(id).value = value"],
        ["say", "Hello"],
        ["text", "#about"],
        ["eval", wide],
        ["eval", shown],
        ["reload"],
        ["wait", "!document.getElementById('send').disabled"],
        ["eval", source("assistant")],
        ["size", 1280, 800],
        ["eval", wide],
        ["eval", shown],
        ["say", "More"],
        ["text", "#stats"],
    ]  # fmt: skip
    with running(bundles["plain"], api_key="secret") as server:
        found = ok(web.drive_at(built, f"http://127.0.0.1:{server.port}/", jobs))
    assert (found[6]["text"], found[12]) == (first, first)
    assert found[6]["pieces"] > 3
    assert found[7].startswith("tiny, on the machine")
    assert (found[8], found[9], found[14], found[15]) == (375, "block", 1280, "none")
    assert "in the conversation" in found[17]


MARKDOWN = [
    "plain *em* **strong** ***both*** `code` ~~gone~~ _under_ snake_case_name 2*3*4 x * y",
    "# One\n## Two ##\nText\n### Three\n\n---\n***\n",
    "- a\n- b\n  - c\n    1. d\n- e\n\n3. three\n4. four\n",
    "1. one\n\n   more of one\n\n2. two\n",
    "- loose\n\n- items\n",
    "```python\na < b & c  # *not*\n\n    x\n```\nafter\n",
    "> quoted **text**\n> goes on\n>\n> - and a list\n\nout\n",
    "| a | b | c |\n|---|:-:|--:|\n| 1 | `2` | *3* |\n| 4 \\| 5 | 6 |\n\nend\n",
    "[a link](https://example.org/a_(b)) and <https://example.org> and \\*not\\*",
    "two  \nlines\\\nand `` a ` b ``\nsoft",
    "**open and *nested* in it** **open",
    "Numbers 1986. A line\n1986. not a list\n* a list\n",
    "a_b_c __init__ **bold**text",
]


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_is_commonmark(text):
    """Against markdown-it, on what models write; and nothing becomes HTML that was HTML."""
    from markdown_it import MarkdownIt

    theirs = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(text)
    assert squeezed(markdown(text)) == squeezed(theirs)


def test_markdown_makes_no_scripts_and_ends():
    html = markdown(
        "<script>alert(1)</script> [x](javascript:alert(1)) <img src=x onerror=y> [y](data:text/html,z)"
    )
    assert "<script" not in html
    assert "<img" not in html
    assert "<a" not in html
    for text in (
        "*" * 20_000,
        "> " * 5_000 + "x",
        "- " * 5_000,
        "[" * 20_000,
        "`" * 20_001 + "a",
        "**a " * 3_000,
    ):
        markdown(text)


def markdown(text: str) -> str:
    """The HTML of the page's own Markdown, through node."""
    if shutil.which("node") is None:
        pytest.skip("node is missing")
    module = (ROOT / "runtime" / "web" / "src" / "markdown.js").as_uri()
    script = f"""
import {{ parse }} from "{module}";
import {{ readFileSync }} from "node:fs";
const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
const html = (nodes) => nodes.map((node) => {{
  if (typeof node === "string") return escape(node);
  const given = Object.entries(node.attributes).map(([name, value]) => ` ${{name}}="${{escape(value)}}"`);
  const open = given.join("");
  if (["br", "hr"].includes(node.tag)) return `<${{node.tag}} />`;
  return `<${{node.tag}}${{open}}>${{html(node.children)}}</${{node.tag}}>`;
}}).join("");
console.log(html(parse(readFileSync(0, "utf-8"))));
"""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], input=text, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def squeezed(html: str) -> str:
    """Without the line breaks between blocks, and with the side of a table's column as a class."""
    html = re.sub(r' style="text-align:(\w+)"', r' class="\1"', html)
    return re.sub(
        r"\s*(</?(?:p|ul|ol|li|pre|blockquote|table|thead|tbody|tr|th|td|h\d|hr|br)\b[^>]*>)\s*", r"\1", html
    ).strip()


def test_the_node_example_writes_the_runners_tokens(built, bundles):
    for name in ("plain", "hybrid"):
        command = ["node", "node/chat.mjs", str(bundles[name]), "Hello", "24"]
        done = subprocess.run(command, cwd=built, capture_output=True, timeout=120)
        if b"Cannot find package 'onnxruntime-node'" in done.stderr:
            pytest.skip("onnxruntime-node is missing; run npm ci")
        assert done.returncode == 0, done.stderr
        expected = Model.load(bundles[name], threads=1).chat("Hello", max_new_tokens=24).text
        assert done.stdout.decode() == expected + "\n"
