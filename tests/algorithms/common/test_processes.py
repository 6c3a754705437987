"""What a launch may not ask for."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from algorithms.common import processes
from algorithms.common.processes import make_accelerator


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"log_with=\['wanddb'\] cannot be used \(installed here: .*tensorboard"):
        make_accelerator(("tensorboard", "wanddb"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "is_fsdp2", "precision", "message"),
    [
        ("FSDP", False, "no", "distributed_type=FSDP is not supported"),
        ("DEEPSPEED", False, "no", "distributed_type=DEEPSPEED is not supported"),
        ("FSDP", True, "bf16", "mixed_precision=bf16 with FSDP2 rounds"),
    ],
)
def test_launches_that_would_train_wrongly_are_refused(
    kind: str, is_fsdp2: bool, precision: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    launched = SimpleNamespace(
        distributed_type=processes.DistributedType[kind], is_fsdp2=is_fsdp2, mixed_precision=precision
    )
    monkeypatch.setattr(processes, "Accelerator", lambda **_: launched)
    with pytest.raises(ValueError, match=message):
        make_accelerator((), tmp_path)
