"""The self-test of a GPU: engines of the pocket model, built for it, loaded, run and compared with the CPU's."""
