"""Running graphs: `session` (the one door to onnxruntime) and `clock` (named stage durations)."""
