"""A small random teacher of any supported family, in a real model folder with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def make_teacher(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """Write a random model of ``family`` into ``folder`` and return it. changes: fields of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, object] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 257,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():  # transformers starts biases at zero and norms at one, which would hide a lost one
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.ndim == 2:
                # attention must matter beside the residual stream, or a broken one would go unseen
                parameter.mul_(7.0 if "self_attn" in name else 4.0)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_corpus(path: Path, documents: int = 40) -> Path:
    """Plain text, documents parted by form feeds."""
    text = (
        "the sea took a grey light and every boat lay still under it while men spoke of bread rope and rain"
    )
    words = text.split()
    generator = torch.Generator().manual_seed(1)
    texts = []
    for _ in range(documents):
        picks = torch.randint(len(words), (300,), generator=generator).tolist()
        texts.append(" ".join(words[k] for k in picks) + ".")
    path.write_text("\n\f\n".join(texts), encoding="utf-8")
    return path
