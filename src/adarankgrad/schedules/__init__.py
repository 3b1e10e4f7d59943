"""What changes along a run besides the rate: batch size, depth, and where gradients are taken."""
