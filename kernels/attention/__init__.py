"""Self-attention over pixels."""

from .dispatch import dispatch_rules, preferred_backend
from .reference import attention as attention_reference
from .registration import attention, attention_jvp
from .xformers import attention as attention_xformers
from .xformers import unavailable as xformers_unavailable

__all__ = [
    "attention",
    "attention_jvp",
    "attention_reference",
    "attention_xformers",
    "dispatch_rules",
    "preferred_backend",
    "xformers_unavailable",
]
