import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from potstill.envs import Envs
from potstill.errors import InputError
from potstill.networks import (
    Conv2d,
    NetworkConfig,
    Policy,
    faster_precision,
    parse_width,
    resolve_device,
    resolve_precision,
)
from potstill.tasks import find_env

PONG = ((4, 84, 84), 3)
CARTPOLE = ((4,), 2)
MINATAR = ((10, 10, 4), 3)
TASKS = pytest.mark.parametrize("task", [PONG, CARTPOLE, MINATAR], ids=["nature", "mlp", "minatar"])


def make(task=PONG, seed=0, **config):
    return Policy(NetworkConfig(**config), *task).initialise(torch.Generator().manual_seed(seed))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def some_observations(task, batch=5, seed=0):
    return torch.randint(0, 256, (batch, *task[0]), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normalised(policy, seed=0):
    """`policy` with some mean and deviation per pixel or feature."""
    generator = torch.Generator().manual_seed(seed)
    shape = policy.normalised_shape
    policy.normalise_by(200 * torch.rand(shape, generator=generator), 1 + 60 * torch.rand(shape, generator=generator))
    return policy


# Sizes


@pytest.mark.parametrize(
    ("width", "parameters"),
    [("1", 1_686_180), ("1/2", 424_276), ("1/4", 107_436), ("1/8", 27_544), ("1/16", 7_230), ("1/32", 1_981)],
)
def test_the_pong_family_has_these_sizes_with_its_value_head(width, parameters):
    assert count(make(width=width)) == parameters


def test_the_size_of_a_nature_cnn_is_that_of_the_deployed_actor_worked_out_by_hand():
    conv = (4 * 4 * 64 + 4) + (8 * 4 * 16 + 8) + (8 * 8 * 9 + 8)
    linear = (392 * 64 + 64) + (64 * 3 + 3)
    macs = 20 * 20 * 4 * 4 * 64 + 9 * 9 * 8 * 4 * 16 + 7 * 7 * 8 * 8 * 9 + 392 * 64 + 64 * 3
    policy = make(width="1/8")
    assert policy.size() == (conv + linear, conv, linear, macs, 4 * (conv + linear + 2 * 84 * 84))
    assert count(policy) - policy.size().parameters == 64 + 1  # the value head


def test_the_size_of_an_mlp_worked_out_by_hand():
    linear = (4 * 16 + 16) + (16 * 16 + 16) + (16 * 2 + 2)
    assert make(CARTPOLE, width="1/4").size() == (linear, 0, linear, 4 * 16 + 16 * 16 + 16 * 2, 4 * (linear + 2 * 4))


def test_the_size_of_a_minatar_network_worked_out_by_hand():
    conv, linear = 16 * 4 * 9 + 16, (1024 * 128 + 128) + (128 * 3 + 3)
    macs = 8 * 8 * 16 * 4 * 9 + 1024 * 128 + 128 * 3
    assert make(MINATAR).size() == (conv + linear, conv, linear, macs, 4 * (conv + linear + 2 * 400))


def test_the_size_of_a_framewise_network_worked_out_by_hand():
    conv, linear = (4 * 64 + 4) + (16 * 4 + 4) + (4 * 4 * 16 + 4), 324 * 3 + 3
    macs = 4 * 20 * 20 * 4 * 64 + 20 * 20 * 16 * 4 + 9 * 9 * 4 * 4 * 16 + 324 * 3
    policy = make(width="1/8", family="framewise")
    assert policy.size() == (1_563, conv, linear, macs, 4 * (1_563 + 2 * 84 * 84))


def test_the_linear_layer_of_a_nature_cnn_may_be_narrower_than_its_width_says():
    lean = make(width="1/4", options=("hidden=32,256",)).size()
    assert lean.linear == (784 * 8 + 8) + (8 * 64 + 64) + (64 * 3 + 3)
    assert lean.parameters == 13_491
    assert lean.conv == make(width="1/4").size().conv
    with pytest.raises(InputError, match="network-option hidden=many: units of linear layers"):
        make(options=("hidden=many",))


def test_each_frame_is_read_by_the_same_filters():
    policy = make(width="1/8", family="framewise")
    first, frames = policy.trunk.convs[0], torch.rand(2, 4, 84, 84)
    alone = [nn.functional.conv2d(frames[:, at : at + 1], first.weight, first.bias, stride=4) for at in range(4)]
    torch.testing.assert_close(first(frames), torch.cat(alone, 1))


def test_each_channel_is_read_by_filters_of_its_own():
    policy = make(width="1/8", family="depthwise")
    first, frames = policy.trunk.convs[0], torch.rand(2, 4, 84, 84)
    torch.testing.assert_close(first(frames), nn.Conv2d.forward(first, frames))
    assert policy.size().conv == 4 * 2 * 65 + (8 * 4 + 4) + 4 * 17 + (4 * 4 + 4)


def balls(count, generator):
    """Four frames each of a ball that moves two rows up, stays, or moves two down from one to the next; and which."""
    way, row, column = (torch.randint(*span, (count,), generator=generator) for span in ((-1, 2), (8, 26), (2, 30)))
    frames = torch.zeros(count, 4, 36, 36, dtype=torch.uint8)
    for at in range(4):
        for high in range(3):
            for wide in range(3):
                frames[torch.arange(count), at, row + 2 * way * at + high, column + wide] = 200
    return frames, way + 1


@pytest.mark.parametrize(
    "config",
    [
        {"width": "1/8"},
        {"width": "1/4", "options": ("hidden=32,256",)},
        *({"width": "1/4", "family": family} for family in ("framewise", "depthwise")),
    ],
    ids=str,
)
def test_an_image_network_learns_which_way_a_ball_moves(config):
    generator = torch.Generator().manual_seed(0)
    policy = make(((4, 36, 36), 3), **config)
    policy.normalise_by(torch.full((36, 36), 2.0), torch.full((36, 36), 20.0))
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(200):
        frames, way = balls(64, generator)
        loss = nn.functional.cross_entropy(policy(frames)[0], way)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frames, way = balls(512, generator)
    assert (policy(frames)[0].argmax(1) == way).float().mean() > 0.9  # a third by chance


@TASKS
def test_a_split_critic_is_a_network_of_its_own_and_no_part_of_the_size(task):
    shared, split = make(task, width="1/4"), make(task, width="1/4", critic="split", critic_width="1/2")
    assert split.size() == shared.size()
    half = make(task, width="1/2")
    assert count(split) == count(shared.trunk) + count(shared.actor) + count(half.trunk) + count(half.critic)


def test_the_loss_of_a_split_critic_does_not_reach_the_actors_trunk():
    policy = make(CARTPOLE, critic="split")
    policy(torch.randn(3, 4))[1].sum().backward()
    assert all(parameter.grad is None for parameter in [*policy.trunk.parameters(), *policy.actor.parameters()])
    assert all(parameter.grad is not None for parameter in policy.critic_trunk.parameters())


def test_every_layer_has_at_least_one_unit():
    logits, value = make(width="1/10000")(some_observations(PONG))
    assert logits.shape == (5, 3)
    assert value.shape == (5,)


def test_widths_are_fractions_decimals_or_whole_numbers():
    assert parse_width("1/8") == parse_width("0.125")
    assert parse_width("2") == 2


@pytest.mark.parametrize(
    ("width", "complaint"),
    [
        ("wide", "width 'wide' is not a number; write 1/8 or 0.125"),
        ("1/0", "width '1/0' is not a number"),
        ("", "width '' is not a number"),
        ("nan", "width 'nan' is not a number"),
        (" 1/8", "width ' 1/8' is not a number"),
        ("1e999999999", "width '1e999999999' is not a number"),
        ("0", "width must be above 0 and at most 16, not 0"),
        ("-1/2", "width must be above 0"),
        ("17", "at most 16, not 17"),
    ],
)
def test_other_widths_are_refused(width, complaint):
    with pytest.raises(InputError, match=complaint):
        Policy(NetworkConfig(width=width), *PONG)


def test_a_cnn_for_a_vector_is_refused():
    with pytest.raises(InputError, match=r"nature family reads images of at least 36 .* shape \(4,\): use mlp"):
        Policy(NetworkConfig(family="nature"), *CARTPOLE)


@pytest.mark.parametrize(("task", "family"), [(PONG, "nature"), (CARTPOLE, "mlp"), (MINATAR, "minatar")])
def test_the_family_follows_from_the_shape_of_the_observation(task, family):
    assert make(task).family == family


# Initialisation


@TASKS
def test_the_generator_alone_decides_the_weights(task):
    first, again, other = make(task, seed=0), make(task, seed=0), make(task, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.actor.weight, other.actor.weight)


@TASKS
def test_weights_are_orthogonal_with_their_layers_gain_and_biases_zero(task):
    policy = make(task, width="1/4", critic="split")
    gains = {policy.actor: 0.01, policy.critic: 1.0}
    for layer in policy.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            singular = torch.linalg.svdvals(layer.weight.flatten(1))
            assert torch.allclose(singular, torch.full_like(singular, gains.get(layer, 2**0.5)), rtol=1e-4)
            assert not layer.bias.any()


@TASKS
def test_a_fresh_policy_is_nearly_uniform(task):
    probabilities = make(task)(some_observations(task) % 2)[0].softmax(-1)
    assert torch.allclose(probabilities, torch.full_like(probabilities, 1 / task[1]), atol=0.1)


# Normalisation


@TASKS
def test_prepared_inputs_are_centred_scaled_and_clipped(task):
    policy, raw = normalised(make(task)), some_observations(task)
    expected = (raw.double() - policy.mean.double()) * policy.scale.double()
    if policy.family == "nature":
        expected = expected.clamp(-5, 5)
        assert (expected.abs() == 5).any()
    if policy.family == "minatar":
        expected = expected.permute(0, 3, 1, 2)
    assert torch.allclose(policy.prepare(raw).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_pixel_in_bytes_that_hardly_moves_counts_as_moving_by_one():
    policy = Policy(NetworkConfig(width="1/32"), (4, 84, 84), 6, layout="stack", dtype="uint8")
    policy.normalise_by(torch.zeros(84, 84), torch.full((84, 84), 0.1))
    assert (policy.scale == 1.0).all()


def test_what_stood_still_keeps_its_unit_and_what_moved_little_does_not():
    policy = make(CARTPOLE)
    policy.normalise_by(torch.tensor([5.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1e-5, 1e-2, 4.0]))
    shown = policy.prepare(torch.tensor([[6.0, 1.0 + 1e-5, 1e-2, 2.0]]))
    assert torch.allclose(shown, torch.tensor([[1.0, 1.0, 1.0, 0.5]]), rtol=1e-2)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "float32"])
