"""`python -m statecodec_server` is `statecodec-server`."""

from .main import main

main()
