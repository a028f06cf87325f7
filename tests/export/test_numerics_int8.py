"""Quantised products on the worst weights there are. Without torch, so that an emulated processor can run it:

qemu-x86_64 -cpu Haswell python -m pytest tests/export/test_numerics_int8.py      AVX2, no VNNI
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 7])
def test_quantised_products_do_not_saturate_on_the_worst_weights(bits: int, level: int, rows: int) -> None:
    """All weights at one end, all activations at one end: the sum is as large as it can be, and right.

    Kernels for processors without VNNI add pairs of products in 16 bits, which is where such sums saturate.
    """
    K, N, block = 512, 16, 64
    top = (1 << bits) - 1
    for stored in (0, top):
        width = block * bits // 8
        packed = np.full((N, K // block, width), stored | (stored << 4) if bits == 4 else stored, np.uint8)
        scales = np.full((N * K // block,), 0.5, np.float32)
        nodes = [
            helper.make_node(
                "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
                K=K, N=N, bits=bits, block_size=block, accuracy_level=level,
            )
        ]  # fmt: skip
        graph = helper.make_graph(
            nodes,
            "worst",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, K])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, N])],
            [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for value in (1.0, -1.0, 1e4, -1e4, 1e30):
            (got,) = session.run(None, {"x": np.full((rows, K), value, np.float32)})
            exact = value * 0.5 * (stored - (1 << (bits - 1))) * K
            assert np.isfinite(got).all()
            np.testing.assert_allclose(got, exact, rtol=0.01)


@pytest.mark.parametrize("weight", [-64, 63])
def test_integer_products_of_seven_bits_are_exact(weight: int) -> None:
    """Under any settings. With all eight bits (weight 127) an emulated Haswell gives 4,194,176 for
    8,290,560."""
    K = 256
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "w"], ["y"])],
        "worst",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [4, K])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [4, 8])],
        [numpy_helper.from_array(np.full((K, 8), weight, np.int8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"a": np.full((4, K), 255, np.uint8)})
    assert (got == 255 * weight * K).all()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("weight", [-127, 127])
def test_integer_products_of_eight_bits_are_exact_as_the_runner_sets_them(weight: int, rows: int) -> None:
    """The scheme int8-dynamic, with the setting that the runner takes where a processor may saturate."""
    K = 256
    nodes = [
        helper.make_node("MatMulIntegerToFloat", ["a", "w", "s", "c", "z"], ["y"], domain="com.microsoft")
    ]
    constants = {
        "w": np.full((K, 8), weight, np.int8),
        "s": np.float32(1),
        "c": np.ones(8, np.float32),
        "z": np.uint8(128),
    }
    graph = helper.make_graph(
        nodes,
        "worst",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [rows, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for stored in (0, 1, 255):
        (got,) = session.run(None, {"a": np.full((rows, K), stored, np.uint8)})
        assert (got == (stored - 128) * weight * K).all()
