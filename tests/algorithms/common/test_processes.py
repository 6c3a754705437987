"""What a launch may not ask for."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, DynamoBackend

from algorithms.common import processes
from algorithms.common.processes import check_alone, make_accelerator


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"log_with=\['wanddb'\] cannot be used \(installed here: .*tensorboard"):
        make_accelerator(("tensorboard", "wanddb"), tmp_path)


FINE = dict(
    distributed_type=DistributedType.MULTI_CPU, is_fsdp2=False, mixed_precision="bf16", gradient_accumulation_steps=1,
    state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)), parallelism_config=None,
    num_processes=1, is_main_process=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(distributed_type=DistributedType.FSDP), "distributed_type=FSDP is not supported"),
        (dict(distributed_type=DistributedType.DEEPSPEED), "distributed_type=DEEPSPEED is not supported"),
        (dict(distributed_type=DistributedType.MEGATRON_LM), "distributed_type=MEGATRON_LM is not supported"),
        (dict(distributed_type=DistributedType.FSDP, is_fsdp2=True), "mixed_precision=bf16 with FSDP2 rounds"),
        (dict(mixed_precision="fp16"), r"mixed_precision=fp16 is not supported \(supported: no, bf16\)"),
        (dict(mixed_precision="fp8"), "mixed_precision=fp8 is not supported"),
        (dict(gradient_accumulation_steps=4), "gradient_accumulation_steps=4 would divide every gradient by 4"),
        (
            dict(state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.INDUCTOR))),
            "dynamo_backend=INDUCTOR would compile the model that is trained",
        ),
        (dict(parallelism_config=object()), "a parallelism_config is not supported"),
        (dict(num_processes=2), "1 processes were launched, but Accelerate runs 2 here"),
    ],
)
def test_launches_that_would_train_wrongly_are_refused(
    changes: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(processes, "Accelerator", lambda **_: SimpleNamespace(**FINE))
    make_accelerator((), tmp_path)
    assert capsys.readouterr().out == "processes    1\n"
    monkeypatch.setattr(processes, "Accelerator", lambda **_: SimpleNamespace(**(FINE | changes)))
    with pytest.raises(ValueError, match=message):
        make_accelerator((), tmp_path)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_that_accelerate_does_not_join_are_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processes, "Accelerator", lambda **_: SimpleNamespace(**FINE))
    monkeypatch.setenv(variable, "3")
    with pytest.raises(ValueError, match="3 processes were launched, but Accelerate runs 1 here"):
        make_accelerator((), tmp_path)


def test_a_program_that_is_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch):
    check_alone()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, and each would do all of the work: start this"):
        check_alone()
