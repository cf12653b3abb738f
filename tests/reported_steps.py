"""A Ray Train callback that writes down what it is told; it runs in Ray's controller, which imports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.train.v2.api.callback import UserCallback


class ReportedSteps(UserCallback):
    """Appends the steps that rank 0 reports to a file, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for step in metrics[0]["steps"]:
                file.write(json.dumps(step) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
