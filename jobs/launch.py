"""The one way a job starts, from the CLI, from ``python -m jobs.<name>`` and from ``ray job submit``."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.traceback import Traceback

from cluster.config import Recipe, load_recipe
from cluster.report import Report
from colbert_core.errors import ConfigError, RaycolbertError

PACKAGES = ("colbert_core", "cluster", "jobs", "serving")
POLL_SECONDS = 1.0
# What Ray takes for the address of a cluster, whatever address it is given.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PATIENCE = 60  # polls in a row without an answer, after which a submitted job is no longer followed

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key, e.g. train.0.steps=20"),
]
Address = Annotated[
    str | None,
    typer.Option(help="submit to the Ray cluster with this dashboard address, e.g. http://head:8265"),
]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]

console = Console()
errors = Console(stderr=True)


def launch(
    job: str,
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    as_json: bool = False,
    debug: bool = False,
    **extras: Any,
) -> None:
    """Runs a job here, or submits the same command to a cluster; exits with the job's status.

    Args:
        job: name of a module of :mod:`jobs` with a function ``run(recipe, **extras)``.
        recipe_path: the recipe file.
        overrides: ``key=value`` strings, see :func:`cluster.config.load_recipe`.
        address: dashboard address of a cluster; None runs in this process.
        as_json: print the report as JSON instead of a table.
        debug: show tracebacks of typed errors.
        extras: options of this job alone; None and False mean "not given".
    """
    # The jobs show their own progress; a loading bar for every model and actor would bury it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    given = {name: value for name, value in extras.items() if value is not None and value is not False}
    try:
        recipe = load_recipe(recipe_path, overrides, elsewhere=address is not None)
        if address:
            given |= {name: True for name, wanted in (("json", as_json), ("debug", debug)) if wanted}
            raise typer.Exit(_submit(job, recipe_path, overrides, address, given))
        report = _module(job).run(recipe, **given)
        _store(recipe, report)
    except RaycolbertError as error:
        if debug:
            errors.print(Traceback())
        message = f"{type(error).__name__}: {escape(str(error))}"
        errors.print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        report.print(console)


def main(job: str, run: Callable[..., Report]) -> None:
    """Entry point of ``python -m jobs.<name>``: the CLI's command of the same name."""
    from jobs.cli import app

    del run  # named in the call so that a job's module shows what its command runs
    app([job, *sys.argv[1:]], prog_name=f"python -m jobs.{job}")


def _module(job: str) -> ModuleType:
    return import_module(f"jobs.{job}")


def _store(recipe: Recipe, report: Report) -> None:
    """Keeps the report beside the outputs, under a key of its own."""
    from cluster.storage import open_store

    stamp = report.started_at.strftime("%Y%m%dT%H%M%S.%fZ")
    key = f"reports/{recipe.name}/{report.job}/{stamp}.json"
    open_store(recipe.storage).put(key, report.model_dump_json(indent=2).encode("utf-8"))


def _submit(
    job: str, recipe_path: Path, overrides: Sequence[str], address: str, extras: dict[str, Any]
) -> int:
    """Submits ``python -m jobs.<job>`` with this code and recipe, follows its log, returns its status."""
    import requests
    from ray.exceptions import RayError
    from ray.job_submission import JobStatus, JobSubmissionClient

    unanswered = (requests.RequestException, ConnectionError, RuntimeError, RayError)
    for variable in ADDRESS_VARIABLES:
        if (set_to := os.environ.get(variable)) and set_to != address:
            raise ConfigError(
                f"--address {address}: {variable} is {set_to}, which Ray would submit to instead; unset it"
            )
    if (report := extras.get("report")) is not None and not Path(report).is_absolute():
        raise ConfigError(
            f"--report {report}: relative; the job writes it on the cluster, so give an absolute path"
        )

    try:
        client = JobSubmissionClient(address)
    except unanswered as error:
        raise ConfigError(
            f"--address {address}: no Ray dashboard there takes jobs from here: {_reason(error)}"
        ) from None
    command = ["python", "-m", f"jobs.{job}", "recipe.yaml"]
    for override in overrides:
        command += ["--set", override]
    for name, value in extras.items():
        option = f"--{name.replace('_', '-')}"
        command += [option] if value is True else [option, str(value)]
    with tempfile.TemporaryDirectory() as directory:
        # What the cluster runs is this code, not whatever version its nodes have installed.
        root = Path(directory)
        shutil.copy(recipe_path, root / "recipe.yaml")
        for package in PACKAGES:
            source = Path(str(import_module(package).__file__)).parent
            shutil.copytree(source, root / package, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            submission = client.submit_job(
                entrypoint=shlex.join(command),
                runtime_env={"working_dir": str(root), "env_vars": {"PYTHONUNBUFFERED": "1"}},
                metadata={"job": job, "recipe": recipe_path.name},
            )
        except unanswered as error:
            raise RaycolbertError(f"{address}: the job was not taken: {_reason(error)}") from None
    console.print(f"submitted {submission} to {address}: {shlex.join(command)}", markup=False)
    shown, lost = 0, 0
    while True:
        try:
            status = client.get_job_status(submission)
            log = client.get_job_logs(submission)
        except unanswered as error:
            lost += 1
            if lost == PATIENCE:
                raise RaycolbertError(
                    f"{address}: out of reach, while job {submission} goes on there; "
                    f"`ray job logs {submission} --address {address}` follows it: {error}"
                ) from None
            time.sleep(POLL_SECONDS)
            continue
        lost = 0
        sys.stdout.write(log[shown:])
        sys.stdout.flush()
        shown = len(log)
        if status.is_terminal():
            break
        time.sleep(POLL_SECONDS)
    if status != JobStatus.SUCCEEDED:
        errors.print(f"[bold red]job {submission} {status}[/]")
        return client.get_job_info(submission).driver_exit_code or 1
    return os.EX_OK


def _reason(error: Exception) -> str:
    """The first line of what Ray says: more follows on how to set up clusters of every kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
