"""Every read of a file that may be hostile: pickles by unpicklers that admit plain data alone, sums compared first.

Read it before you load a file in another way: what is not read here, safetensors or json reads.
"""

import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from quartz.errors import UserError

ZIP_FOLDER = 0x10  # among an archive entry's external attributes
# nanoGPT may store best_val_loss as a numpy scalar: a dtype and its bytes, no code.
_NUMPY_SCALAR = [
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]
# What DCP's .metadata, a pickle, is made of, and dtypes.
_METADATA = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}  # fmt: skip


def plain_pickle(path: Path) -> object:
    """What a pickle of dicts, lists, strings and numbers holds, such as nanoGPT's meta.pkl.

    Raises pickle.UnpicklingError for anything that could run code; a broken pickle raises anything.
    """
    with open(path, "rb") as file:
        return _PlainUnpickler(file).load()


class _PlainUnpickler(pickle._Unpickler):
    """Reads dicts, lists, strings and numbers, and refuses everything that could run code.

    The one in Python, since the one in C reserves whatever memory a file asks for.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no plain data")


def check_dcp_metadata(folder: Path) -> None:
    """Reads the .metadata of a checkpoint in shards as DCP would, which admits only what belongs there.

    Raises pickle.UnpicklingError for anything else; a broken pickle raises anything.
    """
    with open(folder / ".metadata", "rb") as file:
        _MetadataUnpickler(file).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Reads a .metadata, and refuses whatever else hides in it; DCP itself would run it."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _METADATA and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def torch_file(path: Path) -> object:
    """What torch.save wrote to `path`, on the CPU: tensors and plain values. Hidden code is not run.

    Raises UserError for a file that is truncated, damaged, or holds more.
    """
    _check_sums(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY_SCALAR):
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles say less than the errors below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values; it was not loaded") from error
    except Exception as error:  # a broken pickle raises anything
        raise UserError(f"{path} can't be read; is it truncated? ({str(error)[:300]})") from error


def _check_sums(path: Path) -> None:
    """Compares what the file holds with the sums that torch has stored in it, which torch.load does not do."""
    try:
        if not zipfile.is_zipfile(path):  # the format of before 2020, or no checkpoint: torch.load will tell
            return
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            if folders := [info.filename for info in file.infolist() if info.external_attr & ZIP_FOLDER]:
                raise zipfile.BadZipFile(f"{folders[0]} calls itself a folder, of which torch would read nothing")
    except Exception as error:  # zipfile lets pass what its decompressors raise
        raise UserError(f"{path} is damaged ({error})") from error
    if damaged:
        raise UserError(f"{path} is damaged: the sum of {damaged} in it is wrong")
