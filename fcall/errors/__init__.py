"""Every mistake a caller can make, one class each, with the message on the class.

Each class also derives from the builtin that ``torch.func.functional_call`` raises in the same
case, so an ``except ValueError`` keeps working when the import changes. What a class is made with
is listed after "Details" in its docstring, and kept as ``error.details``.
"""

from __future__ import annotations

from fcall.errors.base import FcallError, FcallWarning
from fcall.errors.base import fail as fail
from fcall.errors.base import fail_while_tracing as fail_while_tracing
from fcall.errors.base import nearest as nearest
from fcall.errors.calls import (
    DuplicateNameError,
    InvalidDictsError,
    InvalidNameError,
    LazyModuleError,
    MetaTensorError,
    NotAModuleError,
    NotATensorError,
    NotATensorSlotError,
    PathThroughValueError,
    ReadOnlyAttributeError,
    ReadOnlyMappingError,
    SharedSlotError,
    StrictKeysError,
    TiedValuesError,
    UnknownMethodError,
    UnknownPathError,
    UnsupportedModuleError,
)
from fcall.errors.family import (
    FunctionalizeOptionError,
    InPlaceUnderTransformError,
    ModelHasBuffersError,
    NoModelsError,
    PackedSequenceError,
    PatchNotStartedError,
    TangentsError,
    UnlikeModelsError,
    ValuesCountError,
)
from fcall.errors.files import (
    MissingExtraError,
    StateDtypeError,
    StateFileError,
    UnknownPrefixError,
)
from fcall.errors.graphs import (
    BakedStateError,
    ExportedGradientError,
    GraphChangedError,
    KernelsUnavailableError,
    LossError,
    MissingValuesError,
    MissingWeightsError,
    NotAPackageError,
    NotOnCudaError,
    NotPackagedError,
    PackageDamagedError,
    PackageMismatchError,
    PackageNameError,
    ProgramInputsError,
    ProgramStructureError,
    StateChangedError,
    StaticSetsError,
    UncachedBackendError,
    UnexpectedWeightsError,
)

__all__ = [
    "BakedStateError",
    "DuplicateNameError",
    "ExportedGradientError",
    "FcallError",
    "FcallWarning",
    "FunctionalizeOptionError",
    "GraphChangedError",
    "InPlaceUnderTransformError",
    "InvalidDictsError",
    "InvalidNameError",
    "KernelsUnavailableError",
    "LazyModuleError",
    "LossError",
    "MetaTensorError",
    "MissingExtraError",
    "MissingValuesError",
    "MissingWeightsError",
    "ModelHasBuffersError",
    "NoModelsError",
    "NotAModuleError",
    "NotAPackageError",
    "NotATensorError",
    "NotATensorSlotError",
    "NotOnCudaError",
    "NotPackagedError",
    "PackageDamagedError",
    "PackageMismatchError",
    "PackageNameError",
    "PackedSequenceError",
    "PatchNotStartedError",
    "PathThroughValueError",
    "ProgramInputsError",
    "ProgramStructureError",
    "ReadOnlyAttributeError",
    "ReadOnlyMappingError",
    "SharedSlotError",
    "StateChangedError",
    "StateDtypeError",
    "StateFileError",
    "StaticSetsError",
    "StrictKeysError",
    "TangentsError",
    "TiedValuesError",
    "UncachedBackendError",
    "UnexpectedWeightsError",
    "UnknownMethodError",
    "UnknownPathError",
    "UnknownPrefixError",
    "UnlikeModelsError",
    "UnsupportedModuleError",
    "ValuesCountError",
]
