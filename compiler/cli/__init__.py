"""The command line of the compiler: one file a command."""
