"""The first signal stops a run after its step, a second Ctrl-C immediately."""

from __future__ import annotations

import signal
import time

import pytest

from fastrlhf.parallel.mesh import Mesh
from fastrlhf.training.stopping import INTERRUPT, StopRequest


def test_ctrl_c_waits_for_the_step_and_says_so(
    mesh: Mesh, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(mesh.device, None) as stop:
        assert stop.reason() is None
        signal.raise_signal(signal.SIGINT)
        assert stop.reason() == INTERRUPT
        assert "stopping after this step; once more stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_changes_nothing(mesh: Mesh) -> None:
    with StopRequest(mesh.device, None) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason() == "SIGTERM"


def test_out_of_time(mesh: Mesh) -> None:
    with StopRequest(mesh.device, time.monotonic() - 1) as stop:
        assert stop.reason() == "its time limit (train.max_seconds)"
