"""Thin adapters to other packages, which each module imports only itself."""
