"""lawcat-edge: constant-memory language models for phone-class CPUs.

The rooms: ``lawcat_edge`` (model, distillation, evaluation, command line), ``lawcat_edge.export`` (ONNX),
``lawcat_edge.runtime`` (the device side, free of torch), ``lawcat_edge.calibration`` (ranges and comparison).
Importing this package loads nothing heavy.
"""

import os

# From 1.29 on onnxruntime reports to its maker, over the network and in a database below the home directory,
# from the moment it is imported. Every module of ours imports this one first; the user's own setting stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
