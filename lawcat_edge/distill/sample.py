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

from lawcat_edge.data.corpus import separator_ids
from lawcat_edge.distill.run_folder import PARTIAL
from lawcat_edge.model import LawcatModel
from lawcat_edge.rotary import Tables, rotate
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
    tokens = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    start = len(prompts[0])
    tokens[:, :start] = torch.tensor(prompts, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = _Decoder(model, len(prompts), length)
    if known is not None:
        start = known[0].shape[1]
        tokens[:, :start] = known[0].to(device)
        generator.set_state(known[1])
    if start > 1:
        decoder.read(tokens[:, : start - 1])
    for position in range(start - 1, length - 1):
        logits = decoder.step(tokens[:, position : position + 1], position)
        tokens[:, position + 1] = _choose(logits.float(), temperature, top_p, generator)[:, 0]
        if progress:
            progress(tokens[:, : position + 2], generator.get_state())
    return tokens.cpu()


class _Decoder:
    """The teacher with a preallocated cache; on a GPU, a stretch of positions is one CUDA graph.

    Keys are masked, not cut, to the tokens so far, so that within a stretch every step is the same work.
    """

    STRETCH = 128

    def __init__(self, model: LawcatModel, batch: int, length: int) -> None:
        self.model, g = model, model.geometry
        weight = model.embed_tokens.weight
        self.cuda = weight.is_cuda
        room = -(-length // self.STRETCH) * self.STRETCH
        self.cache = torch.zeros(
            g.num_layers,
            2,
            batch,
            g.num_kv_heads,
            room,
            g.head_dim,
            device=weight.device,
            dtype=torch.bfloat16 if self.cuda else weight.dtype,
        )
        self.rotary = model.rotary(0, room)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.graph: Any = None
        self.end, self.logits = 0, torch.empty(0)

    def read(self, ids: Tensor) -> None:
        """Fill the cache with the text's first tokens, ids [B,T]."""
        position = 0
        for piece in ids.split(max(PREFILL // len(ids), 1), 1):
            positions = torch.arange(position, position + piece.shape[1], device=ids.device)
            position += piece.shape[1]
            self._run(piece, positions, position)

    def step(self, ids: Tensor, position: int) -> Tensor:
        """ids [B,1] at ``position`` -> logits [B,V] of the next token; the next step reuses the buffer."""
        self.ids.copy_(ids)
        self.position.fill_(position)
        if position >= self.end:  # this step runs by itself; the others of its stretch repeat a recording
            self.end, self.graph = (position // self.STRETCH + 1) * self.STRETCH, None
            return self._run(self.ids, self.position, self.end)
        if not self.cuda:
            return self._run(self.ids, self.position, self.end)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run(self.ids, self.position, self.end)
        self.graph.replay()
        return self.logits

    def _run(self, ids: Tensor, positions: Tensor, end: int) -> Tensor:
        """ids [B,T] at positions [T], all below ``end`` -> logits [B,V] after the last."""
        model, g = self.model, self.model.geometry
        T, G, R = ids.shape[1], g.num_kv_heads, g.groups
        here: Tables = (self.rotary[0][positions], self.rotary[1][positions])
        age = positions[:, None] - torch.arange(end, device=ids.device)
        seen = (age >= 0) & (age < (g.sliding_window or end))
        mask = torch.zeros(seen.shape, device=age.device, dtype=self.cache.dtype)
        mask = mask.masked_fill(~seen, -torch.inf).repeat(R, 1)  # [R T, end]
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.cuda):
            x = model.embed_tokens(ids)
            for layer, (keys, values) in zip(model.layers, self.cache, strict=True):
                _, q, k, v = layer.read(x, teacher=True)
                keys.index_copy_(2, positions, rotate(k, here).transpose(1, 2).to(keys.dtype))
                values.index_copy_(2, positions, v.transpose(1, 2).to(values.dtype))
                # The R query heads of a group stand where more tokens would, so that no key is repeated.
                query = rotate(q, here).to(keys.dtype).unflatten(2, (G, R)).permute(0, 2, 3, 1, 4)
                y = F.scaled_dot_product_attention(
                    query.flatten(2, 3), keys[:, :, :end], values[:, :, :end], attn_mask=mask
                )
                y = y.unflatten(2, (R, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)
                x = layer.write(x, y, teacher=True)
            return model.lm_head(model.norm(x[:, -1]))


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Nucleus sampling, [B,V] -> [B,1]. The 128 likeliest tokens hold the nucleus in practice."""
    top, index = (logits / temperature).topk(min(128, logits.shape[-1]))
    probs = top.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    return index.gather(1, torch.multinomial(probs, 1, generator=generator))
