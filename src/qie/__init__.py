"""qie compiles Qwen-Image-Edit into engines for a named GPU and runs edits on them.

``qie.compiler`` works ahead of time (needs ``qie[compile]``); ``qie.engines`` is the thin runtime
(numpy, pillow, tokenizers and one backend); ``qie.recipes`` is data: one TOML file a GPU.
"""

__version__ = "0.1.0"
