"""Zip archives without compression, as PyTorch writes them, which hold no more than their file has bytes."""

import zipfile
from typing import IO


class StoredArchive:
    """A zip archive whose members are stored without compression, as `torch.save` writes it.

    Together its members are no larger than the file, so that reading all of them needs no more memory than that.
    Reading one verifies its checksum.

    Args:
        file: positioned anywhere.
        n_bytes: of the file.

    Raises:
        ValueError: a member is compressed, encrypted or there twice, or members overlap.
        Exception: of many types, where it is no zip archive.
    """

    def __init__(self, file: IO[bytes], n_bytes: int) -> None:
        self.zip = zipfile.ZipFile(file)
        self.members = {member.filename: member for member in self.zip.infolist()}
        listed = self.zip.infolist()
        for member in listed:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise ValueError("a member of the archive is compressed or encrypted, which torch.save never does")
        if len(self.members) < len(listed) or sum(member.file_size for member in listed) > n_bytes:
            raise ValueError("members of the archive overlap")
        if not any(member.CRC for member in listed):  # torch.serialization.set_crc32_options(False)
            for member in listed:
                del member.CRC  # zipfile then does not compare it

    def find(self, ending: str) -> str | None:
        """Return the name of the first member with that ending, or None."""
        return next((name for name in self.members if name.endswith(ending)), None)

    def read(self, name: str) -> bytes:
        """Return the content of a member."""
        return self.zip.read(self.members[name])

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read a member of exactly the length of the buffer."""
        if self.members[name].file_size != len(buffer):
            raise ValueError(f"{name} has {self.members[name].file_size} bytes; its description has {len(buffer)}")
        step = 1 << 20  # within a processor's cache, since checksum and copy both read it
        with self.zip.open(self.members[name]) as member:
            for start in range(0, len(buffer), step):
                piece = buffer[start : start + step]
                if member.readinto(piece) != len(piece):  # type: ignore[attr-defined]  # of io.BufferedIOBase
                    raise ValueError(f"{name} ends early")
