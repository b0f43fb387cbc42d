"""Self-attention over pixels."""

from .reference import attention

__all__ = ["attention"]
