"""The project's own operators: right in every instruction set, and unmoved by graphs that are not."""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from exported import make_bundle, make_student
from native_layers import (
    INPUTS,
    LAYERS,
    PRODUCT_TOKENS,
    PRODUCTS,
    SWIGLU,
    TOKENS,
    Layer,
    cases,
    feeds,
    product_input,
    product_reference,
    reference,
    swiglu_input,
    weights,
)
from tiny_bundle import rewrite_manifest

from lawcat_edge.cli import run
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import native as traced  # noqa: F401 (defines the operators in torch)
from lawcat_edge.runtime import Bundle, Engine, native
from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS, can_run
from lawcat_edge.runtime.bundle.graph_check import check_model
from lawcat_edge.runtime.bundle.manifest import write_manifest
from lawcat_edge.runtime.bundle.verify import verify
from lawcat_edge.runtime.engine.processor import has_vector_products
from lawcat_edge.runtime.errors import LawcatError

HELPERS = Path(__file__).parents[1] / "helpers"
built = pytest.mark.skipif(native.library() is None, reason="the operators are not compiled")
SINKS: dict[str, Any] = {
    "layer_types": ("full_attention", "linear_attention"), "attention_span": 33, "attention_sinks": 3
}  # fmt: skip
BUNDLES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "narrow": ("llama", {"feature_dim": 1, "rope": True}, {"head_dim": 10, "tie_word_embeddings": False}),
    "one": ("llama", {"feature_dim": 3, "window": 1, "window_scaling": "softmax"}, {"attention_bias": True}),
    "large": ("qwen3", {"feature_dim": 8, "window": 150, "rope": True}, {"num_key_value_heads": 3}),
    "hybrid": ("llama", {"feature_dim": 8, "window": 5, **SINKS}, {}),
}
OTHER = ("mistral", {"feature_dim": 9, "window": 4}, {"head_dim": 12, "tie_word_embeddings": False})


def separately(name: str, *words: str, **environment: str) -> str:
    """What a helper prints in a process of its own; a crash fails with the last that it said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LAWCAT_EDGE")}
    path = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1]), clean.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HELPERS / name), *words],
        env={**clean, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("native")
    every: dict[str, Any] = {name: (*case, DEFAULT_OPS) for name, case in BUNDLES.items()}
    every["other"] = (*OTHER, ("portable", "native"))
    for name, (family, settings, changes, ops) in every.items():
        student = make_student(base / f"{name}-t", family, LawcatConfig(**settings), **changes)
        make_bundle(*student, base / name, ops=ops)
    return {name: base / name for name in every}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package had been built where there is no compiler."""
    monkeypatch.setenv("LAWCAT_EDGE_NATIVE", "0")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


# -- the numbers ---------------------------------------------------------------------------------------------

