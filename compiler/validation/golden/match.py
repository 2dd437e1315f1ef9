"""Which golden file is of a bundle."""

from pathlib import Path

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation.golden.file import GOLDEN_FILE, Golden
from qie.engines.bundle.bundle import Bundle

__all__ = ["is_of_pocket", "own_golden", "unlike"]


def is_of_pocket(bundle: Bundle) -> bool:
    """Whether ``bundle`` says that it is of the pocket model, which comes with qie."""
    model = bundle.manifest.model
    return model.name == POCKET.name and model.revision is None


def own_golden(bundle: Bundle) -> Path | None:
    """The golden file that comes with the model of ``bundle``; None where none does."""
    file = POCKET / GOLDEN_FILE
    return file if is_of_pocket(bundle) and file.is_file() else None


def unlike(golden: Golden, bundle: Bundle) -> list[str]:
    """What keeps ``golden`` from being of the checkpoint and the LoRAs of ``bundle``, as sentences with the fix."""
    record, model = golden.record, bundle.manifest.model
    problems = []
    if record.digest != model.digest:
        problems.append(
            f"the golden file was recorded from {record.model} with the digest {record.digest[:12]}, and the bundle is "
            f"of {model.name} with {model.digest[:12]}; record it again with `qie golden`"
        )
    recorded, fused = (
        [(lora.sha256, lora.weight) for lora in loras] for loras in (record.loras, bundle.manifest.loras)
    )
    if recorded != fused:
        problems.append("the golden file was recorded with other LoRAs or weights; record it again with `qie golden`")
    return problems
