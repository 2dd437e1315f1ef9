"""A ``trtllm-build`` for tests: arguments, class file and checkpoint are checked as by the real one.

An "engine" has the loaded tensors of its rank in it, so it does not need the checkpoint any more. Sources:
commands/build.py and builder.py (``Engine.save``).
"""

import argparse
import ast
import json
import stat
import sys
from pathlib import Path
from typing import Any

from tests.support.trtllm.arguments import build_config, parser
from tests.support.trtllm.checkpoint import open_decoder
from tests.support.trtllm.config import Config, read_config
from tests.support.trtllm.tensors import inputs_of, output_of

VERSION = "1.2.1"
MAGIC = b"stand-in for an engine of TensorRT-LLM\n"
ROOT = Path(__file__).parents[3]

SCRIPT = """\
#!{python}
import sys
sys.path[:0] = {paths!r}
from tests.support.trtllm.build import main
main(capability={capability!r}, tensorrt={tensorrt!r}, version={version!r})
"""


def install_command(folder: Path, *, capability: str, tensorrt: str, version: str = VERSION) -> Path:
    """Write the executable ``trtllm-build`` into ``folder``, for a machine with one kind of GPU; the test adds PATH.

    Args:
        folder: where to.
        capability: of the GPU that engines are built for.
        tensorrt: version of TensorRT; ``Device.version`` of the fake GPU.
        version: of TensorRT-LLM.
    """
    path = folder / "trtllm-build"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / "src")]
    script = SCRIPT.format(
        python=sys.executable, paths=paths, capability=capability, tensorrt=tensorrt, version=version
    )
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def main(*, capability: str, tensorrt: str, version: str) -> None:
    print(f"[TensorRT-LLM] TensorRT LLM version: {version}")  # noqa: T201
    args = parser().parse_args()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    output = ("logits", "float32")
    if args.model_cls_file is not None:
        assert args.model_cls_name is not None
        output = output_of_class(Path(args.model_cls_file), args.model_cls_name)
    folder = args.checkpoint_dir if args.checkpoint_dir is not None else args.model_config
    if folder.lower().endswith(".json"):
        raise NotImplementedError("an engine with random weights")
    config = read_config(Path(folder))
    built = build_config(args, config)
    check(args, config, built, capability)
    open_decoder(Path(folder))
    shared = {
        "version": version,
        "tensorrt": tensorrt,
        "capability": capability,
        "pretrained_config": config.content,
        "build_config": built,
        "inputs": [tensor.record for tensor in inputs_of(config, built)],
        "outputs": [output_of(*output, config, built).record],
    }
    for rank in range(config.tp):
        weights = (Path(folder) / f"rank{rank}.safetensors").read_bytes()
        header = json.dumps({**shared, "rank": rank}).encode()
        path = Path(args.output_dir) / f"rank{rank}.engine"
        path.write_bytes(MAGIC + len(header).to_bytes(8, "little") + header + weights)
    keys = ("version", "pretrained_config", "build_config")
    (Path(args.output_dir) / "config.json").write_text(json.dumps({key: shared[key] for key in keys}, indent=4))
    Path(args.output_timing_cache).write_bytes(b"timing cache")


def check(args: argparse.Namespace, config: Config, built: dict[str, Any], capability: str) -> None:
    """What ends a build, and what this stand-in does not know (NotImplementedError)."""
    assert not built["plugin_config"]["streamingllm"], "StreamingLLM is no longer supported"
    if getattr(args, "paged_kv_cache", None) == "enable" and built["kv_cache_type"] == "DISABLED":
        raise AssertionError("paged_kv_cache and kv_cache_type contradict each other")
    if args.workers > 1 and args.model_cls_file is not None and config.tp > 1:
        raise ModuleNotFoundError("No module named 'models'")  # the spawned worker cannot unpickle the class
    sm = [int(part) for part in capability.split(".")]
    algorithm = config.quant_algo
    assert algorithm != "FP8" or sm >= [8, 9], "Engine building failed, please check error log."
    if algorithm in ("W8A16", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL") and [10, 0] <= sm < [12, 0]:
        raise RuntimeError(f"{algorithm} is not supported on SM {sm[0]}{sm[1]}")
    expected = {
        "kv_cache_type": (built["kv_cache_type"], "DISABLED"),
        "remove_input_padding": (args.remove_input_padding, "enable"),
        "max_beam_width": (args.max_beam_width, 1),
        "gpt_attention_plugin": (built["plugin_config"]["gpt_attention_plugin"], config.dtype),
        "multiple_profiles": (args.multiple_profiles, "disable"),
        "lora_plugin": (args.lora_plugin, "disable"),
        "build_config": (args.build_config, None),
        "fast_build": (args.fast_build, False),
        "strip_plan": (args.strip_plan, False),
        "dry_run": (args.dry_run, False),
    }
    for name, (found, known) in expected.items():
        if found != known:
            raise NotImplementedError(f"{name} is {found}, and the stand-in only knows engines with {known}")


def output_of_class(file: Path, name: str) -> tuple[str, str]:
    """Name and dtype of the output that the class ``name`` in ``file`` marks; its code is parsed and not executed."""
    module = ast.parse(file.read_text(), str(file))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        raise AttributeError(f"module 'models' has no attribute '{name}'")
    for node in ast.walk(classes[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "mark_output":
            marked, *dtypes = [each.value for each in node.args if isinstance(each, ast.Constant)]
            dtypes += [each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)]
            return str(marked), str(dtypes[0]) if dtypes else "float32"
    raise AssertionError("Network must have at least one output")
