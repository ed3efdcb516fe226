from test_all import dataset, frames, one_process, script, seeded, workplace  # noqa: F401  (the same fixtures)
