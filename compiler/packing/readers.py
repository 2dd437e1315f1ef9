"""The checkpoint's tensors as a build reads them: LoRAs fused, smoothing folded in."""

from collections.abc import Mapping

from qie.compiler.checkpoint.lora import fused_reader
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.checkpoint.unread import check_unread
from qie.compiler.planning.plan import Plan
from qie.compiler.quantization.smoothing import smoothed_reader

__all__ = ["Readers", "checkpoint_readers"]

Readers = Mapping[Subfolder, TensorReader]
"""The tensors of every subfolder."""


def checkpoint_readers(plan: Plan) -> Readers:
    """Readers of all subfolders: the transformer's with the LoRAs fused, all with the smoothing of the plan.

    Raises:
        CheckpointError: weights are incomplete, or a LoRA does not belong to the model.
    """
    readers = plan.checkpoint.readers()
    if not plan.allow_unread:
        check_unread(readers, plan.read, plan.model)
    if plan.loras:
        readers["transformer"] = fused_reader(readers["transformer"], plan.loras)
    for planned in plan.components:
        if planned.smoothing_groups:
            name = planned.graph.subfolder
            readers[name] = smoothed_reader(readers[name], planned.smoothing_groups, planned.smoothing_scales)
    return readers
