"""Put a bundle on the hub: its files and a card that says what it is and how to run it, in one commit."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from lawcat_edge.runtime.bundle.hub import check_name
from lawcat_edge.runtime.bundle.manifest import MANIFEST, Bundle, describe_state, state_sizes
from lawcat_edge.runtime.bundle.signature import SIGNATURE
from lawcat_edge.runtime.errors import LawcatError

CARD = "README.md"


def push(folder: Path | str, name: str, private: bool = False) -> str:
    """Upload the bundle in `folder` to ``owner/name``, which is made if need be; the commit's address.

    Needs an account of the hub that is logged in (``hf auth login``). Files of an earlier bundle there that
    this one does not have are removed; others (a licence, pictures) stay. Raises LawcatError when refused.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_name(name)
    bundle = Bundle.open(folder)
    signed = [SIGNATURE] if (bundle.folder / SIGNATURE).is_file() else []
    # The manifest last in the list, all in one commit: nobody fetches half of a bundle.
    kept = [*bundle.manifest.files, *signed, MANIFEST]
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        there = set(api.list_repo_files(name))
        stale = _listed(api, name) & there - set(kept) if MANIFEST in there else set()
        operations: list[Any] = [CommitOperationDelete(file) for file in sorted(stale)]
        operations += [CommitOperationAdd(file, str(bundle.folder / file)) for file in kept]
        operations.append(CommitOperationAdd(CARD, card(bundle, name).encode()))
        done = api.create_commit(
            name, operations, commit_message=f"Upload {bundle.manifest.name} ({bundle.manifest.scheme})"
        )
    except LocalTokenNotFoundError as error:
        raise LawcatError(
            f"The bundle is in {folder}, but nobody is logged in to the hub; run `hf auth login`, then again."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        step = "try again"
        if status in (401, 403):
            step = "log in with `hf auth login` as somebody who may write there"
        raise LawcatError(
            f"The bundle is in {folder}, but the hub refused {name} ({_first_line(error)}); {step}."
        ) from error
    except Exception as error:  # the connection's: each version of the client has its own types
        raise LawcatError(
            f"The bundle is in {folder}, but the hub cannot be reached ({_first_line(error)}); push it again "
            "when there is a connection."
        ) from error
    return str(done.commit_url)


def _listed(api: Any, name: str) -> set[str]:
    """The files of the bundle that lies at `name` now; none where its manifest is of no bundle."""
    with tempfile.TemporaryDirectory(prefix="lawcat-push-") as folder:
        try:
            data = json.loads(Path(api.hf_hub_download(name, MANIFEST, local_dir=folder)).read_bytes())
            return set(data["files"])
        except (ValueError, KeyError, TypeError):
            return set()


def card(bundle: Bundle, name: str) -> str:
    """The model card of a bundle, in Markdown with the hub's front matter.

    It says what the manifest knows and no more: a licence and what the model is good for are for its owner.
    """
    manifest = bundle.manifest
    source, lawcat = manifest.source, manifest.lawcat
    teacher = source["teacher"]
    head = ["library_name: lawcat-edge", "pipeline_tag: text-generation"]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", teacher, re.ASCII):
        head.append(f"base_model: {teacher}")
    head += ["tags:", *(f"- {tag}" for tag in ("onnx", "linear-attention", "lawcat", "on-device"))]
    full = manifest.full_attention_layers
    attention = "linear attention" + (
        f", softmax over a window of {manifest.window} tokens" if manifest.window else ""
    )
    if full:
        layers = ", ".join(map(str, full))
        attention += f"; softmax attention over {lawcat['attention_span']:,} tokens in layers {layers}"
        if lawcat.get("attention_sinks"):
            attention += f", the first {lawcat['attention_sinks']} of the text always among them"
    rows = {
        "teacher": f"{_escaped(teacher)} (sha256 `{source['teacher_sha256'][:16]}`)",
        "adapter": f"sha256 `{source['adapter_sha256'][:16]}`" if source.get("adapter_sha256") else "none",
        "attention": attention,
        "weights": f"{manifest.scheme}, {bundle.bytes_on_disk / 1e6:,.1f} MB in all",
        "graphs": ", ".join(
            f"{op} (onnxruntime {version} or newer)" for op, version in manifest.min_onnxruntime.items()
        ),
        "memory of a text": describe_state(state_sizes(manifest.state, manifest.spans)),
        "made by": _escaped(manifest.created_by),
    }
    if manifest.parity is not None and manifest.parity.max_rel_err:
        rows["against torch"] = f"KL {manifest.parity.kl:.2e} over {len(manifest.parity.tokens)} tokens"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{chr(10).join(head)}
---

# {_escaped(manifest.name)}

A language model for the CPU of a phone or a laptop, distilled from {_escaped(teacher)} with lawcat-edge: a
bundle of ONNX graphs, weights, tokenizer and a manifest that records the sha256 of every file.

| | |
|---|---|
{table}

## Run it

```
pip install lawcat-edge
lawcat-edge chat {name}
```

```python
from lawcat_edge.runtime import Model

model = Model.load("{name}")
print(model.chat("Why is the sea salt?", **vars(model.sampling_defaults())).text)
```
"""


def _escaped(text: str) -> str:
    """A name from a file, as plain text in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
