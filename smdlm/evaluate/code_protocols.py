"""The three ways in which diffusion models have been measured on code; numbers of two of them are not comparable.

`ibm`: the soft-masking paper's fork of lm-eval: chat, the answer begun for the model, the longest program that parses.
`dream_coder`: EvalPlus as Dream-Coder's repository runs it: its chat prompts and tests.
`fast_dllm`: lm-eval's plain prompts for a base model, block-wise decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smdlm.evaluate.code_tasks import SETS, Task, sanitize

ENDS = ("<|endoftext|>",)  # where every model's text ends
FEWSHOT = ("MBPP/2", "MBPP/3", "MBPP/4")  # the examples of lm-eval's mbpp
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
      user: the user's message of a chat, None for a plain text without a template.
      prefix: the beginning of the answer, or the plain text, which the model continues.
    """

    user: str | None
    prefix: str

    @property
    def text(self) -> str:
        """The whole context. Of a chat in the template of Qwen and Dream, with their default system message."""
        if self.user is None:
            return self.prefix
        turns = (("system", "You are a helpful assistant."), ("user", self.user))
        begun = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
        return f"{begun}<|im_start|>assistant\n{self.prefix}"


@dataclasses.dataclass(frozen=True)
class Draw:
    """How texts are drawn.

    Attributes:
      tokens: of every text. steps: nominal NFE.
      seed: of the run; numbers: of the texts, one each, so that a text's noise does not depend on its batch.
      temperature, top_p, policy, block: of the protocol; block None for no blocks.
    """

    tokens: int
    steps: int
    seed: int
    numbers: tuple[int, ...]
    temperature: float
    top_p: float
    policy: str
    block: int | None


@dataclasses.dataclass(frozen=True)
class CodeProtocol:
    """What is fixed but the model and its sampler.

    Attributes:
      name, version: the version changes whenever the protocol comes to mean something else.
      tokens: {set: tokens of an answer}; the sets that it is defined for. The full NFE is one step per token.
      temperature, top_p, policy, block: how answers are drawn.
      timeout_s: for the tests of one answer.
    """

    name: ClassVar[str]
    tokens: ClassVar[Mapping[str, int]]
    version: int = 1
    temperature: float = 0.1
    top_p: float = 0.9
    policy: str = "entropy"
    block: int | None = None
    timeout_s: float = 3.0

    def check_set(self, set_name: str) -> None:
        if set_name not in self.tokens:
            raise ValueError(
                f"--set: got {set_name!r}, wanted one of {', '.join(self.tokens)} for --protocol={self.name}"
            )

    def steps(self, set_name: str, share: float) -> int:
        """The nominal NFE at a share of one step per token. ValueError unless it is a whole number."""
        steps = share * self.tokens[set_name]
        if not 0 < share <= 1 or steps != int(steps):
            raise ValueError(
                f"--nfe: got {share}, wanted a share of {self.tokens[set_name]} tokens that is a whole number of "
                "steps, e.g. 1/4"
            )
        return int(steps)

    def draw(self, set_name: str, steps: int, seed: int, numbers: tuple[int, ...]) -> Draw:
        tokens = self.tokens[set_name]
        return Draw(tokens, steps, seed, numbers, self.temperature, self.top_p, self.policy, self.block)

    def facts(self, set_name: str, steps: int) -> dict[str, Any]:
        """For a record: equal in all results that may be compared."""
        return {
            "name": self.name,
            "harness": self.name,  # a name alone keeps no two results apart
            **dataclasses.asdict(self),
            "set": set_name,
            "length": self.tokens[set_name],
            "steps": steps,
            "set_tasks": SETS[set_name].tasks,
        }

    def prompt(self, set_name: str, task: Task, outside: Mapping[str, Task]) -> Prompt:
        raise NotImplementedError

    def cut(self, set_name: str, text: str) -> str:
        """The text up to the first of what ends an answer."""
        raise NotImplementedError

    def program(self, set_name: str, task: Task, answer: str) -> str:
        raise NotImplementedError

    def tests(self, set_name: str, task: Task) -> str:
        return task.tests

    def answer(self, set_name: str, task: Task) -> str:
        """The reference solution in the form in which a model would give it."""
        raise NotImplementedError


def _mbpp_question(task: Task) -> str:
    """lm-eval's, with the three asserts that are shown."""
    asserts = "\n".join(task.asserts[:3])
    start = "You are an expert Python programmer, and here is your task:"
    return f"{start} {task.prompt} Your code should pass these tests:\n\n{asserts}"


