"""Which trial may begin beside those that run."""

from __future__ import annotations

from collections import deque

from cluster.trial_pool import Step, Work, next_of


def work(name: str, *trains: str, steps: int = 1) -> Work:
    """With so many steps left."""
    return Work(name, [Step(print, (), {})] * steps, trains=frozenset(trains))


def test_trials_that_share_a_phase_do_not_train_it_at_once() -> None:
    """One of them makes the phase that both begin with, and the other finds it made."""
    waiting = deque([work("b", "pre", "post-b"), work("c", "other"), work("d", "pre", "post-d")])
    training = work("a", "pre", "post-a")
    names = []
    while (item := next_of(waiting, [training])) is not None:
        names.append(item.name)
    assert names == ["c"]
    assert [item.name for item in waiting] == ["b", "d"]
    judged = work("a", "pre", "post-a", steps=0)
    assert next_of(waiting, [judged]) is not None
    assert next_of(deque(), []) is None
