"""What answers requests: the BentoML service, its packaging, and the pages people look at."""
