"""Entry points: the scripts that launchers start, and the `vitrail` command."""
