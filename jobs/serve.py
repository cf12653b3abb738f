"""Serves an index over HTTP: deploys the application, says where it is, and stays until interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import ray
from rich.console import Console

from cluster.config import Recipe
from cluster.ray_session import ray_session
from cluster.report import Report
from colbert_core.errors import ConfigError
from jobs.launch import main
from serving.app import deploy, deployed, serve_runs, undeploy
from serving.args import recipe_args

# How often a blocked job looks whether somebody else took the service down.
WATCH_SECONDS = 5.0

console = Console(stderr=True)  # the report alone goes to standard output, where --json is read


def run(recipe: Recipe, block: bool = True) -> Report:
    """Deploys the service that the recipe describes.

    Args:
        recipe: with a ``serve`` section.
        block: stay until SIGINT or SIGTERM, then take the service down. False leaves it running and
            returns, which takes a Ray that outlives the job.

    Returns:
        A report with the URL and the index under ``details``.

    Raises:
        ConfigError: the recipe cannot be served, or ``block`` is False and no Ray would outlive the job.
        ArtifactNotFound: the index is not published.
        NotReady: the service did not come up.
    """
    report = Report(job="serve", recipe=recipe.name)
    if not block:
        if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS") or recipe.ray.address):
            raise ConfigError("ray.address: to serve without blocking, join a cluster that outlives this job")
        with report.timed("deploy"), ray_session(recipe):
            _announce(recipe, deploy(recipe), report)
        return report
    with report.timed("total"), suppress(KeyboardInterrupt), ray_session(recipe), _sigterm_interrupts():
        with serving_session(recipe) as url:
            _announce(recipe, url, report)
            console.print("serving; Ctrl-C stops it")
            while deployed():
                time.sleep(WATCH_SECONDS)
        report.warnings.append("the service was taken down by somebody else")
    return report


@contextmanager
def serving_session(recipe: Recipe) -> Iterator[str]:
    """Serves for the time of the block.

    Yields:
        The base URL of a service that is ready.

    Raises:
        ConfigError, ArtifactNotFound, NotReady: as :func:`refuse_second_service` and
            :func:`serving.app.deploy`.
    """
    with ray_session(recipe):
        refuse_second_service()
        started_here = not serve_runs()
        try:
            yield deploy(recipe)
        finally:
            undeploy(stop_serve=started_here)


def refuse_second_service() -> None:
    """To be asked before a service is deployed for a while, when Ray is up.

    Raises:
        ConfigError: one is there already; it would be replaced, and deleted with this one.
    """
    if deployed():
        raise ConfigError(
            "a service is deployed on this Ray already, and would be taken down with this one; it follows "
            "its index's alias by itself, so stop it first or do without serve.questions"
        )


def _announce(recipe: Recipe, url: str, report: Report) -> None:
    args = recipe_args(recipe)
    report.details.update(url=url, index=args.index)
    variable = args.serve.api_keys_env
    key = f' -H "Authorization: Bearer ${variable}"' if variable else ""
    console.print(f"[bold]{args.index}[/] is served at [bold]{url}[/] (search page), {url}/docs (API)")
    console.print("try:", highlight=False)
    console.print(
        f"  curl {url}/v1/search -H 'Content-Type: application/json'{key} "
        '-d \'{"query": "日本で一番高い山は？", "k": 3}\'',
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM, which ``ray job stop`` and process managers send, end the block as Ctrl-C does.

    To be entered when Ray is up: ``ray.init`` installs a handler of its own, which aborts the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # A handler that is not Python's, as Ray's, cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


if __name__ == "__main__":
    main("serve", run)
