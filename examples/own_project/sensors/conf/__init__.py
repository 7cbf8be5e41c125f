"""The configuration groups of this package: `hydra.searchpath=[pkg://sensors.conf]`."""
