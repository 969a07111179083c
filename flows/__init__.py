"""Wiring only: one Prefect flow a verb, the recipes, and the ``couturier`` command line."""
