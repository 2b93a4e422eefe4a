"""Checkpoints that never hand back wrong values: Orbax, and a checksum on everything.

A path that ends in '.safetensors' is one file for one tree, see `single_file`; any
other is a directory of steps:

    path/3/            one directory per step
        manifest.json.gz   structure, a checksum per leaf, a checksum per file
        (other files)      the arrays, as Orbax stores them, compressed with zstd

A step appears by one rename, so a process that is killed while it saves leaves nothing
behind that counts as a step. `restore` checks every file before it decodes any and
every leaf after. A damaged newest step is passed over, with a warning that says what is
damaged; a step asked for by number is not. A step that is replaced gets the name '3.1':
the new one is there before the old one goes.

How leaves become arrays for Orbax and back is in `storage`.
"""

import dataclasses
import pathlib
import re
import shutil
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jopt.arrays.arguments import require_count
from jopt.trees import manifest, single_file, storage, structure
from jopt.trees.manifest import CheckpointError
from jopt.trees.metadata import metadata_of

_NAME = re.compile(r"(0|[1-9]\d*)(?:\.([1-9]\d*))?")
_LEFT_OVER = re.compile(_NAME.pattern + r"\.(orbax-checkpoint-tmp.*|deleted)")
_TRACES = (manifest.NAME, "_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt")


def save(
    path: str | pathlib.Path,
    tree: Any,
    *,
    step: int | None = None,
    max_to_keep: int | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a tree as one step of the checkpoints in a directory, or as one file.

    All is on disk when it returns. A damaged step of the same number is replaced. Where
    the path ends in '.safetensors' it is one file for one tree, packed as in memory and
    readable without this library; docs/safetensors.md specifies it.

    Args:
        path: the directory of all steps, or the file; it is made if need be.
        tree: any pytree of JAX and NumPy arrays, PRNG keys, quantized arrays, numbers,
            strings, bytes and None. Sharded arrays are written shard by shard, into a
            file in one piece each.
        step: the number of the step, 0 when None; a file has none.
        max_to_keep: how many steps stay; the oldest others are deleted, never the one
            just saved. None keeps all.
        metadata: JSON content of the caller's own, see `read_metadata`; its numbers may
            be NaN or infinite, its tuples come back as lists.
        overwrite: replace an intact step of the same number, or the file.

    Raises:
        ValueError: the step exists and is intact, the file exists, a number is out of
            range or given for a file, a key cannot be in a file, or there is more than
            one process.
        TypeError: `path` is none, a leaf is of a type that cannot be saved, or metadata
            is not JSON.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, {"w": jnp.arange(3), "epoch": 7}, step=2)
    ...     steps(path), restore(path)
    ([2], {'w': Array([0, 1, 2], dtype=int32), 'epoch': 7})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(f"{path}/model.safetensors", {"w": jnp.arange(3)})
    ...     restore(f"{path}/model.safetensors")
    {'w': Array([0, 1, 2], dtype=int32)}
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"save must run in one process, got {jax.process_count()}; "
            "gather the tree in one and save it there"
        )
    own = metadata_of(metadata)
    if single_file.is_single_file(path):
        _refuse_steps(path, step=step, max_to_keep=max_to_keep)
        return single_file.save(path, tree, metadata=own, overwrite=overwrite)
    root, number = _root(path), 0 if step is None else step
    _check_numbers(number, max_to_keep)
    node, leaves = structure.encode(tree)
    content = {"tree": node, "metadata": own}
    root.mkdir(parents=True, exist_ok=True)
    older = [version for version in _versions(root) if version.step == number]
    if older and not overwrite and _damage(older[0]) is None:
        raise ValueError(
            f"step must be new, got {number}, which is intact in {str(root)!r}; "
            "save another step or pass overwrite=True"
        )
    rows, items = storage.pack(leaves)
    name = f"{number}.{older[0].generation + 1}" if older else str(number)
    handler = _ManifestHandler({**content, "leaves": rows})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(root / name, args=_SaveArgs(items))
    for version in older + _surplus(root, number, max_to_keep):
        _delete(version.directory)
    for entry in root.iterdir():
        if _LEFT_OVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def restore(
    path: str | pathlib.Path,
    *,
    like: Any = None,
    step: int | None = None,
    with_metadata: bool = False,
) -> Any:
    """Restore the newest intact step, or the one asked for, or a file.

    Dicts, lists, tuples, numbers, strings, keys, arrays and quantized arrays need no
    template. Each leaf comes back with its dtype and bits: JAX arrays on the sharding
    they had, if this process has the devices, else on the default device; NumPy arrays
    as NumPy arrays.

    Args:
        path: the directory of all steps, or a file that ends in '.safetensors'.
        like: a tree of the structure that was saved, for one with NamedTuples
            (optimizer states), NNX states or Equinox modules, or to place leaves:
            arrays or `jax.ShapeDtypeStruct`s, whose shardings are followed. Numbers and
            strings come from the checkpoint, functions from `like`.
        step: the number of the step; None for the newest that is intact.
        with_metadata: whether to return what `save` got as `metadata`, too: that of the
            step that was restored, which need not be the newest.

    Returns:
        The tree, or (tree, metadata).

    Raises:
        FileNotFoundError: there is no such step or file, or none at all.
        CheckpointError: a `ValueError`: the step asked for is damaged, or all are, or
            the file is.
        ValueError: `like` is needed, or differs in structure, shape or dtype.

    Warns:
        UserWarning: a newer step was damaged; it names what was.

    >>> import tempfile, optax
    >>> import jax.numpy as jnp
    >>> state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, state)
    ...     restore(path, like=state)[0].trace
    {'w': Array([0., 0.], dtype=float32)}
    """
    if single_file.is_single_file(path):
        _refuse_steps(path, step=step)
        tree, metadata = single_file.restore(path, like=like)
        return (tree, metadata) if with_metadata else tree
    damage = []
    for version in _wanted(_root(path), step):
        try:
            tree = _load(version, like)
        except CheckpointError as error:
            damage.append(f"step {version.step}: {error}")
            continue
        if damage:
            warnings.warn(
                f"restored step {version.step} of {str(path)!r}, the newest that is "
                f"intact; damaged: {'; '.join(damage)}",
                stacklevel=2,
            )
        if with_metadata:
            return tree, _metadata(version)
        return tree
    raise CheckpointError(
        f"path must hold an intact step, got {str(path)!r} with {'; '.join(damage)}; "
        + ("restore another step" if step is not None else "restore a copy of it")
    )


