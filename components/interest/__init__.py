"""The judges: user-interest models that score a candidate picture for one person's history."""
