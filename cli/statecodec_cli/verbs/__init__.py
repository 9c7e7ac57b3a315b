"""One module per verb, each with a function `run` whose signature and docstring are the verb's options and help.

A new verb is a new module here and one row in `statecodec_cli.main.VERBS`. Modules import torch and statecodec inside
`run` only, so that `statecodec --help` stays instant.
"""