def steps(path: str | pathlib.Path) -> list[int]:
    """List the saved steps in order, without checking them.

    Args:
        path: the directory of all steps.

    Returns:
        Their numbers; none if there is no such directory. Whatever is no step, such as
        what a killed process left behind, is passed over.

    >>> steps("no/such/directory")
    []
    """
    if single_file.is_single_file(path):
        raise ValueError(
            f"path must be a directory of steps, got the file {str(path)!r}; "
            "jopt.restore reads it"
        )
    return sorted({version.step for version in _versions(_root(path))})


def read_metadata(
    path: str | pathlib.Path, *, step: int | None = None
) -> dict[str, Any]:
    """Read the metadata of a step or a file, without reading its arrays.

    The newest step may turn out to be damaged: `restore(..., with_metadata=True)` gives
    the metadata of the step that it restored.

    Args:
        path: the directory of all steps, or a file that ends in '.safetensors'.
        step: the number of the step; None for the newest.

    Returns:
        What `save` got as `metadata`.

    Raises:
        FileNotFoundError: there is no such step or file, or none at all.
        CheckpointError: the manifest is damaged.
    """
    if single_file.is_single_file(path):
        _refuse_steps(path, step=step)
        return single_file.read_metadata(path)
    return _metadata(_wanted(_root(path), step)[0])


@dataclasses.dataclass(frozen=True)
class _Version:
    """A directory of a step; the generation counts how often it was replaced."""

    step: int
    generation: int
    directory: pathlib.Path


def _metadata(version: _Version) -> dict[str, Any]:
    return dict(manifest.read(version.directory)["metadata"])


class _ManifestHandler(ocp.PyTreeCheckpointHandler):  # type: ignore[misc]
    """Orbax's handler, which leaves our manifest beside its files."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self._content = content

    def save(self, directory: Any, args: Any) -> None:
        """Save the arrays; Orbax refuses to save none."""
        if args.item:
            super().save(directory, args=args)

    def finalize(self, directory: Any) -> None:
        """Complete Orbax's files and then describe them, before the rename."""
        if self._content["leaves"]:
            super().finalize(directory)
        manifest.write(pathlib.Path(directory), self._content)


@ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveArgs(ocp.args.PyTreeSave):  # type: ignore[misc]
    """The arguments of `_ManifestHandler`."""


def _load(version: _Version, like: Any) -> Any:
    """Restore one step, or raise `CheckpointError` with what is damaged."""
    content = manifest.read(version.directory)
    manifest.check_files(version.directory, content)
    node, rows = content["tree"], content["leaves"]
    places = storage.find_places(node, rows, like)
    arrays = _read(version.directory, storage.requests(rows, places))
    values = storage.unpack(rows, places, arrays)
    return structure.decode(node, values, like=like)


def _read(
    directory: pathlib.Path, requests: dict[str, storage.Request]
) -> dict[str, Any]:
    """Read arrays with Orbax, each onto its sharding or the host."""
    if not requests:
        return {}
    arguments = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if request.sharding is None
        else ocp.ArrayRestoreArgs(
            sharding=request.sharding, global_shape=request.shape, dtype=request.dtype
        )
        for name, request in requests.items()
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(
            directory,
            args=ocp.args.PyTreeRestore(item=dict(requests), restore_args=arguments),
        )
    return dict(found)


def _damage(version: _Version) -> str | None:
    """Say what is damaged in the files of a step, None if it is intact."""
    try:
        manifest.check_files(version.directory, manifest.read(version.directory))
    except CheckpointError as error:
        return str(error)
    return None


def _versions(root: pathlib.Path) -> list[_Version]:
    """List the directories of steps, newest first."""
    found = []
    for entry in root.iterdir() if root.is_dir() else ():
        name = _NAME.fullmatch(entry.name)
        # A directory of that name without any of our files is somebody else's.
        if name and any((entry / trace).exists() for trace in _TRACES):
            found.append(_Version(int(name[1]), int(name[2] or 0), entry))
    return sorted(found, key=lambda v: (v.step, v.generation), reverse=True)


def _wanted(root: pathlib.Path, step: int | None) -> list[_Version]:
    """List the versions to try: all, or the newest of the step asked for."""
    found = _versions(root)
    if not found:
        raise FileNotFoundError(
            f"path must hold a saved step, got {str(root)!r}, which holds none; "
            "jopt.save makes one"
        )
    if step is None:
        return found
    chosen = [version for version in found if version.step == step]
    if not chosen:
        raise FileNotFoundError(
            f"step must be a saved one, got {step}; {str(root)!r} holds "
            f"{sorted({version.step for version in found})}"
        )
    return chosen[:1]


def _surplus(
    root: pathlib.Path, number: int, max_to_keep: int | None
) -> list[_Version]:
    """List the versions that are too many; the step just saved is never one."""
    others = [version for version in _versions(root) if version.step != number]
    if max_to_keep is None:
        return []
    kept = {version.step for version in others}
    kept = set(sorted(kept, reverse=True)[: max_to_keep - 1])
    return [version for version in others if version.step not in kept]


def _delete(directory: pathlib.Path) -> None:
    """Delete a step: by a rename first, so that no half of it looks like a step."""
    shutil.rmtree(directory.rename(directory.with_name(f"{directory.name}.deleted")))


def _root(path: str | pathlib.Path) -> pathlib.Path:
    if "://" in str(path):
        raise ValueError(
            f"path must be on a file system, got {str(path)!r}; mount the store"
        )
    root = pathlib.Path(path).absolute()
    if root.exists() and not root.is_dir():
        raise ValueError(f"path must be a directory, got the file {str(path)!r}")
    return root


def _check_numbers(step: int, max_to_keep: int | None) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(
            f"step must be an integer from 0, got {step!r}; use int(count)"
        )
    if max_to_keep is not None:
        require_count("max_to_keep", max_to_keep, least=1)


def _refuse_steps(path: str | pathlib.Path, **numbers: int | None) -> None:
    given = [name for name, number in numbers.items() if number is not None]
    if given:
        raise ValueError(
            f"{given[0]} must be left out for one file, which has no steps, got "
            f"{numbers[given[0]]!r} for {str(path)!r}; give a directory as path"
        )
