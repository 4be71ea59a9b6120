"""Protocols: named presets that fix all under which samples are drawn and measured, but not the model and its sampler.

The same model has been quoted from 40 to 109 generative perplexity: every number here carries its protocol, and
`compare` refuses two that differ. What a preset leaves open (None) is taken from the run and is then written down.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from smdlm.evaluate import OF_A_FILE
from smdlm.evaluate.genppl import GenerativePerplexity, Scorer
from smdlm.evaluate.mauve import Mauve
from smdlm.evaluate.samples import SampleMetric, Samples

# What the program does in one way only; part of every protocol, because other programs do it otherwise.
DRAW = "inverse CDF, uniforms to 2^-56"
NOISE_REMOVAL = "argmax"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How samples are drawn and measured.

    Attributes:
      name: of the preset. version: changes whenever a preset comes to mean something else.
      samples: their number. length: tokens of each. steps: nominal NFE.
      batch: samples of one call of the sampler. With the seed it decides every sample's noise, which models share.
      temperature, top_p, top_p_rule, top_k, refresh: of config.sampling. prompt: always none.
      omega: 'ema', or 'live' beside the averaged backbone, of config.sampling.
      tokenizer: spec of the model's.
      scorer: name (folder) of the model that judges, None for the one that is given, '' for none.
      bos, eos, truncate: of GenerativePerplexity.
      also: of SAMPLE_METRICS, measured beside what the scorer says.
    """

    name: str
    version: int = 1
    samples: int = 5000
    length: int | None = 1024
    steps: int | None = 1024
    batch: int = 16
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 0.9
    top_p_rule: str = "reference"
    top_k: int = 0
    refresh: str = "on_change"
    omega: str = "ema"
    tokenizer: str | None = "gpt2"
    scorer: str | None = "gpt2-large"
    bos: bool = False
    eos: str = "first"
    truncate: int = 0
    also: tuple[str, ...] = ("distinct", "repetition", "blank")

    def __post_init__(self):
        if unknown := [name for name in self.also if name not in OF_A_FILE]:
            raise ValueError(f"--also: got {', '.join(unknown)}, wanted some of {', '.join(OF_A_FILE)}")

    def filled(self, length: int, steps: int, tokenizer: str) -> Protocol:
        """The protocol with what it leaves open taken from a run.

        Raises:
          ValueError: one line; the run has another length or tokenizer.
        """
        found = {"length": length, "tokenizer": tokenizer}
        wrong = [name for name, value in found.items() if getattr(self, name) not in (None, value)]
        if wrong:
            raise ValueError(
                f"protocol {self.name}: got {', '.join(f'{n} {found[n]!r}' for n in wrong)}, wanted "
                f"{', '.join(f'{n} {getattr(self, n)!r}' for n in wrong)}: another model, or another protocol "
                f"({', '.join(PRESETS)})"
            )
        return dataclasses.replace(self, **found, steps=self.steps or steps)

    def sampling(self) -> dict[str, Any]:
        """Fields of config.sampling."""
        names = ("steps", "temperature", "top_p", "top_p_rule", "top_k", "refresh", "omega", "seed")
        return {**{name: getattr(self, name) for name in names}, "count": self.batch, "prompt": ""}

    def drawn(self) -> dict[str, Any]:
        """How samples are drawn, for a record: every field but those of the scorer, which are facts of the metrics."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("scorer", "bos", "eos", "truncate", "also"):
            del fields[name]
        return {**fields, "weights": "ema", "draw": DRAW, "noise_removal": NOISE_REMOVAL}

    def check(self, samples: Samples) -> None:
        """ValueError, one line, unless there are as many samples, of such a length, drawn as the protocol says."""
        if len(samples) != self.samples:
            raise ValueError(f"protocol {self.name}: got {len(samples)} samples, wanted {self.samples}")
        if samples.ids.shape[1] != self.length:
            raise ValueError(
                f"protocol {self.name}: got samples of {samples.ids.shape[1]} tokens, wanted {self.length}: samples of "
                "another run or protocol"
            )
        wanted = {name: value for name, value in self.sampling().items() if name not in ("count", "seed")}
        found = {name: samples.settings.get(name, value) for name, value in wanted.items()}
        wrong = [name for name in wanted if found[name] != wanted[name]]
        if wrong:
            raise ValueError(
                f"protocol {self.name}: got samples drawn with {', '.join(f'{n} {found[n]!r}' for n in wrong)}, wanted "
                f"{', '.join(f'{n} {wanted[n]!r}' for n in wrong)}"
            )

    def metrics(self, scorer: Scorer | None, reference: Samples | None) -> dict[str, SampleMetric]:
        """Metrics by name. reference: human text for MAUVE, None leaves it out.

        Raises:
          ValueError: one line; no scorer, or another one.
        """
        plain = {name: OF_A_FILE[name]() for name in self.also}
        if self.scorer == "":
            return {"entropy": OF_A_FILE["entropy"](), **plain}
        if scorer is None or self.scorer not in (None, scorer.name):
            raise ValueError(
                f"protocol {self.name}: got scorer {scorer and scorer.name}, wanted {self.scorer or 'one'}: "
                f"--scorer=FOLDER/{self.scorer or 'NAME'}"
            )
        judged: dict[str, SampleMetric] = {
            "generative_perplexity": GenerativePerplexity(scorer, self.truncate, bos=self.bos, eos=self.eos)
        }
        if reference is not None:
            judged["mauve"] = Mauve(scorer, reference)
        return {**judged, **plain}


PRESETS: dict[str, Protocol] = {
    preset.name: preset
    for preset in (
        # The soft-masking paper: batch 1 with the reference's cache, to which on_change is equal row by row.
        Protocol("sm2026", omega="live"),
        # ReMDM's table: no omega.
        Protocol("remdm"),
        # MDLM's scripts: no nucleus.
        Protocol("mdlm", steps=1000, top_p=1.0, top_p_rule="standard"),
        # What a laptop does in minutes; judged by whatever scorer is at hand.
        Protocol(
            "tiny", samples=512, length=None, steps=None, batch=64, top_p_rule="standard", refresh="always",
            tokenizer=None, scorer=None,
        ),
        # Sources with a known distribution: the plain distribution of the model, and no scorer.
        Protocol(
            "lab", samples=512, length=None, steps=None, batch=64, top_p=1.0, top_p_rule="standard", refresh="always",
            tokenizer=None, scorer="",
        ),
    )
}  # fmt: skip


def preset(name: str, steps: int | None = None) -> Protocol:
    """A preset, at another NFE if one is given: a point of its curve. ValueError, one line, for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"protocol: got {name!r}, wanted one of {', '.join(PRESETS)}")
    return PRESETS[name] if steps is None else dataclasses.replace(PRESETS[name], steps=steps)
