# type: ignore
# ruff: noqa: UP018, RUF046 - Warp takes int(0) for a variable that a loop changes, and 0 for a constant
"""Warp kernels of the ray caster; see `libero_gym.rendering.raycast`.

Warp compiles these functions instead of running them, and annotates them in its own way, so Python's type checkers
have nothing to say about this file. `RayScene` in `libero_gym.rendering.ray_scene` documents the arrays.
"""

import warp as wp

from libero_gym.rendering.ray_scene import TEXTURE_CUBE

# Neighbouring pixels that differ by more than this in a channel, on different surfaces, folds or depths, are an edge.
_EDGE_COLOR = 6.0 / 255.0
_EDGE_DEPTH = 0.02
_EDGE_COSINE = 0.9
# Surface of no pixel at all; that of the sky is -1.
_UNSEEN = -2
# Side in pixels of the tiles for which the parts that can be seen in them are found beforehand.
TILE_SIZE = 8
# Rays that a pixel may need: one through its centre, and four if it is at an edge.
NUM_RAYS = 5
_MAX_BACK_FACES = 8
# Distance of what a ray that meets nothing meets, m.
NOWHERE = 1.0e6
_RAY_STEP = 1.0e-5
# Cosine by which a tile's cone is widened, so that rounding leaves nothing out.
_CULL_SLACK = 1.0e-5

# Each kernel is a module of its own, so that they compile side by side. Four samples of an edge written out as four
# copies of the ray caster would take four times as long.
_OPTIONS = {"enable_backward": False, "fast_math": True, "max_unroll": 3}


@wp.struct
class Scene:
    """Device arrays of a `RayScene`; see there."""

    num_parts: int
    num_lights: int
    num_cameras: int
    part_body: wp.array(dtype=int)
    part_sphere: wp.array(dtype=wp.vec4)
    part_half: wp.array(dtype=wp.vec3)
    part_rests: wp.array2d(dtype=wp.uint8)
    part_mesh: wp.array(dtype=wp.uint64)
    part_first_face: wp.array(dtype=int)
    points: wp.array(dtype=wp.vec3)
    normals: wp.array(dtype=wp.vec3)
    texture_coords: wp.array(dtype=wp.vec3)
    face_surface: wp.array(dtype=int)
    surface_color: wp.array(dtype=wp.vec3)
    surface_material: wp.array(dtype=wp.vec4)
    surface_texture: wp.array(dtype=int)
    surface_body: wp.array(dtype=int)
    texture_kind: wp.array(dtype=int)
    texture_faces: wp.array(dtype=int)
    texture_size: wp.array(dtype=wp.vec2i)
    texture_levels: wp.array(dtype=int)
    texture_offset: wp.array2d(dtype=int)
    texels: wp.array(dtype=wp.uint32)
    skybox: int
    camera_body: wp.array(dtype=int)
    camera_pos: wp.array(dtype=wp.vec3)
    camera_mat: wp.array(dtype=wp.mat33)
    camera_tan: wp.array(dtype=float)
    znear: float
    zfar: float
    light_body: wp.array(dtype=int)
    light_pos: wp.array(dtype=wp.vec3)
    light_dir: wp.array(dtype=wp.vec3)
    light_kind: wp.array(dtype=int)
    light_params: wp.array2d(dtype=float)
    light_ambient: wp.array(dtype=wp.vec3)
    light_diffuse: wp.array(dtype=wp.vec3)
    light_specular: wp.array(dtype=wp.vec3)


@wp.struct
class Worlds:
    """Where everything is in each world, in the world's frame."""

    part_pos: wp.array2d(dtype=wp.vec3)
    part_mat: wp.array2d(dtype=wp.mat33)
    part_sphere: wp.array2d(dtype=wp.vec4)
    camera_pos: wp.array2d(dtype=wp.vec3)
    camera_mat: wp.array2d(dtype=wp.mat33)
    light_pos: wp.array2d(dtype=wp.vec3)
    light_dir: wp.array2d(dtype=wp.vec3)


@wp.struct
class Tiles:
    """Parts that rays through a tile of `TILE_SIZE` x `TILE_SIZE` pixels can meet, of T tiles of all images.

    Tile t = (image * rows + row) * columns + column, image = world * K + camera.
    """

    num_rows: int
    num_columns: int
    num_parts: wp.array(dtype=int)
    parts: wp.array2d(dtype=wp.int16)


@wp.struct
class Resting:
    """What rays meet of the parts that rest as their camera sees them, of all pixels; the same in all worlds.

    Ray r of `NUM_RAYS` of camera k is at k * `NUM_RAYS` + r: ray 0 passes the pixel's centre, the others are those of
    `smooth_edges`.
    """

    faces: wp.array3d(dtype=wp.vec2i)  # part, face
    places: wp.array3d(dtype=wp.vec3)  # distance, u, v
    colors: wp.array3d(dtype=wp.vec3)  # negative where they depend on the world
    tile_ends: wp.array3d(dtype=float)  # [K, rows, columns], distance of the farthest in a tile


