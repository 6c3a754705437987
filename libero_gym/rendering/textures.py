"""Which colours LIBERO's textures have.

Of LIBERO's textures the floor of light grey tiles (most of a libero_object picture, a strip of a libero_spatial or
libero_goal one), another floor and the salad dressing's label are PNG files tagged as sRGB. MuJoCo up to 3.3.2 draws
the bytes of every file as they are. From 3.3.3 on it reads the tag and uploads such a texture as sRGB, so that OpenGL
decodes it to linear light, which nothing encodes again: the floor becomes much darker (mean agent view of
libero_object task 0: RGB 145/139/133 before, 112/103/94 since).

Public data sets and released checkpoints saw the bytes as they are, so that is what every renderer here draws, under
any version of MuJoCo:

- "linear" (default): no texture is decoded, as under MuJoCo 2.3.7 to 3.3.2;
- "auto": the file's tag decides where the installed MuJoCo reads it, as in LIBERO's own environment on this machine.

The names are those of MJCF's attribute `texture/colorspace`. The choice belongs to a renderer, not to a scene: it is
applied where textures are uploaded, to the field `tex_colorspace` that the compiler filled. `Scene.render_model`, the
cached scene and scene archives are the same for both, so that archives made before there was a choice serve it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Literal

import mujoco
import numpy as np
import numpy.typing as npt

TextureColorspace = Literal["linear", "auto"]

# mjtColorSpace, which MuJoCo before 3.3.3 lacks.
_LINEAR, _SRGB = 1, 2


def check_texture_colorspace(value: str) -> TextureColorspace:
    """Returns `value` if it is known.

    Raises:
        ValueError: Otherwise.
    """
    if value not in ("linear", "auto"):
        raise ValueError(
            f"texture_colorspace={value!r} is unknown (valid: 'linear', as in public data sets; 'auto', as the "
            "installed MuJoCo draws)"
        )
    return value


def installed_colorspace() -> TextureColorspace:
    """Returns how LIBERO itself draws with the installed MuJoCo: "linear" before 3.3.3, "auto" since."""
    return "auto" if hasattr(mujoco.MjModel, "tex_colorspace") else "linear"


def decoded_textures(model: mujoco.MjModel, colorspace: TextureColorspace) -> npt.NDArray[np.bool_]:
    """Tells for each texture of `model`, bool [ntex], whether it is decoded from sRGB to linear light."""
    if colorspace == "linear" or installed_colorspace() == "linear":
        return np.zeros(model.ntex, np.bool_)
    return np.asarray(model.tex_colorspace == _SRGB)


@contextlib.contextmanager
def textures_in(model: mujoco.MjModel, colorspace: TextureColorspace) -> Generator[None]:
    """Has an `MjrContext` that is made within upload the textures of `model` as `colorspace` says."""
    if installed_colorspace() == "linear":
        yield
        return
    compiled = model.tex_colorspace.copy()
    model.tex_colorspace[:] = np.where(decoded_textures(model, colorspace), _SRGB, _LINEAR)
    try:
        yield
    finally:
        model.tex_colorspace[:] = compiled
