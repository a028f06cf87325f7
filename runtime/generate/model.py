"""The pleasant side of a bundle: ``Model.load``, ``model.generate``, ``model.chat``, ``model.snapshot``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle.manifest import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Bundle,
)
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.context import Context, Generation, Mark, Result
from lawcat_edge.runtime.generate.core import Core
from lawcat_edge.runtime.generate.request import Request
from lawcat_edge.runtime.generate.sampling import SamplingOptions, sampling_defaults
from lawcat_edge.runtime.generate.snapshot import Snapshot
from lawcat_edge.runtime.generate.text import Tokenizer, special_tokens
from lawcat_edge.runtime.generate.writer import Writer
from lawcat_edge.runtime.template.chat import ChatTemplate, Message, check_messages

Prompt = str | Sequence[int]


class Model:
    """A bundle ready to run. ``context`` is the text of the last call.

    Options of ``generate``, ``chat`` and ``generate_batch``: max_new_tokens (256), temperature (0: greedy),
    top_k, top_p, min_p, repetition_penalty, seed, stop (a string or several), logprobs (record so many
    alternatives a token; 0 only the chosen one), ignore_eos.
    """

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer | None = None) -> None:
        self.bundle = bundle
        self.engine = engine
        self.tokenizer = tokenizer or _tokenizer(bundle)
        self.eos = frozenset(bundle.manifest.eos)
        self.context = self.new_context()
        self._template: ChatTemplate | None = None

    @classmethod
    def load(
        cls,
        path: Path | str,
        threads: int | None = None,
        check_hashes: bool = True,
        flavour: str | None = None,
        chunk: int | None = None,
        public_key: Path | str | None = None,
    ) -> Model:
        """Open the bundle in folder `path`, or of that name on the hub (owner/name).

        threads: default, the physical cores. chunk: tokens of a prompt read at once (memory grows with it).
        public_key: PEM file of the key that the bundle must be signed with; default: not asked.
        Raises LawcatError with what to do if the bundle is damaged or cannot run here.
        """
        bundle = Bundle.open(path, check_hashes=check_hashes, public_key=public_key)
        # onnxruntime lets other threads run while it packs the weights.
        with ThreadPoolExecutor(1) as pool:
            engine = pool.submit(Engine, bundle, threads=threads, flavour=flavour, chunk=chunk)
            tokenizer = _tokenizer(bundle)
            return cls(bundle, engine.result(), tokenizer)

    def new_context(self) -> Context:
        return Context(self.engine.new_state())

    def reset(self) -> None:
        """Forget the last text and its conversation."""
        self.context = self.new_context()

    def read(self, text: Prompt, context: Context | None = None) -> Context:
        """Read `text` without answering: into a new context, or on at the end of `context`."""
        context = self.context = context or self.new_context()
        with _busy(context):
            self._append(context, text)
            # The last token stays unread: what goes on from here needs a token to start from.
            self._feed(context, len(context) - 1)
        return context

    def generate(self, prompt: Prompt = "", *, context: Context | None = None, **options: Any) -> Generation:
        """Continue `prompt` (text or token ids): an iterator of text.

        context: go on from this text (of ``read``, ``restore``, ``fork`` or an earlier call) instead of from
        nothing; the prompt may then be empty. Options: see the class.
        """
        request = Request.of(**options)

        def start(generation: Generation) -> Generator[str, None, None]:
            used = self.context = context or self.new_context()
            with _busy(used):
                generation.stats.reused_tokens = used.fed
                if len(prompt) or not len(used):
                    self._append(used, prompt)
                yield from self._stream(generation, used, request)

        return Generation(start, request.logprobs is not None)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        context: Context | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a message, or a whole conversation; an iterator of text. Options: see the class.

        A text goes on with the last conversation, or in `context` (which may hold a document that was read).
        A list of ``{"role", "content"}`` is the whole conversation; what the state has seen is not re-read.
        system: the system prompt, at the start of a new conversation. Call ``reset`` to begin anew.
        """
        request = Request.of(**options)
        template = self.template
        if not isinstance(messages, str):
            check_messages(messages)

        def start(generation: Generation) -> Generator[str, None, None]:
            if context is None and not self.context.messages:
                self.context = self.new_context()
            used = self.context = context or self.context
            with _busy(used):
                if isinstance(messages, str):
                    history = [dict(message) for message in used.messages]
                    if system is not None and not history:
                        history.append({"role": "system", "content": system})
                    history.append({"role": "user", "content": messages})
                else:
                    history = [dict(message) for message in messages]
                text = template.render(history)
                self._append_chat(used, text, history)
                generation.stats.reused_tokens = used.fed
                try:
                    yield from self._stream(generation, used, request)
                finally:
                    reply = "".join(generation._parts)
                    used.messages = [*history, {"role": "assistant", "content": reply}]
                    # Known only if the tokens say what the reply says: not after a stop string, for example.
                    same = self.tokenizer.decode(generation.tokens, skip_special=False) == reply
                    used.mark = Mark.of(text + reply) if same else None

        return Generation(start, request.logprobs is not None)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingOptions] | None = None,
        **options: Any,
    ) -> list[Result]:
        """Continue several prompts at once; each result is what ``generate`` gives for that prompt alone.

        Each prompt is read by itself, then all are decoded together. sampling: one for each prompt (to draw
        several texts of one prompt, give each its seed).
        """
        if sampling is not None and len(sampling) != len(prompts):
            raise LawcatError(f"There are {len(prompts)} prompts and {len(sampling)} sampling options.")
        each = sampling if sampling is not None else [None] * len(prompts)
        requests = [Request.of(**{**options, "sampling": one}) for one in each]
        core, writers = Core(self.engine, capacity=max(1, len(prompts)), keep=False), []
        for prompt, request in zip(prompts, requests, strict=True):
            context = self.new_context()
            self._append(context, prompt)
            writers.append(self.writer(request, context))
            core.insert(writers[-1])
        texts: dict[Writer, list[str]] = {writer: [] for writer in writers}
        # All prompts first: a pass then writes for as many as there are.
        while advances := core.read() or core.write():
            for advance in advances:
                if advance.error is not None:
                    raise advance.error
                texts[advance.writer].append(advance.text)
        return [writer.result("".join(texts[writer])) for writer in writers]

    def snapshot(self, path: Path | str | None = None, context: Context | None = None) -> Snapshot:
        """The state of the last text (or `context`), written to the file `path` if one is given."""
        context = context or self.context
        if not len(context):
            raise LawcatError("There is nothing to save yet; read or generate something first.")
        tensors = context.state.tensors_of()
        snapshot = Snapshot(self.bundle.sha256, context.tokens[:], context.fed, tensors, context.to_extra())
        if path is not None:
            snapshot.save(path)
        return snapshot

    def restore(self, source: Path | str | Snapshot) -> Context:
        """The context of a snapshot (object or file), which becomes ``model.context``."""
        snapshot = source if isinstance(source, Snapshot) else Snapshot.load(source, self.bundle)
        if snapshot.bundle_sha256 != self.bundle.sha256:
            raise LawcatError("The snapshot belongs to another bundle; load it with the bundle that made it.")
        context = self.new_context()
        context.state.load(snapshot.tensors, snapshot.fed)
        context.tokens = snapshot.tokens[:]
        _restore_conversation(context, snapshot.extra)
        self.context = context
        return context

    @property
    def template(self) -> ChatTemplate:
        """The bundle's chat template; LawcatError if it has none."""
        if self._template is None:
            if not self.bundle.has(CHAT_TEMPLATE):
                raise LawcatError("The bundle has no chat template; use `generate` with a plain prompt.")
            try:
                source = self.bundle.read(CHAT_TEMPLATE, 1 << 20).decode("utf-8")
            except UnicodeDecodeError as error:
                raise LawcatError("The chat template is not UTF-8; export the bundle again.") from error
            self._template = ChatTemplate(source, self._special_tokens())
        return self._template

    def sampling_defaults(self, temperature: float = 0.0) -> SamplingOptions:
        """What the bundle's generation_config.json asks for; `temperature` where it names none."""
        if not self.bundle.has(GENERATION_CONFIG):
            return SamplingOptions(temperature=temperature)
        data = self.bundle.read(GENERATION_CONFIG, 1 << 20)
        return sampling_defaults(files.parse_json(data, GENERATION_CONFIG), temperature)

    def _special_tokens(self) -> dict[str, str]:
        """By name, for the template: the tokenizer's own; a bundle without its settings has only ids."""
        if self.bundle.has(TOKENIZER_CONFIG):
            data = self.bundle.read(TOKENIZER_CONFIG, 32 << 20)
            return special_tokens(files.parse_json(data, TOKENIZER_CONFIG))
        tokens = self.bundle.manifest.tokens
        ids = {"bos_token": tokens.get("bos"), "eos_token": next(iter(tokens["eos"]), None)}
        return {name: "" if token is None else self.tokenizer.token(token) for name, token in ids.items()}

    def encode(self, prompt: Prompt, first: bool = True) -> list[int]:
        """Token ids of a prompt; first: it begins the text, so the tokenizer adds its begin token."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special=first)
        ids = [int(token) for token in prompt]
        if any(not 0 <= token < self.engine.vocab_size for token in ids):
            raise LawcatError(f"Token ids must be from 0 to {self.engine.vocab_size - 1}.")
        return ids

    def _append(self, context: Context, prompt: Prompt) -> None:
        ids = self.encode(prompt, first=not len(context))
        if not ids and context.fed == len(context):
            raise LawcatError("The prompt is empty; give some text to go on from.")
        context.tokens.extend(ids)
        context.messages, context.mark, context.has_base = [], None, True

    def _append_chat(self, context: Context, text: str, history: list[Message]) -> None:
        """Add what `text`, the rendered `history`, has beyond what `context` stands for."""
        if context.mark is not None and context.mark.begins(text):
            fresh = text[context.mark.length :]
        elif not len(context) or (context.has_base and not context.messages):
            fresh = text
        elif context.has_base:
            # The text before the conversation cannot be read again: add the last turn alone.
            before = self.template.render(history[:-1], add_generation_prompt=False)
            fresh = text[len(before) :] if text.startswith(before) else text
        else:
            context.clear()
            fresh = text
        ids = self.tokenizer.encode(fresh, special=False)
        if not ids:
            raise LawcatError("The chat template gives no text for these messages; check it with `info`.")
        context.tokens.extend(ids)
        context.mark = None

    def _feed(self, context: Context, upto: int) -> np.ndarray | None:
        """Run the tokens before `upto` that were not run yet, in chunks; logits [1,V] of the last, if any."""
        if context.fed >= upto:
            return None
        return self.engine.prefill(context.tokens[context.fed : upto], context.state)

    def writer(
        self,
        request: Request,
        context: Context,
        generation: Generation | None = None,
        logits: np.ndarray | None = None,
    ) -> Writer:
        """A sequence for the decoding core, which goes on from `context`. logits: see ``Writer``."""
        generation = generation or Generation(_nothing, request.logprobs is not None)
        return Writer(request, context, generation, self.tokenizer, self.engine.vocab_size, self.eos, logits)

    def _stream(
        self, generation: Generation, context: Context, request: Request
    ) -> Generator[str, None, None]:
        core, writer = Core(self.engine), self.writer(request, context, generation)
        try:
            if request.max_new_tokens == 0:
                self._feed(context, len(context) - 1)
                writer.end("length")
                return
            core.insert(writer)
            while len(core):
                for advance in core.step():
                    if advance.error is not None:
                        raise advance.error
                    if advance.text:
                        yield advance.text
        finally:
            writer.settle()


def _tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer(bundle.read(TOKENIZER), bundle.manifest.vocab_size)


def _nothing(_: Generation) -> Generator[str, None, None]:
    yield from ()


class _busy:  # noqa: N801
    """One call at a time may work on a context: two would interleave their tokens."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __enter__(self) -> None:
        if self.context.busy:
            raise LawcatError(
                "This text is being generated already; finish or close that call, or use fork()."
            )
        self.context.busy = True

    def __exit__(self, *_: object) -> None:
        self.context.busy = False


def _restore_conversation(context: Context, extra: dict[str, Any]) -> None:
    context.has_base = True
    if not extra:
        return
    messages, mark = extra.get("messages"), extra.get("mark")
    if not isinstance(messages, list):
        raise LawcatError("The snapshot's conversation is not valid; make it again.")
    check_messages(messages)
    context.messages = messages
    context.has_base = extra.get("has_base") is not False
    if isinstance(mark, dict) and type(mark.get("length")) is int and isinstance(mark.get("sha256"), str):
        context.mark = Mark(max(0, mark["length"]), mark["sha256"])
