"""Serve a policy by openpi's websocket protocol, or by vla-eval's.

    python -m gr00t_agent.serve --model checkpoints/libero_spatial_rl --port 8000
    python -m gr00t_agent.serve --model checkpoints/libero_spatial_rl --protocol vla-eval --resize

openpi's client gets action chunks from it, and so does an evaluation by --policy-server ws://localhost:8000. Every
answer is deterministic. vla-eval's benchmarks of LIBERO draw 256 pixels, so --resize is for models that saw others.
What is sent and answered say gr00t_agent/policy_server.py and vla_eval_protocol.py; nothing is encrypted and nobody is
asked who they are, so listen at another --host only where you trust the network. Needs the extras `[agent,serve]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from gr00t_agent.config import MAX_SEED, PresetName
from gr00t_agent.files import is_hub_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model and answer until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m gr00t_agent.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a checkpoint's folder, hub id, or a preset's name")
    protocols = ("openpi", "vla-eval")
    parser.add_argument("--protocol", choices=protocols, default="openpi", help="what clients speak (default: openpi)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=int, default=8000, help="TCP port; 0 takes a free one")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, where an observation brings no seed")
    parser.add_argument("--denoising-steps", type=int, help="from noise to action; the checkpoint's own if not given")
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], help="the checkpoint's own if not given")
    parser.add_argument("--device", help="Torch device; a GPU if there is one, if not given")
    parser.add_argument("--resize", action="store_true", help="resize pictures of another size than the model's")
    given = parser.parse_args(arguments)
    presets = get_args(PresetName)
    if given.model not in presets and not Path(given.model).is_dir() and not is_hub_name(given.model):
        parser.error(f"--model {given.model} is no folder, no hub id (owner/name) and no preset ({', '.join(presets)})")

    if not 0 <= given.port <= 65535:
        parser.error(f"--port {given.port} is no TCP port (valid: 0-65535; 0 takes a free one)")
    if not 0 <= given.seed <= MAX_SEED:
        parser.error(f"--seed {given.seed} is no seed (valid: 0-{MAX_SEED})")

    import torch  # which takes seconds: a mistake is told at once

    from gr00t_agent.agent import Gr00tAgent
    from gr00t_agent.policy_server import ServedPolicy, make_server
    from gr00t_agent.weights import to_device

    torch.manual_seed(given.seed)  # a preset's random weights
    try:
        device = to_device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        agent = Gr00tAgent.load(given.model, denoising_steps=given.denoising_steps, compute_dtype=given.compute_dtype)
        agent = agent.to(device).eval()
        policy = ServedPolicy(agent, Path(given.model).name, seed=given.seed, resize=given.resize)
        server = make_server(policy, given.host, given.port, protocol=given.protocol)
    except (ValueError, OSError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error  # Python would put it in quotes
        parser.exit(1, f"error: {text}\n")
    host, port = server.socket.getsockname()[:2]
    print(f"serving {given.model} at ws://{host}:{port}", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
