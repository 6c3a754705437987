"""Where roles are put, and what is refused before anything starts."""

import os
from types import SimpleNamespace

import pytest

from algorithms.common.cluster_process import take_place
from algorithms.common.placement import Node, Place, Wanted, check_shares, check_versions, parse_placement, place_roles

TWO_NODES = [
    Node(node_id="a", address="10.0.0.1", cpus=16, gpus=4),
    Node(node_id="b", address="10.0.0.2", cpus=16, gpus=4),
]
NO_GPU = [Node(node_id="a", address="10.0.0.1", cpus=6), Node(node_id="b", address="10.0.0.2", cpus=2)]


def test_gpus_are_numbered_over_the_nodes():
    placement = place_roles(TWO_NODES, placement="env:0-1,4 rollout:2-5 actor:0-7")
    assert [(place.node, place.gpu) for place in placement.env] == [(0, 0), (0, 1), (1, 0)]
    assert [(place.node, place.gpu) for place in placement.rollout] == [(0, 2), (0, 3), (1, 0), (1, 1)]
    assert placement.actor[7] == Place(node=1, gpu=3, cpus=4)


def test_without_arguments_all_gpus_do_both_and_a_cluster_without_any_has_one_process_of_each():
    placement = place_roles(TWO_NODES)
    assert len(placement.env) == len(placement.rollout) == len(placement.actor) == 8
    assert placement.env[0].gpu is None
    assert place_roles(TWO_NODES, env_on_gpu=True).env == placement.rollout
    placement = place_roles(NO_GPU)
    assert [len(places) for places in (placement.env, placement.rollout, placement.actor)] == [1, 1, 1]


def test_the_first_gpus_decide_and_the_last_ones_learn():
    placement = place_roles(TWO_NODES, rollout_gpus=2, learner_gpus=4, env_workers=4)
    assert [(place.node, place.gpu) for place in placement.rollout] == [(0, 0), (0, 1)]
    assert [(place.node, place.gpu) for place in placement.actor] == [(1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("text", "is_in_rollout"),
    [
        ("env:0-3 rollout:0-3 actor:4", True),
        ("env:1-4 rollout:0-3 actor:4", False),
        ("env:0-3 rollout:0-1 actor:4", False),
        ("env:cpu rollout:cpu actor:cpu", False),
    ],
)
def test_environments_on_the_gpu_that_decides_are_in_its_process(text: str, is_in_rollout: bool):
    placement = place_roles(TWO_NODES, placement=text)
    assert placement.has_envs_in_rollout == is_in_rollout
    assert ("env in the processes of rollout" in str(placement)) == is_in_rollout


def test_stages_of_a_deciding_process_need_no_env_workers_of_their_own():
    args = SimpleNamespace(num_envs=8, micro_batch_size=8, pipeline_stage_num=2)
    check_shares(args, place_roles(TWO_NODES, placement="env:0-1 rollout:0-1 actor:0-1"))
    with pytest.raises(ValueError, match=r"env workers \(2\) cannot be shared by 2 rollout worker\(s\) x 2 stage"):
        check_shares(args, place_roles(TWO_NODES, placement="env:2-3 rollout:0-1 actor:0-1"))


def test_processes_without_a_gpu_are_spread_by_cores():
    placement = place_roles(NO_GPU, placement="env:cpu*4 rollout:cpu actor:cpu*2")
    assert placement.env == (Place(node=0, gpu=None, cpus=2),) * 3 + (Place(node=1, gpu=None, cpus=2),)
    assert parse_placement("rollout:cpu actor:cpu*2") == {
        "rollout": Wanted(cpu_processes=1),
        "actor": Wanted(cpu_processes=2),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env:0 rollout:0", "gives actor no place"),
        ("env:0 rollout:1 learner:2", "'learner:2' is none of env:"),
        ("rollout:0 rollout:1 actor:0", "names the role rollout twice"),
        ("rollout: actor:0", "rollout: is empty"),
        ("rollout:3-1 actor:0", "rollout:3-1 is empty"),
        ("rollout:cpu*0 actor:0", "cpu\\*0 is empty"),
        ("rollout:0-3,2 actor:0", "names GPU 2 twice"),
        ("rollout:0-x actor:0", "'0-x' in rollout:0-x"),
    ],
)
def test_a_placement_that_says_nothing_clear_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_placement(text)


