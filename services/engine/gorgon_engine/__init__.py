"""The Gorgon engine: lossless tree-speculative generation on a frozen backbone."""
