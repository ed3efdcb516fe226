from test_all import frames, one_process, script, seeded  # noqa: F401  (the same fixtures)
