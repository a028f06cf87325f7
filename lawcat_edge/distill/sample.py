"""Text sampled from the teacher itself, so that data in its own manner (chat above all) needs no download.

The prompt is the chat template up to where a user would speak; the teacher then writes both sides. (Letting
an instruction-tuned model write its own instructions is the idea of Magpie, arXiv 2406.08464.)

Sampling takes minutes, so it is resumable: the tokens so far and the state of the random generator are kept
every few seconds in a file of some hundred KB, and the key/value cache is computed from the tokens again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from lawcat_edge.attention import rotate
from lawcat_edge.distill.corpus import separator_ids
from lawcat_edge.distill.run_folder import PARTIAL
from lawcat_edge.model import LawcatModel
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import atomic_file

OPENINGS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n",
    "<|im_start|>user\n",
)
LENGTH = 1024  # tokens of one sampled sequence
PREFILL = 1 << 15  # tokens read at once, of all rows together: bounds memory when a resumed run reads on
KEEP_SECONDS = 5.0


def ensure_samples(
    model: LawcatModel,
    tokenizer: tokenizers.Tokenizer,
    path: Path,
    tokens: int,
    seed: int,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Sample ``tokens`` tokens into ``path`` ([n, LENGTH] int32 .npy), unless they are there.

    Goes on from ``path``.partial where one of the same plan and seed lies; the caller answers for the same
    teacher. Seven in ten open a chat where the tokenizer knows ChatML; the rest start from nothing but the
    separator, which gives text as the teacher saw it in training.
    """
    count = max(1, -(-tokens // LENGTH))
    if path.is_file() and len(_pool(path)) >= count:
        return
    plan: list[list[int]] = [separator_ids(tokenizer)] * count
    if tokenizer.token_to_id("<|im_start|>") is not None:
        with_system, without = (tokenizer.encode(o, add_special_tokens=False).ids for o in OPENINGS)
        chats = count * 7 // 10
        plan = [with_system] * (count // 2) + [without] * (chats - count // 2) + plan[chats:]
    partial = _Partial(path.with_name(path.name + PARTIAL), plan, seed)
    rows, known = partial.read(model.embed_tokens.weight)
    batch = 1024 if model.embed_tokens.weight.is_cuda else 32  # a GPU decodes 1024 rows as fast as 32
    while len(rows) < count:
        made = len(rows)
        size = next((i for i in range(made, count) if plan[i] != plan[made]), count) - made
        size = min(batch, size)

        def tick(tokens: Tensor, state: Tensor, rows: Tensor = rows) -> None:
            partial.keep(rows, tokens, state)
            if tokens.shape[1] % 64 == 0:
                done = len(tokens) * tokens.shape[1]
                here = len(rows) + done // LENGTH
                report({"stage": "sample", "step": here, "steps": count, "tokens": len(rows) * LENGTH + done})

        fits = known is not None and len(known[0]) == size
        more = sample_teacher(
            model,
            plan[made : made + size],
            LENGTH,
            seed=seed + made,
            known=known if fits else None,
            progress=tick,
        )
        rows, known = torch.cat([rows, more.int()]), None
    with atomic_file(path) as file:
        np.save(file, rows.numpy(), allow_pickle=False)
    partial.path.unlink(missing_ok=True)


class _Partial:
    """What was sampled before the samples are whole: finished rows, the rows under way, the generator."""

    def __init__(self, path: Path, plan: list[list[int]], seed: int) -> None:
        self.path, self.saved = path, time.monotonic()
        self.identity = hashlib.sha256(repr((plan, seed, LENGTH)).encode()).hexdigest()

    def keep(self, rows: Tensor, tokens: Tensor, state: Tensor) -> None:
        """rows [n, LENGTH], tokens [B, t], state uint8: written when the last time is some seconds ago."""
        if time.monotonic() - self.saved < KEEP_SECONDS:
            return
        from safetensors.torch import save

        tensors = {"rows": rows.int(), "tokens": tokens.int().cpu().contiguous(), "state": state.cpu()}
        with atomic_file(self.path) as file:
            file.write(save(tensors, {"identity": self.identity}))
        self.saved = time.monotonic()

    def read(self, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(rows, (tokens, state)); nothing where there is no such file, or one of another plan or device.

        embedding: the model's [V, D], which says the device and the largest token.
        """
        from safetensors import SafetensorError, safe_open

        none = torch.zeros(0, LENGTH, dtype=torch.int32)
        if not self.path.is_file():
            return none, None
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    return none, None
                rows, tokens, state = (file.get_tensor(name) for name in ("rows", "tokens", "state"))
        except SafetensorError:
            return none, None  # damaged: sampled anew
        whole = all(
            part.ndim == 2
            and part.dtype == torch.int32
            and bool(((part >= 0) & (part < len(embedding))).all())
            for part in (rows, tokens)
        )
        like = torch.Generator(embedding.device).get_state()
        if not whole or rows.shape[1] != LENGTH or not 0 < tokens.shape[1] < LENGTH:
            return none, None
        if (state.dtype, state.shape) != (like.dtype, like.shape):
            return none, None
        return rows, (tokens.long(), state)


def teacher_text(path: Path) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Draw sampled sequences, as many as asked for: (rng, tokens) -> token ids."""
    pool = _pool(path)

    def draw(rng: np.random.Generator, wanted: int) -> np.ndarray:
        picks = rng.integers(len(pool), size=-(-wanted // pool.shape[1]))
        return np.concatenate([pool[k] for k in picks])

    return draw


def _pool(path: Path) -> np.ndarray:
    try:
        pool = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LawcatError(f"{path} is damaged ({error}); remove it, and it is sampled again.") from None
    if pool.ndim != 2 or pool.shape[1] != LENGTH or pool.dtype != np.int32:
        raise LawcatError(f"{path} holds no samples of {LENGTH} tokens; remove it, and it is sampled again.")
    return pool


@torch.inference_mode()
def sample_teacher(
    model: LawcatModel,
    prompts: list[list[int]],
    length: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 0.95,
    known: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Continue equally long prompts with the teacher's softmax attention: tokens [n, length] on the CPU.

    progress: called after every token with the tokens so far [n, t] and the generator's state; known: what it
    got last, to go on from. A preallocated key/value cache; the end-of-text token does not stop a sequence,
    the next turn begins.
    """
    device = model.embed_tokens.weight.device
    ids = torch.tensor(prompts, device=device)
    B, start = ids.shape
    g = model.geometry
    generator = torch.Generator(device).manual_seed(seed)
    if known is not None:
        ids, start = known[0].to(device), known[0].shape[1]
        generator.set_state(known[1])
    dtype = torch.bfloat16 if device.type == "cuda" else model.embed_tokens.weight.dtype
    cache = torch.zeros(g.num_layers, 2, B, length, g.num_kv_heads, g.head_dim, device=device, dtype=dtype)
    tokens = torch.zeros(B, length, dtype=torch.long, device=device)
    tokens[:, :start] = ids
    cos, sin = model.rotary(0, length)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        fed, position = ids, 0
        while True:
            for piece in fed.split(max(PREFILL // B, 1), 1):
                logits = _advance(model, piece, position, cache, (cos, sin))
                position += piece.shape[1]
            if position >= length:
                return tokens.cpu()
            fed = _choose(logits.float(), temperature, top_p, generator)
            tokens[:, position : position + 1] = fed
            if progress:
                progress(tokens[:, : position + 1], generator.get_state())


def _advance(
    model: LawcatModel, ids: Tensor, position: int, cache: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Run the teacher over ids [B,T] at ``position``; logits of the last token [B,V]."""
    end = position + ids.shape[1]
    here = (rotary[0][position:end], rotary[1][position:end])
    limit, seen = model.geometry.sliding_window, None
    # a mask only where it is needed: without one, SDPA is faster
    if (limit is not None and end > limit) or (position and ids.shape[1] > 1):
        ages = torch.arange(position, end, device=ids.device)[:, None] - torch.arange(end, device=ids.device)
        seen = (ages >= 0) & (ages < (limit or end))
    x = model.embed_tokens(ids)
    for i, layer in enumerate(model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), teacher=True)
        cache[i, 0, :, position:end] = rotate(k, here)
        cache[i, 1, :, position:end] = v
        keys, values = (cache[i, part, :, :end].transpose(1, 2) for part in (0, 1))
        query = rotate(q, here).to(keys.dtype).transpose(1, 2)
        causal = position == 0 and seen is None
        y = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, is_causal=causal, enable_gqa=True
        )
        x = layer.feed_forward(x + attn.out(y.transpose(1, 2), teacher=True))
    return model.lm_head(model.norm(x[:, -1]))


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Nucleus sampling, [B,V] -> [B,1]. The 512 likeliest tokens hold the nucleus in practice."""
    top, index = (logits / temperature).topk(min(512, logits.shape[-1]))
    probs = top.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    return index.gather(1, torch.multinomial(probs, 1, generator=generator))
