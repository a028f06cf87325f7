"""onnxruntime behind a bundle: tokens and state in, logits and state out.

The state lives in numpy arrays that are bound to the session as inputs *and* outputs, so a step allocates
and copies nothing. A tensor is updated in place only where the graph's only reader of the old value is the
operator that writes the new one (LinearAttention, CausalConvWithState and GroupQueryAttention of
com.microsoft and LawcatAttention, whose CPU kernels allow it); every other one alternates between two arrays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime import native
from lawcat_edge.runtime.bundle.flavours import FLAVOURS, can_run, runnable
from lawcat_edge.runtime.bundle.graph_check import ModelSummary
from lawcat_edge.runtime.bundle.manifest import Bundle, StateTensor
from lawcat_edge.runtime.engine import rotary
from lawcat_edge.runtime.engine.processor import physical_cores, saturates
from lawcat_edge.runtime.engine.state import State, aligned
from lawcat_edge.runtime.errors import LawcatError

_CHUNK = 256
_LONGEST_TRIAL = 64
_CHOICE = "logits_at"  # of graphs that give the logits of other positions than the last, if asked
_OFTEN = 16  # shorter calls come often enough to keep what they are bound to
# The portable graph has tensors of every pair of tokens of a call, [B,H,T,T,F]: of 151 MB each at 256 tokens,
# of 2.4 MB at 32, which is also 2.9 times as fast as 256, and the fastest of 16 to 256 (SmolLM2-135M).
PORTABLE_CHUNK = 32
_KINDS = ("last", "all", "step", "chunk", "ort_format")
_IN_PLACE_KINDS = {"last", "all"}  # graphs whose operators are known, because the bundle's check reads them
_FIXED = ("step", "chunk")
_MS = "com.microsoft"
_IN_PLACE = {(_MS, op) for op in ("LinearAttention", "CausalConvWithState", "GroupQueryAttention")}
_IN_PLACE.add((native.DOMAIN, "LawcatAttention"))


def default_chunk(window: int) -> int:
    """Tokens of a prompt that are best read at once.

    A window's scores are of all tokens of a call with each other, most of which are outside the window: with
    a window of 64 and the integer products, 64 tokens at once are read 1.3 times as fast as 256. Without a
    window 256 are best (SmolLM2-135M, 32 to 256 tried).
    """
    return min(_CHUNK, max(64, window)) if window else _CHUNK


class _Call:
    """One session, one T, one phase of the buffers: everything bound once, run many times."""

    def __init__(
        self,
        session: Any,
        binding: Any,
        ids: np.ndarray,
        logits: np.ndarray,
        extra: dict[str, np.ndarray],
        choice: dict[str, np.ndarray],
    ) -> None:
        self.session, self.binding = session, binding
        self.ids, self.logits, self.extra = ids, logits, extra
        self.choice = choice  # bound, and kept for that


class Engine:
    """A bundle's graphs in onnxruntime sessions. ``forward`` is all there is.

    threads: intra-op threads (default: physical cores this process may use).
    flavour: 'native', 'ort', 'portable' or 'onnx'; default the first of these that the bundle has and that
    this package and the onnxruntime at hand can run.
    chunk: tokens of a prompt read at once; default as ``default_chunk``, and at most 32 with 'portable'.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        flavour: str | None = None,
        chunk: int | None = None,
        session_config: dict[str, str] | None = None,
        profile_prefix: str | None = None,
    ) -> None:
        if threads is not None and not 1 <= threads <= 1024:
            raise LawcatError(f"threads must be from 1 to 1024, not {threads}.")
        if chunk is None:
            chunk = default_chunk(bundle.manifest.window)
        if not 1 <= chunk <= 1 << 16:
            raise LawcatError(f"The prompt chunk must be from 1 to 65536 tokens, not {chunk}.")
        self.bundle = bundle
        self.threads = threads or physical_cores()
        self.flavour = _choose_flavour(bundle, flavour)
        self._longest = PORTABLE_CHUNK if self.flavour == "portable" else None
        self.chunk = min(chunk, self._longest or chunk)
        self.longest_trial = min(_LONGEST_TRIAL, self._longest or _LONGEST_TRIAL)
        self._config = session_config or {}
        self._profile_prefix = profile_prefix
        self._sessions: dict[str, Any] = {}
        manifest = bundle.manifest
        self.vocab_size = manifest.vocab_size
        graphs = manifest.graphs[self.flavour]
        known = [bundle.graphs[graphs[kind]] for kind in _IN_PLACE_KINDS & set(graphs)]
        self._in_place = [
            all(_in_place_is_safe(graph, tensor) for graph in known) for tensor in manifest.state
        ]
        # the buffers that a GroupQueryAttention appends to
        self._alone = {"ort": {"window", "full"}, "native": {"full"}}.get(self.flavour, set())
        self._trial_logits: np.ndarray | None = None  # rows that are not used take no memory
        self._frequencies = rotary.inverse_frequencies(manifest.geometry) if manifest.rotary else None
        chosen = {item.name for item in self._session("last").get_overridable_initializers()}
        self._choosable = _CHOICE in chosen
        bundle.check_unchanged()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The graphs this flavour has: ``last`` and some of ``all``, ``step``, ``chunk``, ``ort_format``."""
        return tuple(kind for kind in _KINDS if kind in self.bundle.manifest.graphs[self.flavour])

    def fixed_tokens(self, kind: str) -> int | None:
        """T of a graph that takes one length only, None for one that takes any."""
        if kind not in _FIXED:
            return None
        return next(int(i.shape[1]) for i in self._session(kind).get_inputs() if i.name == "input_ids")

    def release(self, kind: str) -> None:
        """Forget a graph's session, which frees it once no state that ran it is left; loads again on use."""
        self._sessions.pop(kind, None)

    def new_state(self, batch: int = 1, kind: str = "last", capacity: int = 0) -> State:
        """The state before any token, for the graph ``kind``; one for ``last`` is one for ``all``.

        capacity: of sequences that may be put beside the first `batch`.
        """
        manifest = self.bundle.manifest
        in_place = self._in_place if kind in _IN_PLACE_KINDS else [False] * len(self._in_place)
        slots = None
        if kind in _FIXED:
            sizes = {item.name: item.shape for item in self._session(kind).get_inputs()}
            slots = {t.buffer: int(sizes[t.input][2]) for t in manifest.state if t.buffer}
        return State(manifest.state, in_place, batch, manifest.spans, slots, capacity, self._frequencies)

    def forward(self, ids: np.ndarray, state: State, all_positions: bool = False) -> np.ndarray:
        """Feed ids [B,T], any T >= 1, updating `state`; logits float32 [B,V] of the last token, or [B,T,V].

        The result is a buffer that the next call with this state overwrites: copy it to keep it.
        Callers feed long texts in pieces (``prefill``), since memory grows with T.
        """
        logits = self.run("all" if all_positions else "last", ids, state)
        return logits if all_positions else logits[:, 0]

    def run(self, kind: str, ids: np.ndarray, state: State) -> np.ndarray:
        """Feed ids [B,T] to the graph ``kind`` (see ``kinds``); logits [B,T,V] of "all", else [B,1,V].

        In several calls where the state has no room for all tokens at once, or the graph must not have them.
        """
        self._check_tokens(ids, state)
        T, parts, at = ids.shape[1], [], 0
        while True:
            count = min(T - at, state.room, self._longest or T)
            if kind in _FIXED and count < T:
                raise LawcatError(
                    f"There is room for {state.room} tokens before the oldest are forgotten; read those one "
                    "by one, with the graph `step`."
                )
            logits = self._read(kind, ids[:, at : at + count], state)
            at += count
            if at == T:
                break
            if kind == "all":
                parts.append(logits.copy())
        return np.concatenate([*parts, logits], axis=1) if parts else logits

    def _read(self, kind: str, ids: np.ndarray, state: State) -> np.ndarray:
        T = ids.shape[1]
        state.make_room(T)
        if state.batch > 1 and T > 1 and self._alone & set(state.buffers):
            # GroupQueryAttention takes several tokens beside earlier ones of one sequence alone
            rows = [self._call(kind, ids[i : i + 1], state.row(i)).copy() for i in range(state.batch)]
            logits = np.concatenate(rows)
        else:
            logits = self._call(kind, ids, state)
        state.advance(T)
        return logits

    @property
    def can_try(self) -> bool:
        """Whether there is a graph for ``try_tokens``."""
        return self._choosable or "all" in self.kinds

    def trial_room(self, state: State) -> int:
        """Tokens that ``try_tokens`` takes at once."""
        return min(self.longest_trial, state.room)

    def try_tokens(self, ids: np.ndarray, state: State) -> np.ndarray:
        """Read ids [1,T] on trial, T <= ``trial_room``: logits [T,V], which the next trial overwrites.

        ``state.accept(T)`` makes it so; without, the state is what it was.
        """
        assert state.batch == 1
        assert ids.shape[1] <= self.trial_room(state)
        self._check_tokens(ids, state)
        state.make_room(ids.shape[1])
        # A second session has weights of its own, and takes its time to open.
        logits: np.ndarray = self._call("last" if self._choosable else "all", ids, state, trial=True)[0]
        return logits

    def _call(self, kind: str, ids: np.ndarray, state: State, trial: bool = False) -> np.ndarray:
        T = ids.shape[1]
        key = (kind, T, state.phase, state.turn, state.batch, trial)
        call = state.bindings.get(key)
        if call is None:
            call = self._bind(kind, T, state, trial)
            # The lengths that repeat.
            if trial or (kind == "last" and (T <= _OFTEN or self.chunk == T)):
                state.bindings[key] = call
        call.ids[...] = ids
        state.fill_inputs(call.extra)
        try:
            call.session.run_with_iobinding(call.binding)
        except Exception as error:
            raise LawcatError(f"onnxruntime failed to run the model: {_first_line(error)}.") from error
        return call.logits

    def _check_tokens(self, ids: np.ndarray, state: State) -> None:
        if ids.ndim != 2 or ids.shape[0] != state.batch or ids.shape[1] < 1:
            raise LawcatError(f"Tokens must have the shape [{state.batch}, T >= 1], not {list(ids.shape)}.")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise LawcatError(f"A token id is outside the vocabulary of {self.vocab_size}; export it again.")

    def prefill(self, tokens: Sequence[int] | np.ndarray, state: State) -> np.ndarray:
        """Feed the tokens [T] of one sequence, or [B,T] of several, in chunks, at flat memory.

        Logits [B,V] of the last ones.
        """
        ids = np.atleast_2d(np.asarray(tokens, dtype=np.int64))
        if ids.size == 0:
            raise LawcatError("There is nothing to read: the prompt has no tokens.")
        logits = None
        for start in range(0, ids.shape[1], self.chunk):
            logits = self.forward(ids[:, start : start + self.chunk], state)
        assert logits is not None
        return logits

    def end_profiling(self) -> Path:
        """Stop profiling (see profile_prefix) and return the trace's path."""
        return Path(self._sessions["last"].end_profiling())

    def _bind(self, kind: str, T: int, state: State, trial: bool = False) -> _Call:
        session = self._session(kind)
        ids = np.zeros((state.batch, T), np.int64)
        choice: dict[str, np.ndarray] = {}
        if trial:
            if self._trial_logits is None:
                self._trial_logits = aligned((1, self.longest_trial, self.vocab_size))
            logits = self._trial_logits[:, :T]
            if kind == "last":
                choice[_CHOICE] = np.arange(T)
        else:
            logits = aligned((state.batch, T if kind == "all" else 1, self.vocab_size))
        extra = state.new_inputs(T)
        binding = session.io_binding()
        inputs = [("input_ids", ids), *extra.items(), *choice.items()]
        # Of arrays with more rows the first ones are bound: those of the sequences.
        rows = slice(state.batch)
        inputs += [(t.input, array[rows]) for t, array in zip(state.tensors, state.arrays, strict=True)]
        outputs = [("logits", logits)]
        targets = state.trial_targets if trial else state.targets
        outputs += [(t.output, array[rows]) for t, array in zip(state.tensors, targets, strict=True)]
        for name, array in inputs:
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs:
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _Call(session, binding, ids, logits, extra, choice)

    def _session(self, kind: str) -> Any:
        if kind in self._sessions:
            return self._sessions[kind]
        graphs = self.bundle.manifest.graphs[self.flavour]
        if kind not in self.kinds:
            raise LawcatError(f"The bundle has no graph for {kind!r} positions; export it again.")
        ort = _onnxruntime(self.bundle.manifest.min_onnxruntime[self.flavour])
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A pattern is kept for every T that occurs: 20 MB more at the peak and no faster (SmolLM2-135M).
        options.enable_mem_pattern = False
        # "1" has onnxruntime widen signed weights, at half the speed, with VNNI as well as without
        precise = {"session.x64quantprecision": "1" if saturates() else "0"}
        for key, value in (precise | self._config).items():
            options.add_session_config_entry(key, value)
        if self._profile_prefix and kind == "last":
            options.enable_profiling = True
            options.profile_file_prefix = self._profile_prefix
        path = self.bundle.path(graphs[kind])
        try:
            if FLAVOURS[self.flavour].own:
                options.register_custom_ops_library(str(native.library()))
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            self.bundle.check_unchanged()
            raise LawcatError(
                f"onnxruntime {ort.__version__} cannot load {path.name}: {_first_line(error)}; "
                "update onnxruntime, or export with `--ops portable`."
            ) from error
        self._check_session(session, path.name, kind)
        self._sessions[kind] = session
        return session

    def _check_session(self, session: Any, name: str, kind: str) -> None:
        """The session's inputs and outputs are those of the manifest, in type and in every fixed size."""
        manifest = self.bundle.manifest
        B = T = None  # any
        if kind in _FIXED:
            lengths = [item.shape[1] for item in session.get_inputs() if item.name == "input_ids"]
            if len(lengths) != 1 or type(lengths[0]) is not int or (kind == "step" and lengths[0] != 1):
                raise LawcatError(f"{name} does not take a fixed number of tokens; export the bundle again.")
            B, T = 1, lengths[0]
        inputs: dict[str, tuple[str, tuple[int | None, ...]]] = {"input_ids": ("tensor(int64)", (B, T))}
        if manifest.rotary:
            inputs["position_ids"] = ("tensor(int64)", (B, T))
            for key in ("cos_cache", "sin_cache"):
                inputs[key] = ("tensor(float)", (None, manifest.geometry["head_dim"] // 2))
        outputs: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "logits": ("tensor(float)", (B, T if kind == "all" else 1, manifest.vocab_size))
        }
        for tensor in manifest.state:
            sizes = tuple(None if isinstance(size, str) else size for size in tensor.shape)
            inputs[tensor.input] = outputs[tensor.output] = ("tensor(float)", (B, *sizes))
        for name in manifest.spans:
            inputs[f"{name}_seqlens_k"] = ("tensor(int32)", (B,))
        for kind_of, expected, found in (
            ("input", inputs, session.get_inputs()),
            ("output", outputs, session.get_outputs()),
        ):
            got = {item.name: item for item in found}
            for key in sorted(set(expected) ^ set(got)):
                problem = "lacks" if key in expected else "has an unknown"
                raise LawcatError(f"{name} {problem} {kind_of} {key!r}; export the bundle again.")
            for key, (dtype, shape) in expected.items():
                sizes = got[key].shape
                fits = len(sizes) == len(shape) and all(
                    want is None or not isinstance(size, int) or size == want
                    for size, want in zip(sizes, shape, strict=True)
                )
                free = isinstance(sizes[0], int) != (shape[0] is not None) and "_cache" not in key
                if got[key].type != dtype or not fits or free:
                    raise LawcatError(
                        f"{name}: {kind_of} {key!r} is {got[key].type} {sizes}, not {dtype} {list(shape)}; "
                        "export the bundle again."
                    )


def _choose_flavour(bundle: Bundle, flavour: str | None) -> str:
    available = bundle.manifest.ops
    if flavour is None:
        installed, needed = _version(_onnxruntime().__version__), bundle.manifest.min_onnxruntime
        able = runnable(available) or available
        flavour = next((op for op in able if installed >= _version(needed[op])), able[0])
    if flavour not in available:
        wanted = f"ort,{flavour}" if flavour in FLAVOURS and FLAVOURS[flavour].own else flavour
        raise LawcatError(
            f"The bundle has no {flavour!r} graph, only {', '.join(available)}; "
            f"export it with `--ops {wanted}`."
        )
    if not can_run(flavour):
        raise LawcatError(
            f"This installation lacks the operators of {flavour!r}: it was built without a C compiler, "
            "this processor has none of the vector instructions that they use (LAWCAT_EDGE_NATIVE=1 runs "
            "them all the same), or LAWCAT_EDGE_NATIVE is 0; install it again where there is a compiler, or "
            "take another flavour."
        )
    return flavour


def _onnxruntime(minimum: str = "0") -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LawcatError("onnxruntime is missing; install it with `pip install onnxruntime`.") from error
    if _version(onnxruntime.__version__) < _version(minimum):
        raise LawcatError(
            f"The bundle needs onnxruntime {minimum} or newer and {onnxruntime.__version__} is installed; "
            "run `pip install -U onnxruntime`, or export with `--ops portable`."
        )
    return onnxruntime


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _in_place_is_safe(graph: ModelSummary, tensor: StateTensor) -> bool:
    own = graph.readers.get(tensor.input, [])
    return (
        len(own) == 1
        and (own[0].domain, own[0].op) in _IN_PLACE
        and tensor.output in own[0].outputs
        # Nobody may read the new value either: it could meet the buffer of another step.
        and tensor.output not in graph.readers
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300].rstrip(".")
