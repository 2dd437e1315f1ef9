"""Code of a whole edit that is wrong, and that checks of single stages do not run."""

from tests.support.faults.code import Change
from tests.support.faults.fault import Fault

__all__ = ["FAULTS"]


def edit(module: str, how: str, old: str, new: str) -> Fault:
    return Fault(how=how, level="edits", runs=Change(module=f"engines.editing.{module}", old=old, new=new))


FAULTS = {
    "tokens of the schedule": edit(
        "edit",
        "the schedule is for twice as many noise tokens",
        "noise_tokens=settings.size.tokens",
        "noise_tokens=2 * settings.size.tokens",
    ),
    "order of references": edit(
        "conditioning",
        "the latents of reference images are in reverse order",
        "for latents_hwC in latents], 1)",
        "for latents_hwC in latents[::-1]], 1)",
    ),
    "negative prompt of an edit": edit(
        "conditioning",
        "the negative pass reads the instruction",
        "negative=embeds[-1] if inputs.guided else None",
        "negative=embeds[0] if inputs.guided else None",
    ),
    "grid of references": edit(
        "conditioning",
        "rows and columns of reference images are in each other's place",
        "*(each.vae.shape[:2] for each in self.copies)",
        "*(each.vae.shape[1::-1] for each in self.copies)",
    ),
}
