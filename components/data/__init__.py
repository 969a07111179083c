"""From anybody's logs to training windows: adapters, contract, pictures, versions, sequences and splits."""
