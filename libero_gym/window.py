"""The window of `render_mode="human"`, by pygame as in Gymnasium's own environments."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled

from libero_gym.fork import Uncopied

_REMEDY = "take render_mode='rgb_array' and Gymnasium's RecordVideo, or `python -m libero_gym.play --video FOLDER`"
# One of them names where windows go: X11, Wayland, or SDL's choice, such as "dummy" for none.
_DISPLAY_VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")


def is_usable() -> bool:
    """Return whether a window can be expected to open: pygame is installed, and there is a display."""
    has_display = any(os.environ.get(name) for name in _DISPLAY_VARIABLES)
    return has_display and importlib.util.find_spec("pygame") is not None


def check_usable() -> None:
    """Return if there is what a window needs.

    Raises:
        DependencyNotInstalled: pygame is missing.
        RuntimeError: there is no display.
    """
    if importlib.util.find_spec("pygame") is None:
        raise DependencyNotInstalled(
            f"render_mode='human' needs pygame: install it with `pip install pygame`, or {_REMEDY}"
        )
    if not is_usable():
        raise RuntimeError(f"render_mode='human' needs a display (none of {_DISPLAY_VARIABLES} is set); {_REMEDY}")


class Window(Uncopied):
    """A window that shows frames at the rate of the environment."""

    def __init__(self, size: int, *, fps: int, caption: str) -> None:
        """Open the window.

        Args:
            size: height and width, pixels.
            fps: frames a second; `show` waits for the next frame's time.
            caption: the window's title.

        Raises:
            RuntimeError: there is no display.
        """
        import pygame  # greets on import

        self._pygame: Any = pygame
        self._fps = fps
        try:
            pygame.display.init()
            self._surface = pygame.display.set_mode((size, size))
        except pygame.error as error:
            raise RuntimeError(f"no window can be opened here ({error}); {_REMEDY}") from error
        pygame.display.set_caption(caption)
        self._clock = pygame.time.Clock()

    def show(self, frame: npt.NDArray[np.uint8]) -> None:
        """Show a frame, uint8 (H, W, 3), when its time has come."""
        surface = self._pygame.surfarray.make_surface(frame.swapaxes(0, 1))
        self._surface.blit(surface, (0, 0))
        self._pygame.event.pump()
        self._clock.tick(self._fps)
        self._pygame.display.flip()

    def pressed_keys(self) -> list[str]:
        """Return the names of the keys that are held down, and "quit" if the window was closed."""
        names = ["quit" for event in self._pygame.event.get() if event.type == self._pygame.QUIT]
        pressed = self._pygame.key.get_pressed()
        held = (self._pygame.key.name(code) for code in range(len(pressed)) if pressed[code])
        return names + [name for name in held if name]

    def close(self) -> None:
        """Close the window."""
        self._pygame.display.quit()
