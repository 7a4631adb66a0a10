"""What is read from the logs: reasons, order, one request, and which workers have answered."""

from __future__ import annotations

import gzip
from pathlib import Path

from deepdisc_ops.serving import logs

PREFIX = "2026-11-21T23:24:27,088 [INFO ] W-9000-deepdisc_1.0-stdout MODEL_LOG - "
WORKER_LOG = "\n".join(
    PREFIX + line
    for line in (
        "Backend worker process died.",
        "Traceback (most recent call last):",
        "    raise ArchiveError(",
        "deepdisc_ops.errors.ArchiveError: member member-1 is damaged; rebuild it",
    )
)
SERVER_LOG = """\
2026-11-21T23:29:22,843 [WARN ] main org.pytorch.serve.ModelServer - Failed to load model: deepdisc.mar
java.util.zip.ZipException: invalid entry CRC (expected 0x1 but got 0x2)
\tat java.util.zip.ZipInputStream.readEnd(Unknown Source) ~[?:?]
"""
ACCESS_LOG = """\
2026-11-22T13:04:40,884 [INFO ] W-9000-deepdisc_1.0 ACCESS_LOG - /127.0.0.1:45124 "POST /predictions/deepdisc HTTP/1.1" 200 1108
2026-11-22T13:04:40,986 [INFO ] W-9001-deepdisc_1.0 ACCESS_LOG - /127.0.0.1:45118 "POST /predictions/deepdisc HTTP/1.1" 500 1210
2026-11-22T13:04:41,986 [INFO ] epollEventLoopGroup-3-1 ACCESS_LOG - /127.0.0.1:45118 "GET /models/deepdisc HTTP/1.1" 200 3
"""


def fill(run_dir: Path) -> None:
    for number in (1, 2):
        (run_dir / "logs" / str(number)).mkdir(parents=True)
    (run_dir / "logs" / "supervisor.log").write_text("2026-11-21 00:00:02,500 [INFO ] x - server 1 serves\n")
    (run_dir / "logs" / "1" / "model_log.log").write_text(
        "2026-11-21T00:00:03,000 [INFO ] W - MODEL_LOG - request mine 11-22 200 objects=3 megapixels=0.1 seconds=1\n"
        "2026-11-21T00:00:04,000 [INFO ] W - MODEL_LOG - request mine-too 33-44 500 objects=0\n"
        "Traceback\n  of it\n"
    )
    with gzip.open(run_dir / "logs" / "1" / "ts_log.1.log.gz", "wt") as file:
        file.write("2026-11-21T00:00:02,999 [INFO ] W - Sending response for jobId 11-22\n")
    (run_dir / "logs" / "2" / "ts_log.log").write_text("2026-11-21T00:00:01,000 [INFO ] W - first\n")


def test_all_logs_are_one_in_order_of_time(spaced: Path) -> None:
    fill(spaced)
    found = logs.entries(spaced)
    assert [entry.time for entry in found] == sorted(entry.time for entry in found)
    assert [entry.file for entry in found] == ["ts_log.log", "supervisor.log", "ts_log.1.log.gz", "model_log.log", "model_log.log"]
    assert found[-1].text.endswith("Traceback\n  of it")
    assert logs.entries(spaced / "none") == []


def test_a_request_is_followed_through_all_logs_by_either_id(spaced: Path) -> None:
    fill(spaced)
    found = logs.entries(spaced)
    by_client = logs.of_request(found, "mine")
    assert [entry.file for entry in by_client] == ["ts_log.1.log.gz", "model_log.log"]
    assert logs.of_request(found, "11-22") == by_client
    assert len(logs.of_request(found, "mine-too")) == 1
    assert logs.of_request(found, "other") == []


def test_new_lines_are_followed_when_they_are_complete_and_after_rotation(spaced: Path) -> None:
    fill(spaced)
    path = spaced / "logs" / "2" / "ts_log.log"
    script = [
        lambda: path.write_text(f"{path.read_text()}2026-11-21T00:00:09,000 half"),
        lambda: path.write_text(f"{path.read_text()} whole\n"),
        lambda: path.write_text("2026-11-21T00:00:10,000 new\n"),
    ]
    following = logs.follow(spaced, pause=lambda _: script.pop(0)())
    assert next(following).text.endswith("half whole")
    assert next(following).text.endswith("new")


def test_workers_that_have_predicted_are_told(spaced: Path) -> None:
    assert logs.answered(spaced / "none") == set()
    (spaced / "access_log.log").write_text(ACCESS_LOG)
    assert logs.answered(spaced / "access_log.log") == {"9000"}


def test_the_reason_of_a_failed_load_is_found_in_the_logs() -> None:
    assert logs.failure_in_log(WORKER_LOG) == "ArchiveError: member member-1 is damaged; rebuild it"
    assert logs.failure_in_log(SERVER_LOG) == "java.util.zip.ZipException: invalid entry CRC (expected 0x1 but got 0x2)"


def test_a_log_without_a_failed_load_gives_no_reason() -> None:
    assert logs.failure_in_log("") is None
    assert logs.failure_in_log("... MODEL_LOG - RuntimeError: one request failed\n") is None


def test_torchserves_own_last_words_do_not_hide_the_reason() -> None:
    text = "\n".join([PREFIX + "Failed to load model deepdisc, exception x", PREFIX + "RuntimeError: size mismatch for conv"])
    assert logs.failure_in_log(text + f"\n{PREFIX}RuntimeError: 500 - Unknown exception") == "RuntimeError: size mismatch for conv"


def test_a_log_is_summed_up_by_its_exception_or_its_last_line() -> None:
    assert logs.summary(SERVER_LOG.splitlines()).startswith("java.util.zip.ZipException")
    assert logs.summary(["first", "last", ""]) == "last"
    assert logs.summary([]) == "its log is empty"
