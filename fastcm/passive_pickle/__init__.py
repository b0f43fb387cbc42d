"""Pickles of other programs, read without executing anything.

A pickle is a program: it may import any name and call it. ``read_pickle`` runs that program on a machine of its own that
cannot import or call what a file names. Names stand for entries of a table (``Names``): for a value, for a function of ours
that rebuilds one kind of plain data, or for a ``Record``, which only keeps what the file wanted to do. All other names are
refused, and so is every instruction that no checkpoint needs. The standard unpickler is not used: it allocates what a file
claims, and its BUILD instruction calls methods and sets attributes of whatever the file has put on the stack.
"""

from fastcm.passive_pickle.machine import Window, read_pickle
from fastcm.passive_pickle.plain import PLAIN
from fastcm.passive_pickle.records import Names, Record, UnpicklingError, checked_key, recorder

__all__ = ["PLAIN", "Names", "Record", "UnpicklingError", "Window", "checked_key", "read_pickle", "recorder"]
