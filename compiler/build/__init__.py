"""Builders: graph to engine, one file a backend."""

from qie.compiler.build import onnxruntime

__all__ = ["BUILDERS"]

BUILDERS = {"onnxruntime": onnxruntime}
"""Backend to the module that builds for it: ``build`` and ``version``."""
