"""Our ONNX operators; README.md explains them. `table` lists them."""
