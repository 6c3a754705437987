# type: ignore
"""What kernels share in which the threads of one block work on one world: barriers, and the struct of their arrays."""

from __future__ import annotations

from typing import Any

import warp as wp


@wp.func_native(snippet="WP_TILE_SYNC();")
def sync_block():
    """Wait until all threads of the block have come here, and let them see what the others wrote."""
    ...


def collect_arrays(struct: Any, own: dict[str, Any], *sources: Any) -> Any:
    """Return a kernel struct whose members are those of `own`, or else the attributes of that name of a source.

    MuJoCo Warp gives values of its model a leading dimension for worlds that differ in them. Where the struct has an
    array of one dimension less, all worlds share the value.

    Raises:
        ValueError: worlds differ in such a value.
        AttributeError: a member is not there, as in another version of MuJoCo Warp.
    """
    result = struct()
    for name, variable in struct.vars.items():
        value = own[name] if name in own else _find(name, sources)
        wanted = getattr(variable.type, "ndim", None)
        if wanted is not None and value.ndim == wanted + 1:
            if value.shape[0] != 1:
                raise ValueError(
                    f"{name} differs between worlds; GPU physics can do so with body_pos and body_quat only"
                )
            # Warp cannot cut an array without elements.
            value = value[0] if value.size else wp.zeros((0,) * wanted, dtype=value.dtype, device=value.device)
        setattr(result, name, value)
    return result


def _find(name: str, sources: Any) -> Any:
    for source in sources:
        if hasattr(source, name):
            return getattr(source, name)
    raise AttributeError(f"neither MuJoCo Warp's data nor its model has {name!r}")
