"""lm-evaluation-harness's own client against the server, on data written here: right to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import build_tiny_bundle

pytest.importorskip("uvicorn", reason="the server's tests need the extra `serve`")
lm_eval = pytest.importorskip("lm_eval", reason="the harness is in the extra `test`")

from served import load, running  # noqa: E402

from lawcat_edge.runtime import Model  # noqa: E402

STORIES = [
    ("The keeper lit the lamp and the boats saw the", " lamp"),
    ("She baked bread all night, and in the morning sold the", " bread"),
    ("Rain fell on the island; nobody went out into the", " rain"),
    ("A gull took the fish, and the cat looked for its", " fish"),
    ("Élodie wrote a letter and nobody answered the", " letter"),
]
QUESTIONS = [
    ("What does a lighthouse give?", ["light", "bread", "a song"], 0),
    ("Which of these is wet?", ["a stone in the sun", "the sea"], 1),
    ("What do gulls eat?", ["iron", "fish", "paper", "glass"], 1),
]
TASKS: dict[str, dict[str, Any]] = {
    "word_at_the_end": {
        "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{word}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "questions": {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "target_delimiter": " ", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """The tasks and their data, and the tokenizer that the harness cuts texts with."""
    rows: dict[str, list[dict[str, Any]]] = {
        "word_at_the_end": [{"text": text, "word": word} for text, word in STORIES],
        "questions": [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        settings = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", **task,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def loglikelihood(model: Model, text: str, rest: str) -> tuple[float, bool]:
    """(log-probability of `rest` after `text`, whether it is the likeliest), from the model's own logits."""
    before, ids = model.encode(text), model.encode(text + rest)
    logits = model.engine.forward(np.asarray([ids]), model.engine.new_state(), all_positions=True)[0]
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    table = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    places = range(len(before) - 1, len(ids) - 1)
    return (
        float(sum(table[i][ids[i + 1]] for i in places)),
        all(int(table[i].argmax()) == ids[i + 1] for i in places),
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_loglikelihood_tasks_give_what_the_model_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bundle = build_tiny_bundle(tmp_path / "bundle")
    model = load(bundle)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text((bundle / "tokenizer.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    with running(bundle) as found:
        arguments = {
            "model": "tiny", "base_url": f"http://127.0.0.1:{found.port}/v1/completions",
            "tokenizer": str(tokenizer), "tokenizer_backend": "huggingface", "num_concurrent": 1,
            "max_length": 512,
        }  # fmt: skip
        results: Any = lm_eval.simple_evaluate(
            model="local-completions", model_args=arguments, tasks=list(TASKS), batch_size=batch,
            task_manager=TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False),
            bootstrap_iters=0,
        )  # fmt: skip
    expected = [loglikelihood(model, text, word) for text, word in STORIES]
    got = [sample["resps"][0][0] for sample in by_document(results, "word_at_the_end")]
    assert [pair[0] for pair in got] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [bool(pair[1]) for pair in got] == [greedy for _, greedy in expected]
    right = 0
    for sample, (question, choices, answer) in zip(by_document(results, "questions"), QUESTIONS, strict=True):
        prompt = f"Question: {question}\nAnswer:"
        values = [loglikelihood(model, prompt, f" {choice}")[0] for choice in choices]
        assert [pair[0][0] for pair in sample["resps"]] == pytest.approx(values, abs=1e-3)
        right += int(np.argmax(values)) == answer
    accuracy = results["results"]["questions"]["acc,none"]
    assert accuracy == pytest.approx(right / len(QUESTIONS))
    print(json.dumps({name: results["results"][name] for name in TASKS}, default=str))


def by_document(results: Any, task: str) -> list[Any]:
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
