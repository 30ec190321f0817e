"""The scopes of an API key, and where its file is named: what help needs of `keys`, without pydantic."""

from typing import Literal, get_args

Scope = Literal["read", "write", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
VARIABLE = "CALMCLIP_KEYS"  # the setting with the file's path
