"""Many processes, as ``accelerate launch`` starts them: a copy each (DDP) or the weights in shards (FSDP2).

Sharding calls torch's ``fully_shard`` itself: accelerate's own way in ignores ``--use_fsdp`` on a CPU, takes
FSDP1 unless told otherwise, and knows nothing of a layer's three entrances. Its mixed precision is left
alone as well: it would cast the gate's parameters, whose errors add up over the text.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lawcat_edge.runtime.errors import LawcatError

WAIT = timedelta(hours=2)
"""How long processes wait for the main one, which alone samples text from the teacher."""

_SHARDS = "ACCELERATE_USE_FSDP"  # set by accelerate launch --use_fsdp
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|broken pipe|process group|TCPStore", re.I
)


class ProcessLost(LawcatError):  # noqa: N818 (it reads as what happened)
    """Another process of the run ended early."""

    exit_code = 1


def is_main_process() -> bool:
    """Whether this is the process that writes and prints; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def open_accelerator(bf16: bool) -> Any:
    """The accelerate handle of this process: alone, or one of those that a launcher started."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    # Unseen by accelerate, which would take it for a wish to shard by its own means (see above).
    wish = os.environ.pop(_SHARDS, None)
    try:
        return Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        )
    finally:
        if wish is not None:
            os.environ[_SHARDS] = wish


def sharded(accelerator: Any) -> bool:
    """Whether the launcher asked for FSDP and there is more than one process to share the weights."""
    wanted = os.environ.get(_SHARDS, "false").lower() in ("1", "true")
    return wanted and accelerator.num_processes > 1


def wrap(module: nn.Module, accelerator: Any) -> nn.Module:
    """``module`` (a training step around a LawcatModel) ready to train in this process.

    FSDP2 replaces parameters in place: take them from the model after this call, not before.
    """
    if not sharded(accelerator):
        return accelerator.prepare_model(module)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in module.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
        for entrance in ("student", "teacher", "transfer"):  # a layer is never called by ``forward``
            register_fsdp_forward_method(layer, entrance)
    fully_shard(module, mesh=mesh)
    return module


@contextmanager
def held_gradients(module: nn.Module, accelerator: Any, hold: bool) -> Iterator[None]:
    """Backward passes within do not average over processes while ``hold`` (gradient accumulation)."""
    if not hold or accelerator.num_processes == 1:
        yield
    elif sharded(accelerator):
        module.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        with accelerator.no_sync(module):
            yield


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from its shards. Every process must call this, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor``, known whole to every process, on the device and in the shards of ``parameter``."""
    tensor = tensor.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


@contextmanager
def one_fate(accelerator: Any, folder: Path) -> Iterator[None]:
    """One sentence instead of a traceback when another process is gone, or the launcher stops us for it."""
    if accelerator.num_processes == 1:
        yield
        return

    def lost() -> ProcessLost:
        saved = folder / "checkpoint"
        next_step = "start anew, since no checkpoint was written yet"
        if saved.is_dir():
            next_step = f"start the same command with --resume ({saved})"
        return ProcessLost(f"Another process of this run has ended, so this one stops; {next_step}.")

    def told(number: int, frame: Any) -> None:
        raise lost()

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, told) if main_thread else None
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or _LOST_PEER.search(str(error)):
            raise lost() from error
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
