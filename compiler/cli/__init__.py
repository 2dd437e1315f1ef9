"""The command line of the compiler: one file per command."""
