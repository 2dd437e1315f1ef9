"""The piece of a bundle that holds the modulation: tables of the recipe's schedules, and weights where these stay."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.packing.pieces import Piece, Pieces
from qie.compiler.packing.readers import Readers
from qie.compiler.packing.take_over import take_over
from qie.compiler.planning.plan import Plan, recipe_schedules
from qie.compiler.weights.modulation import ModulationFile
from qie.engines.bundle.bundle import Bundle
from qie.engines.inputs.stored_schedules import SCHEDULES, table_name

__all__ = ["ModulationPiece", "take_modulation"]


class ModulationPiece:
    """Reads the modulation weights in the pass over the transformer's files, and keeps the piece when it has all.

    Attributes:
        key: of the piece.
    """

    def __init__(self, plan: Plan, key: str, pieces: Pieces, readers: Readers) -> None:
        """Start on the piece ``key``."""
        self.key = key
        self._pieces = pieces
        self._file = ModulationFile(
            plan.model.transformer,
            readers["transformer"],
            pieces.begin(key),
            schedules=recipe_schedules(plan.model, plan.recipe),
            tables="bfloat16" if plan.recipe.components.transformer.precision == "bfloat16" else "float32",
            mode=plan.recipe.modulation,
        )
        self.first = self._file.first

    @property
    def sources(self) -> Sequence[tuple[Subfolder, str]]:
        """Subfolder and name of every tensor of the modulation."""
        return self._file.sources

    def take(self, subfolder: Subfolder, name: str, tensor: NDArray[Any]) -> None:
        """Take one tensor, which must not change any more."""
        self._file.take(subfolder, name, tensor)

    def finish(self) -> None:
        """Complete the files, and keep the piece."""
        self._file.finish()
        record = replace(self._file.record, key=self.key)
        self._pieces.keep(self.key, Piece(modulation=record, files=self._file.tables))


def take_modulation(plan: Plan, key: str, pieces: Pieces, old: Bundle | None) -> bool:
    """Make the piece ``key`` of the files of an earlier bundle where these have that key; whether it is there now.

    Tables that were added to that bundle later are left out.
    """
    if old is None or old.manifest.model.modulation.key != key:
        return False
    record = old.manifest.model.modulation
    names = [f"{SCHEDULES}/{table_name(record, values)}" for values in recipe_schedules(plan.model, plan.recipe)]
    of = {file.path: file for file in old.manifest.schedules}
    if any(name not in of for name in names):
        return False
    tables = tuple(of[name] for name in dict.fromkeys(names))
    if not take_over([*tables, *([] if record.file is None else [record.file])], old, pieces.begin(key)):
        return False
    pieces.keep(key, Piece(modulation=record, files=tables))
    return True
