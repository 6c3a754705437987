"""A scene's model with visuals whose textures are as small as the ray caster looks at them, kept in the cache.

Most of LIBERO's textures are PNG files of 4096 pixels. To decode them is more than half of what the compilation of
`Scene.render_model` takes (1.4 of 2.5 s on one core), and the ray caster halves them at once. The cache folder keeps,
below `textures/`, the halved texture of each file that was looked at (3 MB and less), for all scenes that it is in. A
model that is compiled with these has the same ray scene as `Scene.render_model` has, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.rendering.ray_scene import MAX_TEXTURE_SIZE, small_texture
from libero_gym.rendering.textures import installed_colorspace
from libero_gym.tasks.cache import cache_dir, digest_file
from libero_gym.tasks.scenes import Scene

_FORMAT = 1


def load_small_model(scene: Scene) -> mujoco.MjModel:
    """Returns the model with visuals for the ray caster: from kept textures, else `Scene.render_model`.

    In the second case its textures are kept for the next one.

    Raises:
        OSError: The cache folder cannot be written to.
    """
    spec = scene.visual_spec()
    textures: list[Any] = list(spec.textures)
    files = {index: _kept_file(texture) for index, texture in enumerate(textures) if texture.file}
    kept = {file: _read(file) for file in set(files.values())}
    if any(arrays is None for arrays in kept.values()):
        for index, file in files.items():
            if kept[file] is None:
                kept[file] = _keep(file, scene.render_model, index)
        return scene.render_model
    for index, file in files.items():
        arrays, texture = kept[file], textures[index]
        assert arrays is not None
        texture.file = ""
        texture.height, texture.width, texture.nchannel = arrays["pixels"].shape
        texture.data = arrays["pixels"].tobytes()
        if installed_colorspace() == "auto":
            texture.colorspace = mujoco.mjtColorSpace(int(arrays["colorspace"]))
    model = spec.compile()
    scene.hide_sites(model)
    return model


def _kept_file(texture: Any) -> Path:
    """Returns where a texture is kept, by the content of its file and by all that decides what MuJoCo makes of it."""
    settings = [str(texture.type), str(getattr(texture, "colorspace", None)), int(texture.nchannel)]
    settings += [int(texture.hflip), int(texture.vflip), texture.gridsize.tolist(), "".join(texture.gridlayout)]
    content = [_FORMAT, mujoco.__version__, MAX_TEXTURE_SIZE, digest_file(Path(texture.file)), settings]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    return cache_dir() / "textures" / f"{name}.npz"


def _read(file: Path) -> dict[str, npt.NDArray[Any]] | None:
    """Returns a kept texture; None if there is none, or if the archive's checksums say that it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("pixels", "colorspace")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if arrays["pixels"].ndim == 3 else None


def _keep(file: Path, model: mujoco.MjModel, texture: int) -> dict[str, npt.NDArray[Any]]:
    """Halves a texture of a compiled model, writes it in one step and returns what `_read` does."""
    pixels = small_texture(model, texture, MAX_TEXTURE_SIZE)  # [3, faces, height, width]
    colorspace = model.tex_colorspace[texture] if installed_colorspace() == "auto" else 0
    arrays: dict[str, Any] = {
        "pixels": np.moveaxis(pixels, 0, -1).reshape(-1, pixels.shape[-1], 3),
        "colorspace": np.array(colorspace, np.int64),
    }
    file.parent.mkdir(exist_ok=True)
    staging = file.with_name(f".{file.stem}.{os.getpid()}.{secrets.token_hex(4)}.npz")
    try:
        np.savez(staging, **arrays)
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)
    return arrays
