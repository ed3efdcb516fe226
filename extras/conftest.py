from test_all import dataset, one_process, script, seeded, workplace  # noqa: F401  (the same fixtures)
