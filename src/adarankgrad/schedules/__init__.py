"""What changes along a run besides the learning rate: batch size, and where gradients are taken."""
