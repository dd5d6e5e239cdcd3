"""Locks of HDF5: whole files that cannot be opened for now are told from damaged ones."""

import errno

_HELD = {errno.EAGAIN, errno.EACCES}  # errno of a lock that another process has


def describe_lock(error: OSError) -> str:
    """Return what to do about a file that HDF5 could not lock; "" for any other error of `h5py.File`.

    HDF5 locks a file while it is open: for itself alone where it writes, with others where it reads.
    """
    if "unable to lock file" not in str(error):
        return ""
    if error.errno in _HELD or "errno = 11," in str(error):
        return (
            "is locked by another process, which writes it now or has it open for writing; wait until that process has "
            "ended, or end it, and start again (`lsof` or `fuser` says which it is)"
        )
    return (
        f"cannot be locked, since its file system has no locks ({error}); set HDF5_USE_FILE_LOCKING=FALSE in the "
        "environment, and let nothing write the file meanwhile"
    )
