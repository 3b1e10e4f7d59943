"""What of a model is trained, and how that comes out: a thin file a method (`interface`)."""
