"""`python -m statecodec_cli` is `statecodec`."""

from statecodec_cli.main import main

raise SystemExit(main())
