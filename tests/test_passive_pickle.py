"""The passive pickle machine: plain data comes out as Python's own unpickler gives it, and nothing else is possible."""

import builtins
import collections
import functools
import importlib
import io
import operator
import os
import pickle
import pickletools
import random
import struct
import subprocess
import time
import tracemalloc

import numpy as np
import pytest

from fastcm.passive_pickle import PLAIN, Names, Record, UnpicklingError, Window, read_pickle

NAMES = Names(PLAIN, {"some.value": 7}, records=r"some\.module\.[A-Z]\w*")
PLAIN_VALUES = [
    None,
    True,
    [0, 1, 255, 65536, -1, 1 << 40, -(1 << 70), 1 << 3000],
    {"a": 1.5, "b": [float("inf"), -0.0], 3: None, 2.5: "x", None: (), b"k": b"v"},
    ("é", "日本", "\ud800", "line\nfeed", "a" * 300),
    [b"", b"bytes", b"\x00\xff" * 200, bytearray(b"abc")],
    {"set": {1, 2, 3}, "frozen": frozenset("ab"), "empty": set()},
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}],
    collections.OrderedDict([("z", 1), ("a", 2)]),
]


def read(content, names=NAMES, persistent=None):
    return read_pickle(Window(io.BytesIO(content), len(content)), names, persistent)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("value", PLAIN_VALUES, ids=range(len(PLAIN_VALUES)))
def test_plain_values_come_out_equal(value, protocol):
    if protocol < 5:
        value = [bytes(part) if isinstance(part, bytearray) else part for part in value] if isinstance(value, list) else value
    result = read(pickle.dumps(value, protocol))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_are_read(protocol):
    value = {"a": [1, 2.5, True, None, "x\ny"], "b": ((), (1,)), "c": 1 << 90}
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", ">f8", "i8", "?", "c8"])
def test_numpy_arrays_and_scalars_come_out_equal(dtype, protocol):
    array = (np.arange(6).reshape(2, 3) % 5).astype(dtype)
    for value in (array, array.T, array[:0], np.asfortranarray(array), array[:, 1]):
        result = read(pickle.dumps([value, value], protocol))
        assert np.array_equal(result[0], value)
        # Some protocols swap bytes of the other order, as numpy itself does.
        assert result[0].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
        assert result[1] is result[0]
    assert read(pickle.dumps(array[1, 2], protocol)) == array[1, 2]


def test_bytes_of_python_2_are_text_of_the_same_codes():
    assert read(b"\x80\x02}U\x04dataU\x03\x00\xe9\xffs.") == {"data": "\x00\xe9\xff"}
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02t"
    array += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    assert read(array + b"\x89U\x02\x00\xfftb.").tolist() == [0, 255]


def test_identity_and_cycles_are_kept():
    shared, circle = [1], []
    circle.append({"circle": circle, "a": shared, "b": shared})
    result = read(pickle.dumps(circle, 4))
    assert result[0]["circle"] is result
    assert result[0]["a"] is result[0]["b"]


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02csome.module\nThing\nK\x01K\x02\x86\x81}X\x01\x00\x00\x00xK\x05sb.",
        b"csome.module\nThing\nK\x01K\x02\x86R}X\x01\x00\x00\x00xK\x05sb.",
        b"(csome.module\nThing\nK\x01K\x02o}X\x01\x00\x00\x00xK\x05sb.",
        b"(K\x01K\x02isome.module\nThing\n}X\x01\x00\x00\x00xK\x05sb.",
        b"\x80\x04\x8c\x0bsome.module\x8c\x05Thing\x93K\x01K\x02\x86}\x92}\x8c\x01xK\x05sb.",
    ],
)
def test_every_way_to_make_an_object_only_records_it(program):
    record = read(program)
    assert type(record) is Record
    assert (record.module, record.name, record.args, record.kwargs) == ("some.module", "Thing", (1, 2), {})
    assert record.state == {"x": 5}


