"""Text sampled from the teacher itself, so that data in its own manner (chat above all) needs no download.

The prompt is the chat template up to where a user would speak; the teacher then writes both sides. (Letting
an instruction-tuned model write its own instructions is the idea of Magpie, arXiv 2406.08464.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from lawcat_edge.distill.corpus import separator_ids
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


def ensure_samples(
    model: LawcatModel,
    tokenizer: tokenizers.Tokenizer,
    path: Path,
    tokens: int,
    seed: int,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Sample ``tokens`` tokens into ``path`` ([n, LENGTH] int32 .npy), unless they are there.

    Seven in ten open a chat where the tokenizer knows ChatML; the rest start from nothing but the
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
    batch = 1024 if model.embed_tokens.weight.is_cuda else 32  # a GPU decodes 1024 rows as fast as 32
    rows: list[Tensor] = []
    made = 0
    while made < count:
        size = next((i for i in range(made, count) if plan[i] != plan[made]), count) - made
        size, done = min(batch, size), 0

        def tick(n: int, made: int = made, size: int = size) -> None:
            nonlocal done
            done += n
            if done % (n * 64) == 0:
                report(
                    {
                        "stage": "sample",
                        "step": made + done // LENGTH,
                        "steps": count,
                        "tokens": made * LENGTH + done,
                    }
                )

        rows.append(sample_teacher(model, plan[made : made + size], LENGTH, seed=seed + made, progress=tick))
        made += size
    with atomic_file(path) as file:
        np.save(file, torch.cat(rows).numpy().astype(np.int32), allow_pickle=False)


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
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue equally long prompts with the teacher's softmax attention: tokens [n, length] on the CPU.

    A preallocated key/value cache; the end-of-text token does not stop a sequence, the next turn begins.
    """
    device = model.embed_tokens.weight.device
    tokens = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    start = len(prompts[0])
    tokens[:, :start] = torch.tensor(prompts, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = _Decoder(model, len(prompts), length)
    for position in range(length - 1):
        logits = decoder.step(tokens[:, position : position + 1], position)
        if position + 1 >= start:
            tokens[:, position + 1] = _choose(logits.float(), temperature, top_p, generator)[:, 0]
            if progress:
                progress(len(prompts))
    return tokens.cpu()


class _Decoder:
    """The teacher, a token at a time for a whole batch; on a GPU each stretch of positions is one CUDA graph.

    Keys are masked, not cut, to the tokens so far, so that within a stretch every step is the same work.
    """

    STRETCH = 128

    def __init__(self, model: LawcatModel, batch: int, length: int) -> None:
        self.model, g = model, model.geometry
        device = model.embed_tokens.weight.device
        self.cuda = device.type == "cuda"
        dtype = torch.bfloat16 if self.cuda else torch.float32
        room = -(-length // self.STRETCH) * self.STRETCH
        self.cache = torch.zeros(
            g.num_layers, 2, batch, g.num_kv_heads, room, g.head_dim, device=device, dtype=dtype
        )
        self.rotary = model.rotary(0, room)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: Any = None
        self.end, self.logits = 0, torch.empty(0)

    def step(self, ids: Tensor, position: int) -> Tensor:
        """ids [B,1] at ``position`` -> logits [B,V] of the next token; the next step reuses the buffer."""
        self.ids.copy_(ids)
        self.position.fill_(position)
        if position >= self.end:  # this step runs by itself; the others of its stretch repeat a recording
            self.end, self.graph = (position // self.STRETCH + 1) * self.STRETCH, None
            return self._run()
        if not self.cuda:
            return self._run()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run()
        self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        model, g = self.model, self.model.geometry
        here: Tables = (self.rotary[0][self.position], self.rotary[1][self.position])
        age = self.position - torch.arange(self.end, device=self.ids.device)
        seen = (age >= 0) & (age < (g.sliding_window or self.end))
        mask = torch.zeros(self.end, device=age.device, dtype=self.cache.dtype).masked_fill(
            ~seen, -torch.inf
        )[None]
        with torch.autocast(self.ids.device.type, dtype=torch.bfloat16, enabled=self.cuda):
            x = model.embed_tokens(self.ids)
            for layer, (keys, values) in zip(model.layers, self.cache, strict=True):
                _, q, k, v = layer.read(x, teacher=True)
                keys.index_copy_(2, self.position, rotate(k, here).transpose(1, 2).to(keys.dtype))
                values.index_copy_(2, self.position, v.transpose(1, 2).to(values.dtype))
                # The query heads of a group stand where queries of several tokens would: nothing is repeated.
                query = rotate(q, here).to(keys.dtype).unflatten(2, (g.num_kv_heads, g.groups))[:, 0]
                y = F.scaled_dot_product_attention(
                    query, keys[:, :, : self.end], values[:, :, : self.end], attn_mask=mask
                )
                x = layer.write(x, y.flatten(1, 2)[:, None], teacher=True)
            return model.lm_head(model.norm(x[:, -1]))


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Nucleus sampling, [B,V] -> [B,1]. The 128 likeliest tokens hold the nucleus in practice."""
    top, index = (logits / temperature).topk(min(128, logits.shape[-1]))
    probs = top.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    return index.gather(1, torch.multinomial(probs, 1, generator=generator))
