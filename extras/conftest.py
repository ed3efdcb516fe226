from test_all import dataset, script, seeded, workplace  # noqa: F401  (the same fixtures)
