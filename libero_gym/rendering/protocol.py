"""What renderers read and give, whatever draws.

Shape legend: N worlds, K cameras, H = W = `image_size` pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.tasks.scenes import Scene

RendererKind = Literal["egl", "osmesa", "warp"]
ViewKind = Literal["images", "depth", "segmentation"]

Images = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]


class RendererUnavailableError(RuntimeError):
    """A renderer that was asked for cannot be used on this machine."""


def check_renderer(kind: Any) -> RendererKind | None:
    """Return `kind`.

    Raises:
        ValueError: it is neither None nor a kind of renderer.
    """
    if kind is not None and kind not in get_args(RendererKind):
        names = ", ".join(map(repr, get_args(RendererKind)))
        raise ValueError(f"renderer={kind!r} is unknown (valid: None, {names})")
    return kind


class RenderState(NamedTuple):
    """What an image of a world shows, apart from the model. All arrays are copies.

    Attributes:
        qpos: float64 [nq]; kinematics of these positions give the poses that the image shows.
        fixture_poses: float64 [num_fixtures, 7], position (m) and quaternion wxyz of `scene.fixture_body_ids`, to be
            written to the render model's `body_pos` and `body_quat`.
        indicator_alpha: float64 [num_indicators], opacity of `scene.indicator_site_ids`, to be written to the render
            model's `site_rgba[:, 3]`: a stove's glow.
    """

    qpos: FloatArray
    fixture_poses: FloatArray
    indicator_alpha: FloatArray


class Views(NamedTuple):
    """What cameras show of worlds, in the same pixels; None for what the renderer was not made for.

    Arrays of NumPy, or torch tensors where those were asked for. All are mirrored as images are.

    Attributes:
        images: uint8 [N, K, H, W, 3].
        depth: float32 [N, K, H, W, 1], m, along the camera's axis (not along the ray) to what is seen at the pixel's
            centre; where nothing is, that of the far clipping plane, MuJoCo's `vis.map.zfar * stat.extent`.
        segmentation: int32 [N, K, H, W, 1], id of the body that is seen at the pixel's centre, -1 where nothing is.
    """

    images: Any
    depth: Any
    segmentation: Any


class Drawable(Protocol):
    """A world as renderers read it, such as `libero_gym.Simulation`."""

    @property
    def scene(self) -> Scene:
        """The scene that the world is one of."""
        ...

    @property
    def model(self) -> mujoco.MjModel:
        """The physics model, with this world's fixture poses."""
        ...

    def render_state(self) -> RenderState:
        """Return what an image of the world shows now."""
        ...


class Renderer(Protocol):
    """What draws worlds."""

    @property
    def name(self) -> RendererKind:
        """Kind of renderer."""
        ...

    @property
    def uses_all_cores(self) -> bool:
        """Whether drawing occupies all cores, so that nothing else should run beside it."""
        ...

    def render(self, simulations: Sequence[Drawable]) -> Images:
        """Draws the last observed state of each simulation; uint8 [N, K, H, W, 3], not shared with later calls.

        Raises:
            ValueError: the renderer was not made for images.
            RuntimeError: this process was forked from the one that made the renderer.
        """
        ...

    def views(self, simulations: Sequence[Drawable]) -> Views:
        """Draws all that the renderer was made for, not shared with later calls.

        Raises:
            RuntimeError: this process was forked from the one that made the renderer.
        """
        ...

    def close(self) -> None:
        """Releases contexts and buffers; a second call does nothing."""
        ...


def check_view_kinds(kinds: Collection[ViewKind]) -> frozenset[ViewKind]:
    """Return what a renderer is to be made for, as a set.

    Raises:
        ValueError: there is nothing, or something unknown.
    """
    valid = get_args(ViewKind)
    if not kinds or not set(kinds) <= set(valid):
        raise ValueError(f"view_kinds={tuple(kinds)!r} must be some of {valid}")
    return frozenset(kinds)


def only_images(views: Views) -> Images:
    """Return the images of what was drawn.

    Raises:
        ValueError: the renderer was not made for them.
    """
    if views.images is None:
        raise ValueError("the renderer was made without 'images' among its view_kinds; use its views()")
    return views.images
