"""FAMILY prompts: a label -> the sentences that describe it. Their embeddings are averaged (`tasks.texts`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.errors import BundleInvalid
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)


@dataclass(frozen=True)
class Prompts(Generic[P]):
    """``sentences(label, params)`` gives at least one sentence."""

    params: type[P]
    sentences: Callable[[str, P], Sequence[str]]

    def bind(self, params: Mapping[str, Any]) -> Callable[[str], Sequence[str]]:
        """Raises `BundleInvalid` when the manifest's params are not this plug-in's."""
        try:
            checked = self.params.model_validate(params)
        except ValidationError as error:
            raise BundleInvalid(f"prompts params {dict(params)}: {explain(error)}") from None
        return lambda label: self.sentences(label, checked)


PROMPTS: Registry[Prompts[Any]] = Registry("prompts", "calmclip.models.prompts")


def fill(template: str, label: str) -> str:
    """``template`` with its ``{}`` replaced. Not `str.format`: a label may hold braces, a template no code."""
    return template.replace("{}", label)
