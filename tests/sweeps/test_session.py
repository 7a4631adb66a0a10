from __future__ import annotations

import os
import signal

import pytest

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.sweeps.session import check_room, interruptible
from deepdisc_ops.sweeps.space import Resources


def test_a_trial_larger_than_every_node_is_refused() -> None:
    nodes = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0}]
    check_room(Resources(cpus=2, gpus=0.5), nodes)
    check_room(Resources(cpus=4), nodes)
    for wanted in (Resources(cpus=3, gpus=1), Resources(cpus=5), Resources(cpus=1, gpus=2)):
        with pytest.raises(ConfigError, match="the nodes have 2 CPUs with 1 GPUs and 4 CPUs with 0 GPUs; lower resources.cpus"):
            check_room(wanted, nodes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_to_the_loop_that_listens_and_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    heard = []
    with interruptible() as caught:
        signal.signal(signal.SIGUSR1, lambda received, frame: heard.append(received))
        os.kill(os.getpid(), number)
        assert (caught, heard) == ([number], [signal.SIGUSR1])
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_outside_of_the_loop_ends_at_once() -> None:
    with pytest.raises(SystemExit) as ended, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
