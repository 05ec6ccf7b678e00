"""The processes of one run: who they are, and how a failure of one becomes an error of all that names the cause."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tsld_fx.errors import ConfigError, TrainingError, TsldError

T = TypeVar("T")
_FAILED = "tsld_fx/failed"
_WAIT = timedelta(seconds=20)


class PeerError(TrainingError):
    """Another process failed; the message is that process's. It is printed there, so the command line stays quiet."""

    told_elsewhere = True


class Ranks:
    """One process among those of a run.

    Attributes:
        rank, world_size: as torch.distributed has them.
        device: where this process computes.
        control: a gloo group for Python objects and checkpoints.
    """

    def __init__(self, device: torch.device, control: Any) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device, self.control = device, control
        self._store: Any = dist.distributed_c10d._get_default_store()

    @classmethod
    def start(cls, use_cpu: bool = False) -> Ranks:
        """Join the processes that torchrun started; without torchrun, be the only one.

        Raises:
            ConfigError: more processes on this machine than it has GPUs.
        """
        cuda = torch.cuda.is_available() and not use_cpu
        device = torch.device("cpu")
        if cuda:
            local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= found:
                raise ConfigError(
                    f"process {local} of this machine has no GPU: it has {found}. "
                    f"Start torchrun with --nproc-per-node {found}, or set training.use_cpu."
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            if "RANK" in os.environ:
                dist.init_process_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        ranks = cls(device, dist.new_group(backend="gloo"))
        dist.barrier(ranks.control)
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """Do something on every process; when one of them fails, all of them raise its error.

        Raises:
            TsldError: what failed here; PeerError with the first failure elsewhere.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        self.share(error)
        return result

    def share(self, error: Exception | None) -> None:
        """Raise on every process as soon as one of them brings an error."""
        messages = self.gather(None if error is None else _text(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        raise self.agreed(error if failed[0] == self.rank else None, messages[failed[0]])

    @staticmethod
    def agreed(error: Exception | None, message: str) -> Exception:
        """An error that every process raises at the same place: its own where it is told, PeerError elsewhere."""
        error = error or PeerError(message)
        error.agreed = True  # type: ignore[attr-defined]
        return error

    @contextlib.contextmanager
    def guard(self, leave: bool = True) -> Iterator[None]:
        """Turn a failure inside collective work into one error everywhere.

        The process that fails leaves its message in the store and closes its connections, which wakes the others.
        What goes wrong elsewhere afterwards is a consequence, and told as that message.

        Args:
            leave: close connections here; else the process's end does it.
        """
        try:
            with self._listening():
                yield
        except Exception as error:
            if getattr(error, "agreed", False):
                raise
            if _lost_connection(_first_cause(error)) or self._has_message():
                raise self._peer_error() from None
            cause = _first_cause(error)
            self._leave_message(cause, leave)
            if cause is error and isinstance(error, TsldError):
                raise
            text = _text(cause) if isinstance(cause, TsldError) else f"process {self.rank}: {_text(cause)}"
            raise TrainingError(text) from error

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """On GPUs: end collectives that wait for a process which has failed. NCCL itself would wait for minutes."""
        if self.device.type != "cuda" or self.world_size == 1:
            yield
            return
        store, done = self._store.clone(), threading.Event()

        def listen() -> None:
            while not done.wait(1.0):
                with contextlib.suppress(Exception):  # the store went with its process
                    if store.check([_FAILED]):
                        if not done.wait(2.0):
                            _abort_collectives()
                        return

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            done.set()
            listener.join()

    def _has_message(self) -> bool:
        """Whether another process has left its error."""
        with contextlib.suppress(Exception):
            return bool(self._store.check([_FAILED]))
        return False

    def _peer_error(self) -> TrainingError:
        """The error of the process that failed first, from the store."""
        with contextlib.suppress(Exception):
            self._store.wait([_FAILED], _WAIT)
            return PeerError(self._store.get(_FAILED).decode())
        return TrainingError(
            f"process {self.rank}: another process stopped without saying why (killed, or out of memory). "
            "Look at its own output, then start again with the same command to resume."
        )

    def _leave_message(self, error: Exception, leave: bool) -> None:
        """Put the cause where the other processes look for it."""
        with contextlib.suppress(Exception):
            self._store.set(_FAILED, f"process {self.rank}: {_text(error)}")
        if self.device.type == "cuda":
            _abort_collectives()
        elif leave:
            with contextlib.suppress(Exception):  # close the connections, which wakes the others
                dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier(self.control)

    def stop(self) -> None:
        """Leave the processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Alone:
    """The only process of a run, with what such a run asks of `Ranks`."""

    def agree(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def guard(self, leave: bool = True) -> contextlib.AbstractContextManager[None]:
        """Errors are errors."""
        return contextlib.nullcontext()


def join(use_cpu: bool = False) -> Ranks | Alone:
    """The processes that torchrun started, or the only one."""
    return Ranks.start(use_cpu) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def finite_everywhere(loss: Tensor) -> None:
    """Look at the loss of every process at once, so that all of them stop at the same step.

    Raises:
        PeerError: that of another process is NaN or Inf.
    """
    losses = torch.zeros(dist.get_world_size(), dtype=torch.float32, device=loss.device)
    losses[dist.get_rank()] = loss.detach().float()
    dist.all_reduce(losses)
    found = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if found and dist.get_rank() not in found:
        raise Ranks.agreed(None, f"the loss of process {found[0]} is {float(losses[found[0]])}")


def _abort_collectives() -> None:
    """Let NCCL's kernels of this process end, and forget the groups; whoever waits for one fails at the next."""
    try:
        dist.distributed_c10d._abort_process_group()
    except Exception:  # a backend that cannot be aborted: at least those that wait
        for group in list(dist.distributed_c10d._world.pg_names):
            with contextlib.suppress(Exception):
                group._get_backend(torch.device("cuda")).abort()


def _first_cause(error: Exception) -> Exception:
    """What an error was raised from: torch's pipelines wrap what goes wrong inside a stage."""
    while isinstance(error.__cause__, Exception) and not isinstance(error, TsldError):
        error = error.__cause__
    return error


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, TsldError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _lost_connection(error: Exception) -> bool:
    """Whether a collective failed because the process at its other end has gone."""
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "NCCL", "Timed out", "Socket")
    return isinstance(error, RuntimeError) and any(sign.lower() in str(error).lower() for sign in signs)
