"""What changes along a run besides the learning rate: the depth."""
