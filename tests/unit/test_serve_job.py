"""The serve job around a service: what it prints and reports, how it ends, when it refuses."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from cluster.config import Recipe, parse_recipe
from colbert_core.errors import ConfigError
from jobs import serve


def recipe(**section: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "r",
            "storage": {"root": "/data"},
            "model": {"name": "m", "base": "b"},
            "serve": {"index": "news@production", **section},
        }
    )


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the deployed service, which the integration tests cover, by a list of what happens to it."""
    happened: list[str] = []

    @contextmanager
    def session(recipe: Recipe) -> Iterator[str]:
        happened.append("up")
        try:
            yield "http://127.0.0.1:1234"
        finally:
            happened.append("down")

    monkeypatch.setattr(serve, "serving_session", session)
    monkeypatch.setattr(serve, "ray_session", lambda recipe: nullcontext())
    monkeypatch.setattr(serve, "WATCH_SECONDS", 0.05)
    return happened


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_in_good_order(
    events: list[str],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "deployed", lambda: True)
    # A shell that runs the tests in its background has them ignore SIGINT.
    as_inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    report = serve.run(recipe(api_keys_env="MY_KEYS"))
    timer.join()
    assert events == ["up", "down"]
    assert report.details == {"url": "http://127.0.0.1:1234", "index": "news@production"}
    assert report.warnings == []
    printed = capsys.readouterr().err
    assert "http://127.0.0.1:1234/v1/search" in printed
    assert "Bearer $MY_KEYS" in printed, "the example names the variable, never a key"
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGINT, as_inherited)


def test_a_service_that_somebody_else_took_down_ends_the_job_with_a_warning(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([True, True, False])
    monkeypatch.setattr(serve, "deployed", lambda: next(answers))
    report = serve.run(recipe())
    assert events == ["up", "down"]
    assert report.warnings == ["the service was taken down by somebody else"]


def test_a_service_that_nobody_would_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"ray\.address"):
        serve.run(recipe(), block=False)


def test_a_service_that_runs_already_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "ray_session", lambda recipe: nullcontext())
    monkeypatch.setattr(serve, "deployed", lambda: True)
    monkeypatch.setattr(serve, "deploy", lambda recipe: pytest.fail("deployed over another service"))
    monkeypatch.setattr(serve, "undeploy", lambda **_: pytest.fail("took the other service down"))
    with pytest.raises(ConfigError, match="a service is deployed on this Ray already"):
        serve.run(recipe())
