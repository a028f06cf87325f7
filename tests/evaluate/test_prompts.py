"""The prompts: one needle at its depth, exact lengths, honest tokens, worlds a small solver agrees with."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers
from evaluation_toys import metaspace_tokenizer, prose, toy_tokenizer
from tiny_teacher import byte_tokenizer

from lawcat_edge.data.task_sequences import TaskMaker
from lawcat_edge.data.tasks.babilong import ROOMS, Babilong, World, simulate
from lawcat_edge.data.tasks.filler import Encoder, Filler, split_sentences
from lawcat_edge.data.tasks.niah import ANSWER_ROOM, DEPTHS, Niah
from lawcat_edge.data.tasks.passkey import Passkey
from lawcat_edge.data.tasks.prompts import Prompt
from lawcat_edge.data.tasks.words import ADJECTIVES, NOUNS
from lawcat_edge.evaluate.run import cell_prompts
from lawcat_edge.runtime.errors import LawcatError

TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": toy_tokenizer,
    "byte-level with bos": lambda: toy_tokenizer(bos=True),
    "metaspace": metaspace_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(TOKENIZERS[request.param]())


def background(encoder: Encoder) -> Filler:
    return Filler.build(encoder, split_sentences(prose(300)))


def task_of(encoder: Encoder, name: str) -> Passkey | Niah | Babilong:
    if name == "passkey":
        return Passkey(encoder)
    if name.startswith("niah"):
        return Niah(encoder, int(name[-1]), background(encoder))
    return Babilong(encoder, int(name[-1]), background(encoder))


def needle_of(prompt: Prompt) -> str:
    if prompt.task == "passkey":
        return f"The pass key is {prompt.answer}. Remember it. {prompt.answer} is the pass key."
    return f"is: {prompt.answer}."


NEEDLE_TASKS = ["passkey", "niah-1", "niah-2", "niah-3"]
ALL_TASKS = [*NEEDLE_TASKS, "babilong-qa2", "babilong-qa3"]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_ids_are_what_the_tokenizer_makes_of_the_text(encoder: Encoder, name: str) -> None:
    task = task_of(encoder, name)
    rng = np.random.default_rng(1)
    for length in (task.shortest(), task.shortest() + 77, 1500):
        prompt = task.make(rng, length, float(rng.random()))
        whole = prompt.text(encoder) + prompt.reply
        assert encoder.tokenizer.encode(whole).ids == [*prompt.ids, *encoder.after_text(prompt.reply)]


@pytest.mark.parametrize("name", NEEDLE_TASKS)
def test_needle_stands_once_at_its_depth(encoder: Encoder, name: str) -> None:
    task = task_of(encoder, name)
    for k, depth in enumerate((0.0, 0.1, 0.5, 0.9, 1.0)):
        prompt = task.make(np.random.default_rng(k), 2000, depth)
        text = prompt.text(encoder)
        assert text.count(needle_of(prompt)) == 1
        times = 2 if name == "passkey" else 1
        assert len(re.findall(rf"(?<!\w){re.escape(prompt.answer)}(?!\w)", text)) == times
        assert prompt.depth is not None
        assert abs(prompt.depth - depth) < 0.06
        # The stated depth against where the needle is found in the text of the context.
        context = text.split("\n", 1)[1].rsplit("\nWhat is", 1)[0]
        position = context.index(needle_of(prompt)) / len(context)
        assert abs(position - depth) < 0.12


@pytest.mark.parametrize("name", NEEDLE_TASKS)
@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_lengths_are_exact_and_equal_within_a_cell(encoder: Encoder, name: str, length: int) -> None:
    made = cell_prompts(name, encoder, background(encoder), length, samples=12, seed=3)
    target = length if name == "passkey" else length - ANSWER_ROOM
    lengths = [len(prompt.ids) for _, prompt in made]
    assert max(lengths) <= target
    assert min(lengths) >= target - 0.01 * length
    assert lengths.count(target) >= 10, "most of a cell can run as one batch"


def test_passkey_is_exact_at_any_length(encoder: Encoder) -> None:
    task = Passkey(encoder)
    for length in range(task.shortest(), task.shortest() + 60):
        assert len(task.make(np.random.default_rng(length), length, 0.4).ids) == length
    with pytest.raises(LawcatError, match="needs at least"):
        task.make(np.random.default_rng(0), task.shortest() - 1, 0.5)


def test_prompts_follow_the_seed(encoder: Encoder) -> None:
    def ids(seed: int) -> list[list[int]]:
        return [
            p.ids.tolist() for _, p in cell_prompts("niah-3", encoder, background(encoder), 600, 4, seed=seed)
        ]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert len({tuple(row) for row in ids(1)}) == 4


def test_stated_depths_and_the_forty_of_ruler(encoder: Encoder) -> None:
    made = cell_prompts("passkey", encoder, None, 512, 3, depths=[0.0, 1.0])
    assert [depth for depth, _ in made] == [0.0] * 3 + [1.0] * 3
    assert len(DEPTHS) == 40
    assert (DEPTHS[0], DEPTHS[-1]) == (0.0, 1.0)
    spread = [p.depth for _, p in cell_prompts("niah-1", encoder, None, 4096, 40)]
    assert all(np.abs(np.sort(np.array(spread, float)) - np.array(DEPTHS)) < 0.03)


@pytest.mark.parametrize("number", [1, 3])
def test_the_shortest_niah_holds_any_key_even_in_bytes(number: int) -> None:
    encoder = Encoder(byte_tokenizer())
    task = Niah(encoder, number, Filler.build(encoder, split_sentences(prose(200))))
    for k in range(300):
        prompt = task.make(np.random.default_rng(k), task.shortest(), k % 11 / 10)
        assert len(prompt.ids) <= task.shortest()
        assert prompt.answer in encoder.tokenizer.decode(prompt.ids.tolist())
    with pytest.raises(LawcatError, match="needs at least"):
        task.make(np.random.default_rng(0), task.shortest() - 1, 0.5)


def test_niah_needle_stands_between_sentences(encoder: Encoder) -> None:
    for k in range(10):
        prompt = task_of(encoder, "niah-2").make(np.random.default_rng(k), 1200, k / 9)
        assert re.search(r"[.\n] ?One of the special magic numbers for", prompt.text(encoder))
    lines = task_of(encoder, "niah-1").make(np.random.default_rng(0), 1200, 0.5).text(encoder).split("\n")
    assert sum(line.startswith("One of the special") for line in lines) == 1
    assert (
        lines.count(
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        )
        > 3
    )


def test_values_are_of_the_stated_kind(encoder: Encoder) -> None:
    rng = np.random.default_rng(0)
    assert re.fullmatch(r"[1-9]\d{6}", task_of(encoder, "niah-1").make(rng, 600, 0.5).answer)
    value = task_of(encoder, "niah-3").make(rng, 600, 0.5).answer
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", value)
    keys = [int(Passkey(encoder).make(rng, 400, 0.5).answer) for _ in range(50)]
    assert min(keys) >= 1
    assert max(keys) <= 50_000
    assert len(set(keys)) > 45


def test_word_list_is_clean() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(words) >= 150
        assert all(re.fullmatch("[a-z]+", word) for word in words)


def test_prose_is_required_where_the_task_has_it(encoder: Encoder) -> None:
    with pytest.raises(LawcatError, match="needs prose"):
        Niah(encoder, 2)
    with pytest.raises(LawcatError, match="needs prose"):
        Babilong(encoder, 2, None).make(np.random.default_rng(0), 900)
    with pytest.raises(LawcatError, match="no whole sentence"):
        Filler.build(encoder, split_sentences("no sentence here"))


# -- BABILong ------------------------------------------------------------------------------------------------


def solve(facts: list[str], question: str) -> str:
    """Answer a world's question from its sentences alone, by keeping books on who is where and holds what."""
    where: dict[str, str] = {}
    holds: dict[str, str] = {}
    track: dict[str, list[str]] = {"apple": [], "football": [], "milk": []}
    for fact in facts:
        person, rest = fact.rstrip(".").split(" ", 1)
        thing = rest.split()[-1]
        if thing in ROOMS:
            where[person] = thing
        elif re.match(r"got|took|grabbed|picked up", rest):
            assert thing not in holds, "an item has one holder"
            holds[thing] = person
        else:
            assert holds.pop(thing) == person, "only the holder drops"
            continue
        for item, who in holds.items():
            if track[item][-1:] != [where[who]]:
                track[item].append(where[who])
    now = re.fullmatch(r"Where is the (\w+)\?", question)
    if now:
        return track[now[1]][-1]
    before = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question)
    assert before
    rooms = track[before[1]]
    assert rooms.count(before[2]) == 1, "the question has one answer"
    return rooms[rooms.index(before[2]) - 1]