@wp.struct
class Hit:
    """Where a ray ends: part (-1 if nowhere), face within it, distance (m), barycentric weights of corners 0, 1."""

    part: int
    face: int
    distance: float
    u: float
    v: float


@wp.struct
class Ray:
    """A ray of a camera; `step_x`, `step_y` lead from `direction` to the next pixels' (for the mipmap level)."""

    eye: wp.vec3
    direction: wp.vec3
    step_x: wp.vec3
    step_y: wp.vec3
    headlight: wp.vec3
    start: float


@wp.struct
class Pixel:
    """A shaded ray: colour in [0, 1], and what tells edges: surface (-1 sky), distance (m), face normal."""

    color: wp.vec3
    surface: int
    distance: float
    normal: wp.vec3


@wp.kernel(module="unique", module_options=_OPTIONS)
def place(
    scene: Scene,
    body_pos: wp.array2d(dtype=wp.vec3),
    body_mat: wp.array2d(dtype=wp.mat33),
    part_visible: wp.array2d(dtype=wp.uint8),
    worlds: Worlds,
):
    """Poses of parts, cameras and lights from those of bodies; dim (N, max(P, K, L))."""
    world, i = wp.tid()
    if i < scene.num_parts:
        body = scene.part_body[i]
        pos = body_pos[world, body]
        mat = body_mat[world, body]
        sphere = scene.part_sphere[i]
        centre = pos + mat @ wp.vec3(sphere[0], sphere[1], sphere[2])
        radius = sphere[3]
        if part_visible[world, i] == wp.uint8(0):
            radius = -1.0
        worlds.part_pos[world, i] = pos
        worlds.part_mat[world, i] = mat
        worlds.part_sphere[world, i] = wp.vec4(centre[0], centre[1], centre[2], radius)
    if i < scene.num_cameras:
        body = scene.camera_body[i]
        worlds.camera_pos[world, i] = body_pos[world, body] + body_mat[world, body] @ scene.camera_pos[i]
        worlds.camera_mat[world, i] = body_mat[world, body] @ scene.camera_mat[i]
    if i < scene.num_lights:
        body = scene.light_body[i]
        if body >= 0:
            worlds.light_pos[world, i] = body_pos[world, body] + body_mat[world, body] @ scene.light_pos[i]
            worlds.light_dir[world, i] = body_mat[world, body] @ scene.light_dir[i]


@wp.func
def _is_behind(normal: wp.vec3, centre: wp.vec3, mat: wp.mat33, half: wp.vec3) -> bool:
    """Whether a box lies behind the plane through the origin that faces along `normal`."""
    along = wp.transpose(mat) @ normal
    reach = wp.abs(along[0]) * half[0] + wp.abs(along[1]) * half[1] + wp.abs(along[2]) * half[2]
    return wp.dot(normal, centre) + reach < -wp.static(_CULL_SLACK)


@wp.kernel(module="unique", module_options=_OPTIONS)
def cull(scene: Scene, worlds: Worlds, resting: Resting, width: int, height: int, tiles: Tiles):
    """Lists the moving parts whose boxes reach into the pyramid of a tile's rays, before what rests; dim T."""
    tile = wp.tid()
    column = tile % tiles.num_columns
    row = tile / tiles.num_columns % tiles.num_rows
    image = tile / (tiles.num_columns * tiles.num_rows)
    world = image / scene.num_cameras
    camera = image % scene.num_cameras
    eye = worlds.camera_pos[world, camera]
    mat = worlds.camera_mat[world, camera]
    pixel_size = 2.0 * scene.camera_tan[camera] / float(height)
    side = float(wp.static(TILE_SIZE))
    left = (float(column) * side - 0.5 * float(width)) * pixel_size
    top = (0.5 * float(height) - float(row) * side) * pixel_size
    extent = side * pixel_size
    # Sides of the pyramid of the tile's rays, in the camera's frame, facing inwards.
    to_right = wp.normalize(wp.vec3(1.0, 0.0, left))
    to_left = wp.normalize(wp.vec3(-1.0, 0.0, -left - extent))
    downwards = wp.normalize(wp.vec3(0.0, -1.0, -top))
    upwards = wp.normalize(wp.vec3(0.0, 1.0, top - extent))
    end = resting.tile_ends[camera, row, column]
    count = int(0)
    for part in range(scene.num_parts):
        sphere = worlds.part_sphere[world, part]
        radius = sphere[3]
        if radius < 0.0 or scene.part_rests[camera, part] != wp.uint8(0):
            continue
        to_centre = wp.transpose(mat) @ (wp.vec3(sphere[0], sphere[1], sphere[2]) - eye)
        distance = wp.length(to_centre)
        if distance - radius > end:
            continue
        turned = wp.transpose(mat) @ worlds.part_mat[world, part]
        half = scene.part_half[part]
        if (
            _is_behind(to_right, to_centre, turned, half)
            or _is_behind(to_left, to_centre, turned, half)
            or _is_behind(downwards, to_centre, turned, half)
            or _is_behind(upwards, to_centre, turned, half)
            or _is_behind(wp.vec3(0.0, 0.0, -1.0), to_centre, turned, half)
        ):
            continue
        tiles.parts[tile, count] = wp.int16(part)
        count += 1
    tiles.num_parts[tile] = count


