"""A relay between the two sides of a migration that reads the frames which pass, and breaks something at one of them.

docs/migration.md has the protocol, src/migrate/frame.h the layout. Faults are placed by what has crossed the link, and not by time, so
that also those stages are hit that take less than a millisecond, and so that it is known what each side can know afterwards.
"""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass

FRAMES = ("", "hello", "refuse", "offer", "ready", "progress", "pages", "fence", "missing", "state", "prepared", "commit", "running",
          "request", "complete", "status", "disk")
HEADER = struct.Struct("<4sHHIIQ")


@dataclass(frozen=True)
class Place:
    """The nth frame of a type in a direction (> from the source, < from the target): before it is passed on, inside it, or after it."""
    way: str
    frame: str
    nth: int
    point: str


class Relay:
    """
    Listens at one Unix socket and connects to another. At the place it calls act, once, in the thread that passes the frame on; if it
    gives false, nothing more passes on this connection.
    """

    def __init__(self, path, to, place=None, act=None):
        self.to, self.place, self.act = str(to), place, act
        self.fired = False
        self.seen = []                  # what passed but for pages, and how connections ended: for whoever looks why a test failed
        self._began = time.monotonic()
        self._counts = {}
        self._sockets = []
        self._lock = threading.Lock()
        self._refuse_until = 0.0
        self._still_until = 0.0
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    # ---- what act may do ----

    def cut(self, seconds=float("inf")):
        """All connections break, and for so long new ones do too."""
        with self._lock:
            self._refuse_until = time.monotonic() + seconds
            self._shutdown()

    def silence(self, seconds=float("inf")):
        """For so long nothing passes, and nothing breaks."""
        self._still_until = time.monotonic() + seconds

    def close(self):
        with self._lock:
            self._closed = True
            self._refuse_until = float("inf")
            self._shutdown()
        self._listener.close()

    # ---- inside ----

    def _shutdown(self):
        for s in self._sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        self._sockets = []

    def _accept(self):
        number = 0
        while True:
            try:
                a, _ = self._listener.accept()
            except OSError:
                return
            b = socket.socket(socket.AF_UNIX)
            with self._lock:
                refused = time.monotonic() < self._refuse_until
                if not refused:
                    try:
                        b.connect(self.to)
                        self._sockets += [a, b]
                    except OSError:
                        refused = True
            number = number + 1
            if refused:
                self._note(number, "refused")
                a.close()
                b.close()
                continue
            threading.Thread(target=self._pair, args=(number, a, b), daemon=True).start()

    def _note(self, number, text):
        self.seen.append(f"{time.monotonic() - self._began:.3f} {number} {text}")

    def _pair(self, number, a, b):
        """Closed only when nobody uses them any more: a number that is given to another socket must not be read from."""
        other = threading.Thread(target=self._pass, args=(number, "<", b, a), daemon=True)
        other.start()
        self._pass(number, ">", a, b)
        other.join()
        with self._lock:
            self._sockets = [s for s in self._sockets if s not in (a, b)]
        a.close()
        b.close()

    def _is_here(self, way, frame):
        """Whether this is the frame at which something is to happen."""
        with self._lock:
            self._counts[way, frame] = self._counts.get((way, frame), 0) + 1
            if self.fired or not self.place or (self.place.way, self.place.frame) != (way, frame) or \
                    self._counts[way, frame] < self.place.nth:
                return False
            self.fired = True
            return True

    def _send(self, to, data):
        while time.monotonic() < self._still_until and not self._closed:
            time.sleep(0.01)
        to.sendall(data)

    @staticmethod
    def _read(source, size):
        data = bytearray()
        while len(data) < size:
            more = source.recv(size - len(data))
            if not more:
                return None
            data += more
        return bytes(data)

    def _pass(self, number, way, source, to):
        end = "ended"
        try:
            while header := self._read(source, HEADER.size):
                _, kind, _, length, _, _ = HEADER.unpack(header)
                frame = FRAMES[kind]
                if frame not in ("pages", "disk", "progress"):
                    self._note(number, f"{way} {frame}")
                payload = self._read(source, length)
                if payload is None:
                    break
                whole, point = header + payload, None
                if self._is_here(way, frame):
                    point = self.place.point
                if point == "before" and not self.act(self):
                    break
                if point == "inside":
                    half = len(whole) // 2
                    self._send(to, whole[:half])
                    if not self.act(self):
                        break
                    whole = whole[half:]
                self._send(to, whole)
                if point == "after" and not self.act(self):
                    break
        except OSError as e:
            end = f"ended: {e}"
        self._note(number, f"{way} {end}")
        for s in (source, to):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
