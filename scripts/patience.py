"""How long to wait for what takes a known time on a host that does little else.

Where others want the processors as well everything takes longer, and is no worse for it; so bounds are stretched by how many
threads there are for each processor, and by no more than LONGEST, since something that hangs has to be found at last.
"""

import os
import time

LONGEST = 3


def stretch():
    """1...LONGEST, by the last minute."""
    try:
        return min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1), LONGEST)
    except OSError:
        return 1


class Deadline:
    """seconds from now, or longer while the host is busy."""

    def __init__(self, seconds):
        self.began, self.seconds = time.monotonic(), seconds

    def left(self):
        """Seconds to wait before asking again; 0 when it is over."""
        gone = time.monotonic() - self.began
        if gone < self.seconds:
            return self.seconds - gone
        return max(self.seconds * stretch() - gone, 0)

    def gone(self):
        return time.monotonic() - self.began