@wp.func
def _nothing() -> Hit:
    hit = Hit()
    hit.part = -1
    hit.distance = wp.static(NOWHERE)
    return hit


@wp.func
def _trace(
    scene: Scene,
    worlds: Worlds,
    tiles: Tiles,
    tile: int,
    world: int,
    origin: wp.vec3,
    direction: wp.vec3,
    start: float,
    behind: Hit,
) -> Hit:
    """The first triangle that faces the ray beyond `start`, of a tile's parts or (-1) of all; `behind` if none does."""
    hit = Hit()
    hit.part = behind.part
    hit.face = behind.face
    hit.distance = behind.distance
    hit.u = behind.u
    hit.v = behind.v
    count = scene.num_parts
    if tile >= 0:
        count = tiles.num_parts[tile]
    for index in range(count):
        part = index
        if tile >= 0:
            part = int(tiles.parts[tile, index])
        sphere = worlds.part_sphere[world, part]
        radius = sphere[3]
        to_centre = wp.vec3(sphere[0], sphere[1], sphere[2]) - origin
        along = wp.dot(to_centre, direction)
        if radius < 0.0 or along + radius < start or along - radius > hit.distance:
            continue
        if wp.dot(to_centre, to_centre) - along * along > radius * radius:
            continue
        mat = wp.transpose(worlds.part_mat[world, part])
        local_origin = mat @ (origin - worlds.part_pos[world, part])
        local_direction = mat @ direction
        distance = start
        mesh = scene.part_mesh[part]
        for _ in range(wp.static(_MAX_BACK_FACES)):
            query = wp.mesh_query_ray(
                mesh, local_origin + local_direction * distance, local_direction, hit.distance - distance
            )
            if not query.result:
                break
            distance += query.t
            if wp.dot(local_direction, query.normal) < 0.0:
                hit.part = part
                hit.face = query.face
                hit.distance = distance
                hit.u = query.u
                hit.v = query.v
                break
            distance += wp.static(_RAY_STEP)
    return hit


@wp.func
def _texel(scene: Scene, address: int) -> wp.vec3:
    packed = scene.texels[address]
    return wp.vec3(
        float(packed & wp.uint32(255)),
        float((packed >> wp.uint32(8)) & wp.uint32(255)),
        float((packed >> wp.uint32(16)) & wp.uint32(255)),
    )


@wp.func
def _wrapped(index: int, size: int) -> int:
    """`index` modulo `size`, which division is too slow for where most are in range."""
    if index >= 0 and index < size:
        return index
    return (index % size + size) % size


@wp.func
def _bilinear(scene: Scene, base: int, width: int, height: int, u: float, v: float, is_repeated: bool) -> wp.vec3:
    x = u * float(width) - 0.5
    y = v * float(height) - 0.5
    left = int(wp.floor(x))
    top = int(wp.floor(y))
    fx = x - float(left)
    fy = y - float(top)
    right = left + 1
    bottom = top + 1
    if is_repeated:
        left = _wrapped(left, width)
        right = _wrapped(right, width)
        top = _wrapped(top, height)
        bottom = _wrapped(bottom, height)
    else:
        left = wp.clamp(left, 0, width - 1)
        right = wp.clamp(right, 0, width - 1)
        top = wp.clamp(top, 0, height - 1)
        bottom = wp.clamp(bottom, 0, height - 1)
    above = _texel(scene, base + top * width + left) * (1.0 - fx) + _texel(scene, base + top * width + right) * fx
    below = _texel(scene, base + bottom * width + left) * (1.0 - fx) + _texel(scene, base + bottom * width + right) * fx
    return above * (1.0 - fy) + below * fy


@wp.func
def _mipmapped(scene: Scene, texture: int, face: int, u: float, v: float, level: float, is_repeated: bool) -> wp.vec3:
    """Trilinear texture colour in [0, 1]; `level` is log2 of texels per pixel."""
    last = scene.texture_levels[texture] - 1
    clamped = wp.clamp(level, 0.0, float(last))
    fine = int(wp.floor(clamped))
    size = scene.texture_size[texture]
    width = wp.max(size[0] >> fine, 1)
    height = wp.max(size[1] >> fine, 1)
    base = scene.texture_offset[texture, fine] + face * width * height
    color = _bilinear(scene, base, width, height, u, v, is_repeated)
    weight = clamped - float(fine)
    if weight > 0.0:
        width = wp.max(size[0] >> (fine + 1), 1)
        height = wp.max(size[1] >> (fine + 1), 1)
        base = scene.texture_offset[texture, fine + 1] + face * width * height
        color = color * (1.0 - weight) + _bilinear(scene, base, width, height, u, v, is_repeated) * weight
    return color * wp.static(1.0 / 255.0)


