"""Our ONNX operators: `spec` (what each promises), `reference` (each in plain numpy, the oracle)."""
