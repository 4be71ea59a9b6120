"""Every command and snippet of README and docs: flags, fields, files and extras exist, and the snippets run.

What a command does is tested elsewhere; here it is read as its program would read it, and nothing is started but the
launch scripts, dry.
"""

import ast
import dataclasses
import os
import re
import shlex
import subprocess

import jax
import pytest
from chat_test import write_folder
from conftest import ROOT, make_params

import smdlm
from smdlm import command
from smdlm.build import assemble
from smdlm.config import CHOICES, SECTIONS, read
from smdlm.convert import __main__ as convert
from smdlm.data import prepare
from smdlm.data.tokenizer import make_tokenizer
from smdlm.evaluate import sandbox
from smdlm.mesh.rules import MeshConfig
from smdlm.study.plan import Study

PAGES = {page.name: page.read_text("utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
STARTS = ("python -m ", "pip install ", "pytest", "launch/", "mkdocs ", "export ")
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")
POD = {"TPU_NAME": "pod", "TPU_ZONE": "z", "TPU_TYPE": "v5litepod-16", "TPU_VERSION": "image", "MOUNT": "mount it"}


def commands(text):
    """Shell lines of fenced blocks and of code in prose and tables, one program each."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines += [span for span in spans if re.sub(r"^([A-Z_]+=\S* )+", "", span).startswith(STARTS)]
    for line in lines:
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and ENVIRONMENT.fullmatch(words[0]):
                words = words[1:]
            if words:
                yield words


ALL = [(page, words) for page, text in PAGES.items() for words in commands(text)]


def defined(*modules):
    """Names of the flags that the sources of modules define."""
    source = "".join((ROOT / "smdlm" / f"{module}.py").read_text("utf-8") for module in modules)
    return set(re.findall(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?(\w+)"', source))


def settings_of(file, overrides):
    """The config of a command; ValueError as its program raises it."""
    settings, given = command.load_config(ROOT / file).to_dict(), []
    for name, value in overrides.items():
        section, field = name.split(".")
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            pass  # text
        settings[section] = {**settings.get(section, {}), field: value}
        given.append(name)
    return read(settings, given)


def check_flags(words, known):
    """{flag: value} of words, all of them known; the words without '--' beside them."""
    flags, rest = {}, []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            assert name.startswith("config.") or name in known, f"--{name}: {sorted(known)}"
            flags[name] = value
        else:
            rest.append(word)
    return flags, rest


def check_main(words):
    flags, rest = check_flags(words, defined("main", "command", "score", "generation") | {"help"})
    assert flags.get("mode", "train") in command.MODES
    assert not rest or flags["mode"] == "compare"
    if "config" in flags and flags["config"] != "FILE":
        fields = {name.removeprefix("config."): value for name, value in flags.items() if name.startswith("config.")}
        settings_of(flags["config"], fields)
    else:
        assert flags.keys() & {"mode", "distributed", "help", "config"}


def check_module(module, words):
    """Its own parser where it can be had; else the names of the flags in its source."""
    if module == "smdlm.main":
        check_main(words)
    elif words == ["--help"]:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    elif module == "smdlm.convert":
        upper = {"KIND": "mdlm"}  # a placeholder of the reader's
        convert.check_flags(convert.parser().parse_args([upper.get(word, word) for word in words]))
    elif module == "smdlm.data.prepare":
        if words:  # else the program is only named
            prepare._parser().parse_args(words)
    elif module == "smdlm.tools.aot":
        flags, _ = check_flags(words, defined("tools/aot/__main__", "command"))
        assert not flags or settings_of(flags["config"], {})
    elif module == "smdlm.tools.lmeval":
        assert words[0] == "run"  # the rest is lm-eval's
    else:
        check_flags(words, defined(module.removeprefix("smdlm.").replace(".", "/")))


def check(words):
    program, *rest = words
    if program == "python":
        assert rest[0] == "-m"
        check_module(rest[1], rest[2:])
    elif program == "pip":
        text = (ROOT / "setup.py").read_text("utf-8")
        for word in (word for word in rest[1:] if not word.startswith("-")):
            extra = re.fullmatch(r"(?:\.|smdlm)\[(.+)\]", word)
            for name in extra.group(1).split(",") if extra else ():
                assert f'"{name}": [' in text, name
            assert extra or word == "." or word.partition("==")[0] in text or word in ("jax[k8s]", "xprof"), word
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
    elif program.startswith("launch/"):
        if not rest:
            assert (ROOT / program).is_file()
            return
        environment = {**os.environ, **POD, "LAUNCHER": "gpu"}
        dry = [ROOT / program, *rest, *(() if "--dry-run" in rest else ("--dry-run",))]
        done = subprocess.run(dry, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        for line in done.stderr.splitlines():
            if " -m smdlm.main " in line and line.startswith("+ ") and "pkill" not in line:
                check_main(shlex.split(line.partition(" -m smdlm.main ")[2]))
    else:
        assert program in ("mkdocs", "export", "xprof"), program


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_what_their_programs_take(page):
    for words in [words for name, words in ALL if name == page]:
        try:
            check(words)
        except (AssertionError, ValueError, SystemExit) as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


def test_commands_were_found():
    assert len(ALL) > 100 and len({words[2] for _, words in ALL if words[0] == "python"}) >= 10
    readme = PAGES["README.md"].splitlines()
    assert "pip install -e . && python -m smdlm.main --config=configs/tiny.py" in readme
    assert "pip install -e '.[test]' && pytest" in readme


@pytest.mark.parametrize("page", PAGES)
def test_fields_in_prose_exist(page):
    """`--config.section.field` and `section.field` of a config section."""
    known = {
        f"{section}.{field.name}"
        for section, cls in SECTIONS.items()
        for one in (cls, *(c for choice in CHOICES.get(section, {}).values() for c in choice.table.values()))
        for field in dataclasses.fields(one)
    }
    known |= {f"study.{field.name}" for field in dataclasses.fields(Study)}
    known |= {f"{section}.{field}" for section, choices in CHOICES.items() for field in choices}
    own = "|".join([*SECTIONS, "study"])
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)):
        found = re.findall(rf"--config\.(\w+\.\w+)|^((?:{own})\.[a-z]\w+)(?:=.*)?$", span)
        for names in found:
            (name,) = filter(None, names)
            if not (ROOT / "smdlm" / name).exists() and name != "section.field":
                assert name in known or hasattr(smdlm.Trained, name.removeprefix("model.")), span


# ------------------------------------------------------------------------------------------------------------- snippets

SNIPPETS = {page: re.findall(r"^```python([^\n]*)\n(.*?)^```$", text, re.M | re.S) for page, text in PAGES.items()}
ELSEWHERE = ("extending.md",)  # tests/extending_test.py
QUOTED = (" title=", " skip:")


SETTINGS = {
    "model": {"width": 16, "depth": 1, "heads": 2, "cond": 8, "dropout": 0.0, "vocab_multiple": 1},
    "data": {"source": "stdlib:docstrings", "seq_len": 160, "batch_size": 2},
    "softmask": {"scale": 0.4, "centre": -2.0, "steepness": 2.0},
    "train": {"steps": 1},
    "sampling": {"steps": 4},
    "generate": {"new_tokens": 32, "bucket": 16, "batch_size": 2},
    "eval": {"chain": 0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With random weights, a canvas that is long enough for all pages and a tokenizer that knows chats."""
    spec = f"hf:{write_folder(tmp_path_factory.mktemp('snippets') / 'tokenizer')}"
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "tokenizer": spec}}
    mesh = MeshConfig(data=1).make(jax.devices()[:1])
    assembled = assemble(read(settings), make_tokenizer(spec), mesh, None)
    return smdlm.Trained(assembled, make_params(assembled.denoiser), 0, settings)


