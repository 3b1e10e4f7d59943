"""What there is to learn: one thin file a task, in one shape (`interface`)."""
