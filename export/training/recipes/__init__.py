"""`Recipe`: the nets, variants and seeds of one demonstration, a TOML file. The files that ship lie here."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from calmclip.export.training import RECIPES, shipped
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest, suggestion

Settings = Mapping[str, Any]  # of `Training`


class NetRecipe(FrozenModel):
    """``training``: settings that all variants share. ``variants``: name -> other settings. ``start`` among these names
    another variant's net, `FAMILY-VARIANT`, of the same seed. ``quantizer``: params of the quantizer `paper`."""

    training: Settings
    variants: Annotated[Mapping[str, Settings], Field(min_length=1)]
    quantizer: Settings = Field(default_factory=dict)


class Recipe(FrozenModel):
    """``nets``: family -> its nets."""

    summary: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    nets: Annotated[Mapping[str, NetRecipe], Field(min_length=1)]


def load(name: str) -> Recipe:
    """The recipe that ships under ``name``, or the one in the file ``name``. Raises `BadRequest`."""
    file = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if file.parent == RECIPES and name not in shipped():
        raise BadRequest(
            f"there is no recipe {name!r}; {suggestion(name, shipped())} A recipe of yours is a .toml file"
        )
    return _read(file)


@cache
def _read(file: Path) -> Recipe:
    try:
        return Recipe.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(f"{file}: {': '.join((*map(str, first['loc']), first['msg']))}") from None
    except (OSError, ValueError) as error:
        raise BadRequest(f"{file} cannot be read ({error}); expected a recipe, a TOML file") from None
