"""Several sentences per label, one per template; their unit embeddings are averaged.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4, "prompt ensembling" over embeddings.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.prompts import PROMPTS, Prompts, fill

Template = Annotated[str, Field(pattern=r"\{\}")]


class Params(FrozenModel):
    templates: tuple[Template, ...] = Field(min_length=1)


def sentences(label: str, params: Params) -> Sequence[str]:
    return tuple(fill(template, label) for template in params.templates)


PROMPTS.register("ensemble")(Prompts(Params, sentences))
