"""What sampling in few steps costs in the laboratory even with an ideal denoiser: a bound to read a model's excess by.

python -m smdlm.tools.ideal markov:64:1:0 --length=64 --steps=8,16,32,64
"""

from __future__ import annotations

import argparse

import numpy as np

from smdlm.data.lab import law
from smdlm.evaluate.lab import ideal_samples, values_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smdlm.tools.ideal", description=__doc__.splitlines()[0])
    parser.add_argument("law", help="what stands behind 'lab:' in data.source")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--count", type=int, default=512, help="samples")
    parser.add_argument("--steps", default="8,16,32,64", help="numbers joined by commas")
    given = parser.parse_args()
    try:
        true = law(given.law)
    except ValueError as error:
        parser.error(str(error))
    letters = np.array([ord(character) for character in true.alphabet])
    for steps in map(int, given.steps.split(",")):
        ids = letters[ideal_samples(true, given.count, given.length, steps, seed=0)]
        values = values_of(true, ids)
        name = "lab_excess_nats" if "lab_excess_nats" in values else "lab_untrue"
        value = values[name]
        print(f"{steps:5} steps  {name} {value.mean:.3f} ± {value.interval:.3f}", flush=True)


if __name__ == "__main__":
    main()
