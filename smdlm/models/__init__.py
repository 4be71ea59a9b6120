"""Models by the name that config.model.name gives them."""

from smdlm.models.base import Model
from smdlm.models.dit import DiT

MODELS: dict[str, type[Model]] = {"dit": DiT}
