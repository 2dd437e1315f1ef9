"""The device of the stand-in: the CPU."""

from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: True)
