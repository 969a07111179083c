"""The judges, one file a model; ``couturier.components.interest.judge`` knows them by name."""
