"""``qie diff``: what differs between two bundles, section by section."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qie.engines.cli.options import DeviceOption, JsonOption, print_json
from qie.engines.terminal import Bars, human_bytes, human_memory, human_seconds, say, table, wrap

if TYPE_CHECKING:
    from qie.compiler.validation.diff.changes import Change
    from qie.compiler.validation.diff.diff import BundleDiff, EngineDiff, VelocityDiff
    from qie.compiler.validation.diff.graph import WeightChange
    from qie.compiler.validation.diff.structure import LayerChange
    from qie.engines.bundle.bundle import Bundle

__all__ = ["diff"]

ROWS = 16
"""Most rows that a table prints of a list without an end: layers, kernels, weights."""

KINDS = ("precision", "removed", "added")
"""The order in which changes of layers are printed."""

DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


def diff(
    old: Annotated[str, typer.Argument(metavar="BUNDLE_A", help="Name or folder of the earlier bundle.")],
    new: Annotated[str, typer.Argument(metavar="BUNDLE_B", help="Name or folder of the later bundle.")],
    golden: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Golden file for the error of each step.", show_default="the one of the pocket model"
        ),
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 where anything but time and memory of the build differs.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two bundles.

    Compares model, LoRAs, recipes, engines with their layers, precisions and kernels, graphs and weights. Where this
    machine runs both bundles and there is a golden file, also the velocities of every step.
    """
    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.validation.diff.compare import compare
    from qie.engines.bundle.bundle import open_bundle
    from qie.engines.records import to_plain

    bundles: tuple[Bundle, Bundle] = open_bundle(old), open_bundle(new)
    with Bars(enabled=not as_json) as bars:
        found = compare(*bundles, golden=golden, device=device, progress=bars)
    if as_json:
        print_json({"differs": found.differs, **to_plain(found)})
    else:
        say(_describe(found))
    if exit_code and found.differs:
        raise typer.Exit(1)


def _describe(found: "BundleDiff") -> str:
    parts: list[str] = []
    if not found.same_model:
        parts.append(wrap(_other_model(found)))
    parts.append(f"old: {found.old}\nnew: {found.new}")
    sections: dict[str, list[str]] = {
        "qie": [_changes(found.version)],
        "model": [_changes(found.model)],
        "LoRAs": [_changes(found.loras)],
        "recipe": [_changes(found.recipe)],
        "defaults and limits": [_changes(found.settings)],
        "files": [_files(found.files)],
        "modulation weights": [_weights(found.modulation)],
        **{_title(engine): _engine(engine) for engine in found.engines},
        "velocity": [_velocity(found.velocity)],
    }
    equal = []
    for title, texts in sections.items():
        filled = [text for text in texts if text]
        parts += ["\n\n".join([f"{title}:\n{filled[0]}", *filled[1:]])] if filled else []
        equal += [] if filled else [title]
    build = _build(found.engines)
    if build:
        parts.append(build)
    if found.velocity.not_run is not None:
        equal.remove("velocity")
        parts.append(wrap(f"velocity: not compared, {found.velocity.not_run}"))
    if not found.differs:
        parts.append("no difference" + (", except in time and memory of the build" if build else ""))
    elif equal:
        parts.append(wrap(f"no difference: {', '.join(equal)}"))
    return "\n\n".join(parts)


def _other_model(found: "BundleDiff") -> str:
    names = next(((c.old, c.new) for c in found.model if c.key == "name"), None)
    if names is None:
        return "The bundles are of one model with different weights or configs."
    return f"The bundles are of different models: {names[0]} and {names[1]}."


def _changes(changes: "Sequence[Change]") -> str:
    rows = [[c.key, _shown(c.key, c.old), _shown(c.key, c.new)] for c in changes]
    return table(rows, header=["", "old", "new"]) if rows else ""


def _shown(key: str, value: Any) -> str:
    """A value for people: digests cut, bytes with a unit, names in place of paths."""
    from qie.compiler.recipe.toml import inline

    if value is None:
        return "-"
    if isinstance(value, int) and key in ("bytes", "activation bytes", "peak bytes", "largest buffer, bytes"):
        return human_bytes(value) if key == "bytes" else human_memory(value)
    if key == "seconds":
        return human_seconds(value)
    if key.startswith("shapes of "):
        low, tuned, high = (" x ".join(map(str, dims)) for dims in value)
        return f"{low} to {high}, tuned for {tuned}"
    text = value if isinstance(value, str) else inline(value)
    return DIGEST.sub(r"\1", PurePath(text).name if text.startswith("/") else text)


