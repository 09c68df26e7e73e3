"""Who saves and restores the same training: ckptcache, and what else people use, each as its documentation advises.

A peer's packages are imported when it is made, so that neither a save nor a restore pays for it.
"""

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.workload import Training
from ckptcache.cache import TrainingCache


class Peer:
    """Saves a training under `folder`, a new checkpoint each time, and restores the latest.

    A subclass says how. What it promises is said by `durable` (a checkpoint that is finished survives a power
    cut: "yes", "files" when these are synced and their folder isn't, "no"), `verified` (what is read is compared
    with what was written), and `atomic` (there is never half a checkpoint under its name).
    """

    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Modules of packages that may not be installed."""
    durable: ClassVar[str] = "no"
    verified: ClassVar[bool] = False
    atomic: ClassVar[bool] = False
    is_ours: ClassVar[bool] = False
    restores_like: ClassVar[str | None] = None
    """The peer whose files and whose way to restore are the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        folder.mkdir(parents=True)

    @property
    def path(self) -> Path:
        """Where the latest checkpoint is, a file or a folder."""
        return self.folder / f"{self.number}"

    def get_ready(self, training: Training) -> None:
        """What is done once, when training has begun."""

    def save(self, training: Training) -> None:
        """Save, or begin to."""
        self.number += 1
        self.write(training)

    def write(self, training: Training) -> None:
        """Write a checkpoint to `path`, or begin to."""
        raise NotImplementedError

    def allow_step(self) -> None:
        """Wait until the optimizer may change what is being saved."""

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is finished, as far as this peer goes."""

    def restore(self, training: Training) -> None:
        """Restore the latest checkpoint into a live model and optimizer."""
        raise NotImplementedError

    def remove_older(self) -> None:
        """Remove all checkpoints but the latest."""
        for path in self.folder.iterdir():
            if path != self.path:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def files(self) -> list[Path]:
        """The files of all checkpoints that are there."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        """Give back what is held."""


# --- ckptcache -----------------------------------------------------------------------------------


class Ours(Peer):
    """ckptcache, in the background; the optimizer's step waits for the copy by itself."""

    title, is_ours = "ckptcache", True
    durable, verified, atomic = "yes", True, True
    blocking = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Removing what is beyond the limit is left to `remove_older`, as it is for the others.
        self.cache = TrainingCache(folder, max_checkpoints=1, max_cache_size_gb=1000.0, auto_cleanup=False)

    def get_ready(self, training: Training) -> None:
        if not self.blocking:
            self.cache.prepare({"model": training.model, "optimizer": training.optimizer})

    def write(self, training: Training) -> None:
        objects = {"model": training.model, "optimizer": training.optimizer}
        self.cache.save(objects, iteration=self.number, val_loss=1.0 / self.number, blocking=self.blocking)

    def wait(self) -> None:
        self.cache.wait_until_finished()

    def restore(self, training: Training) -> None:
        # A new one has looked at nothing yet, as in a program that has just started.
        with TrainingCache(self.folder, auto_cleanup=False) as cache:
            outcome = cache.restore({"model": training.model, "optimizer": training.optimizer})
        if outcome is None:
            raise RuntimeError("nothing was restored")

    def remove_older(self) -> None:
        self.cache.prune()

    def close(self) -> None:
        self.cache.close()


class OursBlocking(Ours):
    title, blocking = "ckptcache, blocking", True
    restores_like = "ckptcache"


# --- torch ---------------------------------------------------------------------------------------


def _state(training: Training) -> dict[str, Any]:
    return {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}


def _load(training: Training, state: Mapping[str, Any]) -> None:
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])


class Torch(Peer):
    title = "torch.save"

    def write(self, training: Training) -> None:
        torch.save(_state(training), self.path)

    def restore(self, training: Training) -> None:
        _load(training, torch.load(self.path, weights_only=True))


class TorchNoCrc(Peer):
    """Without the checksums, which nothing ever checks, and mapped when it is read."""

    title = "torch.save, no CRC"

    def write(self, training: Training) -> None:
        with _no_crc():
            torch.save(_state(training), self.path)

    def restore(self, training: Training) -> None:
        _load(training, torch.load(self.path, weights_only=True, mmap=True))


@contextmanager
def _no_crc() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


# --- safetensors ---------------------------------------------------------------------------------


class Safetensors(Peer):
    """Tensors under flat names, and the optimizer's settings as text beside them."""

    title = "safetensors"

    def write(self, training: Training) -> None:
        from safetensors.torch import save_file

        state = _state(training)
        groups = json.dumps(state["optimizer"]["param_groups"])
        save_file(_flat(state), self.path, metadata={"param_groups": groups})

    def restore(self, training: Training) -> None:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensors = file.get_tensors()
            groups = json.loads(file.metadata()["param_groups"])
        _load(training, _nested(tensors, groups))


