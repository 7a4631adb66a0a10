"""What commands print: progress that a log can hold, suggestions for words that do not exist, completion for the shell."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from deepdisc_ops.errors import did_you_mean, nearest

LONG_WORK = """
import time
from deepdisc_ops.cli.console import console, progress_bar
with progress_bar("looking", 200, "windows") as advance:
    for done in range(1, 201):
        advance(done, "objects")
with console.status("starting") as status:
    status.update("nearly there")
"""


def test_a_log_holds_lines_and_no_more_than_a_dozen_of_them() -> None:
    told = subprocess.run([sys.executable, "-c", LONG_WORK], capture_output=True, check=True).stdout
    assert b"\r" not in told
    assert b"\x1b" not in told
    lines = told.decode().split("\n")
    assert lines[-2:] == ["looking: 200/200 windows objects", ""]
    assert 10 <= len(lines) - 1 <= 11


def test_a_terminal_has_a_bar_that_stays_in_its_place() -> None:
    reader, terminal = pty.openpty()
    worker = subprocess.Popen(
        [sys.executable, "-c", LONG_WORK], stdout=terminal, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(terminal)
    told = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        told += piece
    os.close(reader)
    assert worker.wait() == 0
    assert b"\x1b[2K" in told
    assert b"200/200" in told


def test_the_nearest_word_is_suggested_and_else_all_are_named() -> None:
    assert nearest("HSC-Z", ["hsc-z", "hsc-i"]) == "hsc-z"
    assert nearest("x", []) is None
    assert did_you_mean("trian", ("train", "test")) == "did you mean 'train'?"
    assert did_you_mean("dev", ("train", "test")) == "expected one of train, test"


@pytest.mark.parametrize(
    ("words", "meant"), [(("predct",), "predict"), (("serve", "strt"), "start"), (("train", "--otu", "x"), "--out")]
)
def test_verbs_and_options_are_suggested(words: tuple[str, ...], meant: str) -> None:
    answer = subprocess.run([sys.executable, "-m", "deepdisc_ops", *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert meant in answer.stderr


@pytest.mark.parametrize(
    ("shell", "words", "completed"), [("bash", "deepdisc-ops se", "serve\nsetup"), ("zsh", "deepdisc-ops predict --mod", "--model")]
)
def test_shells_complete_verbs_and_options(shell: str, words: str, completed: str) -> None:
    asked = {"_DEEPDISC_OPS_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    asked["_TYPER_COMPLETE_ARGS"] = words
    program = "import sys; sys.argv[0] = 'deepdisc-ops'; from deepdisc_ops.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asked, check=False)
    assert completed in told.stdout
