"""Pretrained models that come inside packages of the registry, as Hugging Face folders."""
