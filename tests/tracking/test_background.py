from __future__ import annotations

import logging
import threading

import pytest

from deepdisc_ops.errors import TrainingError
from deepdisc_ops.tracking import Background

WAIT_S = 60


def test_only_the_newest_work_of_a_key_is_done_while_the_store_is_slow() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        assert go_on.wait(WAIT_S)

    with Background() as background:
        background.submit("a", slow)
        assert begun.wait(WAIT_S)
        for report in range(5):
            background.submit("a", lambda report=report: done.append(("a", report)))
            background.submit("b", lambda report=report: done.append(("b", report)))
        assert done == []
        go_on.set()
        background.drain()
    assert done == [("a", 4), ("b", 4)]


def test_work_that_fails_is_told_once_kept_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    attempts, came = [], threading.Event()

    def work() -> None:
        attempts.append(None)
        if len(attempts) < 4:
            raise TrainingError("the store is away")
        came.set()

    with caplog.at_level(logging.WARNING), Background(pause_s=0.001) as background:
        background.submit("a", work)
        assert came.wait(WAIT_S)
    assert len(attempts) == 4
    assert [record.message for record in caplog.records] == ["the store is away; it is kept and tried again"]


def test_the_end_brings_out_what_still_fails_and_may_be_repeated() -> None:
    away = True
    done = []

    def work() -> None:
        if away:
            raise TrainingError("the store is away")
        done.append(None)

    with Background(pause_s=3600) as background:
        background.submit("a", work)
        with pytest.raises(TrainingError, match="away"):
            background.drain()
        away = False
        background.drain()
        background.drain()
    assert done == [None]


def test_a_pause_does_not_hold_up_the_end() -> None:
    failed = threading.Event()

    def work() -> None:
        failed.set()
        raise TrainingError("the store is away")

    with Background(pause_s=3600) as background:
        background.submit("a", work)
        assert failed.wait(WAIT_S)
    assert not background._thread.is_alive()
