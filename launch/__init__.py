"""Starting the engine's ranks: `python -m launch`, and a folder for each scheduler."""