def test_a_picture_is_normalised_by_channel_and_clipped_whatever_its_numbers(dtype):
    policy = Policy(NetworkConfig("1/8"), (40, 40, 3), 3, layout="last", dtype=dtype)
    assert (policy.normalised_shape, policy.clip) == ((1, 1, 3), 5.0)


def test_the_frames_of_a_stack_share_one_normalisation():
    policy = normalised(make())
    assert policy.mean.shape == policy.scale.shape == (84, 84)
    frame = some_observations(PONG, 1)[:, :1]
    inputs = policy.prepare(frame.expand(1, 4, 84, 84))
    assert all(torch.equal(inputs[:, 0], inputs[:, i]) for i in (1, 2, 3))


def test_prepared_images_lie_in_memory_channels_last():
    inputs = make().prepare(some_observations(PONG))
    assert inputs.shape == (5, 4, 84, 84)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    inputs = make(MINATAR).prepare(some_observations(MINATAR))
    assert inputs.shape == (5, 4, 10, 10)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


@TASKS
@pytest.mark.parametrize("critic", ["shared", "split"])
def test_forward_is_prepare_and_heads_with_the_value_in_units_of_reward(task, critic):
    policy, raw = normalised(make(task, width="1/8", critic=critic)), some_observations(task)
    policy.return_scale.fill_(7.0)
    logits, value = policy(raw)
    inputs_logits, inputs_value = policy.heads(policy.prepare(raw))
    assert torch.equal(logits, inputs_logits)
    assert torch.equal(value, 7.0 * inputs_value)
    assert torch.equal(logits, policy.logits(policy.prepare(raw)))
    assert (logits.shape, value.shape) == ((5, task[1]), (5,))


