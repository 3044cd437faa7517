"""How a rank ends when it loses another one."""

from __future__ import annotations

import signal
import socket
import threading
import time

import pytest

from yolo_compress.errors import LostRank
from yolo_compress.train import together


class Slow:
    """Its destructor takes longer than it takes to notice a lost rank. Python drops an exception in a destructor."""

    def __init__(self, entered: threading.Event) -> None:
        self.entered = entered

    def __del__(self) -> None:
        self.entered.set()
        time.sleep(3)


def test_an_interruption_that_a_destructor_drops_comes_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(together, "GRACE_S", 4.0)
    monkeypatch.setattr(together.distributed, "destroy_process_group", lambda: None)  # there is none
    here, there = socket.socketpair()
    entered, before = threading.Event(), signal.getsignal(signal.SIGUSR1)

    def lose() -> None:
        entered.wait()
        there.close()

    loser = threading.Thread(target=lose)
    loser.start()
    began = time.monotonic()
    with pytest.raises(LostRank), together._ending_with_others([here]):
        Slow(entered)  # deleted at once
        assert time.monotonic() - began < 2.9, "the first interruption ended the destructor"
        time.sleep(60)
    loser.join()
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGUSR1) == before
