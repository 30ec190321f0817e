"""Bundles and their tasks: the package that export and service share. It imports neither torch nor HTTP."""

import os

# ONNX Runtime's wheels record and send usage data unless this is set before their import. All imports of onnxruntime in
# calmclip come after this package.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
