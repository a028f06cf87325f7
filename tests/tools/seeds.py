"""Small whole artefacts as the seeds of the fuzz corpus: python tests/tools/seeds.py"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from fuzz_targets import ADAPTER, STATE  # noqa: E402
from tiny_bundle import TEMPLATE, build_tiny_bundle  # noqa: E402

from lawcat_edge.calibration.histogram import Histogram  # noqa: E402
from lawcat_edge.calibration.ranges import Ranges  # noqa: E402
from lawcat_edge.distill.settings import DistillSettings  # noqa: E402
from lawcat_edge.export.schemes import SCHEMES  # noqa: E402


def seeds(folder: Path) -> dict[str, list[bytes]]:
    import onnx
    from safetensors.numpy import save

    bundle = build_tiny_bundle(folder / "bundle", window=2, rope=True, span=6)
    tensor = onnx.helper.make_tensor("w", 1, [2, 3], [0.0] * 6)
    far = onnx.TensorProto(name="f", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "16")):
        far.external_data.add(key=key, value=value)
    nodes = [onnx.helper.make_node("Add", ["w", "f"], ["y"], name="n", domain="com.microsoft")]
    graph = onnx.helper.make_graph(nodes, "g", [], [], [tensor, far])
    header = {
        "bundle": "0" * 64, "tokens": 3, "fed": 2, "shapes": [list(t.sizes(2)) for t in STATE],
        "extra": {"messages": [{"role": "user", "content": "x"}], "mark": None, "has_base": True},
    }  # fmt: skip
    numbers = np.arange(3, dtype="<u4").tobytes() + np.arange(14, dtype="<f4").tobytes()
    shapes = {
        "conv_q": (2, 2), "conv_k": (2, 2), "feature": (1, 2, 2), "gate_a": (4, 1), "gate_b": (1, 4),
        "gate_bias": (4,),
    }  # fmt: skip
    stored = save({f"layers.0.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()})
    histogram = Histogram()
    histogram.add(np.array([-1.0, 0.5, 3.0], np.float32))
    found = Ranges(
        {"teacher_sha256": "a", "adapter_sha256": None, "bundle_sha256": "b"},
        {"head": histogram}, {"head": [3.0]}, 3, ["t"],
    )  # fmt: skip
    found.save(folder / "ranges.json")
    chat: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    }
    chat |= {"stream": True, "stream_options": {"include_usage": True}, "seed": 1, "logprobs": True}
    body: dict[str, Any] = {
        "prompt": [1, 2],
        "max_tokens": 4,
        "stop": ["a"],
        "temperature": 0.5,
        "n": 1,
        "top_p": 0.9,
    }
    geometry: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    geometry |= {"intermediate_size": 8, "vocab_size": 8, "rms_norm_eps": 1e-5}
    geometry |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e4}
    wide = "{% set ns = namespace(n=0) %}{% for m in messages if m.role in ['user'] %}{{ m.content | trim }}"
    wide += "{% set ns.n = ns.n + 1 %}{% endfor %}{% macro f(x) %}{{ x ~ '!' }}{% endmacro %}{{ f(ns.n) }}"
    wide += (
        "{% set a %}{{ [1, 2] | sum }}{% endset %}{{ a | tojson }}{{ 'x' * 3 }}{{ raise_exception('no') }}"
    )
    return {
        "manifest": [(bundle / "lawcat_bundle.json").read_bytes()],
        "onnx_graph": [onnx.helper.make_model(graph).SerializeToString()],
        "snapshot": [json.dumps(header).encode() + b"\0\0" + numbers],
        "safetensors": [stored[8:].replace(b"}}", b"}}\0\0", 1)],
        "adapter_config": [json.dumps({**ADAPTER, "tensors_sha256": "0" * 64}).encode()],
        "ranges": [(folder / "ranges.json").read_bytes()],
        "template": [TEMPLATE.encode(), wide.encode()],
        "request": [json.dumps(chat).encode(), json.dumps(body).encode()],
        "settings": [
            *(json.dumps(scheme.to_dict()).encode() for scheme in SCHEMES.values()),
            json.dumps(DistillSettings().to_dict()).encode(),
            json.dumps(geometry).encode(),
        ],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, values in seeds(Path(place)).items():
            target = HERE.parent / "fuzz_corpus" / name
            target.mkdir(parents=True, exist_ok=True)
            for i, value in enumerate(values):
                (target / f"seed-{i}").write_bytes(value)
