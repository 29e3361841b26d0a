"""A whole model as a version: the weights of a full fine-tune, kept in fp32.

It cannot be worn over the base, so it is not served and no alias may point to it: `wardrobe
extract` makes a low-rank adapter of it. Configuration and tokenizer are the base's own files.
"""

import math
from filecmp import cmp
from pathlib import Path

from registry.adapter import Version
from registry.base import BaseModel
from registry.contents import COMPANIONS, MODEL_NAME
from registry.errors import Problem, Refused, refused
from registry.tensors import BASE_BOUNDS, Tensor, largest_magnitudes, read_folder, read_header


def companions(base: BaseModel) -> list[Path]:
    """Return the files of a base that are not its weights: configuration and tokenizer."""
    return [base.path / name for name in COMPANIONS if (base.path / name).is_file()]


def check_whole(folder: Path, base: BaseModel) -> list[Problem]:
    """Return why the model in `folder` is no full fine-tune of the base, in fp32 and finite."""
    expected = read_folder(base.path)
    try:
        found = read_header(folder / MODEL_NAME, BASE_BOUNDS)
    except Refused as error:
        return list(error.problems)
    problems = [*_check_tensors(found, expected, base.id), *_check_companions(folder, base)]
    # Values are read last: only a file whose every size is right is worth a pass over its bytes.
    return problems or [
        ("non_finite", f"{tensor.name} holds NaN or infinity.")
        for tensor, largest in largest_magnitudes(folder / MODEL_NAME, found.values())
        if not math.isfinite(largest)
    ]


def refuse_whole(version: Version) -> None:
    """Raise Refused, with the cure, where a version is a model that nothing can wear."""
    if version.is_whole:
        raise refused(
            "not_servable",
            f"{version.ref.label} is a whole fine-tuned model of {version.size_bytes:,} bytes, "
            f"which cannot be worn over {version.base_id}. Make an adapter of it: "
            f"wardrobe extract {version.ref.label} --push",
        )


def _check_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], base_id: str
) -> list[Problem]:
    problems = [
        ("module_not_in_base", f"{name!r} is no tensor of {base_id}.")
        for name in sorted(found.keys() - expected.keys())
    ]
    problems += [
        ("tensor_missing", f"{name!r} of {base_id} is missing.")
        for name in sorted(expected.keys() - found.keys())
    ]
    for name in sorted(found.keys() & expected.keys()):
        tensor, shape = found[name], expected[name].shape
        if tensor.shape != shape:
            text = f"{name}: has {list(tensor.shape)}, {base_id} has {list(shape)}."
            problems.append(("shape_mismatch", text))
        if tensor.dtype != "F32":
            text = (
                f"{name} is {tensor.dtype}; keep a full fine-tune in F32: rounding is larger than "
                "much of what it has learned."
            )
            problems.append(("dtype_unsupported", text))
    return problems


def _check_companions(folder: Path, base: BaseModel) -> list[Problem]:
    """Compare what the folder brings along with the base's own files."""
    return [
        (
            "base_file_differs",
            f"{name} is not the file of {base.id}: a version changes weights only. Take it out.",
        )
        for name in COMPANIONS
        if (folder / name).is_file()
        and not ((base.path / name).is_file() and cmp(folder / name, base.path / name, False))
    ]