def test_keywords_are_recorded():
    assert read(b"\x80\x04\x8c\x0bsome.module\x8c\x05Thing\x93)}\x8c\x01xK\x05s\x92.").kwargs == {"x": 5}


class Canary:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


FUNCTIONS = [
    *(os.system, os.mkdir, os.popen, subprocess.Popen, builtins.eval, builtins.exec, builtins.open, builtins.getattr),
    *(builtins.__import__, builtins.compile, builtins.map, importlib.import_module, functools.partial, functools.reduce),
    *(operator.attrgetter, operator.methodcaller, pickle.loads, np.load, np.save, type, object, print, setattr, vars, globals),
    *(collections.defaultdict, collections.namedtuple, bytearray, range, slice, getattr(np, "array"), io.FileIO),  # noqa: B009
]


@pytest.mark.parametrize("protocol", range(6))
def test_functions_are_refused_by_name(tmp_path, protocol):
    canary = tmp_path / "canary"
    for function in FUNCTIONS:
        for argument in (f"touch {canary}", str(canary), f"open({str(canary)!r}, 'w')"):
            content = pickle.dumps([1, {"a": Canary(function, argument)}], protocol, fix_imports=False)
            with pytest.raises(UnpicklingError, match=rf"it names \S*\.{function.__name__}, which is none of the known"):
                read(content)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # Attributes of what a known module or class has.
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", r"it names numpy.ndarray.__init__, which"),
        (b"\x80\x04\x8c\x05numpy\x8c\x16core.multiarray.scalar\x93.", "it names numpy.core.multiarray.scalar, which"),
        (b"\x80\x04\x8c\x0bsome.module\x8c\x09Thing.run\x93.", "it names some.module.Thing.run, which"),
        (b"csome\nmodule.Thing\n.", "it names some.module.Thing, which"),
        (b"csome.module\nThing.__class__\n.", "it names some.module.Thing.__class__, which"),
        (b"c__main__\nx\x1b[31m\n.", r"it names __main__.x\\x1b\[31m, which"),
        (b"\x80\x04K\x01K\x02\x93.", "it names a int and a int, expected two texts"),
        # Changing what is ours, or anything that is no record.
        (b"csome.module\nThing\n}b.", "it wants to set attributes of some.module.Thing"),
        (b"c_codecs\nencode\n(N}X\x0c\x00\x00\x00__defaults__Nstb.", "it wants to set attributes of _codecs.encode"),
        (b"]}b.", "it wants to set attributes of a list"),
        (b"}}X\x01\x00\x00\x00aNsb.", "it wants to set attributes of a dict"),
        (b"X\x01\x00\x00\x00a}b.", "it wants to set attributes of a str"),
        (b"csome.module\nThing\n)R]K\x01a}b.", "it wants to set attributes of a list"),
        (b"csome.module\nThing\n)RK\x00K\x01s.", "it wants to set items of a Record"),
        (b"csome.module\nThing\n)RK\x00a.", "it wants to append to a Record"),
        (b"csome.module\nThing\nK\x00K\x01s.", "it wants to set items of some.module.Thing"),
        # Calling what is no name.
        (b"X\x01\x00\x00\x00a)R.", "it wants to call a str"),
        (b"csome.module\nThing\n)R)R.", "it wants to call a Record"),
        (b"csome.value\nx\n.", "it names some.value.x, which"),
        (b"csome\nvalue\n)R.", "it wants to call a int"),
        (b"csome.module\nThing\nK\x01R.", "it calls some.module.Thing without a tuple"),
        (b"c_codecs\nencode\n(Vprint(1)\nVrot13\ntR.", "it encodes text as 'rot13', expected latin1"),
        (b"c_codecs\nencode\n)R.", "it calls _codecs.encode with unexpected arguments"),
        (b"c__builtin__\nset\n(Vabc\ntR.", "it makes a set of something that is no list"),
        (b"c__builtin__\nbytes\n(I99999999999\ntR.", "it makes a bytes of something that is no list"),
        # What lies outside of the file.
        (b"\x80\x02\x82\x01.", "it uses the instruction EXT1, which is refused"),
        (b"\x80\x02\x83\x01\x00.", "it uses the instruction EXT2, which is refused"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "it uses the instruction EXT4, which is refused"),
        (b"\x80\x05\x97.", "it uses the instruction NEXT_BUFFER, which is refused"),
        (b"Pdata\n.", "it uses the instruction PERSID, which is refused"),
        (b"\x80\x02K\x01Q.", "it refers to an object outside of it"),
        # Keys whose hash runs code or recurses.
        (b"}csome.module\nThing\n)RK\x01s.", "it uses a Record as a key"),
        (b"})K\x01s.", "it uses a tuple as a key"),
        (b"\x80\x04\x8f(csome.module\nThing\n)R\x90.", "it uses a Record as a key"),
        # Damage.
        (b"", "it is damaged: ValueError: pickle exhausted"),
        (b"K\x01", "it is damaged: ValueError: pickle exhausted"),
        (b".", "it is damaged: IndexError"),
        (b"t.", "it is damaged: IndexError"),
        (b"\x87.", "takes more from its stack"),
        (b"h\x05.", "it is damaged: KeyError"),
        (b"}(K\x01u.", "it is damaged: ValueError"),
        (b"\xff.", "it is damaged: ValueError"),
    ],
)  # fmt: skip
def test_crafted_programs_are_refused(program, message):
    with pytest.raises(UnpicklingError, match=message):
        read(program)
    assert read(pickle.dumps(PLAIN_VALUES[3], 4)) == PLAIN_VALUES[3]