@pytest.mark.parametrize("number", [2, 3])
def test_solver_finds_the_answer_of_every_world(number: int) -> None:
    rng = np.random.default_rng(number)
    worlds = [simulate(rng, number) for _ in range(300)]
    for world in worlds:
        assert solve(list(world.facts), world.question) == world.answer
        assert world.answer in world.reply
        assert world.answer not in world.question
        assert len(world.facts) >= number
    assert {world.answer for world in worlds} == set(ROOMS)
    verbs = " ".join(" ".join(world.facts) for world in worlds)
    for verb in ("went back to", "journeyed to", "picked up", "put down", "discarded", "travelled to"):
        assert verb in verbs


def facts_in(text: str) -> list[str]:
    pattern = r"(?:Mary|John|Daniel|Sandra) [a-z ]+ the (?:\w+)\."
    return re.findall(pattern, text)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("length", [0, 1024, 2048])
def test_facts_lie_in_the_background_in_order(encoder: Encoder, number: int, length: int) -> None:
    task = Babilong(encoder, number, background(encoder))
    prompts = task.cell(7, length, 8)
    for prompt in prompts:
        context = prompt.text(encoder).rsplit(
            "was in the garden.\n" if number == 3 else "is in the garden.\n", 1
        )[1]
        assert solve(facts_in(context), prompt.question) == prompt.answer
    if length:
        sizes = {len(prompt.ids) for prompt in prompts}
        assert max(sizes) - min(sizes) <= 2, "one length a cell"
        longest = max(
            task.overhead(simulate(np.random.default_rng([7, number, length, k]), number)) for k in range(8)
        )
        assert max(sizes) == length - 300 + longest
    else:
        assert len(facts_in(context)) == context.count(".")
    with pytest.raises(LawcatError, match="above 300"):
        task.cell(7, 200, 1)