ISAS = ("base", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("base", "dotprod")
ONES = [(isa, threads) for isa in ISAS for threads in (1, 2)]


@pytest.fixture(scope="module", params=ONES, ids=lambda one: f"{one[0]}-{one[1]}")
def outputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    isa, threads = request.param
    path = tmp_path_factory.mktemp("isa") / "out.npz"
    separately("native_layers.py", str(path), str(threads), LAWCAT_EDGE_ISA=isa)
    with np.load(path) as found:
        return dict(found)


@functools.cache
def expected(name: str, T: int, B: int) -> dict[str, np.ndarray]:
    return reference(LAYERS[name], feeds(LAYERS[name], T, B))


@built
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_float64(outputs: dict[str, np.ndarray], name: str) -> None:
    """Every number of tokens and of sequences; the states too, written apart and in place."""
    compared = 0
    for case, _, T, B in cases():
        if not case.startswith(f"{name}/"):
            continue
        for key, want in expected(name, T, B).items():
            for how in ("", "in_place/"):
                got = outputs[f"{case}/{how}{key}"]
                assert got.shape == want.shape
                # written so that a NaN fails too
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (case, how, key)
                compared += 1
    assert compared == len(TOKENS) * 2 * 2 * (5 if LAYERS[name].window else 3)


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_exporter_traces_is_that_layer(name: str) -> None:
    """The operator's form in torch, of which the trace takes the shapes."""
    layer, T, B = LAYERS[name], 7, 3
    given = {key: torch.from_numpy(array) for key, array in {**weights(layer), **feeds(layer, T, B)}.items()}
    operator = (
        torch.ops.lawcat.lawcat_windowed_attention if layer.window else torch.ops.lawcat.lawcat_attention
    )
    numbers = (
        layer.H,
        layer.G,
        layer.window,
        int(layer.max_score),
        int(layer.rope),
        layer.divisor,
        1e-6,
        1e-5,
    )
    arguments = (*(given.get(key) for key in INPUTS), *numbers)
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
    for got, want in zip(operator(*arguments), expected(name, T, B).values(), strict=True):
        assert got.shape == want.shape
        assert np.abs(got.numpy() - want).max() <= 1e-5 * np.abs(want).max()


@built
def test_the_gates_of_that_comparison_are_extreme() -> None:
    """Some features are forgotten at once and others never: the comparison holds at both ends."""
    layer: Layer = LAYERS["gates"]
    fed = feeds(layer, 1, 1)
    fed["packed"][..., (layer.H + layer.G) * layer.d :][..., : layer.d] = 0  # no value: what was is left
    kept = reference(layer, fed)["recurrent_after"][..., : layer.d] / fed["recurrent_state"][..., : layer.d]
    assert (kept < 1e-30).any()
    assert (kept > 0.999).any()


@built
def test_nan_stays_in_its_sequence(outputs: dict[str, np.ndarray]) -> None:
    for name, layer in LAYERS.items():
        y = outputs[f"{name}/nan/y"]
        assert np.isnan(y[0, 4:]).all(), name
        assert np.isfinite(y[1:]).all(), name
        assert np.isnan(outputs[f"{name}/nan/recurrent_after"][0, ..., : layer.d]).all(), name


@built
def test_swiglu_is_that_of_float64(outputs: dict[str, np.ndarray]) -> None:
    for width, tokens in SWIGLU:
        x = torch.from_numpy(swiglu_input(width, tokens))
        torch.library.opcheck(
            torch.ops.lawcat.swiglu.default, (x,), test_utils=("test_schema", "test_faketensor")
        )
        gate, up = np.split(swiglu_input(width, tokens).astype(np.float64), 2, -1)
        want = gate / (1 + np.exp(np.minimum(-gate, 700))) * up
        got = outputs[f"swiglu/{width}/{tokens}"]
        for each in (got, torch.ops.lawcat.swiglu(x).numpy()):
            assert np.abs(each - want).max() <= 1e-6 * np.abs(want).max(), (width, tokens)


@built
def test_a_product_is_that_of_float64(outputs: dict[str, np.ndarray]) -> None:
    """Of 8 and of 4 bits, with offsets and without, few tokens and many.

    Exact where rounding x to 8 bits changes nothing, and elsewhere off by no more than it may be. What is not
    finite stays in its token.
    """
    for (name, case), T, exact in itertools.product(PRODUCTS.items(), PRODUCT_TOKENS, (True, False)):
        want, allowed = product_reference(case, product_input(case, T, exact))
        got, largest = outputs[f"product/{name}/{T}/{exact}"], np.abs(want).max()
        assert got.shape == want.shape
        if exact:
            assert np.abs(got - want).max() <= 3e-6 * largest, (name, T)
        else:
            assert (np.abs(got - want) <= 1.01 * allowed + 1e-6 * largest).all(), (name, T)
    for name, what in itertools.product(PRODUCTS, (np.nan, np.inf)):
        got = outputs[f"product/{name}/{what}"]
        assert np.isnan(got[0, 0]).all(), name
        assert np.isfinite(got[0, 1:]).all(), name


@built
@pytest.mark.parametrize(("isa", "threads"), [("base", 2), *((isa, 1) for isa in ISAS[1:]), (ISAS[-1], 2)])
def test_a_bundle_gives_the_logits_of_its_other_flavours(
    bundles: dict[str, Path], isa: str, threads: int
) -> None:
    """Any number of tokens at once, of one sequence and of three; a trial leaves no trace until accepted."""
    for other, names in (("ort", tuple(BUNDLES)), ("portable", ("other",))):
        folders = [str(bundles[name]) for name in names]
        told = json.loads(separately("native_bundles.py", str(threads), other, *folders, LAWCAT_EDGE_ISA=isa))
        assert list(told) == folders
        for folder, worst in told.items():
            assert all(0 < error < 5e-5 for error in worst.values()), (folder, worst)


# -- what is wrong ends in an error --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def malformed() -> dict[str, str]:
    """What became of each malformed model."""
    lines = separately("native_layers.py", "--malformed").splitlines()
    return dict(line.split(": ", 1) for line in lines)


@built
def test_malformed_graphs_and_inputs_end_in_an_error(malformed: dict[str, str]) -> None:
    """Wrong sizes, types, slots, positions and attributes; nothing is read or written outside of a tensor."""
    assert len(malformed) > 260
    # no numbers in, no numbers out
    harmless = {"SwiGlu of (1, 2, 0)", "SwiGlu of (0, 2, 8)"}
    for name, found in malformed.items():
        if name not in OPTIONAL:
            assert found == "ran" if name in harmless else found.startswith("error: "), (name, found)
    said = "\n".join(malformed.values())
    for reason in (
        "the weights do not fit each other",
        "sizes out of range",
        "must be constants",
        "num_heads, kv_num_heads or window is out of range",
        "the packed product is not",
        "the packed product does not fit",
        "the state does not fit",
        "the rotary tables do not fit",
        "a position is outside",
        "the window's buffers do not fit",
        "a token's slot is outside",
        "an output of the operator is not asked",
        "SwiGlu: the input is not",
        "BlockProduct: a size is out of range",
        "blocks must hold whole chunks",
        "the input is not [B,T,K]",
        "the weights must be constants that fit the product",
        "qk_gamma must be a constant",
    ):
        assert reason in said, reason


# taken for what a product may be without
OPTIONAL = (
    "product, bias as an input, 8 bits",
    "product, bias as an input, 4 bits",
    "product, offsets as an input, 4 bits",
    "product, bias empty axis 0, 8 bits",
    "product, bias empty axis 0, 4 bits",
    "product, offsets empty axis 0, 4 bits",
    "product, offsets empty axis 1, 4 bits",
)


@built
def test_optional_tensors_that_cannot_be_read_are_refused(malformed: dict[str, str]) -> None:
    assert all(malformed[name].startswith("error: ") for name in OPTIONAL)


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize(
    ("op", "domain"), [("Shell", "lawcat_edge"), ("LawcatAttention", "lawcat"), ("SwiGlu", "x")]
)
def test_another_operator_is_refused(bundles: dict[str, Path], op: str, domain: str) -> None:
    graph = _graph(bundles["narrow"] / "model_native.onnx")
    assert check_model(graph.SerializeToString(), "it", lambda name: 1 << 40).suspicious is None
    (first, *_) = (node for node in graph.graph.node if node.domain == native.DOMAIN)
    first.op_type, first.domain = op, domain
    found = check_model(graph.SerializeToString(), "it", lambda name: 1 << 40)
    assert found.suspicious == f"an operator of the domain {domain!r}"


def _read_three_tokens(folder: Path) -> None:
    engine = Engine(Bundle.open(folder), threads=1)
    engine.forward(np.array([[1, 2, 3]]), engine.new_state())


@built
def test_a_bundle_with_a_wrong_native_graph_says_so(bundles: dict[str, Path], tmp_path: Path) -> None:
    """From the command line: one sentence, when the graph is loaded and when it is run."""
    folder = tmp_path / "b"
    shutil.copytree(bundles["large"], folder)
    manifest = Bundle.open(folder).manifest
    whole = (folder / "model_native.onnx").read_bytes()
    for attribute, reason in (("num_heads", "cannot load .*do not fit"), ("window", "failed to run .*fit")):
        graph = _graph(folder / "model_native.onnx")
        for node in graph.graph.node:
            for entry in node.attribute:
                if node.op_type == "LawcatAttention" and entry.name == attribute:
                    entry.i = 0 if attribute == "window" else 6
        (folder / "model_native.onnx").write_bytes(graph.SerializeToString())
        write_manifest(folder, manifest)
        with pytest.raises(LawcatError, match=reason):
            _read_three_tokens(folder)
        (folder / "model_native.onnx").write_bytes(whole)


# -- with them and without -----------------------------------------------------------------------------------


@built
def test_the_runner_takes_them_where_it_has_them(bundles: dict[str, Path]) -> None:
    assert can_run("native")
    assert Engine(Bundle.open(bundles["narrow"]), threads=1).flavour == "native"
    assert [check.name for check in verify(bundles["narrow"])][-2:] == ["parity (ort)", "parity (native)"]


@pytest.mark.parametrize(
    ("asked", "flags", "taken"),
    [
        (None, "avx2 fma f16c", True),
        (None, "avx fma f16c", False),
        ("1", "avx fma f16c", True),
        ("0", "avx2 fma f16c", False),
        ("", "avx fma f16c", False),
    ],
)
def test_they_are_taken_on_processors_that_have_vectors_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, flags: str, taken: bool
) -> None:
    (tmp_path / "_operators.abi3.so").touch()
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    this = functools.partial(has_vector_products, "x86_64", tmp_path / "cpuinfo")
    monkeypatch.setattr(native, "has_vector_products", this)
    monkeypatch.delenv("LAWCAT_EDGE_NATIVE", raising=False)
    if asked is not None:
        monkeypatch.setenv("LAWCAT_EDGE_NATIVE", asked)
    native.library.cache_clear()
    try:
        assert native.library() == (tmp_path / "_operators.abi3.so" if taken else None)
        assert can_run("native") is taken
    finally:
        native.library.cache_clear()


