#!/usr/bin/env python3
"""Does a bundle fall into loops? Everyday questions, answered with several ways of choosing tokens.

    python benchmarks/sampling.py BUNDLE [--tokens 200] [--seeds 1] [--penalties 1,1.1] [--temperatures 0,0.7]
        [--min-p 0,0.1] [--show]

Every combination answers the 30 questions below through the bundle's chat template, in batches, each answer
with a seed of its own (greedy ones once). Prints a row a combination: answers with a loop, answers that end
by themselves, the mean share of words that are new (type-token ratio of the first 100 words), and the mean
log-probability of the text under the model without any filter, a token: higher is nearer to what the model
would say. The last line of output is one JSON document.

A loop: the same eight words in a row three times or more in one answer, or the last 24 tokens three times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime import Model
from lawcat_edge.runtime.generate.sampling import SamplingOptions

QUESTIONS = """\
What can I cook with eggs, rice and spinach?
How do I get a red wine stain out of a shirt?
Give me three tips for sleeping better.
What should I pack for a weekend at the sea?
How do I write a polite email to cancel an appointment?
Why is the sky blue?
What is the capital of Portugal, and what is it known for?
How much water should I drink a day?
Explain what inflation is to a ten-year-old.
My plant has yellow leaves. What can I do?
Write a short poem about autumn.
What is the difference between a virus and a bacterium?
How do I boil an egg so that the yolk stays soft?
Suggest a name for a small brown dog.
How can I save money on groceries?
What are good questions for a job interview?
I have a headache. What can I do?
How do I change a bicycle tyre?
Tell me a short story about a lighthouse keeper.
What is a good way to learn a new language?
Summarise what photosynthesis is in two sentences.
How do I thank a neighbour who watered my flowers?
What is machine learning?
Plan a birthday party for a six-year-old.
How do I stop procrastinating?
Is it better to rent or to buy a home?
What happened in 1969?
Write a shopping list for a vegetarian dinner for four.
How does a refrigerator work?
What should I tell a friend who lost his job?
""".strip().splitlines()


def loops(text: str, tokens: list[int] | None = None, words: int = 8, times: int = 3) -> bool:
    """Whether some `words` words in a row come `times` times, or the text ends in 24 tokens said so often.

    A repeated line of a list ("- ") of fewer words is seen by the tokens.
    """
    said = re.findall(r"\w+", text.lower())
    runs = Counter(tuple(said[i : i + words]) for i in range(len(said) - words + 1))
    if runs and max(runs.values()) >= times:
        return True
    tail = list(tokens or [])
    for period in range(1, 25):
        repeats = max(times, -(-24 // period))
        end = tail[-period * repeats :]
        if len(end) == period * repeats and end == end[:period] * repeats:
            return True
    return False


def answers(model: Model, options: dict[str, Any], seed: int, tokens: int, batch: int) -> list[Any]:
    found = []
    prompts = [
        model.encode(model.template.render([{"role": "user", "content": question}]), first=False)
        for question in QUESTIONS
    ]
    for start in range(0, len(prompts), batch):
        several = prompts[start : start + batch]
        sampling = [SamplingOptions(**options, seed=1000 * seed + start + i) for i in range(len(several))]
        found += model.generate_batch(several, sampling, max_new_tokens=tokens, logprobs=0)
    return found


def measure(
    model: Model, options: dict[str, Any], seeds: int, tokens: int, batch: int, show: bool
) -> dict[str, Any]:
    results = [
        (question, result)
        for seed in range(1 if options["temperature"] == 0 else seeds)
        for question, result in zip(QUESTIONS, answers(model, options, seed, tokens, batch), strict=True)
    ]
    looped = [(question, result.text) for question, result in results if loops(result.text, result.tokens)]
    if show:
        for question, result in results:
            print(f"\n> {question}\n{result.text}")
    said = [re.findall(r"\w+", result.text.lower())[:100] for _, result in results]
    chosen = [choice.logprob for _, result in results for choice in result.logprobs]
    return {
        **options,
        "answers": len(results),
        "loops": len(looped),
        "ended": sum(result.stop_reason == "eos" for _, result in results),
        "new_words": round(float(np.mean([len(set(w)) / len(w) for w in said if w])), 3),
        "logprob": round(float(np.mean(chosen)), 3),
        "looped": [question for question, _ in looped],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--show", action="store_true", help="print the answers too")
    for name, default in (("penalties", "1,1.1,1.2"), ("temperatures", "0,0.7"), ("min-p", "0,0.1")):
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    model = Model.load(args.bundle, threads=args.threads)
    lists = [[float(x) for x in text.split(",")] for text in (args.penalties, args.temperatures, args.min_p)]
    rows = []
    columns = ("penalty", "temperature", "min p", "answers", "loops", "ended", "new words", "log p")
    print(" ".join(f"{column:>11}" for column in columns))
    for penalty, temperature, min_p in itertools.product(*lists):
        if temperature == 0 and min_p != lists[2][0]:
            continue  # greedy: no filter changes the choice
        options = {"repetition_penalty": penalty, "temperature": temperature, "min_p": min_p}
        row = measure(model, options, args.seeds, args.tokens, args.batch, args.show)
        rows.append(row)
        print(" ".join(f"{value:>11}" for value in list(row.values())[:-1]), flush=True)
    print(json.dumps({"bundle": args.bundle.name, "tokens": args.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
