"""One module a trainer: what its users write, and nothing else.

Each module has the distribution `PACKAGE`, the names of the `SETTINGS` that the trainer can do, and
`fit(setting, watch, steps, micro)`, which trains from the beginning with `steps` micro-batches of `micro`
samples an update. Settings with several processes run under the environment of `torchrun`, once in each
rank.
"""
