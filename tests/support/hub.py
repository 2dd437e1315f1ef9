"""A hub with one model, for tests of what is downloaded, and when."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

__all__ = ["COMMIT", "HUB_ID", "FakeHub"]

HUB_ID = "owner/name"
COMMIT = "a" * 40


class FakeHub:
    """Takes the place of huggingface_hub's downloads; ``published`` is a checkpoint with weights.

    Attributes:
        calls: in order, ("configs" or "weights", revision) of every download and ("sizes", revision) of every question.
        online: False for a hub that does not answer.
    """

    def __init__(self, published: Path, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self.published = published
        self.snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
        self.calls: list[tuple[str, str | None]] = []
        self.online = True
        patch.setattr("huggingface_hub.snapshot_download", self._download)
        patch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=self._info))

    @property
    def weight_files(self) -> list[Path]:
        return sorted(file.relative_to(self.published) for file in self.published.rglob("*.safetensors"))

    def _download(
        self, hub_id: str, *, revision: str | None, allow_patterns: Sequence[str], local_files_only: bool = False
    ) -> str:
        assert hub_id == HUB_ID
        if local_files_only or not self.online:
            raise ValueError("the hub does not answer")
        self.calls.append(("weights" if "safetensors" in allow_patterns[0] else "configs", revision))
        for file in self.published.rglob("*"):
            name = file.relative_to(self.published)
            if file.is_file() and any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.snapshot / name)
        return str(self.snapshot)

    def _info(self, hub_id: str, *, revision: str, files_metadata: bool) -> Any:
        assert (hub_id, files_metadata) == (HUB_ID, True)
        self.calls.append(("sizes", revision))
        if not self.online:
            raise ConnectionError("the hub does not answer")
        files = [file for file in self.published.rglob("*") if file.is_file()]
        siblings = [
            SimpleNamespace(rfilename=str(f.relative_to(self.published)), size=f.stat().st_size, lfs=None)
            for f in files
        ]
        return SimpleNamespace(siblings=siblings)
