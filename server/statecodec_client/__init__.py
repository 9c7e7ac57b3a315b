"""A client of the conversion service: `pip install 'statecodec[remote]'`, which needs nothing of the service itself."""

from .client import Client
from .transfer import ServiceError

__all__ = ["Client", "ServiceError"]
