"""Picture codecs, any-to-any models and their samplers."""
