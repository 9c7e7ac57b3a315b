"""The globals that a pickle may import without being able to run code of its author's choosing.

They make values: tensors, numbers, containers, dates, paths. Everything that is not here counts as able to run code,
because importing a module runs it, and because a list of what is dangerous never ends.
"""

from __future__ import annotations

from typing import Final

from statecodec.dtypes import TORCH, storage_dtype

_METADATA: Final = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata _MEM_FORMAT_ENCODING"
)
_NUMPY_TYPES: Final = (
    "bool bool_ bytes_ complex128 complex64 datetime64 dtype float16 float32 float64 int16 int32 int64 int8 longdouble "
    "longlong ndarray str_ timedelta64 uint16 uint32 uint64 uint8 ulonglong void"
)
_HARMLESS: Final[dict[str, frozenset[str]]] = {
    module: frozenset(names.split())
    for module, names in {
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "_codecs": "encode",
        "argparse": "Namespace",
        "collections": "Counter OrderedDict defaultdict deque",
        "copyreg": "__newobj__ _reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "types": "SimpleNamespace",
        "uuid": "SafeUUID UUID",
        "numpy": _NUMPY_TYPES,
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "torch": "BoolTensor ByteTensor FloatTensor IntTensor LongTensor Size Tensor device per_channel_affine "
        "per_channel_affine_float_qparams per_channel_symmetric per_tensor_affine per_tensor_symmetric",
        "torch._tensor": "_rebuild_from_type _rebuild_from_type_v2",
        "torch._utils": "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
        "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state "
        "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 "
        "_rebuild_wrapper_subclass",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.distributed.checkpoint.metadata": _METADATA,
        "torch.nn.parameter": "Buffer Parameter",
        "torch.serialization": "_get_layout",
        "torch.storage": "TypedStorage",
        "torch.torch_version": "TorchVersion",
    }.items()
}


def is_harmless(module: str, name: str) -> bool:
    """Whether a global only makes values.

    Args:
        module: As the pickle names it.
        name: As the pickle names it; dots lead into attributes.

    >>> is_harmless("collections", "OrderedDict"), is_harmless("os", "system")
    (True, False)
    """
    known = name in _HARMLESS.get(module, ()) or (module == "torch" and name in TORCH)
    return known or storage_dtype(module, name) is not None