@wp.func
def _cube_face(direction: wp.vec3) -> wp.vec4:
    """OpenGL's cube map lookup: image coordinates u, v in [0, 1], face number, major component."""
    ax = wp.abs(direction[0])
    ay = wp.abs(direction[1])
    az = wp.abs(direction[2])
    if ax >= ay and ax >= az:
        major = wp.max(ax, 1.0e-8)
        if direction[0] > 0.0:
            return wp.vec4(0.5 - 0.5 * direction[2] / major, 0.5 - 0.5 * direction[1] / major, 0.0, major)
        return wp.vec4(0.5 + 0.5 * direction[2] / major, 0.5 - 0.5 * direction[1] / major, 1.0, major)
    if ay >= az:
        major = wp.max(ay, 1.0e-8)
        if direction[1] > 0.0:
            return wp.vec4(0.5 + 0.5 * direction[0] / major, 0.5 + 0.5 * direction[2] / major, 2.0, major)
        return wp.vec4(0.5 + 0.5 * direction[0] / major, 0.5 - 0.5 * direction[2] / major, 3.0, major)
    major = wp.max(az, 1.0e-8)
    if direction[2] > 0.0:
        return wp.vec4(0.5 + 0.5 * direction[0] / major, 0.5 - 0.5 * direction[1] / major, 4.0, major)
    return wp.vec4(0.5 - 0.5 * direction[0] / major, 0.5 - 0.5 * direction[1] / major, 5.0, major)


@wp.func
def _sky(scene: Scene, direction: wp.vec3, pixel_angle: float) -> wp.vec3:
    if scene.skybox < 0:
        return wp.vec3(0.0)
    # MuJoCo turns the sky a quarter about x: its z is the cube map's y.
    lookup = _cube_face(wp.vec3(direction[0], direction[2], -direction[1]))
    face = int(lookup[2]) % scene.texture_faces[scene.skybox]
    texels = 0.5 * float(scene.texture_size[scene.skybox][0]) * pixel_angle / lookup[3]
    return _mipmapped(scene, scene.skybox, face, lookup[0], lookup[1], wp.log2(texels), False)


@wp.func
def _lit_corner(
    scene: Scene,
    worlds: Worlds,
    world: int,
    point: wp.vec3,
    normal: wp.vec3,
    eye: wp.vec3,
    headlight: wp.vec3,
    color: wp.vec3,
    material: wp.vec4,
) -> wp.vec3:
    """Fixed-function lighting of one vertex, clamped to [0, 1] as OpenGL does before texturing."""
    view = wp.normalize(eye - point)
    result = color * material[0]
    for light in range(scene.num_lights):
        to_light = -headlight
        distance = float(0.0)
        direction = headlight
        is_spot = False
        if scene.light_body[light] >= 0:
            direction = worlds.light_dir[world, light]
            to_light = -direction
            if scene.light_kind[light] == 0:
                is_spot = True
                offset = worlds.light_pos[world, light] - point
                distance = wp.length(offset)
                to_light = offset / wp.max(distance, 1.0e-6)
        facing = wp.dot(normal, to_light)
        ambient = scene.light_ambient[light]
        # What follows is costly, and counts for nothing where the light lights nothing.
        if facing <= 0.0 and ambient == wp.vec3(0.0):
            continue
        weight = 1.0
        if is_spot:
            cosine = -wp.dot(to_light, direction)
            if cosine < scene.light_params[light, 0]:
                continue
            weight = wp.pow(cosine, scene.light_params[light, 1]) / (
                scene.light_params[light, 2]
                + distance * (scene.light_params[light, 3] + distance * scene.light_params[light, 4])
            )
        result += wp.cw_mul(color, ambient) * weight
        if facing > 0.0:
            result += wp.cw_mul(color, scene.light_diffuse[light]) * (facing * weight)
            if material[1] > 0.0:
                # An exponent of 0 leaves a constant: OpenGL takes pow(x, 0) as 1.
                highlight = 1.0
                if material[2] > 0.0:
                    highlight = wp.pow(wp.max(wp.dot(normal, wp.normalize(to_light + view)), 0.0), material[2])
                result += scene.light_specular[light] * (material[1] * highlight * weight)
    return wp.min(wp.max(result, wp.vec3(0.0)), wp.vec3(1.0))


@wp.func
def _coords_on_plane(
    origin: wp.vec3, direction: wp.vec3, p0: wp.vec3, edge1: wp.vec3, edge2: wp.vec3, normal: wp.vec3
) -> wp.vec2:
    """Barycentric weights of corners 1 and 2 where a ray meets a triangle's plane."""
    distance = wp.dot(normal, p0 - origin) / wp.dot(normal, direction)
    offset = origin + direction * distance - p0
    scale = 1.0 / wp.dot(normal, normal)
    return wp.vec2(wp.dot(wp.cross(offset, edge2), normal) * scale, wp.dot(wp.cross(edge1, offset), normal) * scale)


