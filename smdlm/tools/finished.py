"""Whether a run is finished, for scripts that start it again: exit status 0 if its summary is there, else 1.

python -m smdlm.tools.finished WORKDIR      (a folder, or gs:// or s3://BUCKET/FOLDER)
"""

from __future__ import annotations

import sys

from smdlm.files import path_of


def main(argv: list[str]) -> int:
    """2 with one line for anything but one workdir."""
    if len(argv) != 1:
        print(f"error: got {len(argv)} arguments, wanted one: WORKDIR", file=sys.stderr)
        return 2
    try:
        return 0 if (path_of("WORKDIR", argv[0]) / "summary.json").exists() else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
