"""The editor: an opened bundle with its engines, ready for requests.

NumPy, Pillow and the backend are imported with the first editor, not with this file: ``qie.Editor`` costs nothing.
"""

import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import Residency
from qie.engines.editing.request import Edit, Request
from qie.engines.errors import QieError
from qie.engines.progress import Progress, no_progress

if TYPE_CHECKING:
    from qie.engines.editing.denoise import StepObserver
    from qie.engines.editing.stages import Stages

__all__ = ["Editor"]


class Editor:
    """Runs edits with the engines of one bundle; ``with Editor(...) as editor`` closes it.

    Attributes:
        bundle: the opened bundle.
        model: constants of its model.
        stages: its engines as functions.
        tokenizer: of its model.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        residency: Residency | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Open a bundle and choose the engines for this machine; they are loaded when first needed.

        Args:
            bundle: an opened bundle, or a name or folder of one; None is the newest.
            residency: "resident" keeps engines loaded, "sequential" releases each after its stage; None is the bundle's
                default.
            cuda_graphs: capture repeated runs as CUDA graphs on a GPU.

        Raises:
            BundleError: there is no such bundle, or it is incomplete or damaged.
            EngineMismatchError, BackendMissingError: see ``choose_engines``.
        """
        from qie.engines.editing.conditioning import open_tokenizer
        from qie.engines.editing.stages import Stages

        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.model = self.bundle.manifest.model
        self.stages = Stages(self.bundle, residency=residency, cuda_graphs=cuda_graphs)
        self.tokenizer = open_tokenizer(self.bundle)
        weakref.finalize(self, _close_quietly, self.stages)  # also at interpreter exit

    def edit(
        self,
        request: Request,
        *,
        progress: Progress = no_progress,
        observer: "StepObserver | None" = None,
    ) -> Edit:
        """Edit ``request.images`` by every instruction with every seed.

        ``progress`` is called with (stage, units done, units in all). ``observer`` sees every step, for which its
        tensors are copied to the host.

        Raises:
            RequestError: an image, instruction, seed or option cannot be used.
            EngineError: a backend failed or memory ran out.
        """
        from qie.engines.editing.edit import edit

        return edit(self.stages, self.tokenizer, request, progress=progress, observer=observer)

    def close(self) -> None:
        """Release all engines and the GPU; the next edit would load them again. Closing twice is allowed."""
        self.stages.close()

    def __enter__(self) -> "Editor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_quietly(stages: "Stages") -> None:
    """Close what an editor left open; there is nobody left to handle a failure of the GPU."""
    with suppress(QieError):
        stages.close()
