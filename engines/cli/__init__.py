"""The command line of the runtime: one file a command."""