@wp.func
def _surface_color(
    scene: Scene,
    worlds: Worlds,
    world: int,
    hit: Hit,
    eye: wp.vec3,
    direction: wp.vec3,
    step_x: wp.vec3,
    step_y: wp.vec3,
    headlight: wp.vec3,
    scale: float,
) -> wp.vec3:
    """Shaded colour of a hit; `step_x`, `step_y` lead from `direction` to the next pixels' (for the mipmap level)."""
    face = scene.part_first_face[hit.part] + hit.face
    surface = scene.face_surface[face]
    material = scene.surface_material[surface]
    color = scene.surface_color[surface] * scale
    pos = worlds.part_pos[world, hit.part]
    mat = worlds.part_mat[world, hit.part]
    w = 1.0 - hit.u - hit.v
    i = 3 * face
    p0 = pos + mat @ scene.points[i]
    p1 = pos + mat @ scene.points[i + 1]
    p2 = pos + mat @ scene.points[i + 2]
    lit = (
        _lit_corner(scene, worlds, world, p0, mat @ scene.normals[i], eye, headlight, color, material) * hit.u
        + _lit_corner(scene, worlds, world, p1, mat @ scene.normals[i + 1], eye, headlight, color, material) * hit.v
        + _lit_corner(scene, worlds, world, p2, mat @ scene.normals[i + 2], eye, headlight, color, material) * w
    )
    texture = scene.surface_texture[surface]
    if texture < 0:
        return lit
    t0 = scene.texture_coords[i]
    edge_t1 = scene.texture_coords[i + 1] - t0
    edge_t2 = scene.texture_coords[i + 2] - t0
    coords = t0 + edge_t1 * hit.v + edge_t2 * w
    edge1 = p1 - p0
    edge2 = p2 - p0
    normal = wp.cross(edge1, edge2)
    here = wp.vec2(hit.v, w)
    along_x = _coords_on_plane(eye, direction + step_x, p0, edge1, edge2, normal) - here
    along_y = _coords_on_plane(eye, direction + step_y, p0, edge1, edge2, normal) - here
    change_x = edge_t1 * along_x[0] + edge_t2 * along_x[1]
    change_y = edge_t1 * along_y[0] + edge_t2 * along_y[1]
    width = float(scene.texture_size[texture][0])
    if scene.texture_kind[texture] == wp.static(TEXTURE_CUBE):
        lookup = _cube_face(coords)
        texels = 0.5 * width / lookup[3] * wp.max(wp.length(change_x), wp.length(change_y))
        cube_face = int(lookup[2]) % scene.texture_faces[texture]
        texture_color = _mipmapped(
            scene, texture, cube_face, lookup[0], lookup[1], wp.log2(wp.max(texels, 1.0e-6)), False
        )
    else:
        height = float(scene.texture_size[texture][1])
        texels = wp.max(
            wp.length(wp.vec2(change_x[0] * width, change_x[1] * height)),
            wp.length(wp.vec2(change_y[0] * width, change_y[1] * height)),
        )
        texture_color = _mipmapped(scene, texture, 0, coords[0], coords[1], wp.log2(wp.max(texels, 1.0e-6)), True)
    return wp.cw_mul(lit, texture_color)


@wp.func
def _ray(scene: Scene, worlds: Worlds, world: int, camera: int, x: float, y: float, width: int, height: int) -> Ray:
    """The camera's ray through image position (x, y) in pixels, y down."""
    pixel_size = 2.0 * scene.camera_tan[camera] / float(height)
    mat = worlds.camera_mat[world, camera]
    to_pixel = mat @ wp.vec3((x - 0.5 * float(width)) * pixel_size, (0.5 * float(height) - y) * pixel_size, -1.0)
    length = wp.length(to_pixel)
    ray = Ray()
    ray.eye = worlds.camera_pos[world, camera]
    ray.direction = to_pixel / length
    ray.step_x = mat @ wp.vec3(pixel_size / length, 0.0, 0.0)
    ray.step_y = mat @ wp.vec3(0.0, -pixel_size / length, 0.0)
    ray.headlight = -wp.vec3(mat[0, 2], mat[1, 2], mat[2, 2])
    ray.start = scene.znear * length
    return ray


@wp.func
def _color(scene: Scene, worlds: Worlds, tiles: Tiles, world: int, ray: Ray, hit: Hit, normal: wp.vec3) -> wp.vec3:
    """Colour of a hit whose face's normal in the world is `normal`, with what it mirrors."""
    face = scene.part_first_face[hit.part] + hit.face
    color = _surface_color(
        scene, worlds, world, hit, ray.eye, ray.direction, ray.step_x, ray.step_y, ray.headlight, 1.0
    )
    reflectance = scene.surface_material[scene.face_surface[face]][3]
    if reflectance > 0.0:
        # The classic renderer adds the scene, lights included, mirrored at the surface, colours scaled by the
        # reflectance. Seen from the mirrored eye nothing else is mirrored.
        point = ray.eye + ray.direction * hit.distance
        mirrored_eye = ray.eye - normal * (2.0 * wp.dot(normal, ray.eye - point))
        mirrored = ray.direction - normal * (2.0 * wp.dot(normal, ray.direction))
        second = _trace(scene, worlds, tiles, -1, world, mirrored_eye, mirrored, hit.distance + 1.0e-4, _nothing())
        if second.part >= 0:
            color += _surface_color(
                scene,
                worlds,
                world,
                second,
                mirrored_eye,
                mirrored,
                ray.step_x - normal * (2.0 * wp.dot(normal, ray.step_x)),
                ray.step_y - normal * (2.0 * wp.dot(normal, ray.step_y)),
                ray.headlight,
                reflectance,
            )
    return wp.min(color, wp.vec3(1.0))