def before(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text


@dataclasses.dataclass(frozen=True)
class Ibm(CodeProtocol):
    """0-shot chat; HumanEval's answer begins with the prompt itself, MBPP is tested by the three asserts shown."""

    name = "ibm"
    tokens = {"humaneval": 768, "humaneval_plus": 768, "mbpp": 512, "mbpp_plus": 512}

    def prompt(self, set_name: str, task: Task, outside: Mapping[str, Task]) -> Prompt:
        begun = "Here is the completed function:\n```python\n"
        if not task.asserts:
            user = (
                f"Write a solution to the following problem and make sure that it passes the tests:\n```{task.prompt}"
            )
            return Prompt(user, f"{begun}{task.prompt}\n")
        return Prompt(_mbpp_question(task), begun)

    def cut(self, set_name: str, text: str) -> str:
        mbpp = set_name.startswith("mbpp")
        ends = ("```",) if mbpp else ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|im_end|>")
        return before(text, ENDS + ends)

    def program(self, set_name: str, task: Task, answer: str) -> str:
        if task.asserts:
            return answer
        code = answer.split("```python\n", 1)[-1].split("```")[0]
        return sanitize(f"{task.prompt}\n{code}", task.entry_point, lines=100)

    def tests(self, set_name: str, task: Task) -> str:
        return "\n".join(task.asserts[:3]) or task.tests

    def answer(self, set_name: str, task: Task) -> str:
        return f"{task.solution}\n```\n"


@dataclasses.dataclass(frozen=True)
class DreamCoder(CodeProtocol):
    """EvalPlus, chat: base and extra tests of the + sets; every test of a task within one limit."""

    name = "dream_coder"
    tokens = {"humaneval": 512, "humaneval_plus": 512, "mbpp_plus": 512}
    timeout_s: float = 60.0

    def prompt(self, set_name: str, task: Task, outside: Mapping[str, Task]) -> Prompt:
        problem = task.prompt
        if task.asserts and not problem.startswith('"""'):  # EvalPlus's own file has it in this form
            problem = f'"""\n{problem}\n{task.asserts[0]}\n"""'
        return Prompt(f"{INSTRUCTION}\n```\n{problem.strip()}\n```\n", f"{RESPONSE}\n```python\n")

    def cut(self, set_name: str, text: str) -> str:
        return before(text, (*ENDS, "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(", "\n```\n"))

    def program(self, set_name: str, task: Task, answer: str) -> str:
        return sanitize(answer, task.entry_point, keep="first")

    def answer(self, set_name: str, task: Task) -> str:
        whole = task.solution if task.asserts else task.prompt + task.solution
        return f"{whole}\n```\n"


@dataclasses.dataclass(frozen=True)
class FastDllm(CodeProtocol):
    """A base model continues the prompt; MBPP with the three examples of lm-eval, which must be in the file."""

    name = "fast_dllm"
    tokens = {"humaneval": 256, "mbpp": 256}
    temperature: float = 0.0
    top_p: float = 1.0
    policy: str = "threshold"
    block: int | None = 32

    def prompt(self, set_name: str, task: Task, outside: Mapping[str, Task]) -> Prompt:
        if not task.asserts:
            return Prompt(None, task.prompt)
        if missing := [name for name in FEWSHOT if name not in outside]:
            raise ValueError(f"--tasks: got no {', '.join(missing)}, wanted the whole of MBPP: its examples are shown")
        shots = [f"{self._asked(outside[name])}{outside[name].solution}\n[DONE]\n\n" for name in FEWSHOT]
        return Prompt(None, "".join(shots) + self._asked(task))

    def _asked(self, task: Task) -> str:
        return f"{_mbpp_question(task)}\n[BEGIN]\n"

    def cut(self, set_name: str, text: str) -> str:
        ends = ("[DONE]",) if set_name == "mbpp" else ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
        return before(text, ENDS + ends)

    def program(self, set_name: str, task: Task, answer: str) -> str:
        return answer if task.asserts else sanitize(f"{task.prompt}\n{answer}", task.entry_point, keep="first")

    def answer(self, set_name: str, task: Task) -> str:
        return f"{task.solution}\n[DONE]" if task.asserts else task.solution


CODE_PROTOCOLS: dict[str, CodeProtocol] = {found.name: found for found in (Ibm(), DreamCoder(), FastDllm())}


def code_protocol(name: str) -> CodeProtocol:
    """ValueError, one line, for an unknown name."""
    if name not in CODE_PROTOCOLS:
        raise ValueError(f"--protocol: got {name!r}, wanted one of {', '.join(CODE_PROTOCOLS)}")
    return CODE_PROTOCOLS[name]
