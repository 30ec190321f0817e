"""FAMILY endpoints, a module per task: parse, call the engine, shape the answer. They do not catch, count or time."""

from calmclip.service.endpoints import ENDPOINTS

__all__ = ["ENDPOINTS"]
