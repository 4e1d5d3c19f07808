"""A federation across machines, on Flower (extra `flower`); see `docs/howto/flower.md`."""

from fedex_hf.flower.app import make_server_app
from fedex_hf.flower.client import make_client_app
from fedex_hf.flower.strategy import FedExStrategy
from fedex_hf.flower.wire import PayloadError


__all__ = ["FedExStrategy", "PayloadError", "make_client_app", "make_server_app"]
