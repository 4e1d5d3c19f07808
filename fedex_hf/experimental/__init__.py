"""What may still change without notice."""

from fedex_hf.experimental.parallel_clients import ParallelClients


__all__ = ["ParallelClients"]
