"""The command line of statecodec: one file per verb, thin over the library's public API."""
