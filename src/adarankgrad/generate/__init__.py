"""A quick look at what a language model writes."""
