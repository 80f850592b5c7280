"""`python -m gorgon_cli`: the `gorgon` command without the installed script."""

from gorgon_cli.entry import main

main()
