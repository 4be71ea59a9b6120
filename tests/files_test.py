"""Paths, locks, atomic writes and terminals: once each, for every command."""

import io
import os
import sys
from pathlib import Path

import pytest

from smdlm import files


@pytest.mark.parametrize("text", ["gs://bucket/run", "s3://b", "https://x/y", "gs:/bucket/run", "file:///tmp/x"])
def test_a_url_is_no_path(text):
    with pytest.raises(ValueError, match=f"--workdir: got the URL {text}, wanted a local path"):
        files.local_path("--workdir", text)


@pytest.mark.parametrize("text", ["az://b/x", "https://x/y", "file:///tmp/x"])
def test_other_urls_are_no_path_where_a_bucket_would_be(text):
    with pytest.raises(ValueError, match=f"--workdir: got the URL {text}, wanted a local path"):
        files.path_of("--workdir", text)
    assert files.path_of("--workdir", "runs/a") == files.as_path("runs/a") == Path("runs/a")


@pytest.mark.parametrize("text", ["", None, 5, {}])
def test_nothing_is_no_path(text):
    with pytest.raises(ValueError, match="--workdir: got .*, wanted a path"):
        files.local_path("--workdir", text)


def test_home_is_expanded_and_other_paths_stay(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.local_path("x", "~/runs/a") == Path("/home/me/runs/a")
    assert files.local_path("x", "runs/a:b") == Path("runs/a:b")
    with pytest.raises(ValueError, match="x: got ~nobody_here/a"):
        files.local_path("x", "~nobody_here/a")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    files.write(tmp_path / "deep" / "a", "old")
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "deep" / "a", {"x": float("nan")})
    with pytest.raises(OSError):
        files.write(tmp_path / "deep", "a folder stands there")
    assert (tmp_path / "deep" / "a").read_text() == "old" and os.listdir(tmp_path / "deep") == ["a"]


def test_a_file_is_no_folder_to_write_in(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out: got .*file .File exists., wanted a folder that can be written"):
        with files.owned(tmp_path / "file", "--out"):
            pass


@pytest.mark.parametrize("encoding, shown", [("ascii", "3 +- 1 omega \\u4e2d"), ("latin-1", "3 ± 1 omega \\u4e2d")])
def test_a_terminal_without_a_character_shows_another(monkeypatch, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    files.plain_output()
    print("3 ± 1 ω 中")
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding) == f"{shown}\n"
