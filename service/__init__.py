"""calmclip over HTTP: bundles -> answers. The only place where FastAPI is imported; free of torch."""
