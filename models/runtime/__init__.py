"""Running graphs: `session` (the only import of onnxruntime) and `clock` (durations of named stages)."""