@wp.func
def _normal(scene: Scene, worlds: Worlds, world: int, part: int, face: int) -> wp.vec3:
    """Normal in the world of a part's face, numbered among all."""
    edge1 = scene.points[3 * face + 1] - scene.points[3 * face]
    edge2 = scene.points[3 * face + 2] - scene.points[3 * face]
    return worlds.part_mat[world, part] @ wp.normalize(wp.cross(edge1, edge2))


@wp.func
def _to_byte(value: float) -> wp.uint8:
    return wp.uint8(int(value * 255.0 + 0.5))


@wp.func
def _pixel_of_thread(thread: int, first_row: int, width: int) -> wp.vec2i:
    """Row and column of a thread: the 32 threads of a GPU's warp take a tile of 4 x 8 pixels, whose rays stay close."""
    tile = thread / 32
    lane = thread % 32
    num_tiles = (width + 7) / 8
    return wp.vec2i(first_row + tile / num_tiles * 4 + lane / 8, tile % num_tiles * 8 + lane % 8)


@wp.func
def _is_same(pixel: Pixel, other: Pixel) -> bool:
    """Whether both lie on one surface, not beyond a fold or an edge of it."""
    return (
        pixel.surface == other.surface
        and wp.dot(pixel.normal, other.normal) >= wp.static(_EDGE_COSINE)
        and wp.abs(pixel.distance - other.distance) <= wp.static(_EDGE_DEPTH) * wp.min(pixel.distance, other.distance)
    )


@wp.func
def _unseen() -> Pixel:
    pixel = Pixel()
    pixel.surface = wp.static(_UNSEEN)
    return pixel


@wp.func
def _position_in_pixel(ray: int) -> wp.vec2:
    """Where ray `ray` of a pixel passes it, right and down from its upper left corner, in pixels."""
    if ray == 0:
        return wp.vec2(0.5, 0.5)
    # The standard multisampling pattern: (3, 1), (7, 3), (1, 5), (5, 7) eighths of a pixel.
    index = ray - 1
    return wp.vec2(float((4 * index + 3) % 8 - 2 * (index / 2)) / 8.0, (2.0 * float(index) + 1.0) / 8.0)


@wp.func
def _sample(
    scene: Scene,
    worlds: Worlds,
    tiles: Tiles,
    resting: Resting,
    row: int,
    x: int,
    ray_id: int,
    width: int,
    height: int,
    known: Pixel,
) -> Pixel:
    """What ray `ray_id` of pixel `x` of line `row` of all images sees.

    Where it meets what `known` has met in the same pixel, it takes its colour: OpenGL, too, colours a surface once a
    pixel.
    """
    image = row / height
    world = image / scene.num_cameras
    camera = image % scene.num_cameras
    y = row % height
    tile = (image * tiles.num_rows + y / wp.static(TILE_SIZE)) * tiles.num_columns + x / wp.static(TILE_SIZE)
    position = _position_in_pixel(ray_id)
    ray = _ray(scene, worlds, world, camera, float(x) + position[0], float(y) + position[1], width, height)

    layer = camera * wp.static(NUM_RAYS) + ray_id
    behind = Hit()
    behind.part = resting.faces[layer, y, x][0]
    behind.face = resting.faces[layer, y, x][1]
    behind.distance = resting.places[layer, y, x][0]
    behind.u = resting.places[layer, y, x][1]
    behind.v = resting.places[layer, y, x][2]
    hit = _trace(scene, worlds, tiles, tile, world, ray.eye, ray.direction, ray.start, behind)

    pixel = Pixel()
    pixel.surface = -1
    pixel.distance = hit.distance
    if hit.part >= 0:
        face = scene.part_first_face[hit.part] + hit.face
        pixel.surface = scene.face_surface[face]
        pixel.normal = _normal(scene, worlds, world, hit.part, face)
    color = resting.colors[layer, y, x]
    if _is_same(pixel, known):
        color = known.color
    elif hit.part != behind.part or color[0] < 0.0:
        if hit.part >= 0:
            color = _color(scene, worlds, tiles, world, ray, hit, pixel.normal)
        else:
            color = _sky(scene, ray.direction, 2.0 * scene.camera_tan[camera] / float(height))
    pixel.color = color
    return pixel


