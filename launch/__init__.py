"""What a user starts: the scripts that launchers run, and the `vitrail` command."""
