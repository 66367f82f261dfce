"""The kinds of base models that are known, by the class that their `model_index.json` names."""

from typing import Any

from . import (
    class_conditional,
    ddpm,
    dit,
    flux,
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from .objective import Family

FAMILIES: dict[str, Family] = {
    family.pipeline: family
    for family in (
        class_conditional.FAMILY,
        stable_diffusion.FAMILY,
        stable_diffusion_xl.FAMILY,
        stable_diffusion_3.FAMILY,
        flux.FAMILY,
        pixart.ALPHA,
        pixart.SIGMA,
        dit.FAMILY,
        ddpm.FAMILY,
    )
}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline that ``load_base`` has loaded."""
    return FAMILIES[type(pipeline).__name__]
