"""Running graphs: `session` (the only file that imports onnxruntime) and `clock` (named stage durations)."""
