"""Telling a hang from a slow run on a busy machine: by whether anything still moves.

Where no progress can be seen, tests set a generous time limit. It only decides how late a hang is reported.
"""

import time

HANG = 600  # seconds without any movement


class Hung(AssertionError):
    """Nothing has moved for too long."""


def wait_until(is_so, moving, what):
    """Wait until a condition holds.

    Args:
        is_so: Returns whether it holds.
        moving: Returns something that keeps changing unless there is a hang, such as an output's size.
        what: What is awaited, for the error message.

    Raises:
        Hung: What ``moving`` returns has not changed for HANG seconds.
    """
    seen, since = moving(), time.monotonic()
    while not is_so():
        now = moving()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > HANG:
            raise Hung(f"nothing has moved for {HANG} seconds while waiting for {what}")
        time.sleep(0.05)
