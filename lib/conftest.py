from test_all import frames, script  # noqa: F401  (the same fixtures)
