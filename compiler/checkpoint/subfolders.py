"""The subfolders of a diffusers checkpoint that hold weights."""

from typing import Literal

__all__ = ["SUBFOLDERS", "Subfolder"]

Subfolder = Literal["transformer", "text_encoder", "vae"]

SUBFOLDERS: tuple[Subfolder, ...] = ("transformer", "text_encoder", "vae")
"""Every subfolder with weights, in the order in which a digest reads them."""
