"""One sentence per label, by one template.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4: "A photo of a {label}."
"""

from collections.abc import Sequence

from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.prompts import PROMPTS, Prompts, fill


class Params(FrozenModel):
    template: str = Field("a photo of a {}.", pattern=r"\{\}")


def sentences(label: str, params: Params) -> Sequence[str]:
    return (fill(params.template, label),)


PROMPTS.register("single")(Prompts(Params, sentences))
