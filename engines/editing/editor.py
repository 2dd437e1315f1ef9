"""The editor: an opened bundle with its engines, ready for requests.

NumPy, Pillow and the backend are imported with the first editor, not with this file: ``qie.Editor`` costs nothing.
"""

import threading
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import Residency, Specialization
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Edit, Request
from qie.engines.errors import QieError, RequestError
from qie.engines.progress import Progress, no_progress

if TYPE_CHECKING:
    from qie.engines.editing.denoise import StepObserver
    from qie.engines.editing.edit import ImageObserver
    from qie.engines.editing.stages import Stages

__all__ = ["Editor"]


class Editor:
    """Runs edits with the engines of one bundle; ``with Editor(...) as editor`` closes it.

    It may be used from several threads: edits run one after the other, in the order in which they get hold of it. Edits
    that shall run at the same time take an editor each.

    Attributes:
        bundle: the opened bundle.
        model: constants of its model.
        stages: its engines as functions.
        tokenizer: of its model.
        encoder_cache: of embeddings of its images and prompts.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        device: int | None = None,
        residency: Residency | None = None,
        cuda_graphs: bool | None = None,
        specialization: Specialization | None = None,
        threads: int = 0,
        encoder_cache: EncoderCache | None = None,
        vllm_url: str | None = None,
    ) -> None:
        """Open a bundle and choose the engines for this machine; they are loaded when first needed.

        Args:
            bundle: an opened bundle, or a name or folder of one; None is the newest that this machine can run.
            device: CUDA index of the GPU to run on, as `qie doctor` lists them; None is the first that fits.
            residency: "resident" keeps engines loaded, "sequential" releases each after its stage; None is the bundle's
                default.
            cuda_graphs: capture repeated runs as CUDA graphs on a GPU; None is with TensorRT and not with TensorRT for
                RTX, which captures behind its API.
            specialization: kernels of TensorRT for RTX: "none" are those that serve every shape, "eager" are compiled
                for every new shape before its first run; None is the bundle's default.
            threads: of engines on the CPU; 0 is one per core.
            encoder_cache: of embeddings of images and prompts, which may be shared with other editors; None is one of
                its own, in memory. ``EncoderCache(bytes_max=0)`` keeps none.
            vllm_url: URL of a vLLM server that runs the language model in place of the bundle's engine
                (docs/language.md).

        Raises:
            BundleError: there is no such bundle, or it is incomplete or damaged.
            EngineMismatchError, BackendMissingError: see ``choose_engines``.
            RequestError: see ``Stages``; or ``encoder_cache`` is none.
        """
        from qie.engines.editing.conditioning import open_tokenizer
        from qie.engines.editing.stages import Stages, elsewhere
        from qie.engines.sessions.choose import newest_runnable

        if not isinstance(encoder_cache, EncoderCache | None):
            raise RequestError(
                f"the encoder cache is {encoder_cache!r}; give an EncoderCache, or None", option="encoder_cache"
            )
        if bundle is None:
            bundle = newest_runnable(device, elsewhere=elsewhere(vllm_url))
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.model = self.bundle.manifest.model
        self.stages = Stages(
            self.bundle,
            device=device,
            residency=residency,
            cuda_graphs=cuda_graphs,
            specialization=specialization,
            threads=threads,
            vllm_url=vllm_url,
        )
        self.tokenizer = open_tokenizer(self.bundle)
        self.encoder_cache = EncoderCache() if encoder_cache is None else encoder_cache
        self._lock, self._edits, self._closes = threading.RLock(), False, False
        weakref.finalize(self, _close_quietly, self.stages)  # also at interpreter exit

    def edit(
        self,
        request: Request,
        *,
        progress: Progress = no_progress,
        observer: "StepObserver | None" = None,
        on_image: "ImageObserver | None" = None,
    ) -> Edit:
        """Edit ``request.images`` by every instruction with every seed.

        Args:
            request: what to edit and how.
            progress: called with (stage, units done, units in all).
            observer: sees every step, for which its tensors are copied to the host.
            on_image: called with the number of a sample, as in ``Edit.samples``, and its image as soon as that is
                decoded: before the next batch where engines are resident or on a CPU, otherwise after the last one.

        Raises:
            RequestError: an image, instruction, seed or option cannot be used; or this thread is in an edit already.
            EngineError: a backend failed, memory ran out, or the result is not finite.
        """
        from qie.engines.editing.edit import edit

        with self._lock:
            if self._edits:
                raise RequestError("an edit cannot start inside another one of the same editor; use a second editor")
            self._edits = True
            try:
                return edit(
                    self.stages,
                    self.tokenizer,
                    request,
                    progress=progress,
                    observer=observer,
                    on_image=on_image,
                    encoder_cache=self.encoder_cache,
                )
            finally:
                self._edits = False
                if self._closes:
                    self.close()

    def close(self) -> None:
        """Release all engines and the GPU once a running edit has ended.

        An edit of another thread is waited for; one of this thread, as in a signal handler, closes when it ends. The
        next edit would load the engines again. Closing twice is allowed.
        """
        with self._lock:
            self._closes = self._edits
            if not self._edits:
                self.stages.close()

    def __enter__(self) -> "Editor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(QieError) if kind is not None else nullcontext():  # the first problem is the one to tell
            self.close()


def _close_quietly(stages: "Stages") -> None:
    """Close what an editor left open; there is nobody left to handle a failure of the GPU."""
    with suppress(QieError):
        stages.close()
