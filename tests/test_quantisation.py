from dataclasses import replace

import numpy as np
import pytest
import torch

import potstill as ps
from potstill.compress.config import CompressConfig
from potstill.compress.shapes import cost_of, shapes
from potstill.distill import DistillConfig, DistillState, distill_from, start
from potstill.errors import InputError
from potstill.export import export
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.quantisation import (
    activation_levels,
    greatest,
    is_on_grid,
    on_grid,
    prune,
    round_weights,
    scales,
    simulated,
)
from potstill.tasks import TASKS


def policy(width="1/4", seed=0):
    return Policy(NetworkConfig(width=width), (4,), 2).initialise(torch.Generator().manual_seed(seed))


def test_each_output_has_the_scale_that_its_largest_weight_needs():
    weight = torch.tensor([[1.0, -0.5, 0.04], [0.1, 0.02, 0.0]])
    # of 4 bits, -7 to 7: steps of 1/7 and 0.1/7
    assert scales(weight, 4).tolist() == pytest.approx([1 / 7, 0.1 / 7])
    assert on_grid(weight, 4).flatten().tolist() == pytest.approx([1.0, -4 / 7, 0.0, 0.1, 0.1 / 7, 0.0])
    assert (greatest(8), greatest(4)) == (127, 7)


def test_what_lies_on_the_grid_stays_and_what_does_not_is_told():
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    rounded = on_grid(weight, 8)
    assert not is_on_grid(weight, 8)
    assert is_on_grid(rounded, 8)
    assert torch.allclose(on_grid(rounded, 8), rounded, atol=1e-7)
    assert not is_on_grid(rounded, 4)


def test_no_sum_of_products_leaves_32_bits():
    for bits, inputs in ((8, 1), (8, 3_136), (4, 64), (8, 100_000)):
        assert activation_levels(bits, inputs) * greatest(bits) * inputs <= 2**30
    assert activation_levels(4, 8) == 32_767


def test_rounding_leaves_out_what_all_actions_have_in_common():
    network = policy()
    with torch.no_grad():
        network.actor.weight += 5.0
    before = (network.actor.weight - network.actor.weight.mean(0)).detach()
    round_weights(network, 8)
    assert torch.allclose(network.actor.weight, before, atol=float(before.abs().max()) / 127)


def test_in_the_simulation_logits_are_those_of_rounded_weights_and_gradients_go_straight_through():
    network, shown = policy(), torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    exact = {name: value.clone() for name, value in network.state_dict().items()}
    with simulated(network, 4):
        logits = network.logits(shown)
        logits.square().mean().backward()
    assert all(torch.equal(value, exact[name]) for name, value in network.state_dict().items())
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (*network.trunk.linears, network.actor))
    rounded = policy()
    round_weights(rounded, 4)
    assert torch.allclose(logits, rounded.logits(shown), atol=1e-3)  # activations have some 15 bits
    assert not torch.allclose(logits, network.logits(shown), atol=1e-3)


class Memory:
    """States that a teacher labelled."""

    def __init__(self, teacher):
        self.inputs = torch.randn(512, 4, generator=torch.Generator().manual_seed(2))
        self.logits = teacher.logits(self.inputs).detach()

    def draw(self, size, generator):
        return torch.randint(512, (size,), generator=generator)

    def batch(self, rows, student, dtype):
        from potstill.buffer import Batch

        return Batch(self.inputs[rows], self.logits[rows], torch.zeros(len(rows)))


def test_a_student_that_learns_with_rounded_weights_loses_less_by_rounding_than_one_that_is_rounded_afterwards():
    teacher = policy("1", seed=3)
    with torch.no_grad():
        teacher.actor.weight *= 500
    memory, losses, bits = Memory(teacher), {}, 4
    for trained in (32, bits):
        config = DistillConfig(
            network=NetworkConfig(width="1/8"), bits=trained, lead="teacher", total_timesteps=32 * 400, batch_size=64
        )
        state: DistillState = start(config, teacher, torch.device("cpu"))
        list(distill_from(config, state, memory))
        assert state.gradient_steps == config.gradient_steps
        if trained < 32:
            assert is_on_grid(state.student.actor.weight, bits)
        round_weights(state.student, bits)
        difference = state.student.distribution.kl(state.student.logits(memory.inputs), memory.logits)
        losses[trained] = difference.mean().item()
    assert losses[bits] < losses[32]


def test_the_smallest_weights_before_the_last_layer_go_first_and_gone_ones_stay_gone():
    network = policy()  # layers 4 - 16 - 16 - 2: 64 and 256 weights before the last layer
    before = [layer.weight.detach().clone() for layer in (*network.trunk.linears, network.actor)]
    prune(network, 0.5)
    layers = (*network.trunk.linears, network.actor)
    left = torch.cat([layer.weight.flatten() for layer in network.trunk.linears]).abs()
    assert int((left > 0).sum()) == 160
    gone = torch.cat([old[layer.weight == 0].abs() for old, layer in zip(before, layers, strict=True)])
    assert gone.max() <= left[left > 0].min()
    assert torch.equal(network.actor.weight, before[-1])
    zero = [layer.weight == 0 for layer in network.trunk.linears]
    prune(network, 0.75)
    assert all((layer.weight[was] == 0).all() for layer, was in zip(network.trunk.linears, zero, strict=True))
    assert network.size().parameters == 80 + 2 * 16 + (16 * 2 + 2)  # weights left, biases, the last layer
    assert network.size().bytes == policy().size().bytes  # a file holds zeros too


