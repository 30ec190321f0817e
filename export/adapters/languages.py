"""Another text tower, for texts in several languages. Its vectors lie among those of the tower that it replaces, so
that the picture tower and all that was trained with it stay.

Only a net that ships such a tower offers it: the built-in model does (`calmclip.export.nets.mini.multilingual`). The
bundle's manifest names the languages, and the default name of the bundle ends in -multi.

Source: Chen et al. 2022, AltCLIP (arXiv 2211.06679), for another text encoder distilled into a CLIP's vectors.
"""

from pydantic import Field

from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest

NAME = "languages"


class Params(FrozenModel):
    on: bool = Field(description="replace the text tower by one for texts in several languages (the built-in model)")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """``net`` itself if the switch is off. Raises `BadRequest` for a net that has no such tower; as the net does."""
    if not params.on:
        return net
    if NAME not in net.offers:
        raise BadRequest(
            f"languages does not apply to {net.source.model}: it has no text tower for other languages; expected the "
            "built-in model, mini, once. `calmclip distil` trains a text tower for other checkpoints"
        )
    adapted = net.offers[NAME](net)
    return with_note(adapted, f"texts in {', '.join(adapted.languages)}")


ADAPTERS.register("languages")(Adapter(Params, adapt, {"--languages": "on"}))
