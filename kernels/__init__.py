"""Kernels of fastcm: one folder per operation, usable alone as ``fastcm.kernels``.

Each folder holds ``reference.py`` (plain PyTorch, the truth that every other backend is tested against).
Imports inside this package are relative, so that it works under its one installed name.
"""

if __name__ == "kernels":
    raise ImportError("this package is installed as 'fastcm.kernels': write 'import fastcm.kernels' (after 'pip install -e .')")
