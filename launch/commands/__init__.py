"""The verbs of the `vitrail` command: one file per verb or group of verbs."""