def test_the_normalisation_travels_with_the_weights():
    policy, copy = normalised(make()), make(seed=1)
    policy.return_scale.fill_(3.0)
    copy.load_state_dict(policy.state_dict())
    for mine, theirs in zip(policy(some_observations(PONG)), copy(some_observations(PONG)), strict=True):
        assert torch.equal(mine, theirs)


@TASKS
def test_bfloat16_inputs_give_float32_outputs_close_to_those_of_float32(task):
    policy, raw = normalised(make(task, width="1/4")), some_observations(task)
    nn.init.orthogonal_(policy.actor.weight, generator=torch.Generator().manual_seed(2))
    exact, value = policy.heads(policy.prepare(raw))
    rough, rough_value = policy.heads(policy.prepare(raw, torch.bfloat16))
    assert rough.dtype == rough_value.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.05 * exact.abs().max().item())
    assert torch.allclose(value, rough_value, atol=0.05 * value.abs().max().item())


# Continuous actions


def test_the_logits_of_continuous_actions_are_means_and_deviations_that_no_state_changes():
    policy = Policy(NetworkConfig(), (3,), 2, continuous=True).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.5]))
    logits, value = policy(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert (logits.shape, value.shape, policy.num_logits) == ((5, 4), (5,), 4)
    assert torch.equal(logits[:, 2:], torch.tensor([-1.0, 0.5]).expand(5, 2))
    assert logits[:, :2].std(0).min() > 0


def test_the_deviations_are_learned_travel_with_the_weights_and_are_no_part_of_the_size():
    policy = Policy(NetworkConfig(), (3,), 2, continuous=True)
    assert "log_std" in policy.state_dict()
    assert any(parameter is policy.log_std for parameter in policy.parameters())
    assert policy.size() == Policy(NetworkConfig(), (3,), 2).size()


def test_a_policy_of_discrete_actions_holds_what_it_always_held():
    layers = ("trunk.linears.0", "trunk.linears.1", "actor", "critic")
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(make(CARTPOLE).state_dict()) == names | {"mean", "scale", "return_scale"}


# Precision and device


def test_a_precision_that_is_asked_for_is_taken():
    assert resolve_precision("float32", torch.device("cpu")) == torch.float32
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_what_auto_comes_to_does_not_hang_on_what_else_this_program_does():
    in_peace = faster_precision.__wrapped__(torch.device("cpu"))
    assert resolve_precision("auto", torch.device("cpu")) == in_peace
    done = threading.Event()

    def burn():
        while not done.is_set():
            hashlib.pbkdf2_hmac(
                "sha256", b"potstill", b"potstill", 20_000
            )  # leaves the interpreter to others meanwhile

    others = [threading.Thread(target=burn) for _ in range(2)]
    torch.set_num_threads(2)
    try:
        for each in others:
            each.start()
        assert {faster_precision.__wrapped__(torch.device("cpu")) for _ in range(5)} == {in_peace}
        assert torch.get_num_threads() == 2
    finally:
        done.set()
        for each in others:
            each.join()


def test_auto_takes_a_device_that_is_there_and_cpu_always_is():
    assert torch.zeros(1, device=resolve_device("auto")).sum() == 0
    assert resolve_device("cpu") == torch.device("cpu")


def test_an_unknown_or_absent_device_is_refused(monkeypatch):
    with pytest.raises(InputError, match="device 'tpu' is unknown: use auto, cuda, mps or cpu"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device cuda is not available here: use --device cpu"):
        resolve_device("cuda")


# With a real environment


def test_a_policy_fits_what_its_environment_shows():
    envs = Envs(replace(find_env("pong"), frame_stack=2), 2)
    policy = make((envs.observation_shape, envs.num_actions), width="1/32")
    logits, value = policy(torch.from_numpy(np.asarray(envs.reset(0))))
    assert (logits.shape, value.shape) == ((2, 3), (2,))


# Speed


@pytest.mark.parametrize(("channels", "units", "size"), [(4, 2, (10, 10)), (6, 4, (9, 12)), (1, 1, (3, 5))])
def test_a_convolution_by_rows_is_torchs(channels, units, size):
    conv = Conv2d(channels, units, 3)
    images = torch.randn(16, *size, channels).permute(0, 3, 1, 2)
    by_rows, plain = conv(images), nn.functional.conv2d(images, conv.weight, conv.bias)
    assert torch.allclose(by_rows, plain, rtol=1e-4, atol=1e-4)
    assert "Rows" in str(by_rows.grad_fn.next_functions)
    mine, theirs = (torch.autograd.grad(each.sin().sum(), [conv.weight, conv.bias]) for each in (by_rows, plain))
    for mine_of, theirs_of in zip(mine, theirs, strict=True):
        assert torch.allclose(mine_of, theirs_of, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [torch.randn(1, 4, 10, 10), torch.randn(16, 4, 10, 10, requires_grad=True)])
def test_a_single_image_and_one_with_a_gradient_take_torchs_own(images):
    assert "Convolution" in type(Conv2d(4, 2, 3)(images).grad_fn).__name__
