"""Which signals end a run after the current step, and which at once."""

import os
import signal

import interruption
import pytest
from interruption import Interruption

INT, TERM = signal.SIGINT, signal.SIGTERM


def outcome(*numbers):
    """The exit status, as its parent sees it, of a process that gets these signals within a step."""
    if (child := os.fork()) == 0:
        try:
            with Interruption() as its:
                for number in numbers:
                    signal.raise_signal(number)
                os._exit(its.status if its.requested() else 0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("number", [INT, TERM])
def test_the_first_is_heard_after_the_step(number):
    assert outcome() == 0
    assert outcome(number) == 128 + number


def test_who_does_not_want_to_wait_need_not(monkeypatch):
    monkeypatch.setattr(interruption, "DUPLICATE_SECONDS", 0)
    assert outcome(INT, INT) == -INT
    assert outcome(TERM, INT) == -INT
    assert outcome(INT, TERM) == -TERM  # torchrun sends SIGTERM at a second Ctrl-C
    assert outcome(TERM, TERM, TERM) == 128 + TERM  # schedulers signal both the launcher and its processes


def test_one_that_is_passed_on_is_no_second():
    assert outcome(INT, INT) == 128 + INT


def test_what_is_ignored_stays_so():
    before = signal.signal(INT, signal.SIG_IGN)  # as a shell starts background processes
    try:
        assert outcome(INT) == 0
        assert outcome(INT, TERM) == 128 + TERM
    finally:
        signal.signal(INT, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (INT, TERM)]
    with Interruption():
        assert [signal.getsignal(number) for number in (INT, TERM)] != before
    assert [signal.getsignal(number) for number in (INT, TERM)] == before
