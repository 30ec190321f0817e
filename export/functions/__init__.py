"""Our operators as ONNX local functions of standard ops: how a bundle runs without the compiled library."""
