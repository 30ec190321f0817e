"""What several nets share. Nothing here is a net of its own."""
