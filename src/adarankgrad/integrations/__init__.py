"""What other libraries need beyond a `torch.optim.Optimizer`; each module imports its own."""
