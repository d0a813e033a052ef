"""The list of boot tests. See run."""

from dataclasses import dataclass
from typing import Callable

ALL = []


@dataclass
class Case:
    name: str
    function: Callable
    seconds: int    # bound for the whole case, enforced by ./check
    alone: bool     # measures time: nothing else may run beside it
    parts: bool     # gets (report, folder) and names its results itself; else (folder), one result
    kvm: str        # "only": not for other engines; "small": also where /dev/kvm emulates; "": only where it is fast
    wanted: bool    # runs only when it is asked for by name: takes long, or downloads much


def case(seconds, alone=False, parts=False, name=None, wanted=False, kvm=""):
    def add(function):
        ALL.append(Case(name or function.__name__.replace("_", "-"), function, seconds, alone, parts, kvm, wanted))
        return function
    return add
