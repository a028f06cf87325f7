"""Small stand-ins shared by the tests of data and evaluation: a byte-level tokenizer and some prose."""

import functools
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SUBJECTS = (
    "The miller",
    "A quiet neighbour",
    "My older sister",
    "The harbour master",
    "Nobody in town",
    "The clerk",
)
VERBS = ("remembered", "forgot about", "painted", "wrote down", "argued over", "carefully measured")
OBJECTS = (
    "the narrow bridge",
    "an unpaid bill",
    "seven lanterns",
    "the winter of that year",
    "a letter",
    "the tide",
)
TASK_TEXTS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "An important fact is hidden in irrelevant text. Find it and memorize it.",
    "What is the pass key? The pass key is",
    "One of the special magic numbers for is: What is the special magic number mentioned in the text?",
    "Mary John Daniel Sandra moved went back travelled journeyed to the bathroom bedroom garden hallway",
    "kitchen office got took grabbed picked up the apple football milk dropped left discarded put down",
    "Question: Where was the apple before the kitchen?",
)


def prose(sentences: int) -> str:
    """English sentences without any word that a task asks for, none of them the same as its neighbour."""
    made = []
    for i in range(sentences):
        subject, verb, thing = SUBJECTS[i % 6], VERBS[(i // 2) % 6], OBJECTS[(i * 5 + i // 6) % 6]
        made.append(f"{subject} {verb} {thing}{', and later denied it' * (i % 3 == 0)}.")
    return " ".join(made)


def train_tokenizer(bos: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(200), *TASK_TEXTS * 40], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@functools.cache
def toy_tokenizer(bos: bool = False) -> tokenizers.Tokenizer:
    return train_tokenizer(bos)


@functools.cache
def metaspace_tokenizer() -> tokenizers.Tokenizer:
    """In the manner of Llama 2 and Mistral: words begin with ▁, a text begins with <s>."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(200), *TASK_TEXTS * 40], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save_teacher(path: Path) -> Path:
    """A random two-layer Llama with the toy tokenizer, saved as a teacher's folder."""
    import torch
    import transformers

    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path
