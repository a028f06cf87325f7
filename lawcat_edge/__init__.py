"""lawcat-edge: constant-memory language models for phone-class CPUs.

The rooms: ``lawcat_edge`` (model, distillation, evaluation, command line), ``lawcat_edge.export`` (ONNX),
``lawcat_edge.runtime`` (the device side, free of torch), ``lawcat_edge.calibration`` (ranges and comparison).
Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
