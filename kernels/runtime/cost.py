"""What a pass must move and compute at least: the floor under its time."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes read and written once each, and floating-point operations (a multiply-add is two)."""

    read_bytes: int
    write_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        """All traffic."""
        return self.read_bytes + self.write_bytes

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The time that neither this bandwidth nor this arithmetic rate can undercut."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)
