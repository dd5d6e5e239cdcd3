"""Locks of HDF5: distinguishes files that another process has locked from damaged ones."""

import errno

_LOCKED = {errno.EAGAIN, errno.EACCES}  # errno where another process has the lock


def describe_lock(error: OSError) -> str:
    """Return a sentence on a file that HDF5 could not lock; "" for any other error of `h5py.File`.

    HDF5 locks a file while it is open: exclusively for writing, shared for reading.
    """
    if "unable to lock file" not in str(error):
        return ""
    if error.errno in _LOCKED or "errno = 11," in str(error):
        return (
            "is locked by another process that has it open for writing; wait until that process has ended, or end it, "
            "and start again (`lsof` or `fuser` lists it)"
        )
    return (
        f"cannot be locked, since its file system has no locks ({error}); set HDF5_USE_FILE_LOCKING=FALSE in the "
        "environment, and make sure that no process writes the file meanwhile"
    )
