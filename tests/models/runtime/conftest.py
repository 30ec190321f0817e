"""The compiled op library, as the tests of it see it."""

from tests.models.ops.conftest import library

__all__ = ["library"]
