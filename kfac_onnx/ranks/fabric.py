"""What ranks say to each other: a few collective calls on arrays, by MPI or by nobody.

Every method is collective: each rank calls it, in the same order. MPI knows all of them since 1994; mpi4py is
imported where a rank is opened (https://mpi4py.readthedocs.io, section "Communicating buffer-like objects").
"""

from __future__ import annotations

import os
import platform
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["AgreedError", "Alone", "Fabric", "Mpi", "agree", "launched_ranks"]

_LAUNCHERS: Final = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""What MPICH and Intel MPI, Open MPI, MVAPICH and Slurm tell each process: how many were started."""


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes a launcher of MPI started; 1 without one."""
    for name in _LAUNCHERS:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 1


class Fabric(Protocol):
    """Ranks 0 to size − 1."""

    rank: int
    size: int

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks, which have one shape, stacked by rank."""
        ...

    def exchange(self, parts: Sequence[np.ndarray], lengths: Sequence[int]) -> list[np.ndarray]:
        """Send part d to rank d; return what each rank sent here, of these lengths along the first axis."""
        ...

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over ranks, the same bits on all of them."""
        ...

    def abort(self, error: BaseException) -> None:
        """Say what went wrong on this rank alone, and end all of them: they would wait for it for ever."""
        ...


class AgreedError(UserError):
    """An error that all ranks raise, so that none waits for another."""


def agree(fabric: Fabric, error: UserError | None) -> None:
    """Raise, on all ranks, the error of the first rank that has one; collective."""
    text = b"" if error is None else str(error).encode()
    lengths = fabric.gather(np.array([0 if error is None else max(1, len(text))]))[:, 0]
    if not lengths.any():
        return
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    sentences = fabric.gather(padded)
    first = int(np.flatnonzero(lengths)[0])
    message, _, remedy = sentences[first].tobytes().rstrip(b"\0").decode().partition("\n  help: ")
    everywhere = bool((sentences == sentences[0]).all())
    place = "" if everywhere else f"rank {first} of {fabric.size}: "
    raise AgreedError(place + message, help=remedy or None) from error


class Alone:
    """One rank that talks to itself."""

    rank = 0
    size = 1

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Return the array as the only one of a stack."""
        return array[np.newaxis]

    def exchange(self, parts: Sequence[np.ndarray], lengths: Sequence[int]) -> list[np.ndarray]:
        """Return the part of rank 0."""
        return [parts[0]]

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the array."""
        return array

    def abort(self, error: BaseException) -> None:
        """Do nothing: nobody waits."""


class Mpi:
    """The ranks of an mpi4py communicator; None is all that were started.

    Raises UserError where mpi4py is not installed.
    """

    def __init__(self, communicator: object = None) -> None:
        try:
            from mpi4py import MPI
        except ImportError as e:
            raise UserError(
                "training on several ranks needs mpi4py, which is not installed",
                help="pip install 'kfac-onnx[mpi]'",
            ) from e
        self._comm: Any = MPI.COMM_WORLD if communicator is None else communicator
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks, stacked."""
        own = np.ascontiguousarray(array)
        result = np.empty((self.size, *own.shape), own.dtype)
        self._comm.Allgather(own, result)
        return result

    def exchange(self, parts: Sequence[np.ndarray], lengths: Sequence[int]) -> list[np.ndarray]:
        """Send part d to rank d, as bytes: MPI has no name for some of our dtypes."""
        shape, dtype = parts[0].shape[1:], parts[0].dtype
        width = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        out = np.concatenate([np.ascontiguousarray(part) for part in parts])
        result = np.empty((sum(lengths), *shape), dtype)
        # Counts are of rows, so that 2^31 of them fit, not 2^31 bytes.
        from mpi4py import MPI

        row = MPI.BYTE.Create_contiguous(width).Commit()
        try:
            self._comm.Alltoallv(
                [out, ([len(part) for part in parts], _starts([len(part) for part in parts])), row],
                [result, (list(lengths), _starts(lengths)), row],
            )
        finally:
            row.Free()
        return np.split(result, np.cumsum(lengths)[:-1])

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over ranks."""
        own = np.ascontiguousarray(array)
        result = np.empty_like(own)
        self._comm.Allreduce(own, result)
        return result

    def abort(self, error: BaseException) -> None:
        """Print the error with its rank and host, and end the processes of all ranks."""
        if self.size == 1:
            return
        place = f"rank {self.rank} of {self.size} on {platform.node()}"
        lines = "".join(traceback.format_exception(error))
        sys.stderr.write(f"{lines}{place} ended all ranks: {error}\n")
        sys.stderr.flush()
        self._comm.Abort(1 if isinstance(error, UserError) else 3)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths)[:-1].tolist()]