def _flat(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    moments = state["optimizer"]["state"]
    return {
        **{f"model.{name}": tensor for name, tensor in state["model"].items()},
        **{f"optimizer.{number}.{name}": t for number, held in moments.items() for name, t in held.items()},
    }


def _nested(tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    model: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part == "model":
            model[name] = tensor
        else:
            number, _, name = name.partition(".")
            moments.setdefault(int(number), {})[name] = tensor
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}


# --- torch's distributed checkpoint --------------------------------------------------------------


class Dcp(Peer):
    title = "DCP"
    durable, atomic = "files", True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import state_dict

        self.dcp, self.state_dict = dcp, state_dict
        self.saving: Any = None

    def write(self, training: Training) -> None:
        self.dcp.save(self._state(training), checkpoint_id=self.path, no_dist=True)

    def wait(self) -> None:
        if self.saving is not None:
            self.saving.result()

    def restore(self, training: Training) -> None:
        state = self._state(training)
        self.dcp.load(state, checkpoint_id=self.path, no_dist=True)
        self.state_dict.set_state_dict(
            training.model,
            training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _state(self, training: Training) -> dict[str, Any]:
        model, optimizer = self.state_dict.get_state_dict(training.model, training.optimizer)
        return {"model": model, "optimizer": optimizer}


class DcpAsync(Dcp):
    title = "DCP async"
    restores_like = "dcp"

    def write(self, training: Training) -> None:
        self.saving = self.dcp.async_save(self._state(training), checkpoint_id=self.path, no_dist=True)


class DcpStaged(Dcp):
    """The copy made in a thread too, into memory that is kept; the loop waits for it before the optimizer's step."""

    title = "DCP async, staged"
    restores_like = "dcp"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        without_accelerator = {"use_pinned_memory": False, "use_shared_memory": False, "use_non_blocking_copy": False}
        self.stager = DefaultStager(StagingOptions(use_async_staging=True, **without_accelerator))
        self.staging: Any = None

    def write(self, training: Training) -> None:
        begun = self.dcp.async_save(
            self._state(training), checkpoint_id=self.path, async_stager=self.stager, no_dist=True
        )
        self.staging, self.saving = begun.staging_completion, begun.upload_completion

    def allow_step(self) -> None:
        if self.staging is not None:
            self.staging.result()

    def close(self) -> None:
        self.stager.close()


# --- frameworks ----------------------------------------------------------------------------------


class Lightning(Peer):
    """What `Trainer(plugins=[AsyncCheckpointIO()])` saves with."""

    title, needs = "Lightning async", ("lightning",)
    atomic = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self.io = AsyncCheckpointIO(TorchCheckpointIO())

    def write(self, training: Training) -> None:
        self.io.save_checkpoint(_state(training), self.path)

    def wait(self) -> None:
        self.io.teardown()

    def restore(self, training: Training) -> None:
        _load(training, self.io.load_checkpoint(self.path, weights_only=True))


class Orbax(Peer):
    """JAX's, given NumPy arrays that share memory with the tensors; uncompressed, which is faster."""

    title, needs = "Orbax async", ("orbax.checkpoint", "jax")
    atomic = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        logging.getLogger("absl").setLevel(logging.ERROR)
        import orbax.checkpoint as ocp

        self.ocp = ocp
        self.checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def write(self, training: Training) -> None:
        arrays = {name: tensor.detach().numpy() for name, tensor in _flat(_state(training)).items()}
        self.checkpointer.save(self.path, args=self.ocp.args.PyTreeSave(arrays))

    def wait(self) -> None:
        self.checkpointer.wait_until_finished()

    def restore(self, training: Training) -> None:
        arrays = self.checkpointer.restore(self.path, args=self.ocp.args.PyTreeRestore())
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        _load(training, _nested(tensors, _state(training)["optimizer"]["param_groups"]))

    def close(self) -> None:
        self.checkpointer.close()


PEERS: dict[str, type[Peer]] = {
    "ckptcache": Ours,
    "ckptcache-blocking": OursBlocking,
    "torch": Torch,
    "torch-nocrc": TorchNoCrc,
    "safetensors": Safetensors,
    "dcp": Dcp,
    "dcp-async": DcpAsync,
    "dcp-staged": DcpStaged,
    "lightning": Lightning,
    "orbax": Orbax,
}
"""By the names that `--peers` takes; new ones are taken up by every benchmark."""


def missing(name: str) -> str | None:
    """The first module that a peer needs and that isn't installed."""
    # A dotted module can only be looked for once its parent is there.
    for module in PEERS[name].needs:
        parent = module.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
            return module
    return None
