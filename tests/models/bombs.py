"""Pickles, archives and headers that would fill memory or time, or run code."""

import struct
import zipfile
from pathlib import Path


def pickled(*operations):
    return b"\x80\x02" + b"".join(operations) + b"."


def write_archive(path: Path, data: bytes, compression=zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"x/data/{name}", content)
    return path


def nested_tuple(depth):
    """A tuple of two equal tuples of two equal tuples ..., in a few bytes."""
    operations = [b")q\x00"]
    for index in range(depth):
        operations += [b"h", bytes([index]), b"h", bytes([index]), b"\x86q", bytes([index + 1])]
    return b"".join(operations)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
BOMBS = {
    "a key that takes for ever to hash": pickled(b"}", nested_tuple(60), b"Ns"),
    "a key in a call": pickled(b"ccollections\nOrderedDict\n]]", nested_tuple(60), b"aNaa\x85R"),
    "an item of a set": pickled(b"cbuiltins\nset\n]", nested_tuple(60), b"a\x85R"),
    "values that contain one another": pickled(b"}X\x01\x00\x00\x00a", nested_tuple(60), b"s"),
    "a list that contains itself": pickled(b"}X\x01\x00\x00\x00a]q\x00h\x00as"),
    "deep nesting": pickled(b"}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s"),
    "a bytearray of ten gigabytes": pickled(b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x80\x02\x85R"),
    "a tensor of ten gigabytes": pickled(b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x80\x02\x85R"),
    "a string that ends early": pickled(b"X\xff\xff\xff\x7f"),
    "a place of four billion": pickled(b"}r\xff\xff\xff\xff"),
    "a storage larger than the file": pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"J\xff\xff\xff\x7ftQs"),
    "a storage of a negative length": pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"J\xff\xff\xff\xfftQs"),
    "code": pickled(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"),
    "a method": pickled(b"cbuiltins\ngetattr\n}X\x06\x00\x00\x00update\x86R"),
    "an object of a class": pickled(b"ctorch\nFloatStorage\n)\x81"),
    "text where a number is expected": pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"X\x01\x00\x00\x00xtQs"),
}

HEADERS = {
    "longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "negative": struct.pack("<q", -1) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "nested": struct.pack("<Q", 20000) + b"[" * 20000,
    "outside": b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16000]}}',
    "overlapping": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "another length": b'{"x":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,16]}}',
    "overflow": b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "reversed": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    "type": b'{"x":{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}}',
    "name": b'{"":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
}