def test_a_world_is_told_and_asked(encoder: Encoder) -> None:
    world = World(
        ("Mary went to the office.", "Mary got the milk."), "Where is the milk?", "office", "The milk is ..."
    )
    text = Babilong(encoder, 2, None).assemble(np.random.default_rng(0), world, 0).text(encoder)
    assert text.endswith(
        "\nMary went to the office. Mary got the milk.\nQuestion: Where is the milk?\nAnswer:"
    )


# -- training sequences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_TASKS)
def test_training_sequences_are_full_of_answered_prompts(encoder: Encoder, name: str) -> None:
    maker = TaskMaker(encoder.tokenizer, 2048, prose(300), answer_weight=5.0)
    end = int(maker.end[0])
    counts = []
    for k in range(6):
        row = maker.make(name, np.random.default_rng(k))
        assert row.ids.shape == row.weight.shape == (2048,)  # type: ignore[union-attr]
        assert row.weight is not None
        answers = [encoder.decode(row.ids[span]) for span in runs(row.weight == 5.0)]
        counts.append(len(answers))
        assert (row.weight == 0).sum() < 40
        if name in NEEDLE_TASKS:
            text = encoder.tokenizer.decode(row.ids.tolist(), skip_special_tokens=True)
            assert all(
                f"{'key is' if name == 'passkey' else 'is:'} {answer.strip()}" in text for answer in answers
            )
        ends = np.flatnonzero((row.weight == 5.0) & (row.ids == end))
        assert len(ends) == len(answers), "each answer ends with the end token"
    assert len(set(counts)) > 1, "lengths vary"
    assert min(counts) >= 1


def runs(mask: np.ndarray) -> list[slice]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_training_sequences_are_checked(encoder: Encoder) -> None:
    with pytest.raises(LawcatError, match="too short for passkey"):
        TaskMaker(encoder.tokenizer, 64).make("passkey", np.random.default_rng(0))
    with pytest.raises(LawcatError, match="sampled no text"):
        TaskMaker(encoder.tokenizer, 64, teacher=lambda rng, n: []).make("teacher", np.random.default_rng(0))
    row = TaskMaker(encoder.tokenizer, 64, teacher=lambda rng, n: np.arange(5, 15)).make(
        "teacher", np.random.default_rng(0)
    )
    assert row.ids.shape == (64,)
    assert row.weight is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_TASKS)
def test_ids_with_the_tokenizer_of_the_real_teacher(name: str) -> None:
    teachers = pytest.importorskip("lawcat_edge.teacher")
    path = teachers.resolve("smollm2").tokenizer_path
    encoder = Encoder(tokenizers.Tokenizer.from_file(str(path)))
    task = task_of(encoder, name)
    rng = np.random.default_rng(1)
    for length in (700, 1024, 3000):
        prompt = task.make(rng, length, float(rng.random()))
        assert len(prompt.ids) == length
        whole = prompt.text(encoder) + prompt.reply
        assert encoder.tokenizer.encode(whole).ids == [*prompt.ids, *encoder.after_text(prompt.reply)]
