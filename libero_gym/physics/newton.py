# type: ignore
"""Constraint forces by one kernel: all of Newton's iterations of a world in one block.

MuJoCo Warp's solver launches some ten kernels for every iteration of all worlds, so that each waits for the world that
needs most of them. Here a world goes on alone, and its block makes room for another when it is done. The mathematics is
the same, MuJoCo's; `newton.cu` tells it.

Shape legend: N worlds, V degrees of freedom, R constraint rows for which there is space.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mujoco
import numpy as np
import warp as wp

# Threads of a block on a GPU: a world has some hundred contacts at most. Blocks are smaller where a model has so many
# degrees of freedom that a Hessian for each of four warps does not fit into shared memory.
_BLOCK_SIZES = (128, 64, 32)
_WARP_SIZE = 32
# 48 KiB is what every CUDA device gives a block without being asked; Warp may take some of it for itself.
_SHARED_BYTES = 47 * 1024
# Kernels are compiled for numbers of degrees of freedom rounded up to multiples of this.
_SIZE_STEP = 8

_vec5 = wp.types.vector(length=5, dtype=wp.float32)


@wp.struct
class Problem:
    """Arrays of MuJoCo Warp that the solver reads and writes, and its own memory; see `mujoco_warp.Data`.

    `M_entry` says where the entries of M lie in a lower triangle stored row after row.
    """

    M_rownnz: wp.array(dtype=int)
    M_rowadr: wp.array(dtype=int)
    M_colind: wp.array(dtype=int)
    M_mulm_rowadr: wp.array(dtype=int)
    M_mulm_col: wp.array(dtype=int)
    M_mulm_madr: wp.array(dtype=int)
    M_entry: wp.array(dtype=int)
    M: wp.array2d(dtype=float)
    qfrc_smooth: wp.array2d(dtype=float)
    qacc_smooth: wp.array2d(dtype=float)
    qacc_warmstart: wp.array2d(dtype=float)
    njmax: int
    nefc: wp.array(dtype=int)
    nf: wp.array(dtype=int)
    num_blocks: wp.array(dtype=int)
    block_adr: wp.array2d(dtype=int)
    block_nrow: wp.array2d(dtype=int)
    J_rownnz: wp.array2d(dtype=int)
    J_rowadr: wp.array2d(dtype=int)
    J_colind: wp.array3d(dtype=int)
    J: wp.array3d(dtype=float)
    efc_type: wp.array2d(dtype=int)
    efc_id: wp.array2d(dtype=int)
    efc_D: wp.array2d(dtype=float)
    efc_aref: wp.array2d(dtype=float)
    efc_frictionloss: wp.array2d(dtype=float)
    contact_friction: wp.array(dtype=_vec5)
    residual: wp.array2d(dtype=float)
    motion: wp.array2d(dtype=float)
    curvature: wp.array2d(dtype=float)
    efc_force: wp.array2d(dtype=float)
    efc_state: wp.array2d(dtype=int)
    qacc: wp.array2d(dtype=float)
    Ma: wp.array2d(dtype=float)
    qfrc_constraint: wp.array2d(dtype=float)
    solver_niter: wp.array(dtype=int)


@functools.lru_cache
def _make_kernel(max_nv: int, max_rows: int, block_size: int) -> Any:
    """Return the kernel for at most `max_nv` degrees of freedom and contacts of at most `max_rows` rows."""
    constraint, state = mujoco.mjtConstraint, mujoco.mjtConstraintState
    names = {
        "NV": max_nv,
        "MAX_ROWS": max_rows,
        "MAX_WARPS": block_size // _WARP_SIZE,
        "MIN_VALUE": f"{mujoco.mjMINVAL}f",
        "FRICTION_DOF": int(constraint.mjCNSTR_FRICTION_DOF),
        "CONTACT_ELLIPTIC": int(constraint.mjCNSTR_CONTACT_ELLIPTIC),
        "SATISFIED": int(state.mjCNSTRSTATE_SATISFIED),
        "QUADRATIC": int(state.mjCNSTRSTATE_QUADRATIC),
        "LINEAR": int(state.mjCNSTRSTATE_LINEARNEG),
        "CONE": int(state.mjCNSTRSTATE_CONE),
    }
    code = files(__package__).joinpath("newton.cu").read_text()
    before = [f"#define {name} {value}" for name, value in names.items()]
    after = [f"#undef {name}" for name in names]

    @wp.func_native(snippet="\n".join([*before, code, *after, ""]))
    def solve(
        problem: Problem,
        nv: int,
        max_iterations: int,
        max_linesearch: int,
        tolerance: float,
        ls_tolerance: float,
        impratio_invsqrt: float,
        world: int,
        lane: int,
        lanes: int,
    ): ...

    @wp.kernel(module="unique", enable_backward=False, module_options={"fast_math": True})
    def kernel(
        problem: Problem,
        nv: int,
        max_iterations: int,
        max_linesearch: int,
        tolerance: float,
        ls_tolerance: float,
        impratio_invsqrt: float,
    ):
        world, lane = wp.tid()
        solve(
            problem,
            nv,
            max_iterations,
            max_linesearch,
            tolerance,
            ls_tolerance,
            impratio_invsqrt,
            world,
            lane,
            wp.block_dim(),
        )

    return kernel


@dataclass(frozen=True)
class NewtonSolver:
    """Solves the constraints of MuJoCo Warp's worlds, in place of `mujoco_warp.solve`.

    Make one by `NewtonSolver.of`.
    """

    kernel: Any
    problem: Any
    settings: tuple[int | float, ...]
    block_size: int
    num_worlds: int
    device: str

    @classmethod
    def of(cls, mjm: mujoco.MjModel, model: Any, data: Any, *, device: str) -> NewtonSolver:
        """Make the solver of some worlds.

        Args:
            mjm: what `model` was made of.
            model: from `mujoco_warp.put_model`.
            data: from `mujoco_warp.make_data`.
            device: Warp's name of the device where they are.

        Raises:
            ValueError: the model has constraints that scenes of LIBERO do not have, or too many degrees of freedom.
        """
        _check_model(mjm, model)
        problem = Problem()
        efc = data.efc
        sources = {
            "num_blocks": efc.jtdaj_nblock,
            "block_adr": efc.jtdaj_adr,
            "block_nrow": efc.jtdaj_nrow,
            "contact_friction": data.contact.friction,
            "njmax": data.njmax,
            "Ma": efc.Ma,
        }
        max_rows = max(3, int(mjm.geom_condim.max()), *mjm.pair_dim.tolist())
        shape = (data.nworld, data.njmax)
        own = {"residual": shape, "motion": shape, "curvature": (data.nworld, max_rows * data.njmax)}
        rows = np.repeat(np.arange(mjm.nv), mjm.M_rownnz)
        triangle = rows * (rows + 1) // 2 + mjm.M_colind
        sources["M_entry"] = wp.array(triangle, dtype=int, device=device)
        for name in Problem.vars:
            if name in own:
                value = wp.zeros(own[name], dtype=float, device=device)
            elif name in sources:
                value = sources[name]
            elif name.startswith("J"):
                value = getattr(efc, name)
            elif name.startswith("efc_"):
                value = getattr(efc, name.removeprefix("efc_"))
            else:
                value = getattr(data, name) if hasattr(data, name) else getattr(model, name)
            setattr(problem, name, value)
        option = mjm.opt
        settings = (
            mjm.nv,
            option.iterations,
            option.ls_iterations,
            float(model.opt.tolerance.numpy()[0]),
            option.ls_tolerance,
            option.impratio**-0.5,
        )
        max_nv = -(-mjm.nv // _SIZE_STEP) * _SIZE_STEP
        block_size = _choose_block_size(mjm.nv, max_nv)
        return cls(
            kernel=_make_kernel(max_nv, max_rows, block_size),
            problem=problem,
            settings=settings,
            block_size=block_size,
            num_worlds=data.nworld,
            device=device,
        )

    def solve(self) -> None:
        """Write `qacc`, `efc.Ma`, `efc.force`, `efc.state`, `qfrc_constraint` and `solver_niter` of the data."""
        wp.launch_tiled(
            self.kernel,
            dim=[self.num_worlds],
            inputs=[self.problem, *self.settings],
            block_dim=self.block_size,
            device=self.device,
        )


def _choose_block_size(nv: int, max_nv: int) -> int:
    """Return the number of threads of a block, the most for which `newton.cu` has enough shared memory.

    Raises:
        ValueError: not even a single warp has enough.
    """
    for block_size in _BLOCK_SIZES:
        if _shared_bytes(max_nv, block_size // _WARP_SIZE) <= _SHARED_BYTES:
            return block_size
    valid = max(nv for nv in range(0, max_nv, _SIZE_STEP) if _shared_bytes(nv, 1) <= _SHARED_BYTES)
    raise ValueError(f"GPU physics solves scenes of at most {valid} degrees of freedom; this model has {nv}")


def _shared_bytes(max_nv: int, num_warps: int) -> int:
    """Return the size of the arrays that `newton.cu` declares as shared."""
    a_warp = max_nv * (max_nv + 1) // 2 + max_nv + 6
    return 4 * (num_warps * a_warp + 9 * max_nv + 2)


def _check_model(mjm: mujoco.MjModel, model: Any) -> None:
    unsupported = {
        "equality constraints": mjm.neq,
        "tendons": mjm.ntendon,
        "flexes": mjm.nflex,
        "a solver other than Newton": mjm.opt.solver != mujoco.mjtSolver.mjSOL_NEWTON,
        "pyramidal friction cones": mjm.opt.cone != mujoco.mjtCone.mjCONE_ELLIPTIC,
        "iterations of the noslip solver": mjm.opt.noslip_iterations,
        "no warm start": mjm.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_WARMSTART,
        "a dense constraint Jacobian": not model.is_sparse,
    }
    found = [name for name, value in unsupported.items() if value]
    if found:
        raise ValueError(
            f"GPU physics solves joint friction, joint limits and contacts with elliptic cones by Newton's method over "
            f"sparse Jacobians; this model has {', '.join(found)}"
        )
