"""onnxruntime behind a bundle: sessions, and the state that they read and write."""
