"""The verbs, one a module: each is the story of one command."""
