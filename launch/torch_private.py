"""Every name of torch that the scripts use and torch does not publish, each with what breaks without it.

``tests/launch/test_torch_private.py`` names what has gone when torch changes.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# What the pickled metadata of a distributed checkpoint names, by module, beside dtypes. torch writes private
# names among them; without one of these, the reader would refuse every checkpoint.
METADATA_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


def release_groups(mesh: DeviceMesh) -> None:
    """Drop the process groups of a root mesh, which are also those of the meshes sliced from it.

    DTensor's caches hold meshes for as long as the process lives. Without it, gloo's threads would outlive
    ``destroy_process_group``, and one of them can abort the process as Python shuts down.
    """
    if hasattr(mesh, "_pg_registry"):  # up to torch 2.10, a mesh knows its groups by names alone
        mesh._pg_registry.clear()


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Let a group's collectives fail when a process is silent for this long.

    Groups of torch 2.8 have no method for it; without this function, they would wait for half an hour.
    """
    if hasattr(group, "set_timeout"):
        group.set_timeout(timeout)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
