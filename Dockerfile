# Two images, built from the wheel of this checkout. docs/machines.md says how they are used.
#
#     docker build --target env --tag libero-gr00t:env .      the environment, without PyTorch
#     docker build --tag libero-gr00t:train .                 trainers and policies too, on NVIDIA GPUs or none
#
# `python -m tools.check_dockerfile` executes these steps without a container engine.

ARG ENV_IMAGE=ubuntu:noble-20260917
# PyTorch's wheels hold CUDA's libraries. This base adds the driver that they need, which is checked when a container
# starts: choose it by TORCH.
ARG TRAIN_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

# --- the wheel ---

FROM ${ENV_IMAGE} AS wheel

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv

COPY pyproject.toml README.md LICENSE NOTICE /src/
COPY libero_gym /src/libero_gym
COPY gr00t_agent /src/gr00t_agent
RUN /opt/venv/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

# --- the environment alone ---

FROM ${ENV_IMAGE} AS env

# What `docker run --gpus all` brings of the driver: with graphics, which EGL needs.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,graphics,utility
COPY docker/10_nvidia.json /usr/share/glvnd/egl_vendor.d/10_nvidia.json

# EGL, and what OpenCV needs for LIBERO's own environment: OpenGL and GLib.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates libegl1 libgl1 libglib2.0-0 libopengl0 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl

RUN useradd --create-home --uid 10001 gr00t
WORKDIR /workspace
COPY tools/smoke.py tools/smoke.py
USER gr00t

# A build that cannot play a task fails here; what it compiled and cached on the way stays in the image.
RUN python tools/smoke.py
HEALTHCHECK --interval=30m --timeout=3m --start-period=3m CMD ["python", "tools/smoke.py"]
CMD ["python"]

# --- trainers and policies ---

FROM ${TRAIN_IMAGE} AS train

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,graphics,utility
COPY docker/10_nvidia.json /usr/share/glvnd/egl_vendor.d/10_nvidia.json

# What the environment needs, see above. Triton compiles with gcc what torch.compile asks for, and KubeRay asks Ray by
# wget whether a node is healthy.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates libegl1 libgl1 libglib2.0-0 libopengl0 python3 python3-venv \
        gcc libc6-dev python3-dev wget \
    && rm -rf /var/lib/apt/lists/*

# Login shells, which KubeRay may start Ray by, set a PATH of their own.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh

# What changes seldom, and is large, comes first. PyTorch for processors alone is torch==2.13.0+cpu, with its index in
# PIP_EXTRA_INDEX_URL. Jobs that are submitted to a cluster need Ray's [default].
ARG PIP_EXTRA_INDEX_URL
ARG TORCH=torch==2.13.0
ARG RAY=ray[default]==2.60.0
RUN pip install --no-cache-dir "${TORCH}" "${RAY}"
ARG EXTRAS=all
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]"

# The trainers are files to be read and changed, and no part of the wheel.
RUN useradd --create-home --uid 10001 gr00t
WORKDIR /workspace
ENV PYTHONPATH=/workspace
COPY checkpoints checkpoints
COPY algorithms algorithms
COPY benchmarks benchmarks
COPY examples examples
COPY tools tools
RUN install --directory --owner gr00t --group gr00t runs
ARG COMMIT
ENV LIBERO_GR00T_COMMIT=$COMMIT
USER gr00t

RUN python tools/smoke.py --policy checkpoints/libero_spatial_fewshot --device cpu
HEALTHCHECK --interval=30m --timeout=3m --start-period=3m \
    CMD ["python", "tools/smoke.py", "--policy", "checkpoints/libero_spatial_fewshot", "--device", "cpu"]
CMD ["bash"]
