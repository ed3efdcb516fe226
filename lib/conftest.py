from test_all import script  # noqa: F401  (the same fixture)