WITH_SNIPPETS = [page for page, found in SNIPPETS.items() if found and page not in ELSEWHERE]
SLOW = ("generation.md",)  # two programs that no other page has


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in WITH_SNIPPETS]
)
def test_snippets_run(page, model, monkeypatch, tmp_path, capsys):
    """As they stand there, one after another, on a small model in the place of whatever run they name."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(smdlm, "load", lambda workdir, **_: asked.append(workdir) or model, raising=False)
    names = {"smdlm": smdlm}
    for kind, code in SNIPPETS[page]:
        runs = not kind.startswith(QUOTED) and not ("sandbox" in code and not isolated())
        if runs:
            exec(compile(code, page, "exec"), names)
        elif not kind.startswith(" title="):
            ast.parse(code)
    assert all(isinstance(workdir, str) and workdir for workdir in asked)
    if page == "README.md":
        samples, infilled, value, *_ = capsys.readouterr().out.splitlines()
        assert samples.startswith("['Return the ") and value.startswith("Value(mean=")
        assert infilled.startswith("Return ") and infilled.endswith(" of the list.")
        assert names["hidden"].shape == (1, len("Return"), 16)


def isolated():
    """Whether programs can be isolated here."""
    try:
        return sandbox.check("def f(x): return x\n", timeout_s=10, tests="assert f(1) == 1").passed
    except (OSError, RuntimeError, ValueError):
        return False
