"""An edit: its request, its stages, the denoising loop, and the editor around them."""
