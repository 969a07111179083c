"""Proof: the protocol with its controls, metrics, intervals over users, and the report."""
