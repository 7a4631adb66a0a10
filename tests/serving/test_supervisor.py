"""The supervisor's decisions, with generations that start, die and finish when the test says so."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from discovered import INFO

from deepdisc_ops.errors import ArchiveError, ServerError
from deepdisc_ops.serving import plan, remains, state, supervisor
from deepdisc_ops.serving.discovery import DISCOVERY, ServerInfo, read_discovery
from deepdisc_ops.serving.supervisor import Supervisor


class Generation:
    """A generation without processes."""

    made: ClassVar[list[Generation]] = []
    failure: ClassVar[Exception | None] = None
    hold: ClassVar[threading.Event] = threading.Event()

    def __init__(self, number: int, planned: plan.Plan, settings: plan.ServerSettings, run_dir: Path) -> None:
        self.number, self.plan, self.settings, self.run_dir = number, planned, settings, run_dir
        self.info: ServerInfo = replace(INFO, generation=number, archive=planned.source, token=f"token-{number}")
        self.code: int | None = None
        self.in_flight, self.renewals = 0, 0
        self.due = self.closed = self.ended = False
        Generation.made.append(self)

    def start(self, tick: Callable[[], None], tell: Callable[[str], None]) -> ServerInfo:
        tell("starting")
        while not self.hold.is_set():
            tick()
            time.sleep(0.01)
        if self.failure:
            raise self.failure
        return self.info

    def exit_code(self) -> int | None:
        return self.code

    def renewal_due(self, now: float) -> bool:
        return self.due

    def renew(self) -> ServerInfo:
        self.renewals += 1
        self.due = False
        self.info = replace(self.info, token=f"token-{self.number}-{self.renewals}")
        return self.info

    def close_door(self) -> None:
        self.closed = True

    def unanswered(self) -> int:
        return self.in_flight

    def end(self) -> None:
        self.ended = True


class Running:
    """A supervisor at work in a thread."""

    def __init__(self, run_dir: Path, **settings: object) -> None:
        self.run_dir = run_dir
        self.supervisor = Supervisor(run_dir, planned(run_dir / "a.mar"), plan.ServerSettings.model_validate(settings))
        self.code: int | None = None
        self.error: Exception | None = None
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.code = self.supervisor.run(lambda _: None, lambda _: self.ready.set())
        except Exception as error:  # noqa: BLE001 - handed to the test
            self.error = error

    def order(self, verb: state.Verb, name: str | None = None) -> state.Answer:
        order = state.place_order(self.run_dir, verb, self.run_dir / name if name else None)
        wait_for(lambda: state.read_answer(self.run_dir, order) is not None)
        answer = state.read_answer(self.run_dir, order)
        assert answer is not None
        return answer

    def join(self) -> int | None:
        self.thread.join(10)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error
        return self.code

    def served(self) -> ServerInfo | None:
        return read_discovery(self.run_dir)


def planned(mar: Path, settings: object = None, source: str | None = None) -> plan.Plan:
    if not mar.exists():
        raise ArchiveError(f"archive {mar} does not exist")
    text = mar.read_text()
    return plan.Plan(mar, source or str(mar), text, text * 8, ("g",), 0.2, 1, 1)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def started(spaced: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    monkeypatch.setattr(supervisor, "Generation", Generation)
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.01)
    monkeypatch.setattr(plan, "make_plan", planned)
    monkeypatch.setattr(Generation, "made", [])
    monkeypatch.setattr(Generation, "failure", None)
    monkeypatch.setattr(Generation, "hold", threading.Event())
    Generation.hold.set()
    (spaced / "a.mar").write_text("aaaa")
    (spaced / "b.mar").write_text("bbbb")
    all_of_them: list[Running] = []

    def start(*, wait: bool = True, **settings: object) -> Running:
        running = Running(spaced, **settings)
        all_of_them.append(running)
        if wait:
            assert running.ready.wait(10)
        return running

    yield start
    for running in all_of_them:
        running.supervisor.stop()
        running.supervisor.stop()
        running.thread.join(10)


def test_it_publishes_a_proved_server_and_leaves_nothing_when_stopped(started: Callable[..., Running], spaced: Path) -> None:
    running = started()
    assert running.served() == Generation.made[0].info
    assert state.read_state(spaced).stage == "serving"  # type: ignore[union-attr]
    running.supervisor.stop()
    assert running.join() == 0
    assert Generation.made[0].closed
    assert Generation.made[0].ended
    assert sorted(path.name for path in spaced.iterdir()) == ["a.mar", "b.mar"]


def test_nothing_is_published_before_it_has_proved_itself(started: Callable[..., Running]) -> None:
    Generation.hold.clear()
    running = started(wait=False)
    wait_for(lambda: bool(Generation.made))
    assert running.served() is None
    Generation.hold.set()
    assert running.ready.wait(10)
    assert running.served() is not None


def test_a_stop_waits_for_what_was_accepted_and_tells_clients_first(started: Callable[..., Running]) -> None:
    running = started(drain_s=60)
    only = Generation.made[0]
    only.in_flight = 2
    running.supervisor.stop()
    wait_for(lambda: only.closed)
    assert running.served() is None
    time.sleep(0.2)
    assert not only.ended
    only.in_flight = 0
    assert running.join() == 0
    assert only.ended


@pytest.mark.parametrize("twice", [False, True])
def test_a_drain_ends_in_time_or_when_told_twice(started: Callable[..., Running], twice: bool) -> None:
    running = started(drain_s=60 if twice else 0.1)
    Generation.made[0].in_flight = 1
    running.supervisor.stop()
    if twice:
        wait_for(lambda: Generation.made[0].closed)
        running.supervisor.stop()
    assert running.join() == 0
    assert Generation.made[0].ended


def test_a_dead_server_ends_the_supervisor_with_its_code(started: Callable[..., Running]) -> None:
    running = started()
    Generation.made[0].code = 137
    assert running.join() == 137
    assert running.served() is None


def test_a_server_that_ends_by_itself_is_no_success(started: Callable[..., Running]) -> None:
    running = started()
    Generation.made[0].code = 0
    assert running.join() == 1


def test_a_dead_server_is_started_anew_when_asked(started: Callable[..., Running]) -> None:
    running = started(restart=True)
    Generation.made[0].code = 137
    wait_for(lambda: (info := running.served()) is not None and info.generation == 2)
    assert Generation.made[0].ended
    assert Generation.made[1].plan.source == Generation.made[0].plan.source
    running.supervisor.stop()
    assert running.join() == 0


def test_one_that_dies_again_and_again_is_given_up(started: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS", 2)
    running = started(restart=True)
    Generation.failure = ServerError("no memory")
    Generation.made[0].code = 3
    assert running.join() == 3
    assert len(Generation.made) == 3
    assert running.served() is None


def test_an_upgrade_hands_over_and_lets_the_old_one_finish(started: Callable[..., Running], spaced: Path) -> None:
    running = started()
    Generation.made[0].in_flight = 1
    answer = running.order("upgrade", "b.mar")
    assert answer.error is None
    old, new = Generation.made
    assert running.served() == new.info
    assert new.info.archive.endswith("b.mar")
    assert old.closed
    assert not old.ended
    assert state.read_state(spaced).retiring == (1,)  # type: ignore[union-attr]
    old.in_flight = 0
    wait_for(lambda: old.ended)
    wait_for(lambda: state.read_state(spaced).retiring == ())  # type: ignore[union-attr]
    assert not new.closed


def test_clients_never_find_the_door_closed_before_the_next_one_is_published(started: Callable[..., Running]) -> None:
    running = started()
    seen: list[ServerInfo | None] = []
    first = Generation.made[0]
    first.close_door = lambda: seen.append(running.served())  # type: ignore[method-assign]
    running.order("upgrade", "b.mar")
    assert [info.generation for info in seen if info] == [2]


def test_a_rollback_goes_back_even_when_the_users_file_is_gone(started: Callable[..., Running], spaced: Path) -> None:
    running = started()
    assert running.order("rollback").error == "ServerError"
    running.order("upgrade", "b.mar")
    (spaced / "a.mar").unlink()
    answer = running.order("rollback")
    assert answer.error is None
    assert running.served().archive.endswith("a.mar")  # type: ignore[union-attr]
    assert running.order("rollback").error is None
    assert running.served().archive.endswith("b.mar")  # type: ignore[union-attr]
    assert len(list((spaced / remains.ARCHIVES).iterdir())) == 2


@pytest.mark.parametrize("name", ["c.mar", "a.mar"])
def test_an_upgrade_to_nothing_or_to_the_same_changes_nothing(started: Callable[..., Running], name: str) -> None:
    running = started()
    before = running.served()
    answer = running.order("upgrade", name)
    assert answer.error in {"ArchiveError", "ServerError"}
    assert running.served() == before
    assert len(Generation.made) == 1


def test_when_the_new_one_fails_the_present_one_goes_on(started: Callable[..., Running], spaced: Path) -> None:
    running = started()
    before = running.served()
    Generation.failure = ServerError("the archive could not be loaded")
    answer = running.order("upgrade", "b.mar")
    assert answer.error == "ServerError"
    assert "could not be loaded" in answer.what
    assert running.served() == before
    assert not Generation.made[0].closed
    assert len(list((spaced / remains.ARCHIVES).iterdir())) == 1


def test_tokens_are_renewed_in_time_also_while_an_upgrade_starts(started: Callable[..., Running], spaced: Path) -> None:
    running = started()
    first = Generation.made[0]
    first.due = True
    wait_for(lambda: running.served().token == "token-1-1")  # type: ignore[union-attr]
    Generation.hold.clear()
    state.place_order(spaced, "upgrade", spaced / "b.mar")
    wait_for(lambda: len(Generation.made) == 2)
    running.supervisor._renewal_again = 0.0
    first.due = True
    wait_for(lambda: running.served().token == "token-1-2")  # type: ignore[union-attr]
    Generation.hold.set()
    wait_for(lambda: running.served().generation == 2)  # type: ignore[union-attr]


def test_on_a_full_disk_no_token_is_renewed_that_could_not_be_told(
    started: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = started()
    only, before = Generation.made[0], running.served()
    monkeypatch.setattr(supervisor, "RETRY_RENEWAL_S", 0.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("os.posix_fallocate", full)
        only.due = True
        time.sleep(0.2)
        assert only.renewals == 0
        assert running.served() == before
        assert running.thread.is_alive()
    wait_for(lambda: running.served().token == "token-1-1")  # type: ignore[union-attr]


def test_a_server_that_cannot_be_published_does_not_stay(
    started: Callable[..., Running], spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    running = started()
    with monkeypatch.context() as disk:
        order = state.place_order(spaced, "upgrade", spaced / "b.mar")
        disk.setattr("os.posix_fallocate", full)
        wait_for(lambda: len(Generation.made) == 2 and Generation.made[1].ended)
        assert not Generation.made[0].ended
        assert running.served() == Generation.made[0].info
    wait_for(lambda: state.read_answer(spaced, order) is not None)
    assert state.read_answer(spaced, order).error == "ServerError"  # type: ignore[union-attr]
    monkeypatch.setattr("os.posix_fallocate", full)
    running.supervisor.stop()
    assert running.join() == 0
    with pytest.raises(ServerError, match="disk full"):
        started(wait=False).join()
    assert Generation.made[2].ended


def test_a_leaked_token_is_replaced_on_order(started: Callable[..., Running]) -> None:
    running = started()
    assert "renewed" in running.order("renew").what
    assert running.served().token == "token-1-1"  # type: ignore[union-attr]


def test_a_stop_does_not_wait_for_a_start(started: Callable[..., Running], spaced: Path) -> None:
    running = started()
    Generation.hold.clear()
    state.place_order(spaced, "upgrade", spaced / "b.mar")
    wait_for(lambda: len(Generation.made) == 2)
    running.supervisor.stop()
    assert running.join() == 0
    assert not (spaced / DISCOVERY).exists()


def test_a_failed_start_is_raised_and_leaves_nothing(started: Callable[..., Running], spaced: Path) -> None:
    Generation.failure = ServerError("no")
    running = started(wait=False)
    with pytest.raises(ServerError, match="no"):
        running.join()
    assert sorted(path.name for path in spaced.iterdir()) == ["a.mar", "b.mar"]


def test_orders_wait_their_turn_and_nonsense_is_none(spaced: Path) -> None:
    first = state.place_order(spaced, "renew")
    with pytest.raises(ServerError, match="another order"):
        state.place_order(spaced, "rollback")
    assert state.take_order(spaced) == first
    assert state.take_order(spaced) is None
    for text in ("", "[]", "{}", json.dumps({"id": "1", "verb": "rm"})):
        (spaced / state.ORDER).write_text(text)
        assert state.take_order(spaced) is None
        assert not (spaced / state.ORDER).exists()


def test_an_answer_belongs_to_its_order(spaced: Path) -> None:
    order = state.Order("1", "renew")
    assert state.read_answer(spaced, order) is None
    state.write_answer(spaced, state.Answer("0", "of an earlier one"))
    assert state.read_answer(spaced, order) is None
    state.write_answer(spaced, state.Answer("1", "done"))
    assert state.read_answer(spaced, order) == state.Answer("1", "done")


def test_one_supervisor_holds_a_run_directory(spaced: Path) -> None:
    assert not state.is_supervised(spaced)
    with state.locked(spaced):
        assert state.is_supervised(spaced)
        with pytest.raises(ServerError, match="already serves"), state.locked(spaced):
            pass
    assert not state.is_supervised(spaced)
    with state.locked(spaced):
        pass
