from test_all import frames, script, seeded  # noqa: F401  (the same fixtures)
