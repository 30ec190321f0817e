"""From what a caller sends to what a graph takes: `image` and `text`."""