@built
def test_operators_that_cannot_be_loaded_are_an_error(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_operators.so").write_bytes(b"of another processor")
    monkeypatch.setattr(native, "library", lambda: tmp_path / "_operators.so")
    with pytest.raises(LawcatError, match=r"cannot load model_native\.onnx: .*_operators\.so"):
        Engine(Bundle.open(bundles["narrow"]), threads=1)


def test_without_them_the_next_flavour_runs(
    bundles: dict[str, Path], without: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not can_run("native")
    bundle = Bundle.open(bundles["narrow"])
    assert Engine(bundle, threads=1).flavour == "ort"
    assert Engine(Bundle.open(bundles["other"]), threads=1).flavour == "portable"
    last = verify(bundles["narrow"])[-1]
    assert last.name == "parity (native)"
    assert last.detail.startswith("not run: ")
    with pytest.raises(LawcatError, match="lacks the operators of 'native'") as caught:
        Engine(bundle, flavour="native")
    assert "\n" not in str(caught.value)
    assert run(["bench", str(bundles["narrow"]), "--flavour", "native"]) == 2
    said = capsys.readouterr().err
    assert "lacks the operators of 'native'" in said
    assert "Traceback" not in said


def test_without_them_an_export_writes_their_graphs_all_the_same(tmp_path: Path, without: None) -> None:
    """It cannot replay them, so the other flavours' agreement is all that it reports."""
    student = make_student(tmp_path / "t")
    report = make_bundle(*student, tmp_path / "b")
    assert list(report["parity"]) == ["ort"]
    assert set(report["nodes_per_layer"]) == {"ort", "native"}
    native.library.cache_clear()
    os.environ.pop("LAWCAT_EDGE_NATIVE")
    assert verify(tmp_path / "b")[-1].name == "parity (native)"


def test_a_bundle_of_nothing_else_is_refused(bundles: dict[str, Path], tmp_path: Path, without: None) -> None:
    """An export, and a manifest that was written otherwise."""
    student = make_student(tmp_path / "t")
    with pytest.raises(LawcatError, match=r"^Only this package's runner .*`--ops ort,native`\.$"):
        make_bundle(*student, tmp_path / "b", ops=("native",))
    assert not (tmp_path / "b").exists()
    shutil.copytree(bundles["narrow"], tmp_path / "alone")

    def alone(data: dict[str, Any]) -> None:
        data["ops"] = ["native"]
        for part in ("graphs", "min_onnxruntime"):
            data[part] = {"native": data[part]["native"]}

    rewrite_manifest(tmp_path / "alone", alone)
    with pytest.raises(LawcatError, match="lacks the operators of 'native'"):
        Engine(Bundle.open(tmp_path / "alone"))


def test_other_runtimes_get_other_operators(tmp_path: Path) -> None:
    """onnxruntime-genai and ORT format read the flavour ort, whatever stands first."""
    student = make_student(tmp_path / "t", config=LawcatConfig(feature_dim=8, window=5))
    make_bundle(*student, tmp_path / "b", ops=("native", "ort"), ort_format=True)
    manifest = Bundle.open(tmp_path / "b").manifest
    assert set(manifest.graphs["native"]) == {"last", "all"}
    assert {"genai", "ort_format"} <= set(manifest.graphs["ort"])
    stated = json.loads((tmp_path / "b" / "genai_config.json").read_text())
    assert stated["model"]["decoder"]["filename"] == manifest.graphs["ort"]["genai"]
    assert b"LawcatAttention" not in (tmp_path / "b" / manifest.graphs["ort"]["ort_format"]).read_bytes()
    domains = {node.domain for node in _graph(tmp_path / "b" / manifest.graphs["ort"]["genai"]).graph.node}
    assert native.DOMAIN not in domains
