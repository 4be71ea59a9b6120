"""Soft-masked diffusion language models in JAX/Flax.

model = smdlm.load("runs/tiny")
model.sample("Return the ", count=4, steps=64, seed=0)
model.infill("Return ____ of the list.", tokens=12)
model.generate(["Return the ", "Return [MASK] of the list."], new_tokens=64).answers[0].text
model.chat("What is a list?")   # where the tokenizer has a chat template
model.score(["Return a copy of the list."])
model.denoiser, model.params    # for those who go on in JAX
"""

from __future__ import annotations

from typing import Any

from smdlm import memory, program

memory.use_huge_pages()
if program.starting():
    program.end_by_one_line()

__all__ = ["Trained", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: programs set up memory and devices before anything of the package touches jax.
    if name in __all__:
        from smdlm import library

        return getattr(library, name)
    raise AttributeError(f"module 'smdlm' has no attribute {name!r}")
