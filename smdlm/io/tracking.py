"""Weights & Biases (`pip install 'smdlm[wandb]'`): the metrics of a run, beside metrics.jsonl and not instead of it."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smdlm import files

RUN = "wandb.json"  # in the workdir: the id under which a continued run is found again
WAIT = 60  # seconds for anything that needs the network


class Wandb:
    """One run of a project; the network is its service's affair, and WANDB_MODE=offline needs none.

    Whatever fails raises, and the writer turns it into one warning. A continued run goes on under the same id; what it
    logs a second time (updates behind its last checkpoint) is left out by the service.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        known = workdir / RUN
        if known.exists():
            identity = json.loads(known.read_text("utf-8"))["id"]
        else:
            identity = uuid.uuid4().hex[:16]
            files.write_json(known, {"project": project, "id": identity})
        # A machine without a network would else wait for minutes, one without a key for an answer, before any update.
        settings = wandb.Settings(init_timeout=WAIT, login_timeout=WAIT, silent=True)
        self._run = wandb.init(
            project=project, id=identity, name=workdir.name, config=dict(config), resume="allow", settings=settings,
            **({} if files.is_url(workdir) else {"dir": str(workdir)}),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        plain = {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
        self._run.summary.update(plain)

    def close(self) -> None:
        """Waits for what is still on its way, but no longer than a minute: a network that is down ends no run late."""
        ending = threading.Thread(target=self._run.finish, daemon=True)
        ending.start()
        ending.join(WAIT)
