"""A run as a model of EleutherAI's lm-eval (`pip install 'smdlm[lmeval]'`), under the name smdlm:

    python -m smdlm.tools.lmeval run --model smdlm --model_args workdir=runs/tiny,draws=32 --tasks ... --batch_size 8

is `lm_eval run ...` with that name known: lm-eval (0.4.13) looks for models in a list of its own, not in the entry
points of other packages. A program calls `register()` before lm_eval's own functions.

A context is text, whatever it holds, also a literal '[MASK]'. A text without one begins a document: the token that
begins documents stands before it.

A diffusion model has no exact likelihood: a request's is a bound, the mean of `draws` draws of masks on its
continuation. Draw i is the same whatever their number, so that more draws extend fewer, and whatever the batch size.
Each estimate's standard error is kept in WORKDIR/results/lmeval.jsonl beside it: differences within it mean nothing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import smdlm
from smdlm.evaluate.base import Subject
from smdlm.evaluate.code_protocols import before
from smdlm.evaluate.likelihood import Likelihood
from smdlm.evaluate.samples import append
from smdlm.files import local_path
from smdlm.library import Trained
from smdlm.sampling.generate import Answer, Prompt, continued

ESTIMATES = ("two_pass", "one_pass", "next_token")  # the first that a model has is the one reported
SHORTEST = 16  # rows are padded to a power of two of tokens: few programs to compile


class Harness:
    """What lm-eval asks a model for, without lm-eval. Values of --model_args come as strings or numbers."""

    def __init__(
        self,
        workdir: str,
        batch_size: int | str = 8,
        draws: int = 16,
        seed: int = 0,
        tokens: int = 64,
        greedy: bool = False,
        **sampling: Any,
    ):
        """Loads a run.

        Args:
          batch_size: rows of one forward.
          draws: of masks per request, at least 2.
          tokens: of a generated text where a task does not say (max_gen_toks).
          greedy: whether `is_greedy` is found out, by decoding every continuation at temperature 0; else it is False.
          sampling: fields of config.sampling; what is not given is as the run was configured.
        """
        super().__init__()
        if int(draws) < 2:
            raise ValueError(f"draws: got {draws}, wanted at least 2, for a standard error")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, wanted a whole number, at least 1")
        self.model: Trained = smdlm.load(workdir)
        self.errors: Path = local_path("workdir", workdir) / "results" / "lmeval.jsonl"
        self.batch, self.draws, self.seed, self.tokens = int(batch_size), int(draws), int(seed), int(tokens)
        self.greedy, self.sampling = bool(greedy), {k: v for k, v in sampling.items() if k not in OF_LM_EVAL}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """[(log-likelihood of the continuation in nats, is_greedy)] of requests with .args (context, continuation)."""
        pairs = [request.args for request in requests]
        means, _ = self._scored([self._row(*pair) for pair in pairs], pairs)
        return [(float(mean), self._is_greedy(*pair)) for mean, pair in zip(means, pairs, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """[log-likelihood of a whole text in nats], in windows of the canvas's length, each alone."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.model.tokenizer.encode(request.args[0])
            step = self._room(begins=True)
            parts = [ids[i : i + step] for i in range(0, len(ids), step)] or [ids]
            windows += [self._begun(np.zeros(0, np.int32), part) for part in parts]
            owners += [number] * len(parts)
        means, _ = self._scored(windows, [("", requests[number].args[0]) for number in owners])
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, means)
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts behind the contexts of requests with .args (context, {'until', 'max_gen_toks', 'temperature'})."""
        texts = [""] * len(requests)
        for (tokens, cold), numbers in self._alike(requests).items():
            prompts = [continued(requests[i].args[0], self.model.tokenizer, self.seed + i) for i in numbers]
            for i, answer in zip(numbers, self._answers(prompts, tokens, cold), strict=True):
                until = requests[i].args[1].get("until") or []
                texts[i] = before(answer.text, [until] if isinstance(until, str) else until)
        return texts

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.name

    # ----------------------------------------------------------------------------------------------------- likelihood

    def _room(self, begins: bool) -> int:
        """Tokens of a row beside the one that begins a document: before every row of an AR model, and before a text
        without a context."""
        return self.model.length - (begins or self.model.denoiser.model.causal)

    def _row(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """(tokens, how many of them are given); of a context that is too long the end is kept."""
        blank = len(context) - len(context.rstrip())
        if blank:  # tokens of most vocabularies begin with the blank of their word
            context, continuation = context[:-blank], context[-blank:] + continuation
        whole = self.model.tokenizer.encode(context + continuation)
        given = min(len(self.model.tokenizer.encode(context)), len(whole))
        return self._begun(whole[:given], whole[given:])

    def _begun(self, given: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, int]:
        room = self._room(begins=not len(given))
        if len(scored) > room:
            raise ValueError(
                f"loglikelihood: got a continuation of {len(scored)} tokens, wanted at most {room}: a model with a "
                "longer canvas, or another task"
            )
        begins = not len(given) or self.model.denoiser.model.causal
        given = given[max(0, len(given) + len(scored) - room) :]
        if begins:
            given = np.concatenate([[self.model.tokenizer.bos_id], given])
        return np.concatenate([given, scored]).astype(np.int32), len(given)

    def _scored(
        self, rows: Sequence[tuple[np.ndarray, int]], pairs: Sequence[tuple[str, str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(log-likelihoods [N], their standard errors [N]), which are kept, too."""
        sizes = [max(SHORTEST, 1 << (len(tokens) - 1).bit_length()) for tokens, _ in rows]
        order = sorted(range(len(rows)), key=lambda i: sizes[i])
        subject = Subject(
            objective=self.model.experiment.objective,
            params=self.model.params,
            token_bytes=self.model.tokenizer.token_bytes,
            batches=lambda blocks, size: self._batches([rows[i] for i in order], [sizes[i] for i in order]),
            place=self.model.experiment.place,
        )
        with jax.set_mesh(self.model.experiment.mesh):
            draws = [Likelihood(seed=self.seed + i, chain=0).blockwise(subject)[0] for i in range(self.draws)]
        name = next(name for name in ESTIMATES if name in draws[0])
        nll = np.empty((self.draws, len(rows)))
        nll[:, order] = [draw[name] for draw in draws]
        means, errors = -nll.mean(0), nll.std(0, ddof=1) / np.sqrt(self.draws)
        facts = {"estimate": name, "draws": self.draws, "seed": self.seed}
        append(
            self.errors,
            (
                {"context": a, "continuation": b, "loglikelihood": float(mean), "standard_error": float(error), **facts}
                for (a, b), mean, error in zip(pairs, means, errors, strict=True)
            ),
        )
        return means, errors

    def _batches(
        self, rows: Sequence[tuple[np.ndarray, int]], sizes: Sequence[int]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """Rows in their order, padded on the right, in batches of one size; none is filled up with rows that do not
        count, so that a row's number, which decides its noise, is the same in every batch size."""
        start = 0
        while start < len(rows):
            end = start + 1
            while end < min(len(rows), start + self.batch) and sizes[end] == sizes[start]:
                end += 1
            shape = (end - start, min(sizes[start], self.model.length))
            tokens, attend, given = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
            for i, (ids, count) in enumerate(rows[start:end]):
                tokens[i, : len(ids)], attend[i, : len(ids)], given[i, :count] = ids, True, True
            if self.model.denoiser.model.causal:  # what counts; what lies behind is not seen anyway
                attend, frozen = attend & ~given, {}
            else:
                frozen = {"frozen": given}
            yield {"tokens": tokens, "attend": attend, "valid": np.ones(len(tokens), bool), **frozen}
            start = end

    # ----------------------------------------------------------------------------------------------------- generation

    def _alike(self, requests: Sequence[Any]) -> dict[tuple[int, bool], list[int]]:
        """{(tokens, whether at temperature 0): numbers of the requests} that are answered together."""
        found: dict[tuple[int, bool], list[int]] = {}
        for number, request in enumerate(requests):
            given = request.args[1]
            tokens = min(int(given.get("max_gen_toks", self.tokens)), self.model.length - 1)
            cold = not given.get("do_sample", True) or given.get("temperature") == 0
            found.setdefault((tokens, cold), []).append(number)
        return found

    def _answers(self, prompts: Sequence[Prompt], tokens: int, cold: bool) -> list[Answer]:
        """What the model writes behind prompts; of one that is too long the end is kept."""
        sampling = {**self.sampling, "temperature": 0.0} if cold else self.sampling
        room = self.model.length - tokens
        kept = [dataclasses.replace(prompt, ids=prompt.ids[max(0, len(prompt.ids) - room) :]) for prompt in prompts]
        fields = {"block": 0, "cache": "none", **sampling}
        return self.model.answer(kept, new_tokens=tokens, batch_size=self.batch, **fields).answers

    def _is_greedy(self, context: str, continuation: str) -> bool:
        if not self.greedy:
            return False
        row, given = self._row(context, continuation)
        prompt = continued(context, self.model.tokenizer, self.seed)
        (answer,) = self._answers([dataclasses.replace(prompt, ids=row[:given], ends=())], len(row) - given, True)
        return np.array_equal(answer.ids, row[given:])


OF_LM_EVAL = ("max_batch_size", "device", "trust_remote_code")  # what lm-eval hands to every model


def register() -> type:
    """Makes lm-eval know the name smdlm. ImportError, one line, without lm-eval."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(f"lm-eval: got {error}, wanted it installed: pip install 'smdlm[lmeval]'") from error
    return register_model("smdlm")(type("SmdlmLM", (Harness, LM), {}))


def main() -> None:
    try:
        register()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