@wp.func
def _store(
    color: wp.vec3, row: int, x: int, num_cameras: int, num_worlds: int, images: wp.array(dtype=wp.uint8, ndim=4)
):
    height = images.shape[1]
    image = row / height
    index = image % num_cameras * num_worlds + image / num_cameras
    for channel in range(3):
        images[index, row % height, images.shape[2] - 1 - x, channel] = _to_byte(color[channel])


@wp.kernel(module="unique", module_options=_OPTIONS)
def rest(
    scene: Scene,
    worlds: Worlds,
    tiles: Tiles,
    is_still: wp.array(dtype=wp.uint8),
    first_row: int,
    last_row: int,
    resting: Resting,
):
    """Fills `resting` but for `tile_ends`, some of its K * NUM_RAYS * H lines; dim from `num_threads`.

    `tiles` has a tile of each camera, with its resting parts. `is_still` is 1 for a camera that rests with its parts
    and all lights, so that colours do too.
    """
    height = resting.faces.shape[1]
    width = resting.faces.shape[2]
    pixel = _pixel_of_thread(wp.tid(), first_row, width)
    line = pixel[0]
    x = pixel[1]
    if line >= last_row or x >= width:
        return
    layer = line / height
    y = line % height
    camera = layer / wp.static(NUM_RAYS)
    position = _position_in_pixel(layer % wp.static(NUM_RAYS))
    ray = _ray(scene, worlds, 0, camera, float(x) + position[0], float(y) + position[1], width, height)
    hit = _trace(scene, worlds, tiles, camera, 0, ray.eye, ray.direction, ray.start, _nothing())
    resting.faces[layer, y, x] = wp.vec2i(hit.part, hit.face)
    resting.places[layer, y, x] = wp.vec3(hit.distance, hit.u, hit.v)
    color = wp.vec3(-1.0)
    if is_still[camera] != wp.uint8(0):
        if hit.part < 0:
            color = _sky(scene, ray.direction, 2.0 * scene.camera_tan[camera] / float(height))
        else:
            face = scene.part_first_face[hit.part] + hit.face
            # What a mirror shows moves.
            if scene.surface_material[scene.face_surface[face]][3] == 0.0:
                color = wp.min(
                    _surface_color(
                        scene, worlds, 0, hit, ray.eye, ray.direction, ray.step_x, ray.step_y, ray.headlight, 1.0
                    ),
                    wp.vec3(1.0),
                )
    resting.colors[layer, y, x] = color


@wp.kernel(module="unique", module_options=_OPTIONS)
def render(
    scene: Scene,
    worlds: Worlds,
    tiles: Tiles,
    resting: Resting,
    num_worlds: int,
    first_row: int,
    last_row: int,
    colors: wp.array2d(dtype=wp.vec3),
    geometry: wp.array2d(dtype=wp.vec4),
    surfaces: wp.array2d(dtype=int),
    images: wp.array(dtype=wp.uint8, ndim=4),
):
    """One sample at the centre of each pixel of some of the N * K * H image lines; dim from `num_threads`."""
    height = images.shape[1]
    width = images.shape[2]
    pixel = _pixel_of_thread(wp.tid(), first_row, width)
    row = pixel[0]
    x = pixel[1]
    if row >= last_row or x >= width:
        return
    sample = _sample(scene, worlds, tiles, resting, row, x, 0, width, height, _unseen())
    if colors.shape[0] > 0:
        colors[row, x] = sample.color
        geometry[row, x] = wp.vec4(sample.normal[0], sample.normal[1], sample.normal[2], sample.distance)
        surfaces[row, x] = sample.surface
    _store(sample.color, row, x, scene.num_cameras, num_worlds, images)


@wp.kernel(module="unique", module_options=_OPTIONS)
def measure(
    scene: Scene,
    num_worlds: int,
    first_row: int,
    last_row: int,
    geometry: wp.array2d(dtype=wp.vec4),
    surfaces: wp.array2d(dtype=int),
    depths: wp.array3d(dtype=float),
    bodies: wp.array3d(dtype=int),
):
    """Depth along the camera's axis and body of what `render` met at pixels' centres; dim from `num_threads`.

    Either of `depths` and `bodies` may be empty.
    """
    width = geometry.shape[1]
    height = width
    pixel = _pixel_of_thread(wp.tid(), first_row, width)
    row = pixel[0]
    x = pixel[1]
    if row >= last_row or x >= width:
        return
    image = row / height
    camera = image % scene.num_cameras
    index = camera * num_worlds + image / scene.num_cameras
    surface = surfaces[row, x]
    depth = scene.zfar
    body = int(-1)
    if surface >= 0:
        pixel_size = 2.0 * scene.camera_tan[camera] / float(height)
        right = (float(x) + 0.5 - 0.5 * float(width)) * pixel_size
        up = (0.5 * float(height) - float(row % height) - 0.5) * pixel_size
        depth = geometry[row, x][3] / wp.length(wp.vec3(right, up, -1.0))
        body = scene.surface_body[surface]
    if depths.shape[0] > 0:
        depths[index, row % height, width - 1 - x] = depth
    if bodies.shape[0] > 0:
        bodies[index, row % height, width - 1 - x] = body