def test_attributes_of_a_state_dict_are_dropped_and_of_a_record_only_kept():
    ordered = read(b"ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadataNsb.")
    assert ordered == {}
    assert not hasattr(ordered, "_metadata")
    record = read(b"csome.module\nThing\n)R}X\x05\x00\x00\x00stateX\x0c\x00\x00\x00__setstate__sb.")
    assert record.state == {"state": "__setstate__"}
    abused = read(b"csome.module\nThing\n)R}X\x09\x00\x00\x00__class__K\x01sb.")
    assert type(abused) is Record


@pytest.mark.parametrize(
    ("dtype", "state", "content"),
    [
        (("O8", False, True), None, b"\0" * 8),
        (("V8", False, True), None, b"\0" * 8),
        (("M8", False, True), None, b"\0" * 8),
        (("f4,f4", False, True), None, b"\0" * 8),
        (("f4", False, True), (3, "<", ("f4", (2,)), None, None, -1, -1, 0), b"\0" * 8),
        (("f4", False, True), (3, "<", None, ("a",), {"a": 1}, -1, -1, 0), b"\0" * 8),
        (("f4", False, True), (3, "x", None, None, None, -1, -1, 0), b"\0" * 4),
        (("f4", False, True), None, b"\0" * 5),
        (("f4", False, True), None, ["a"]),
    ],
)
def test_numpy_types_that_are_no_numbers_are_refused(dtype, state, content):
    names = Names(PLAIN | {"test.dtype": lambda: Record("numpy", "dtype", dtype, state=state), "test.content": lambda: content})
    with pytest.raises(UnpicklingError):
        read(b"cnumpy.core.multiarray\nscalar\n(ctest\ndtype\n)Rctest\ncontent\n)RtR.", names)


