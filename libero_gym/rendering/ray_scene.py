"""What the ray caster needs of a MuJoCo model: triangles in body frames, surfaces, lights, cameras, textures.

MuJoCo's classic renderer draws with fixed-function OpenGL: geometric primitives as coarse grids, lighting at
vertices, textures with mipmaps. All of that is made explicit here once per scene, as plain arrays, so that the
ray caster (`libero_gym.rendering.raycast`) has a single kind of geometry and reproduces the same shading.

Shape legend: B bodies of the model, P parts (bodies that move as one, with something to see), F triangles,
S surfaces (one per drawn geom), T textures, K cameras, L lights (the headlight is the last).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from libero_gym.rendering.cameras import Camera, CameraPlace, place_camera
from libero_gym.rendering.textures import TextureColorspace, decoded_textures

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int32]

# Geoms that LIBERO shows: robosuite keeps collision geoms in group 0 and visual ones in group 1.
VISIBLE_GROUPS = (1, 2)
# What the classic renderer assumes where a geom has no material (mjv_initGeom, mjvGeom's defaults).
DEFAULT_SPECULAR = 0.5
DEFAULT_SHININESS = 0.5
# A fixed-function shininess exponent is mat_shininess times this (GL_SHININESS's upper limit).
SHININESS_SCALE = 128.0
# Surfaces less opaque than this are left out: rays do not blend.
MIN_ALPHA = 0.5
MAX_MIP_LEVELS = 14
# Images of 256 pixels never look at finer levels than those of textures of this size, texels.
MAX_TEXTURE_SIZE = 1024

TEXTURE_2D, TEXTURE_CUBE = 0, 1

# Geoms that the classic renderer builds of the unit sphere.
_ROUND_TYPES = (
    int(mujoco.mjtGeom.mjGEOM_SPHERE),
    int(mujoco.mjtGeom.mjGEOM_CAPSULE),
    int(mujoco.mjtGeom.mjGEOM_ELLIPSOID),
)
_MIRROR_TYPES = (int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_BOX))


@dataclass(frozen=True, kw_only=True, eq=False)
class RayScene:
    """Arrays that describe everything visible of one model.

    Attributes:
        part_body: [P] body in whose frame the part is: the first of those that move as one.
        part_rests: uint8 [K, P], 1 if the part never moves as the camera sees it, and is always there.
        part_site: [P] site id if the part is a site that is only drawn while lit (a stove's burner), else -1.
        part_sphere: [P, 4] bounding sphere, centre in the body's frame and radius (m).
        part_half: [P, 3] half sides of its bounding box around the same centre, in the body's frame (m).
        part_first_face: [P + 1] range of faces of each part.
        points: [3 F, 3] triangle corners in the body's frame (m).
        normals: [3 F, 3] corner normals in the body's frame.
        texture_coords: [3 F, 3] corner texture coordinates: u, v, 0, or a cube map direction.
        face_surface: [F] surface of each triangle.
        surface_color: [S, 3] diffuse and ambient colour.
        surface_material: [S, 4] emission, specular, shininess exponent, reflectance (0 where not a mirror).
        surface_texture: [S] texture id, -1 without.
        surface_body: [S] body that carries it.
        texture_kind: [T] TEXTURE_2D or TEXTURE_CUBE.
        texture_faces: [T] 6 for a cube map with six images below each other, else 1.
        texture_size: [T, 2] width and height (texels) of one face at level 0.
        texture_levels: [T] number of mipmap levels.
        texture_offset: [T, MAX_MIP_LEVELS] first texel of each level.
        texels: [sum] uint32, 0x00BBGGRR.
        skybox: texture id of the skybox, -1 without.
        camera_body: [K] body that carries the camera.
        camera_pos: [K, 3] in the body's frame (m).
        camera_mat: [K, 3, 3] in the body's frame.
        camera_tan: [K] tangent of half the vertical field of view.
        camera_is_still: uint8 [K], 1 if neither the camera nor any light ever moves.
        rest_pos: float32 [B, 3] and
        rest_mat: float32 [B, 3, 3], poses of the bodies in which to look for what rests.
        znear: distance of the near clipping plane (m).
        zfar: distance of the far one (m), the depth where nothing is.
        light_body: [L] body that carries the light, -1 for the headlight.
        light_pos: [L, 3] in the body's frame (m).
        light_dir: [L, 3] in the body's frame, unit.
        light_kind: [L] 0 spot, 1 directional.
        light_params: [L, 5] cosine of the cutoff, exponent, constant, linear, quadratic attenuation.
        light_ambient: [L, 3].
        light_diffuse: [L, 3].
        light_specular: [L, 3].
    """

    part_body: IntArray
    part_rests: NDArray[np.uint8]
    part_site: IntArray
    part_sphere: FloatArray
    part_half: FloatArray
    part_first_face: IntArray
    points: FloatArray
    normals: FloatArray
    texture_coords: FloatArray
    face_surface: IntArray
    surface_color: FloatArray
    surface_material: FloatArray
    surface_texture: IntArray
    surface_body: IntArray
    texture_kind: IntArray
    texture_faces: IntArray
    texture_size: IntArray
    texture_levels: IntArray
    texture_offset: IntArray
    texels: NDArray[np.uint32]
    skybox: int
    camera_body: IntArray
    camera_pos: FloatArray
    camera_mat: FloatArray
    camera_tan: FloatArray
    camera_is_still: NDArray[np.uint8]
    rest_pos: FloatArray
    rest_mat: FloatArray
    znear: float
    zfar: float
    light_body: IntArray
    light_pos: FloatArray
    light_dir: FloatArray
    light_kind: IntArray
    light_params: FloatArray
    light_ambient: FloatArray
    light_diffuse: FloatArray
    light_specular: FloatArray


@dataclass(frozen=True)
class _Triangles:
    """Corners [3 F, 3] of one geom in its own frame, with normals and texture coordinates."""

    points: FloatArray
    normals: FloatArray
    texture_coords: FloatArray


def build_ray_scene(
    model: mujoco.MjModel,
    camera_names: tuple[str | Camera, ...],
    *,
    max_texture_size: int = MAX_TEXTURE_SIZE,
    moved_bodies: Collection[int] = (),
    lit_sites: tuple[int, ...] = (),
    reflections: bool = True,
    texture_colorspace: TextureColorspace = "linear",
) -> RayScene:
    """Extracts what is visible of a model.

    Args:
        model: A model with visual geoms and textures.
        camera_names: Cameras to render, in order.
        max_texture_size: Larger textures are halved until they fit.
        moved_bodies: Bodies without joints whose places are changed in the model all the same.
        lit_sites: Sites that are drawn while they are lit.
        reflections: Whether the first reflective plane or box mirrors.
        texture_colorspace: Whether textures tagged as sRGB are decoded, see `libero_gym.rendering.textures`.

    Returns:
        The arrays of the scene.

    Raises:
        ValueError: A camera is not in the model, a camera or light tracks a body, or a visible geom is of a type
            that LIBERO does not have.
    """
    cameras = [place_camera(model, camera) for camera in camera_names]
    carriers = _carriers(model, moved_bodies)
    rest_pos, rest_mat = _rest(model)
    triangles_of_part: dict[tuple[int, int], list[tuple[_Triangles, int]]] = {}
    colors: list[FloatArray] = []
    materials: list[list[float]] = []
    textures: list[int] = []
    surface_body: list[int] = []
    mirror_found = not reflections
    for geom in range(model.ngeom):
        rgba = _geom_rgba(model, geom)
        if model.geom_group[geom] not in VISIBLE_GROUPS or rgba[3] < MIN_ALPHA:
            continue
        material = int(model.geom_matid[geom])
        emission, specular, shininess, reflectance = 0.0, DEFAULT_SPECULAR, DEFAULT_SHININESS, 0.0
        texture = -1
        if material >= 0:
            emission = float(model.mat_emission[material])
            specular = float(model.mat_specular[material])
            shininess = float(model.mat_shininess[material])
            texture = int(model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB])
            # The classic renderer mirrors in the first reflective plane or box only.
            is_flat = int(model.geom_type[geom]) in _MIRROR_TYPES
            if is_flat and not mirror_found and model.mat_reflectance[material] > 0:
                reflectance, mirror_found = float(model.mat_reflectance[material]), True
        body = int(model.geom_bodyid[geom])
        carrier = int(carriers[body])
        triangles = _place(_geom_triangles(model, geom, texture), model.geom_pos[geom], model.geom_quat[geom])
        # Only the upper side of a box mirrors, so it is a surface of its own.
        pieces = [(triangles, reflectance)]
        if reflectance > 0:
            up = _rotation(model.geom_quat[geom])[:, 2]
            pieces = [(_select(triangles, up, True), reflectance), (_select(triangles, up, False), 0.0)]
        for piece, piece_reflectance in pieces:
            if carrier != body:
                piece = _carry(piece, rest_pos[[body, carrier]], rest_mat[[body, carrier]])
            triangles_of_part.setdefault((carrier, -1), []).append((piece, len(colors)))
            colors.append(rgba[:3])
            materials.append([emission, specular, shininess * SHININESS_SCALE, piece_reflectance])
            textures.append(texture)
            surface_body.append(body)
    for site in lit_sites:
        if model.site_type[site] != mujoco.mjtGeom.mjGEOM_CYLINDER:
            raise ValueError(f"site {site} is of type {model.site_type[site]}; only lit cylinders are known")
        radius, half_height = (float(value) for value in model.site_size[site][:2])
        disc = _cylinder(model, np.array([radius, radius, half_height], dtype=np.float32))
        triangles = _place(disc, model.site_pos[site], model.site_quat[site])
        triangles_of_part[(int(model.site_bodyid[site]), int(site))] = [(triangles, len(colors))]
        colors.append(model.site_rgba[site][:3].astype(np.float32))
        materials.append([0.0, DEFAULT_SPECULAR, DEFAULT_SHININESS * SHININESS_SCALE, 0.0])
        textures.append(-1)
        surface_body.append(int(model.site_bodyid[site]))

    # Small parts first: what they hide of the walls and the table is then never looked at.
    parts = sorted(triangles_of_part, key=lambda part: _extent(triangles_of_part[part]))
    points, normals, coords, surfaces, spheres, halves, first_face = [], [], [], [], [], [], [0]
    for part in parts:
        entries = triangles_of_part[part]
        part_points = np.concatenate([triangles.points for triangles, _ in entries])
        points.append(part_points)
        normals.append(np.concatenate([triangles.normals for triangles, _ in entries]))
        coords.append(np.concatenate([triangles.texture_coords for triangles, _ in entries]))
        surfaces.append(np.concatenate([np.full(len(t.points) // 3, index, np.int32) for t, index in entries]))
        low, high = part_points.min(axis=0), part_points.max(axis=0)
        centre = 0.5 * (low + high)
        radius = np.linalg.norm(part_points - centre, axis=1).max()
        halves.append(0.5 * (high - low))
        spheres.append(np.append(centre, radius * 1.0001))
        first_face.append(first_face[-1] + len(part_points) // 3)
    part_body = np.array([body for body, _ in parts], dtype=np.int32)
    camera_carriers = carriers[[camera.body_id for camera in cameras]]
    lights = _lights(model)
    lights_rest = not carriers[lights["light_body"][lights["light_body"] >= 0]].any()
    is_site = np.array([site >= 0 for _, site in parts], np.bool_)
    return RayScene(
        part_body=part_body,
        part_rests=((part_body == camera_carriers[:, None]) & ~is_site).astype(np.uint8),
        camera_is_still=((camera_carriers == 0) & lights_rest).astype(np.uint8),
        rest_pos=rest_pos.astype(np.float32),
        rest_mat=rest_mat.astype(np.float32),
        part_site=np.array([site for _, site in parts], dtype=np.int32),
        part_sphere=np.array(spheres, dtype=np.float32),
        part_half=np.array(halves, dtype=np.float32),
        part_first_face=np.array(first_face, dtype=np.int32),
        points=np.concatenate(points).astype(np.float32),
        normals=np.concatenate(normals).astype(np.float32),
        texture_coords=np.concatenate(coords).astype(np.float32),
        face_surface=np.concatenate(surfaces),
        surface_color=np.array(colors, dtype=np.float32),
        surface_material=np.array(materials, dtype=np.float32),
        surface_texture=np.array(textures, dtype=np.int32),
        surface_body=np.array(surface_body, dtype=np.int32),
        **_textures(model, max_texture_size, set(textures), decoded_textures(model, texture_colorspace)),
        **_cameras(model, cameras),
        **lights,
    )


def _carriers(model: mujoco.MjModel, moved_bodies: Collection[int]) -> IntArray:
    """Returns for each body [B] the first of those that it moves as one with, 0 where nothing ever moves."""
    carriers = np.arange(model.nbody, dtype=np.int32)
    for body in range(1, model.nbody):
        moves = model.body_jntnum[body] > 0 or model.body_mocapid[body] >= 0 or body in moved_bodies
        if not moves:
            carriers[body] = carriers[model.body_parentid[body]]
    return carriers


def _rest(model: mujoco.MjModel) -> tuple[FloatArray, FloatArray]:
    """Returns positions [B, 3] and rotations [B, 3, 3] of the bodies as the model was compiled."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    return data.xpos.copy(), data.xmat.reshape(-1, 3, 3).copy()


def _carry(triangles: _Triangles, pos: FloatArray, mat: FloatArray) -> _Triangles:
    """Returns triangles of the first of two bodies, in the frame of the second."""
    rotation = mat[1].T @ mat[0]
    return _Triangles(
        points=(triangles.points @ rotation.T + mat[1].T @ (pos[0] - pos[1])).astype(np.float32),
        normals=(triangles.normals @ rotation.T).astype(np.float32),
        texture_coords=triangles.texture_coords,
    )


def _extent(entries: list[tuple[_Triangles, int]]) -> float:
    low = np.min([triangles.points.min(axis=0) for triangles, _ in entries], axis=0)
    high = np.max([triangles.points.max(axis=0) for triangles, _ in entries], axis=0)
    return float(np.linalg.norm(high - low))


def _geom_rgba(model: mujoco.MjModel, geom: int) -> FloatArray:
    """The geom's colour; a material's counts where the geom keeps the default grey (as in mjv_updateScene)."""
    rgba, material = model.geom_rgba[geom], model.geom_matid[geom]
    if material >= 0 and np.array_equal(rgba, np.array([0.5, 0.5, 0.5, 1.0], dtype=np.float32)):
        return model.mat_rgba[material]
    return rgba


def _place(triangles: _Triangles, pos: FloatArray, quat: FloatArray) -> _Triangles:
    rotation = _rotation(quat)
    return _Triangles(
        points=(triangles.points @ rotation.T + pos).astype(np.float32),
        normals=(triangles.normals @ rotation.T).astype(np.float32),
        texture_coords=triangles.texture_coords,
    )


def _select(triangles: _Triangles, direction: FloatArray, is_facing: bool) -> _Triangles:
    """The triangles whose first corner's normal points along `direction`, or the others."""
    mask = np.repeat((triangles.normals[::3] @ direction > 0.99) == is_facing, 3)
    return _Triangles(triangles.points[mask], triangles.normals[mask], triangles.texture_coords[mask])


def _geom_triangles(model: mujoco.MjModel, geom: int, texture: int) -> _Triangles:
    """The triangles of a geom in its own frame, as the classic renderer draws them."""
    kind, size = model.geom_type[geom], model.geom_size[geom].astype(np.float32)
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        triangles = _mesh(model, int(model.geom_dataid[geom]))
    elif kind == mujoco.mjtGeom.mjGEOM_BOX:
        triangles = _box(model, size)
    elif kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        triangles = _cylinder(model, np.array([size[0], size[0], size[1]], dtype=np.float32))
    elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        triangles = _capsule(model, radius=float(size[0]), half_length=float(size[1]))
    elif kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        triangles = _ellipsoid(model, np.repeat(size[:1], 3))
    elif kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        triangles = _ellipsoid(model, size)
    elif kind == mujoco.mjtGeom.mjGEOM_PLANE:
        triangles = _plane(size)
    else:
        raise ValueError(f"geom {geom} has type {mujoco.mjtGeom(kind).name}, which the ray caster cannot draw")
    if texture < 0:
        return triangles
    material = int(model.geom_matid[geom])
    repeat = model.mat_texrepeat[material].astype(np.float32)
    is_uniform = bool(model.mat_texuniform[material])
    is_mesh = kind == mujoco.mjtGeom.mjGEOM_MESH
    if int(kind) in _ROUND_TYPES:
        if model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D or is_uniform:
            name = mujoco.mjtGeom(kind).name.removeprefix("mjGEOM_").lower()
            raise ValueError(
                f"geom {geom} is of type {name} and has a flat or uniform texture, which the ray caster cannot draw; "
                "give its material a cube map without texuniform, or none"
            )
        coords = triangles.texture_coords
    elif model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D:
        # A cube map is looked up by the position on the unit shape.
        scale = np.ones(3, np.float32) if is_uniform or is_mesh else np.where(size > 0, size, 1)
        if kind == mujoco.mjtGeom.mjGEOM_CYLINDER and not is_uniform:
            scale = np.array([size[0], size[0], size[1]], dtype=np.float32)
        coords = triangles.points / scale
    elif is_mesh and model.mesh_texcoordadr[model.geom_dataid[geom]] < 0:
        factor = repeat / np.where(size[:2] > 0, size[:2], 1) * np.where(is_uniform & (size[:2] > 0), size[:2], 1)
        coords = np.zeros_like(triangles.points)
        coords[:, 0] = 0.5 * factor[0] * triangles.points[:, 0] - 0.5
        coords[:, 1] = -0.5 * factor[1] * triangles.points[:, 1] - 0.5
    else:
        factor = repeat.copy()
        if is_uniform and not is_mesh:
            factor *= size[:2] if kind != mujoco.mjtGeom.mjGEOM_CYLINDER else size[0]
        coords = triangles.texture_coords.copy()
        coords[:, :2] *= factor
    return _Triangles(triangles.points, triangles.normals, coords.astype(np.float32))


def _mesh(model: mujoco.MjModel, mesh: int) -> _Triangles:
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    points = model.mesh_vert[model.mesh_vertadr[mesh] + model.mesh_face[faces]]  # [F, 3, 3]
    normals = model.mesh_normal[model.mesh_normaladr[mesh] + model.mesh_facenormal[faces]]  # [F, 3, 3]
    coords = np.zeros_like(points)
    # Stored normals more than 37 degrees off the face's are not used (mjr_uploadMesh).
    flat = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-20)
    is_off = np.einsum("fcx,fx->fc", normals, flat) < 0.8
    if model.mesh_texcoordadr[mesh] >= 0:
        index = model.mesh_texcoordadr[mesh] + model.mesh_facetexcoord[faces]
        coords[..., :2] = model.mesh_texcoord[index]
    normals = np.where(is_off[..., None], flat[:, None], normals)
    return _Triangles(points.reshape(-1, 3), normals.reshape(-1, 3), coords.reshape(-1, 3))


