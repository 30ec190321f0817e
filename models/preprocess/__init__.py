"""A caller's pictures and texts -> the inputs of graphs: `image` and `text`."""
