"""One run of the command, from its settings to its released files."""