@pytest.mark.parametrize("shape", [b"(J\xff\xff\xff\xfft", b"(K\x03t", b"(NtR", b"K\x01", b"(\x8a\x08\0\0\0\0\0\0\0\x40K\x04t"])
def test_array_whose_shape_does_not_fit_is_refused(shape):
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape
    with pytest.raises(UnpicklingError):
        read(array + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89U\x02\x00\xfftb.")


def too_large(instruction: bytes, width: int) -> bytes:
    return b"\x80\x05" + instruction + (2**31 - 8).to_bytes(width, "little") + b"abc"


BOMBS = {
    "text": too_large(b"X", 4),
    "bytes": too_large(b"B", 4),
    "bytes8": too_large(b"\x8e", 8),
    "bytearray8": too_large(b"\x96", 8),
    "python 2 text": too_large(b"T", 4),
    "integer": too_large(b"\x8b", 4),
    "frame": too_large(b"\x95", 8),
    "memo index": b"\x80\x02Nr\xff\xff\xff\xfe.",
    "nested lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested tuples": b")" + b"\x85" * 100_000 + b".",
    "nested marks": b"(" * 100_000 + b"." ,
    "nested records": b"\x80\x02csome.module\nThing\nq\x00)R" + b"\x85" * 100_000 + b".",
    "laughs": b"]q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(250)) + b".",
    "copies": b"\x80\x02X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    + b"c_codecs\nencode\nq\x02" + b"h\x02h\x00h\x01\x86R" * 5000 + b".",
    "digits": b"L" + b"9" * 900_000 + b"L\n.",
    "no line feed": b"c" + b"a" * 3_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_neither_time_nor_memory(name):
    tracemalloc.start()
    started = time.process_time()
    try:
        read(BOMBS[name])
    except UnpicklingError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 150e6
    assert time.process_time() - started < 20


@pytest.mark.parametrize("name", ["copies", "text", "bytearray8", "integer"])
def test_bomb_is_an_error(name):
    with pytest.raises(UnpicklingError, match="again and again" if name == "copies" else "it is damaged"):
        read(BOMBS[name])


def test_honest_repetition_is_no_bomb():
    value = [np.full(1000, number, np.float32) for number in range(500)]
    assert np.array_equal(read(pickle.dumps(value, 2)), value)


def test_truncation_anywhere_is_an_error():
    content = pickle.dumps([*PLAIN_VALUES, np.arange(5.0)], 4)
    for length in range(len(content)):
        with pytest.raises(UnpicklingError):
            read(content[:length])


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("protocol", range(6))
def test_flipped_bits_give_a_value_or_the_error(protocol):
    value = [{"a": 1, "b": (2.5, "text", b"bytes")}, {1, 2}, np.arange(6.0), collections.OrderedDict(a=1)]
    content, generator = pickle.dumps(value, protocol), random.Random(protocol)
    errors = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 3])):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        try:
            read(bytes(damaged))
        except UnpicklingError:
            errors += 1
    assert 50 < errors < 400


def test_random_programs_give_a_value_or_the_error():
    generator = random.Random(0)
    codes = [operation.code.encode("latin1") for operation in pickletools.opcodes]
    prefix = b"\x80\x04}\x94]\x94csome.module\nThing\n)R\x94)(K\x01"
    for _ in range(3000):
        program = b"".join(generator.choice([*codes, b"K\x01", b"h\x00", b"h\x02", b"}", b"]", b")"]) for _ in range(12))
        try:
            read(prefix + program + b".")
        except UnpicklingError:
            continue


def test_the_window_stands_behind_the_pickle():
    content = pickle.dumps(1, 2) + pickle.dumps("two", 4) + b"rest"
    window = Window(io.BytesIO(content), len(content))
    assert (read_pickle(window, NAMES), read_pickle(window, NAMES)) == (1, "two")
    assert (window.remaining, window.tell(), window.read(1 << 62)) == (4, len(content) - 4, b"rest")
    assert not window.readinto(memoryview(bytearray(1)))


def test_persistent_ids_go_through_the_given_function():
    assert read(b"\x80\x02X\x01\x00\x00\x00aQ.", persistent=lambda identity: identity * 3) == "aaa"
