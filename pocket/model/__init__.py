"""The modules of the pocket model as they are trained, and their inputs."""
