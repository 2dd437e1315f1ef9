"""Objects that die as those of pybind11 do: C++ object first, then the callbacks of weak references, then the rest.

(pybind11/detail/class.h, ``clear_instance``.) A Python object does the same where its reference count decides. Where
the garbage collector finds it in a cycle, callbacks would come first, but pybind11's types are unknown to the collector
and their counts decide in a cycle, too: so destructors wait until the collector is done and then run in the order
opposite to that of creation, which is what reference counts give for contexts, configs, caches and engines.
"""

import gc
import itertools
from typing import Any

__all__ = ["Owned"]

NUMBERS = itertools.count()
WAITING: list["Owned"] = []
COLLECTING = [False]


class Owned:
    """The base of the fake's objects; ``destroy`` is what their C++ destructor does."""

    def __new__(cls, *_: Any, **__: Any) -> "Owned":
        owned = super().__new__(cls)
        owned._number = next(NUMBERS)
        return owned

    def destroy(self) -> None:
        """The C++ destructor."""

    def __del__(self) -> None:
        if COLLECTING[0]:
            WAITING.append(self)
        else:
            self.destroy()


def _collected(phase: str, _: dict[str, int]) -> None:
    COLLECTING[0] = phase == "start"
    if phase == "stop":
        for owned in sorted(WAITING, key=lambda each: -each._number):
            owned.destroy()
        WAITING.clear()


gc.callbacks.append(_collected)
