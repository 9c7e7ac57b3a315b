"""The verbs, one module each, from reading arguments to the report."""
