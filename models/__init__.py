"""What a bundle is and does: the ground that export and service share. Free of torch and of HTTP."""

import os

# ONNX Runtime's wheels keep a file of what is run and send it to their maker unless told otherwise. They look when they
# are imported, which nothing of ours does before this package.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
