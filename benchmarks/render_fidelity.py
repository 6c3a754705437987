"""How close the ray caster comes to MuJoCo's classic OpenGL renderer, the one behind LIBERO's data.

    python -m benchmarks.render_fidelity --gl osmesa --contact-sheet sheet.png

One scene of each suite, two cameras, several moments of an episode with random actions; PSNR over the pixels of all
moments, with the mirror that the classic renderer draws and without. Needs OpenGL: OSMesa (Debian: libosmesa6) or
EGL. Prints a table, then one JSON line. `--record FILE` instead stores a few classic images with the states they
show, for tests on machines without OpenGL.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.publish import Table, judge, make_parser, publish
from libero_gym.physics.simulation import Simulation
from libero_gym.rendering.raycast import WarpRenderer
from libero_gym.rendering.renderers import GlRenderer
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

CAMERAS = ("agentview", "robot0_eye_in_hand")
TASKS = (("libero_spatial", 0), ("libero_object", 0), ("libero_goal", 0), ("libero_10", 2), ("libero_90", 74))
# Of the scene that fares worst.
TARGETS_DB = {"agentview_without_mirror": 29.0, "robot0_eye_in_hand": 30.0}

Images = npt.NDArray[np.uint8]


def psnr(images: Images, reference: Images) -> float:
    """Return the peak signal-to-noise ratio (dB) of 8-bit images."""
    error = np.mean((images.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def draw_episode(
    suite: str, task_id: int, renderers: dict[str, Any], num_moments: int
) -> tuple[dict[str, Images], dict[str, float]]:
    """Return for each renderer the images [num_moments, K, H, W, 3] and the fastest time (ms) of a moment."""
    task = get_task(suite, task_id)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 0, np.random.RandomState(0))
    rng = np.random.default_rng(0)
    images: dict[str, list[Images]] = {name: [] for name in renderers}
    times = dict.fromkeys(renderers, np.inf)
    for moment in range(num_moments):
        if moment:
            action = rng.uniform(-1, 1, 7)
            for _ in range(8):
                simulation.step(action)
        for name, renderer in renderers.items():
            renderer.render([simulation])
            start = time.perf_counter()
            images[name].append(renderer.render([simulation])[0])
            times[name] = min(times[name], 1e3 * (time.perf_counter() - start))
    return {name: np.stack(values) for name, values in images.items()}, times


def record(gl: str, path: Path) -> None:
    """Store classic images [K, 128, 128, 3] of two scenes with `RenderState`'s arrays."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    renderer = GlRenderer(gl, CAMERAS, 128)
    for suite, task_id in TASKS[:2]:
        task = get_task(suite, task_id)
        simulation = Simulation(load_scene(task))
        simulation.reset(task, 0, np.random.RandomState(0))
        state = simulation.render_state()
        arrays[f"{suite}/qpos"] = state.qpos
        arrays[f"{suite}/fixture_poses"] = state.fixture_poses
        arrays[f"{suite}/indicator_alpha"] = state.indicator_alpha
        arrays[f"{suite}/images"] = renderer.render([simulation])[0]
    np.savez_compressed(path, allow_pickle=False, **arrays)


def contact_sheet(images: dict[str, Images]) -> Images:
    """Return one row per camera of the last moment: classic, ray caster, four times their difference."""
    rows = []
    for camera in range(len(CAMERAS)):
        classic, ours = (images[name][-1, camera] for name in ("classic", "warp"))
        difference = np.clip(4 * np.abs(classic.astype(np.int32) - ours), 0, 255).astype(np.uint8)
        rows.append(np.concatenate([classic, ours, difference], axis=1))
    return np.concatenate(rows)


def main() -> dict[str, Any] | None:
    """Compares, prints, leaves the contact sheet; returns the document, None if images were recorded."""
    parser = make_parser(__doc__)
    parser.add_argument("--gl", choices=("egl", "osmesa"), default="osmesa")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--num-moments", type=int, default=4)
    parser.add_argument("--contact-sheet", type=Path, help="PNG to write")
    parser.add_argument("--record", type=Path, help="store reference images here and stop")
    args = parser.parse_args()
    if args.record is not None:
        record(args.gl, args.record)
        return None
    renderers: dict[str, Any] = {
        "classic": GlRenderer(args.gl, CAMERAS, args.image_size),
        "classic_flat": GlRenderer(args.gl, CAMERAS, args.image_size, reflections=False),
        "warp": WarpRenderer(CAMERAS, args.image_size),
        "warp_flat": WarpRenderer(CAMERAS, args.image_size, reflections=False),
        "warp_aliased": WarpRenderer(CAMERAS, args.image_size, antialiasing=False),
    }

    decibels = dict.fromkeys(("mirror dB", "without", "aliased dB"), ">11.1f")
    milliseconds = dict.fromkeys(("GL ms", "warp ms", "aliased ms"), ">11.0f")
    table = Table({"scene": "<20", "view": "<20"} | decibels | milliseconds)
    results: list[dict[str, Any]] = []
    sheets: list[Images] = []
    for suite, task_id in TASKS:
        images, times = draw_episode(suite, task_id, renderers, args.num_moments)
        sheets.append(contact_sheet(images))
        for camera, name in enumerate(CAMERAS):
            measured = {
                "psnr_db": psnr(images["warp"][:, camera], images["classic"][:, camera]),
                "psnr_without_mirror_db": psnr(images["warp_flat"][:, camera], images["classic_flat"][:, camera]),
                "psnr_aliased_db": psnr(images["warp_aliased"][:, camera], images["classic"][:, camera]),
                "classic_ms": times["classic"],
                "warp_ms": times["warp"],
                "warp_aliased_ms": times["warp_aliased"],
            }
            table.add(f"{suite}/{task_id}", name, *measured.values())
            results.append({"suite": suite, "task_id": task_id, "camera": name} | measured)
    if args.contact_sheet is not None:
        Image.fromarray(np.concatenate(sheets)).save(args.contact_sheet)
        print(f"contact sheet (classic, ray caster, 4 x difference): {args.contact_sheet}")

    values = {
        "agentview_without_mirror": min(r["psnr_without_mirror_db"] for r in results if r["camera"] == CAMERAS[0]),
        "robot0_eye_in_hand": min(r["psnr_db"] for r in results if r["camera"] == CAMERAS[1]),
    }
    settings = {"gl": args.gl, "image_size": args.image_size, "num_moments": args.num_moments}
    return publish(
        "render_fidelity",
        results,
        settings=settings | {"warp_device": renderers["warp"].device},
        targets=judge(values, at_least=TARGETS_DB),
        output=args.output,
    )


if __name__ == "__main__":
    main()
