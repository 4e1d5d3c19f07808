"""Federated LoRA on a GLUE task, on Flower."""
