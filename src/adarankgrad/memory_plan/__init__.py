"""Memory of a training run, predicted before anything is allocated."""
