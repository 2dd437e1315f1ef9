"""``qie doctor``: what this machine can build and run, and what to install for the rest."""

from typing import TYPE_CHECKING

from qie.engines.cli.options import JsonOption, print_json
from qie.engines.terminal import human_bytes, say, table

if TYPE_CHECKING:
    from qie.compiler.doctor import Capability
    from qie.engines.machine import Machine

__all__ = ["doctor"]


def doctor(as_json: JsonOption = False) -> None:
    """Check what this machine can build and run.

    Lists what is missing and the command that installs it.
    """
    from qie.compiler.doctor import examine
    from qie.engines.records import to_plain

    report = examine()
    if as_json:
        return print_json(to_plain(report))
    machine = report.machine
    facts = [
        ["qie", report.qie],
        ["Python", report.python],
        ["machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB, {machine.system}"],
        *_gpus(machine),
        ["home", f"{report.home} ({human_bytes(report.free_bytes)} free)"],
    ]
    capabilities = [[c.name, "yes" if c.ready else "no", ", ".join(c.requirements) or "-"] for c in report.capabilities]
    notes = [_note(capability) for capability in report.capabilities]
    sections = [table(facts), table(capabilities, header=["capability", "ready", "found"], notes=notes)]
    if report.bundles:
        rows = [[bundle.name, "yes" if bundle.reason is None else "no"] for bundle in report.bundles]
        reasons = [bundle.reason for bundle in report.bundles]
        sections.append(table(rows, header=["bundle", "runs here"], notes=reasons))
    say("\n\n".join(sections))
    return None


def _note(capability: "Capability") -> str | None:
    """What is missing and how to get it, and what nobody has tried yet."""
    lines = []
    if not capability.ready:
        lines += [f"missing: {', '.join(capability.missing)}", f"fix: {capability.fix}"]
    if capability.trial is not None:
        lines.append(f"not run on a GPU yet: `{capability.trial}` in a clone of qie tries it there")
    return "\n".join(lines) or None


def _gpus(machine: "Machine") -> list[list[str]]:
    """Rows of the table: a GPU with its CUDA index each, and the driver."""
    if not machine.gpus:
        return [["GPU", f"none: {str(machine.no_gpu).partition('; ')[0]}"]]
    rows = [
        [
            f"GPU {gpu.index}",
            f"{gpu.name}, compute capability {gpu.compute_capability}, "
            + (f"{gpu.memory_gib:g} GiB" if gpu.memory_gib else "memory shared with the CPU")
            + (f", PCI {gpu.pci}" if gpu.pci else ""),
        ]
        for gpu in machine.gpus
    ]
    driver = [machine.driver, f"(CUDA {machine.cuda})" if machine.cuda else None]
    return [*rows, ["driver", " ".join(filter(None, driver)) or "of unknown version"]]
