"""The thin runtime: opens a bundle, loads its engines, edits images. numpy, pillow, tokenizers and one backend."""
