"""The `gorgon` command."""