@wp.func
def _stored(
    row: int,
    x: int,
    colors: wp.array2d(dtype=wp.vec3),
    geometry: wp.array2d(dtype=wp.vec4),
    surfaces: wp.array2d(dtype=int),
) -> Pixel:
    """What `render` has seen there."""
    place = geometry[row, x]
    pixel = Pixel()
    pixel.color = colors[row, x]
    pixel.surface = surfaces[row, x]
    pixel.normal = wp.vec3(place[0], place[1], place[2])
    pixel.distance = place[3]
    return pixel


@wp.func
def _differ(
    row: int,
    x: int,
    other_row: int,
    other_x: int,
    colors: wp.array2d(dtype=wp.vec3),
    geometry: wp.array2d(dtype=wp.vec4),
    surfaces: wp.array2d(dtype=int),
) -> bool:
    change = colors[row, x] - colors[other_row, other_x]
    if wp.max(wp.abs(change)) < wp.static(_EDGE_COLOR):
        return False
    here = _stored(row, x, colors, geometry, surfaces)
    there = _stored(other_row, other_x, colors, geometry, surfaces)
    return not _is_same(here, there)


@wp.kernel(module="unique", module_options=_OPTIONS)
def find_edges(
    first_row: int,
    last_row: int,
    strip: int,
    height: int,
    colors: wp.array2d(dtype=wp.vec3),
    geometry: wp.array2d(dtype=wp.vec4),
    surfaces: wp.array2d(dtype=int),
    num_edges: wp.array(dtype=int),
    edges: wp.array(dtype=int),
):
    """Lists the pixels next to an edge, as row * W + column, from `first_row` * W on; dim from `num_threads`."""
    width = colors.shape[1]
    pixel = _pixel_of_thread(wp.tid(), first_row, width)
    row = pixel[0]
    x = pixel[1]
    if row >= last_row or x >= width:
        return
    y = row % height
    found = False
    if x > 0 and _differ(row, x, row, x - 1, colors, geometry, surfaces):
        found = True
    if x < width - 1 and not found and _differ(row, x, row, x + 1, colors, geometry, surfaces):
        found = True
    if y > 0 and not found and _differ(row, x, row - 1, x, colors, geometry, surfaces):
        found = True
    if y < height - 1 and not found and _differ(row, x, row + 1, x, colors, geometry, surfaces):
        found = True
    if found:
        edges[first_row * width + wp.atomic_add(num_edges, strip, 1)] = row * width + x


@wp.func_native(
    snippet="""
#if defined(__CUDA_ARCH__)
    const unsigned int four = 0xfu << (threadIdx.x & 28u);
    value += __shfl_xor_sync(four, value, 1);
    value += __shfl_xor_sync(four, value, 2);
#endif
    return value;
"""
)
def _sum_of_four(value: float) -> float:
    """Sum over the four neighbouring threads of a GPU's warp, in each of them."""
    ...


@wp.kernel(module="unique", module_options=_OPTIONS)
def smooth_edges(
    scene: Scene,
    worlds: Worlds,
    tiles: Tiles,
    resting: Resting,
    num_worlds: int,
    first_row: int,
    strip: int,
    samples_per_thread: int,
    colors: wp.array2d(dtype=wp.vec3),
    geometry: wp.array2d(dtype=wp.vec4),
    surfaces: wp.array2d(dtype=int),
    num_edges: wp.array(dtype=int),
    edges: wp.array(dtype=int),
    images: wp.array(dtype=wp.uint8, ndim=4),
):
    """Replaces the listed pixels by the mean of four samples; dim at least that of all samples in threads.

    On a GPU four threads take a sample each, and their rays stay close; on a CPU one takes all four.
    """
    first_sample = wp.tid() * samples_per_thread
    edge = first_sample / 4
    if edge >= num_edges[strip]:
        return
    height = images.shape[1]
    width = images.shape[2]
    pixel = edges[first_row * width + edge]
    row = pixel / width
    x = pixel % width
    centre = _stored(row, x, colors, geometry, surfaces)
    color = wp.vec3(0.0)
    for index in range(first_sample % 4, first_sample % 4 + samples_per_thread):
        sample = _sample(scene, worlds, tiles, resting, row, x, 1 + index, width, height, centre)
        color += sample.color * 0.25
    if samples_per_thread == 1:
        color = wp.vec3(_sum_of_four(color[0]), _sum_of_four(color[1]), _sum_of_four(color[2]))
    if first_sample % 4 == 0:
        _store(color, row, x, scene.num_cameras, num_worlds, images)


KERNELS = (place, cull, rest, render, measure, find_edges, smooth_edges)


def num_threads(num_rows: int, width: int) -> int:
    """Threads that `render` and `find_edges` need for some image lines: whole tiles of 4 x 8 pixels."""
    return -(-num_rows // 4) * -(-width // 8) * 32
