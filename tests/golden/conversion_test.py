"""Names and layouts of the reference's checkpoints, and their way through ours and back."""

import dataclasses

import pytest

from golden.arrays import Group, compare
from golden.models import MDLM
from smdlm.convert import __main__ as convert
from smdlm.convert import files, mdlm, mdlm_export

CONVERSION = Group("conversion", 0)


def test_names(diffusion):
    """Our table is the reference's state_dict and its unnamed EMA list, in order."""
    lines = MDLM.need("names.txt").read_text().splitlines()
    middle = next(i for i, line in enumerate(lines) if i and line.startswith("#"))
    order = [line.split(" ", 1) for line in lines[1:middle]]
    listed = [line.split(" ", 1)[1] for line in lines[middle + 1 :]]
    assert listed == [f"{leaf.source} {leaf.shape}" for leaf in mdlm.table(diffusion.model)]
    exported = mdlm_export.export_tree(diffusion.params, {"model": dataclasses.asdict(diffusion.model)}, "mdlm").tensors
    assert [[name, f"{value.shape} {value.dtype}"] for name, value in exported.items()] == order
    if MDLM.has("ema.safetensors"):  # the list under its names
        averaged = mdlm.from_tree(diffusion.ema["backbone"], diffusion.model)
        for name, value in files.load(MDLM.path / "ema.safetensors").tensors.items():
            compare(CONVERSION, f"ema {name}", averaged[name], value)


@pytest.mark.parametrize("name", MDLM.names(".ckpt", ".safetensors"))
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_round_trip(tmp_path, capsys, name, suffix):
    """file -> orbax -> file: every tensor and the EMA bit for bit."""
    source = files.load(MDLM.path / name)
    base, extra = source, []
    if not source.tensors:  # an EMA alone, beside its checkpoint
        base, extra = files.load(MDLM.need("mdlm.ckpt", "mdlm.safetensors")), [f"--ema={MDLM.path / name}"]
    kind = "mdlm" if any("sigma_map" in key for key in base.tensors) else "ar"
    if mdlm.ROTARY not in base.tensors:
        whole = files.load(MDLM.need("mdlm.ckpt", "mdlm.safetensors")).tensors
        extra.append(f"--heads={whole['backbone.vocab_embed.embedding'].shape[1] // (2 * whole[mdlm.ROTARY].size)}")
    for argv in (
        ["import", kind, str(MDLM.path / base.name), str(tmp_path / "run"), *extra],
        ["export", kind, str(tmp_path / "run"), str(tmp_path / f"out{suffix}")],
    ):
        assert convert.main(argv) == 0, capsys.readouterr().err
    made = files.load(tmp_path / f"out{suffix}")
    has_head = kind == "ar" or any(key.startswith("tran_head.") for key in base.tensors)
    assert set(made.tensors) == {*base.tensors, mdlm.ROTARY, *(() if has_head else mdlm.OMEGA)}
    for key, value in base.tensors.items():
        assert made.tensors[key].dtype == value.dtype and made.tensors[key].tobytes() == value.tobytes(), key
        compare(CONVERSION, key, made.tensors[key], value)
    if suffix == ".ckpt" and source.shadow is not None:
        assert made.ema == source.ema
        for i, (got, wanted) in enumerate(zip(made.shadow, source.shadow, strict=True)):
            assert got.tobytes() == wanted.tobytes(), i
            compare(CONVERSION, f"ema {i}", got, wanted)
