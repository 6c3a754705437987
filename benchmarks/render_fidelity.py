"""How close the ray caster comes to MuJoCo's classic OpenGL renderer, and both to the pictures of public data sets.

    python -m benchmarks.render_fidelity --gl osmesa --contact-sheet sheet.png

One scene of each suite, two cameras, several moments of an episode with random actions; PSNR over the pixels of all
moments, with the mirror that the classic renderer draws and without. Then the state that MuJoCo 3.3.2 has drawn itself
(`tools/record_reference_pictures.py`), as both renderers draw it now. Textures are those of the environments' default,
`--texture-colorspace auto` measures the installed MuJoCo's. Needs OpenGL: OSMesa (Debian: libosmesa6) or EGL. Prints
two tables, then one JSON line.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, tasks_of
from benchmarks.publish import Table, judge, publish
from libero_gym.physics.simulation import Simulation
from libero_gym.rendering.raycast import WarpRenderer
from libero_gym.rendering.renderers import GlRenderer
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

CAMERAS = ("agentview", "robot0_eye_in_hand")
TASKS = (("libero_spatial", 0), ("libero_object", 0), ("libero_goal", 0), ("libero_10", 2), ("libero_90", 74))
# What MuJoCo 3.3.2 draws of these scenes.
REFERENCE = Path(__file__).parents[1] / "tests" / "libero_gym" / "rendering" / "data" / "mujoco_3.3.2.npz"
REFERENCE_SIZE = 128
# Of the scene that fares worst.
TARGETS_DB = {
    "agentview_without_mirror": 29.0,
    "robot0_eye_in_hand": 30.0,
    "opengl_against_mujoco_3_3_2": 40.0,
    "warp_against_mujoco_3_3_2": 30.0,
}

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


def compare_with_reference(renderers: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the PSNR (dB) of each renderer's pictures with the recorded ones, a row per scene and camera."""
    rows: list[dict[str, Any]] = []
    with np.load(path, allow_pickle=False) as archive:
        for suite, task_id in TASKS:
            name = f"{suite}/{task_id}"
            scene = load_scene(get_task(suite, task_id))
            simulation = Simulation(scene)
            simulation.reset(
                get_task(suite, task_id), int(archive[f"{name}/init_state_id"]), np.random.RandomState(0),
                init_states="settled",
            )  # fmt: skip
            if not np.allclose(simulation.render_state().qpos, archive[f"{name}/qpos"], rtol=0, atol=1e-9):
                raise RuntimeError(f"{path}: {name} shows another state than settled state 0; record it anew")
            images = {kind: renderer.render([simulation])[0] for kind, renderer in renderers.items()}
            for camera, camera_name in enumerate(CAMERAS):
                reference = archive[f"{name}/images"][camera]
                values = {f"{kind}_psnr_db": psnr(image[camera], reference) for kind, image in images.items()}
                rows.append({"suite": suite, "task_id": task_id, "camera": camera_name, **values})
    return rows


def contact_sheet(images: dict[str, Images]) -> Images:
    """Return one row per camera of the last moment: classic, ray caster, four times their difference."""
    rows = []
    for camera in range(len(CAMERAS)):
        classic, ours = (images[name][-1, camera] for name in ("classic", "warp"))
        difference = np.clip(4 * np.abs(classic.astype(np.int32) - ours), 0, 255).astype(np.uint8)
        rows.append(np.concatenate([classic, ours, difference], axis=1))
    return np.concatenate(rows)


def main() -> dict[str, Any]:
    """Compares, prints, leaves the contact sheet; returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--gl", choices=("egl", "osmesa"), default="osmesa")
    parser.add_argument("--image-size", type=integer(at_least=1), default=256)
    parser.add_argument("--num-moments", type=integer(at_least=1), default=4)
    parser.add_argument("--contact-sheet", type=Path, help="PNG to write")
    parser.add_argument("--texture-colorspace", choices=("linear", "auto"), default="linear")
    args = parser.parse_args()
    with refusals(parser):
        for suite, task_id in TASKS:
            tasks_of(suite, [task_id])
    if args.contact_sheet is not None and args.contact_sheet.suffix != ".png":
        parser.error(f"--contact-sheet {args.contact_sheet} must end in .png")
    look: Any = {"texture_colorspace": args.texture_colorspace}
    renderers: dict[str, Any] = {
        "classic": GlRenderer(args.gl, CAMERAS, args.image_size, **look),
        "classic_flat": GlRenderer(args.gl, CAMERAS, args.image_size, reflections=False, **look),
        "warp": WarpRenderer(CAMERAS, args.image_size, **look),
        "warp_flat": WarpRenderer(CAMERAS, args.image_size, reflections=False, **look),
        "warp_aliased": WarpRenderer(CAMERAS, args.image_size, antialiasing=False, **look),
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
    small = {
        "classic": GlRenderer(args.gl, CAMERAS, REFERENCE_SIZE, **look),
        "warp": WarpRenderer(CAMERAS, REFERENCE_SIZE, **look),
    }
    reference = compare_with_reference(small, REFERENCE)
    print()
    against = Table({"against MuJoCo 3.3.2": "<24", "view": "<20", "GL dB": ">10.1f", "warp dB": ">10.1f"})
    for row in reference:
        scene = f"{row['suite']}/{row['task_id']}"
        against.add(scene, row["camera"], row["classic_psnr_db"], row["warp_psnr_db"])
    if args.contact_sheet is not None:
        args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(sheets)).save(args.contact_sheet)
        print(f"contact sheet (classic, ray caster, 4 x difference): {args.contact_sheet}")

    values = {
        "agentview_without_mirror": min(r["psnr_without_mirror_db"] for r in results if r["camera"] == CAMERAS[0]),
        "robot0_eye_in_hand": min(r["psnr_db"] for r in results if r["camera"] == CAMERAS[1]),
        "opengl_against_mujoco_3_3_2": min(row["classic_psnr_db"] for row in reference),
        "warp_against_mujoco_3_3_2": min(row["warp_psnr_db"] for row in reference),
    }
    settings = {"gl": args.gl, "image_size": args.image_size, "num_moments": args.num_moments}
    settings |= {"warp_device": renderers["warp"].device, "texture_colorspace": args.texture_colorspace}
    return publish(
        "render_fidelity",
        {"against_opengl": results, "against_mujoco_3_3_2": reference},
        settings=settings,
        targets=judge(values, at_least=TARGETS_DB),
        output=args.output,
    )


if __name__ == "__main__":
    launch_benchmark(main)
