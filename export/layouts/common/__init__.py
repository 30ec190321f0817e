"""Names, tokenizers and towers that several layouts share. Nothing here is a layout of its own."""
