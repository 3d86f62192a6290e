"""How tests tell what hangs from what is slow: by whether anything moves, since machines may have much to do.

Where nothing can be seen to move, a limit is generous. It only says how late a hang is told.
"""

import time

HANG = 600  # seconds in which nothing has moved


class Hung(AssertionError):
    """Nothing has moved for too long."""


def wait_until(is_so, moving, what):
    """Wait until something is so.

    Args:
        is_so: Tells whether it is.
        moving: Tells something that changes as long as nothing hangs, such as the size of an output.
        what: What is waited for.

    Raises:
        Hung: What ``moving`` tells has not changed for HANG seconds.
    """
    seen, since = moving(), time.monotonic()
    while not is_so():
        now = moving()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > HANG:
            raise Hung(f"nothing has moved for {HANG} seconds while {what} was waited for")
        time.sleep(0.05)
