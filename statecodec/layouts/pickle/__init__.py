"""Reading a pickle into descriptions of its objects, without running any of it."""
