"""Which backend attention prefers: rules per architecture, the pass "dispatch" of ``pinned/<arch>.json``.

    {"dispatch": [{"when": {"tokens": [0, 256], "head_dim": [1, 256]}, "use": {"backend": "triton"}}, ...]}

The tables shipped are analytic, not measured, until a GPU has tuned them: up to 256 tokens attention is bound by memory
and launches (T/2 operations per byte), where a kernel that reads qkv and writes dqkv in place saves the copies; above, it
is bound by arithmetic, where PyTorch's fused kernels (cuDNN, FlashAttention) are the safe choice. The JVP always has its own.
"""

from ..runtime.pinned import pinned, table


def preferred_backend(tokens: int, head_dim: int, arch: str) -> str:
    """ "triton", "torch" or "xformers" for images of ``tokens`` pixels and heads of ``head_dim`` channels on an architecture.

    ``arch`` is "sm80", "sm90" or "sm100" (``runtime.pinned.architecture``). Whether that backend is installed is not asked.
    """
    return pinned("attention", "dispatch", arch, tokens=tokens, head_dim=head_dim)["backend"]


def dispatch_rules(arch: str) -> list[str]:
    """The table of an architecture in words, a line per rule: the first that fits a call counts."""
    rules = table("attention", arch)["dispatch"]
    return [f"{_in_words(rule.get('when', {}))}: {rule['use']['backend']}" for rule in rules]


def _in_words(when: dict[str, list[int]]) -> str:
    return ", ".join(f"{fact} {low} to {high}" for fact, (low, high) in when.items()) or "else"