def _grid(corners: FloatArray, normals: FloatArray, coords: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Splits a grid of quads [rows + 1, columns + 1, 3] into triangles [6 rows columns, 3]."""

    def split(values: FloatArray) -> FloatArray:
        a, b, c, d = values[:-1, :-1], values[:-1, 1:], values[1:, 1:], values[1:, :-1]
        return np.stack([a, b, c, a, c, d], axis=2).reshape(-1, 3)

    return split(corners), split(normals), split(coords)


def _merge(patches: list[tuple[FloatArray, FloatArray, FloatArray]]) -> _Triangles:
    points, normals, coords = (np.concatenate(arrays).astype(np.float32) for arrays in zip(*patches, strict=True))
    return _Triangles(points, normals, coords)


def _box(model: mujoco.MjModel, size: FloatArray) -> _Triangles:
    steps = np.linspace(-1.0, 1.0, model.vis.quality.numquads + 1)
    second, first = np.meshgrid(steps, steps, indexing="ij")
    coords = np.stack([0.5 * (first + 1), 1 - 0.5 * (second + 1), np.zeros_like(first)], axis=-1)
    patches = []
    for axis in range(3):
        u, v = [i for i in range(3) if i != axis]
        for sign in (-1.0, 1.0):
            corners = np.zeros((*first.shape, 3))
            corners[..., u], corners[..., v], corners[..., axis] = first, second, sign
            normals = np.zeros_like(corners)
            normals[..., axis] = sign
            # (u, v, axis) is right-handed for axes 0 and 2; triangles face outwards.
            is_outward = (sign > 0) == (axis != 1)
            patch = (corners * size, normals, coords)
            patches.append(_grid(*patch) if is_outward else _grid(*(np.swapaxes(array, 0, 1) for array in patch)))
    return _merge(patches)


def _angles(model: mujoco.MjModel) -> FloatArray:
    """Angles at which MuJoCo cuts what is round, from 0 to 2 pi."""
    slices = model.vis.quality.numslices
    return 2 * np.pi * np.arange(slices + 1) / slices


def _tube(model: mujoco.MjModel) -> tuple[FloatArray, FloatArray]:
    """Points and normals [stacks + 1, slices + 1, 3] of a tube of radius 1 from z = -1 to 1."""
    z, angle = np.meshgrid(np.linspace(-1.0, 1.0, model.vis.quality.numstacks + 1), _angles(model), indexing="ij")
    points = np.stack([np.cos(angle), np.sin(angle), z], axis=-1)
    return points, points * [1.0, 1.0, 0.0]


def _cylinder(model: mujoco.MjModel, size: FloatArray) -> _Triangles:
    stacks, angles = model.vis.quality.numstacks, _angles(model)
    side, side_normals = _tube(model)
    around = np.broadcast_to(angles / (2 * np.pi), side.shape[:2])
    side_coords = np.stack([around, 0.5 * (1 - side[..., 2]), np.zeros_like(around)], axis=-1)
    patches = [_grid(side * size, side_normals, side_coords)]
    radii, angle = np.meshgrid(np.linspace(0.0, 1.0, stacks // 2 + 1), angles, indexing="ij")
    for sign in (-1.0, 1.0):
        cap = np.stack([radii * np.cos(angle), radii * np.sin(angle), np.full_like(radii, sign)], axis=-1)
        cap_normals = np.zeros_like(cap)
        cap_normals[..., 2] = sign
        cap_coords = np.stack([0.5 + 0.5 * cap[..., 0], 0.5 + 0.5 * cap[..., 1], np.zeros_like(radii)], axis=-1)
        patch = (cap * size, cap_normals, cap_coords)
        patches.append(_grid(*patch) if sign < 0 else _grid(*(np.swapaxes(array, 0, 1) for array in patch)))
    return _merge(patches)


def _capsule(model: mujoco.MjModel, *, radius: float, half_length: float) -> _Triangles:
    """A tube and two half spheres; their texture coordinates are points of the unit tube and the unit sphere."""
    unit, normals = _tube(model)
    patches = [_grid(unit * [radius, radius, half_length], normals, unit)]
    for sign in (1, -1):
        unit = _half_sphere(model, sign)
        patches.append(_grid(unit * radius + [0.0, 0.0, sign * half_length], unit, unit))
    return _merge(patches)


def _ellipsoid(model: mujoco.MjModel, radii: FloatArray) -> _Triangles:
    """A sphere of radius 1, scaled; its texture coordinates are points of the former."""
    patches: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    for sign in (1, -1):
        unit = _half_sphere(model, sign)
        normals = unit / radii
        patches.append(_grid(unit * radii, normals / np.linalg.norm(normals, axis=-1, keepdims=True), unit))
    return _merge(patches)


def _half_sphere(model: mujoco.MjModel, sign: int) -> FloatArray:
    """Points [stacks / 2 + 1, slices + 1, 3] of the half of the unit sphere above (1) or below (-1) the equator."""
    quarter = 0.5 * np.pi
    latitudes = np.linspace(min(0, sign) * quarter, max(0, sign) * quarter, model.vis.quality.numstacks // 2 + 1)
    latitude, angle = np.meshgrid(latitudes, _angles(model), indexing="ij")
    return np.stack([np.cos(latitude) * np.cos(angle), np.cos(latitude) * np.sin(angle), np.sin(latitude)], axis=-1)


def _plane(size: FloatArray) -> _Triangles:
    if size[0] <= 0 or size[1] <= 0:
        raise ValueError(f"infinite planes (size {size.tolist()}) are not drawn; LIBERO's floors are finite")
    lines = []
    for extent in size[:2]:
        # The classic renderer's grid: squares of twice size[2], an even number, padding at both ends.
        spacing = max(float(size[2]), float(extent) / 198)
        count = int(extent // spacing) // 2 * 2
        padding = float(extent) - count * spacing
        inner = -float(extent) + padding + 2 * spacing * np.arange(count + 1)
        lines.append(np.concatenate([[-extent], inner, [extent]]))
    y, x = np.meshgrid(lines[1], lines[0], indexing="ij")
    corners = np.stack([x, y, np.zeros_like(x)], axis=-1)
    normals = np.zeros_like(corners)
    normals[..., 2] = 1.0
    coords = np.stack([0.5 * (x / size[0] + 1), 0.5 * (1 - y / size[1]), np.zeros_like(x)], axis=-1)
    return _merge([_grid(corners, normals, coords)])


def _textures(model: mujoco.MjModel, max_size: int, used: set[int], is_decoded: NDArray[np.bool_]) -> dict[str, Any]:
    sky = np.nonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)[0]
    skybox = int(sky[0]) if len(sky) else -1
    kinds, faces, sizes, levels = [], [], [], []
    offsets = np.zeros((max(model.ntex, 1), MAX_MIP_LEVELS), dtype=np.int32)
    chunks: list[NDArray[np.uint32]] = [np.zeros(1, np.uint32)]
    end = 1
    for texture in range(model.ntex):
        is_2d = model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D
        is_seen = texture in used or texture == skybox
        pixels = small_texture(model, texture, max_size) if is_seen else np.zeros((3, 1, 1, 1), np.uint8)
        values = pixels.astype(np.float32)
        if is_decoded[texture]:
            values = _srgb_to_linear(values / 255) * 255
        kinds.append(TEXTURE_2D if is_2d else TEXTURE_CUBE)
        faces.append(pixels.shape[1])
        sizes.append(values.shape[3:1:-1])
        num_levels = 0
        for level in range(MAX_MIP_LEVELS):
            offsets[texture, level] = end
            num_levels += 1
            chunk = _pack(values)
            chunks.append(chunk)
            end += len(chunk)
            if max(values.shape[2:]) == 1:
                break
            values = _halve(values)
        levels.append(num_levels)
    return {
        "texture_kind": np.array(kinds, dtype=np.int32),
        "texture_faces": np.array(faces, dtype=np.int32),
        "texture_size": np.array(sizes, dtype=np.int32).reshape(-1, 2),
        "texture_levels": np.array(levels, dtype=np.int32),
        "texture_offset": offsets,
        "texels": np.concatenate(chunks),
        "skybox": skybox,
    }


def small_texture(model: mujoco.MjModel, texture: int, max_size: int) -> NDArray[np.uint8]:
    """Returns a texture of a compiled model, [3, faces, height, width], halved until a face fits `max_size`, texels."""
    height, width, channels = (int(array[texture]) for array in (model.tex_height, model.tex_width, model.tex_nchannel))
    first = int(model.tex_adr[texture])
    data = model.tex_data[first : first + height * width * channels].reshape(height, width, channels)
    is_2d = model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D
    count = 6 if not is_2d and height == 6 * width else 1
    faces = data[..., :3].reshape(count, height // count, width, 3)
    pixels = np.ascontiguousarray(np.moveaxis(faces, -1, 0))
    while max(pixels.shape[2:]) > max_size:
        pixels = _halve_bytes(pixels)
    return pixels


def _halve(pixels: NDArray[np.uint8] | FloatArray) -> FloatArray:
    """Halves [3, faces, height, width] as Mesa's glGenerateMipmap does: bilinear samples at the new texels' centres.

    An even size is thereby averaged in pairs; of an odd one no row is dropped.
    """
    values: Any = pixels.astype(np.float32)
    for axis in (2, 3):
        size = values.shape[axis]
        if size == 1:
            continue
        if size % 2 == 0:
            pairs = values.reshape(*values.shape[:axis], size // 2, 2, *values.shape[axis + 1 :])
            rest = (slice(None),) * (3 - axis)
            first, second, weight = pairs[..., 0, *rest], pairs[..., 1, *rest], np.float32(0.5)
        else:
            centres = (np.arange(size // 2) + 0.5) * size / (size // 2) - 0.5
            below = centres.astype(np.int64)
            first, second = values.take(below, axis), values.take(below + 1, axis)
            weight = np.expand_dims((centres - below).astype(np.float32), tuple(range(1, 4 - axis)))
        values = second - first
        values *= weight
        values += first
    return values


def _halve_bytes(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns `_halve(pixels)` rounded to the nearest, to even if two are; most textures are of 4096 pixels."""
    if pixels.shape[2] % 2 or pixels.shape[3] % 2:
        return np.rint(_halve(pixels)).astype(np.uint8)
    rows = np.add(pixels[:, :, 0::2], pixels[:, :, 1::2], dtype=np.uint16)
    fours = rows[..., 0::2] + rows[..., 1::2]
    return ((fours + 1 + (fours >> 2 & 1)) >> 2).astype(np.uint8)


def _srgb_to_linear(values: FloatArray) -> FloatArray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _pack(values: FloatArray) -> NDArray[np.uint32]:
    red, green, blue = np.clip(np.rint(values), 0, 255).astype(np.uint32).reshape(3, -1)
    return red | green << np.uint32(8) | blue << np.uint32(16)


def _cameras(model: mujoco.MjModel, cameras: list[CameraPlace]) -> dict[str, Any]:
    return {
        "camera_body": np.array([camera.body_id for camera in cameras], dtype=np.int32),
        "camera_pos": np.array([camera.pos for camera in cameras], dtype=np.float32),
        "camera_mat": np.array([_rotation(camera.quat_wxyz) for camera in cameras], dtype=np.float32),
        "camera_tan": np.tan(0.5 * np.deg2rad([camera.fovy_deg for camera in cameras])).astype(np.float32),
        "znear": float(model.vis.map.znear * model.stat.extent),
        "zfar": float(model.vis.map.zfar * model.stat.extent),
    }


def _rotation(quat: FloatArray) -> FloatArray:
    mat = np.zeros(9)
    mujoco.mju_quat2Mat(mat, np.asarray(quat, dtype=np.float64))
    return mat.reshape(3, 3).astype(np.float32)


def _lights(model: mujoco.MjModel) -> dict[str, Any]:
    active = np.nonzero(model.light_active)[0]
    if hasattr(model, "light_type"):
        is_directional = model.light_type == int(mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
        is_known = is_directional | (model.light_type == int(mujoco.mjtLightType.mjLIGHT_SPOT))
    else:  # before MuJoCo 3.3.3 every light is one of the two
        is_directional = np.asarray(model.light_directional, np.bool_)
        is_known = np.ones_like(is_directional)
    for light in active:
        if model.light_mode[light] != mujoco.mjtCamLight.mjCAMLIGHT_FIXED or not is_known[light]:
            raise ValueError(f"light {light} is not a spot or directional light fixed to a body")
        if model.light_castshadow[light]:
            raise ValueError(f"light {light} casts shadows, which the ray caster does not draw")
    headlight = model.vis.headlight
    head = slice(0, 1 if headlight.active else 0)

    def stack(values: FloatArray, of_headlight: FloatArray | list[float] | float) -> FloatArray:
        extra = np.asarray([of_headlight], dtype=np.float32)[head]
        return np.concatenate([values.astype(np.float32), extra.reshape(-1, *values.shape[1:])])

    cutoff = np.cos(np.deg2rad(model.light_cutoff[active]))
    exponent = model.light_exponent[active]
    params = np.column_stack([cutoff, exponent, model.light_attenuation[active]])
    return {
        "light_body": stack(model.light_bodyid[active], -1.0).astype(np.int32),
        "light_pos": stack(model.light_pos[active], [0.0, 0.0, 0.0]),
        "light_dir": stack(model.light_dir[active], [0.0, 0.0, -1.0]),
        "light_kind": stack(is_directional[active].astype(np.float32), 1.0).astype(np.int32),
        "light_params": stack(params, [-1.0, 0.0, 1.0, 0.0, 0.0]),
        "light_ambient": stack(model.light_ambient[active], headlight.ambient),
        "light_diffuse": stack(model.light_diffuse[active], headlight.diffuse),
        "light_specular": stack(model.light_specular[active], headlight.specular),
    }