def _files(changes: "Sequence[Change]") -> str:
    """Changed files; the tables of schedules, which have digests as names, by their number."""
    tables = [c for c in changes if c.key.startswith("schedules/")]
    text = _changes([c for c in changes if c not in tables])
    if not tables:
        return text
    counts = {
        "removed": sum(c.new is None for c in tables),
        "added": sum(c.old is None for c in tables),
        "changed": sum(c.old is not None and c.new is not None for c in tables),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{text}\n\ntables of schedules: {told}".lstrip()


def _title(engine: "EngineDiff") -> str:
    part = f", part {engine.part}" if engine.part else ""
    target = engine.old or engine.new or ""
    return f"{engine.component}{part} ({target})"


def _engine(engine: "EngineDiff") -> list[str]:
    """The tables of an engine; none where it is equal."""
    if engine.old is None or engine.new is None:
        return ["only in the new bundle" if engine.old is None else "only in the old bundle"]
    texts = [_changes(engine.changes)]
    keys = {change.key for change in engine.changes}
    if "key" not in keys and any(key.endswith(".engine") for key in keys):
        texts.append("of one key: the engine compiler wrote other bytes for the same graph, weights and versions")
    if engine.structure is not None:
        texts += [_changes(engine.structure.counts), _layers(engine.structure.layers)]
        texts.append(_counted("kernel", engine.structure.kernels))
    if engine.graph is not None:
        texts += [_counted("nodes of", engine.graph.nodes), _counted("weights in", engine.graph.dtypes)]
        texts.append(_weights(engine.graph.weights))
    return texts


def _counted(what: str, changes: "Sequence[Change]") -> str:
    rows = [[c.key, str(c.old or 0), str(c.new or 0)] for c in changes]
    return _cut(rows, header=[what, "old", "new"], right=[1, 2])


def _layers(layers: "Sequence[LayerChange]") -> str:
    """Layers by block, type and precision, those of all blocks that differ alike in one row; --json has each."""
    counts: Counter[tuple[str, ...]] = Counter()
    for layer in layers:
        name, number = _block(layer.name)
        place = name.partition("*")[0] + "*" if number else "other layers"
        counts[layer.kind, place, layer.type, layer.old or "-", layer.new or "-", number] += layer.count
    groups: dict[tuple[str, ...], list[str]] = {}
    for (*key, number), count in sorted(counts.items(), key=lambda item: KINDS.index(item[0][0])):
        groups.setdefault((*key, str(count)), []).append(number)
    rows = [[place.replace("*", _ranges(numbers)), *rest] for (_, place, *rest), numbers in groups.items()]
    return _cut(rows, header=["layers of", "type", "old precision", "new precision", "each"], right=[4])


def _weights(weights: "Sequence[WeightChange]") -> str:
    """Weights, the largest error first, those of all blocks that differ alike in one row."""
    groups: dict[tuple[str, str, str], list[tuple[str, float | None]]] = {}
    for weight in weights:
        name, number = _block(weight.name)
        groups.setdefault((name, weight.old or "-", weight.new or "-"), []).append((number, weight.relative_l2))
    largest = {key: max((e for _, e in found if e is not None), default=None) for key, found in groups.items()}
    ordered = sorted(groups.items(), key=lambda item: -(largest[item[0]] or 0))
    rows = [
        [name.replace("*", _ranges(n for n, _ in found), 1), old, new, str(len(found)), _error(largest[name, old, new])]
        for (name, old, new), found in ordered
    ]
    return _cut(rows, header=["weight", "old", "new", "count", "L2 error"], right=[3, 4])


def _block(name: str) -> tuple[str, str]:
    """A name with ``*`` in place of the number of its block, and that number."""
    found = re.search(r"(?<=\.)\d+(?=[./]|$)", name)
    return (name, "") if found is None else (f"{name[: found.start()]}*{name[found.end() :]}", found[0])


def _ranges(numbers: Iterable[str]) -> str:
    """``{0-3,58}``; a single number as it is."""
    ordered = sorted({int(number) for number in numbers if number})
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"


def _cut(rows: list[list[str]], *, header: Sequence[str], right: Sequence[int]) -> str:
    if not rows:
        return ""
    more = f"\n… and {len(rows) - ROWS} more, all of them with --json" if len(rows) > ROWS else ""
    return table(rows[:ROWS], header=header, right=right) + more


def _build(engines: "Sequence[EngineDiff]") -> str:
    """Time and memory of the builds, which count as no difference."""
    rows = [
        [e.component if not e.part else f"{e.component}, part {e.part}", c.key.replace(" bytes", " memory"),
         _shown(c.key, c.old), _shown(c.key, c.new)]
        for e in engines
        for c in e.build
    ]  # fmt: skip
    return table(rows, header=["build of", "", "old", "new"], right=[2, 3]) if rows else ""


def _velocity(velocity: "VelocityDiff") -> str:
    if all(step.between == 0 for step in velocity.steps):
        return ""
    rows = [
        [s.case, str(s.step + 1), f"{s.sigma:.3f}", s.passed, _error(s.between), _error(s.old), _error(s.new)]
        for s in velocity.steps
    ]
    header = ["case", "step", "sigma", "pass", "new to old", "old to reference", "new to reference"]
    text = table(rows, header=header, right=[1, 2, 4, 5, 6])
    return f"{text}\n\nrelative L2 along the trajectory of {velocity.golden}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