def test_a_student_pruned_while_it_learns_loses_less_than_one_that_is_pruned_afterwards():
    teacher = policy("1", seed=3)
    with torch.no_grad():
        teacher.actor.weight *= 500
    memory, losses = Memory(teacher), {}
    for sparsity in (0.0, 0.75):
        config = DistillConfig(
            network=NetworkConfig(width="1/2"), sparsity=sparsity, lead="teacher", total_timesteps=32 * 400,
            batch_size=64,
        )  # fmt: skip
        state: DistillState = start(config, teacher, torch.device("cpu"))
        list(distill_from(config, state, memory))
        if sparsity:
            zeros = [(layer.weight == 0).sum() for layer in state.student.trunk.linears]
            assert int(sum(zeros)) == 0.75 * (4 * 32 + 32 * 32)
        prune(state.student, 0.75)
        difference = state.student.distribution.kl(state.student.logits(memory.inputs), memory.logits)
        losses[sparsity] = difference.mean().item()
    assert losses[0.75] < losses[0.0] / 2


def test_zeros_that_rounding_makes_count():
    network, before = policy(), policy().size()
    round_weights(network, 4)
    assert sum(int((layer.weight == 0).sum()) for layer in network.trunk.linears) > 10
    assert network.size() == before


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_pruned_student_has_the_size_that_was_asked_for_whatever_its_bits_and_its_seed(bits, tmp_path):
    """Rounding makes zeros of its own, a few or many; a pruned and rounded network is as large as a pruned one."""
    teacher = policy("1", seed=3)
    with torch.no_grad():
        teacher.actor.weight *= 500
    found = []
    for seed in (0, 1):
        config = DistillConfig(
            network=NetworkConfig(width="1/2"), sparsity=0.88, bits=bits, lead="teacher", total_timesteps=32 * 60,
            batch_size=64, seed=seed,
        )  # fmt: skip
        state: DistillState = start(config, teacher, torch.device("cpu"))
        list(distill_from(config, state, Memory(teacher)))
        save_policy(tmp_path / f"{seed}.safetensors", state.student, TASKS["cartpole"].env, np.eye(4, dtype="f4"), {})
        loaded = load_policy(tmp_path / f"{seed}.safetensors")
        record = export(loaded, tmp_path / f"{seed}.c", card=False)
        header = (tmp_path / f"{seed}.h").read_text()
        size = loaded.policy.size()
        assert (size, record["policy"]["parameters"]) == (state.student.size(), size.parameters)
        assert f" {size.parameters} parameters" in header
        assert size.conv + size.linear == pytest.approx(size.parameters, abs=1)
        found.append(size.parameters)
    hidden = 4 * 32 + 32 * 32
    assert found == [hidden - int(0.88 * hidden) + 2 * 32 + 33 * 2] * 2
    shape = next(
        shape
        for shape in shapes(teacher, CompressConfig(base=replace(config, network=NetworkConfig(family="mlp"))))
        if shape.network.width == "1/2"
    )
    assert shape.size.parameters == found[0]


def test_zeros_that_a_file_only_claims_do_not_make_it_smaller():
    for claimed in (0.9, float("nan"), float("inf"), -1.0):
        network = policy()
        network.sparsity = torch.tensor(claimed)
        assert network.size() == policy().size()


def test_integers_save_room_for_zeros_too():
    config = CompressConfig(minimise="bytes", base=DistillConfig(bits=8))
    dense, pruned = policy(), policy()
    prune(pruned, 0.75)
    assert cost_of(pruned, config) == cost_of(dense, config) == dense.size().bytes - 3 * dense.size().parameters


def test_a_network_without_hidden_weights_has_none_to_prune():
    config = DistillConfig(network=NetworkConfig(family="linear"), sparsity=0.5)
    with pytest.raises(InputError, match="the linear network has no weights before its last layer"):
        start(config, policy(), torch.device("cpu"))
    with pytest.raises(InputError, match="sparsity is a share from 0 to below 1"):
        DistillConfig(sparsity=1.0)


def test_what_is_to_go_is_told_beside_the_size_before_it_went(save_teacher, tmp_path, capsys):
    save_teacher(tmp_path / "teacher")
    small = {"total_timesteps": 512, "num_envs": 8, "warmup_steps": 64, "batch_size": 32, "width": "1/8", "episodes": 0}
    ps.distill(tmp_path / "teacher", out=tmp_path / "run", sparsity=0.5, device="cpu", threads=1, **small)
    assert "130 parameters, 50% of whose weights go\n" in capsys.readouterr().err
