"""Models by the name that config.model.name gives them."""

from smdlm.models.base import Model
from smdlm.models.decoder import Decoder
from smdlm.models.dit import DiT
from smdlm.models.gpt2 import GPT2
from smdlm.models.lora import ADAPTERS

__all__ = ["ADAPTERS", "MODELS", "Model"]

MODELS: dict[str, type[Model]] = {"dit": DiT, "decoder": Decoder, "gpt2": GPT2}
