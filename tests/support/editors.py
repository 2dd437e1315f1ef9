"""Editors whose every edit runs every engine, for tests of engines and of what surrounds them."""

from pathlib import Path
from typing import Any

from qie.engines.bundle.bundle import Bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache

__all__ = ["uncached_editor"]


def uncached_editor(bundle: Bundle | str | Path, **options: Any) -> Editor:
    """An editor that keeps no embeddings."""
    return Editor(bundle, encoder_cache=EncoderCache(bytes_max=0), **options)
