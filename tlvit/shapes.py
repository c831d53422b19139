"""Array annotations with type and axes: `Float[Array, "B N L"]`. They are those of jaxtyping.

Images of accelerators often lack jaxtyping. There the annotations mean any value, and nothing else changes.
"""

from typing import TYPE_CHECKING, Any

try:
    from jaxtyping import (
        Bool,
        Float,
        Float16,
        Float32,
        Int,
        Int32,
        Integer,
        Num,
        PRNGKeyArray,
        Shaped,
        UInt8,
        UInt16,
    )
except ModuleNotFoundError:
    if not TYPE_CHECKING:

        class AnyArray:
            """Stands for every array annotation."""

            def __class_getitem__(cls, item: Any) -> Any:
                return Any

        Bool = Float = Float16 = Float32 = Int = Int32 = Integer = Num = Shaped = UInt8 = UInt16 = AnyArray
        PRNGKeyArray = Any

__all__ = [
    "Bool", "Float", "Float16", "Float32", "Int", "Int32", "Integer", "Num", "PRNGKeyArray", "Shaped",
    "UInt8", "UInt16",
]  # fmt: skip
