from __future__ import annotations

import os
import signal

import pytest

from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.sweeps import session
from deepdisc_ops.sweeps.session import NodeWatch, check_room, interruptible
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


def test_a_loop_without_nodes_is_ended_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    alive, heard = [True, False], []
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": one} for one in alive])
    monkeypatch.setattr(session, "LOOK_EVERY_S", 0.0)
    watch = NodeWatch()
    with interruptible():
        signal.signal(signal.SIGUSR1, lambda received, frame: heard.append(received))
        watch.look()
        assert (watch.lost, heard) == (False, [])
        alive[0] = False
        watch.look()
        watch.look()
    assert (watch.lost, heard) == (True, [signal.SIGUSR1])
    assert caplog.text.count("lost its last node") == 1
    with pytest.raises(TrainingError, match="the same command goes on"):
        NodeWatch().look()