def test_what_the_cluster_has_not_is_refused_with_both_named():
    with pytest.raises(ValueError, match=r"puts actor on GPU 8, 9, and the cluster has 8 GPU\(s\) on 2 node\(s\)"):
        place_roles(TWO_NODES, placement="rollout:0 actor:7-9")
    with pytest.raises(ValueError, match=r"rollout_gpus=9, and the cluster has 8 GPU\(s\).*give 1 to 8"):
        place_roles(TWO_NODES, rollout_gpus=9)
    with pytest.raises(ValueError, match=r"learner_gpus=1, and the cluster has 0 GPU\(s\)"):
        place_roles(NO_GPU, learner_gpus=1)
    with pytest.raises(ValueError, match="both say where processes run"):
        place_roles(TWO_NODES, placement="rollout:0 actor:0", learner_gpus=1)
    with pytest.raises(ValueError, match="physics='warp' simulates on GPUs"):
        place_roles(TWO_NODES, placement="env:cpu rollout:0 actor:0", env_on_gpu=True)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("env:cpu*3 rollout:0 actor:0", {}, r"num_envs \(8\) cannot be shared by 3 env worker"),
        ("env:cpu*8 rollout:0 actor:0-2", {}, r"num_envs \(8\) cannot be shared by 3 learner"),
        ("env:cpu*2 rollout:0-3 actor:0", {}, r"env workers \(2\) cannot be shared by 4 rollout"),
        ("env:cpu*4 rollout:0-3 actor:0", dict(pipeline_stage_num=2), r"4 rollout worker\(s\) x 2 stage"),
        ("env:0 rollout:0 actor:0", dict(pipeline_stage_num=3), r"num_envs \(8\) .* by 1 rollout.* x 3 stage"),
        ("env:cpu*6 rollout:0-2 actor:0-1", dict(num_envs=12), r"\(3\) cannot be shared by 2 of the other"),
    ],
)
def test_counts_that_do_not_divide_are_refused(text: str, changes: dict[str, int], message: str):
    args = SimpleNamespace(**(dict(num_envs=8, micro_batch_size=8, pipeline_stage_num=1) | changes))
    with pytest.raises(ValueError, match=message):
        check_shares(args, place_roles(TWO_NODES, placement=text))


def test_other_versions_on_a_node_are_refused():
    def nodes(*versions: dict[str, str | None]) -> list[Node]:
        return [Node(node_id=str(i), address=f"10.0.0.{i}", cpus=1, versions=v) for i, v in enumerate(versions)]

    first: dict[str, str | None] = {"Python": "3.11.7", "torch": "2.13.0", "commit": "abc"}
    check_versions(nodes(first, first | {"commit": None}))
    for change in ({"Python": "3.12.1"}, {"torch": None}, {"commit": "def"}):
        with pytest.raises(ValueError, match=r"node 10.0.0.1 has other versions than the driver's: "):
            check_versions(nodes(first, first | change))


@pytest.mark.parametrize(
    ("named", "gpu", "shown"),
    [(None, 1, "1"), ("4,5", 1, "5"), ("GPU-8a, MIG-3f", 1, "MIG-3f"), (None, None, ""), ("4,5", None, "")],
)
def test_a_process_is_shown_the_gpu_of_its_place_among_those_of_its_node(
    monkeypatch: pytest.MonkeyPatch, named: str | None, gpu: int | None, shown: str
):
    monkeypatch.setattr(os, "environ", {} if named is None else {"CUDA_VISIBLE_DEVICES": named})
    take_place(Place(node=0, gpu=gpu, cpus=1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
    assert os.environ.get("ACCELERATE_USE_CPU") == ("true" if gpu is None else None)


@pytest.mark.parametrize("named", ["", "4"])
def test_a_gpu_that_its_node_does_not_show_is_refused(monkeypatch: pytest.MonkeyPatch, named: str):
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": named})
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES='{named}' shows it {len(named)}: start Ray"):
        take_place(Place(node=0, gpu=1, cpus=1))
