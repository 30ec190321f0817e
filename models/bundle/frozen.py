"""What records outside of a manifest share with it. This module imports pydantic alone: help texts wait for it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]  # a BCP 47 tag, such as de or zh-Hant


class FrozenModel(BaseModel):
    """Immutable; numbers are finite; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants", protected_namespaces=()
    )
