"""State dicts of CleanRL's files act as CleanRL's own networks, which are written out here as it has them."""

import pickle
from itertools import pairwise

import numpy as np
import own_tasks
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.nn import functional as F

import potstill as ps
from potstill import imports
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.load import load
from potstill.load.state_dicts import load_weights
from potstill.networks import NetworkConfig
from potstill.tasks import find_env

PONG = "ale/pong"


def mlp(*units, activation=nn.Tanh):
    layers = [layer for a, b in pairwise(units) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def convolutions():
    return [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()]


class PPO(nn.Module):
    def __init__(self, actor="actor", actions=2, seen=4):
        super().__init__()
        self.critic = mlp(seen, 64, 64, 1)
        self.add_module(actor, mlp(seen, 64, 64, actions))
        if actor == "actor_mean":
            self.actor_logstd = nn.Parameter(torch.full((1, actions), 0.25))

    def forward(self, x):
        return getattr(self, "actor", getattr(self, "actor_mean", None))(x)


class PPOAtari(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*convolutions(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU())
        self.actor, self.critic = nn.Linear(512, 6), nn.Linear(512, 1)

    def forward(self, x):
        return self.actor(self.network(x / 255.0))


class DQN(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = mlp(4, 120, 84, 2, activation=nn.ReLU)

    def forward(self, x):
        return self.network(x)


class DQNAtari(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*convolutions(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6))

    def forward(self, x):
        return self.network(x / 255.0)


class SAC(nn.Module):
    def __init__(self, head="fc_mean"):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 32), nn.Linear(32, 32)
        self.add_module(head, nn.Linear(32, 1))
        if head == "fc_mean":
            self.fc_logstd = nn.Linear(32, 1)
        self.head = head
        self.register_buffer("action_scale", torch.tensor([2.0]))
        self.register_buffer("action_bias", torch.tensor([0.0]))

    def forward(self, x):
        hidden = F.relu(self.fc2(F.relu(self.fc1(x))))
        return torch.tanh(getattr(self, self.head)(hidden)) * self.action_scale + self.action_bias


class SACAtari(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(*convolutions()[:-1], nn.Flatten())
        self.fc1, self.fc_logits = nn.Linear(3136, 512), nn.Linear(512, 6)

    def forward(self, x):
        return self.fc_logits(F.relu(self.fc1(F.relu(self.conv(x / 255.0)))))


MADE = {
    "PPO": (PPO, "cartpole"),
    "PPO continuous": (lambda: PPO("actor_mean", 1, 3), "pendulum"),
    "PPO Atari": (PPOAtari, PONG),
    "DQN": (DQN, "cartpole"),
    "DQN Atari": (DQNAtari, PONG),
    "DQN of a checkpoint": (DQN, "cartpole"),
    "SAC": (SAC, "pendulum"),
    "SAC Atari": (SACAtari, PONG),
    "TD3": (lambda: SAC("fc_mu"), "pendulum"),
}


def made(name, folder):
    torch.manual_seed(0)
    make, env = MADE[name]
    model = make()
    state = model.state_dict()
    if name == "DQN of a checkpoint":  # of a training that compiled its network
        optimizer = torch.optim.Adam(model.parameters()).state_dict()
        compiled = {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
        state = {"step": 5, "model_state_dict": compiled, "optimizer_state_dict": optimizer}
    torch.save((state, {}) if name == "TD3" else state, folder / "model.cleanrl_model")
    return model, env


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_greedy_actions_are_those_of_cleanrl(name, tmp_path):
    model, env = made(name, tmp_path)
    statistics = "none" if name == "PPO continuous" else None
    loaded = load(tmp_path / "model.cleanrl_model", env, statistics=statistics)
    envs = Envs(loaded.env, 2)
    rng, seen = np.random.default_rng(0), [envs.reset(0)]
    seen += [envs.step(envs.random_actions(rng)).observations for _ in range(24)]
    rows = torch.from_numpy(np.concatenate(seen))
    expected = model(rows.float()).numpy()
    logits = loaded.policy(rows)[0]
    actions = envs.own_actions(loaded.policy.distribution.greedy(logits).numpy())
    envs.close()
    if envs.continuous:
        np.testing.assert_allclose(actions, np.clip(expected, -2, 2), atol=1e-5)
    else:
        assert np.array_equal(actions, expected.argmax(1))
    assert loaded.document["provenance"]["algorithm"] == name.split()[0]
    if name == "PPO":
        np.testing.assert_allclose(loaded.policy(rows)[1], model.critic(rows).squeeze(1), atol=1e-5)
    if name == "PPO continuous":
        assert loaded.policy.log_std.item() == pytest.approx(0.25 - np.log(2))


def test_one_is_imported_exported_and_teaches(tmp_path, call):
    made("DQN", tmp_path)
    file = tmp_path / "model.cleanrl_model"
    code, out, err = call("import-weights", file, "--env", "cartpole", "--out", tmp_path / "new")
    assert code == 0, err
    assert "DQN" in out
    code, _, err = call("export", tmp_path / "new", "--out", tmp_path / "policy.onnx", "--episodes", 0, "--threads", 1)
    assert code == 0, err
    words = ["--total-timesteps", 512, "--num-envs", 8, "--warmup-steps", 256, "--evaluate", 0, "--device", "cpu"]
    code, _, err = call("distill", file, "--env", "cartpole", "--out", tmp_path / "run", *words)
    assert code == 0, err


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, width, units="8"):
        super().__init__()
        self.first, self.last = nn.Linear(shape[0], int(units)), nn.Linear(int(units), 2)

    def forward(self, x):
        return self.last(self.first(x).abs())
"""


@torch.no_grad()
def test_any_state_dict_is_read_where_the_user_names_its_network(tmp_path, call):
    (tmp_path / "my_nets.py").write_text(OWN)
    ps.import_modules([str(tmp_path / "my_nets.py")])
    seen = torch.randn(20, 4)
    torch.manual_seed(0)
    plain = nn.ModuleDict({"body": mlp(4, 10, 6, activation=nn.ReLU), "out": nn.Linear(6, 2)})
    own = imports.find("my_nets:Net", "--network")((4,), 1.0, "5")
    for number, (model, options, answer) in enumerate(
        (
            (
                plain,
                ["--network", "mlp", "--network-option", "activation=relu"],
                plain["out"](F.relu(plain["body"](seen))),
            ),
            (own, ["--network", "my_nets:Net", "--network-option", "units=5"], own(seen)),
        )
    ):
        torch.save(model.state_dict(), tmp_path / "model.pt")
        out = tmp_path / f"new-{number}"
        code, _, err = call("import-weights", tmp_path / "model.pt", "--env", "cartpole", "--out", out, *options)
        assert code == 0, err
        torch.testing.assert_close(load(out).policy(seen)[0], answer)


class Whole(nn.Module):
    """Reads pictures of 6 x 6 pixels as they are."""

    def __init__(self, shape, width):
        super().__init__()
        self.out = nn.Linear(36, 3)

    def forward(self, pictures):
        return self.out(pictures.flatten(1) / 255)


@pytest.mark.parametrize("network", ["own", "mlp"])
@torch.no_grad()
def test_pixels_reach_a_network_that_normalises_nothing_as_they_are(network, tmp_path):
    torch.manual_seed(0)
    model: nn.Module = Whole((1, 6, 6), 1.0)
    if network == "mlp":
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    family = imports.allow(Whole) if network == "own" else "mlp"
    env = find_env(own_tasks.Picture)
    policy = load_weights(tmp_path / "model.pt", env, network=NetworkConfig(family=family)).policy
    seen = torch.randint(0, 256, (20, 6, 6), dtype=torch.uint8)
    torch.testing.assert_close(policy(seen)[0], model(seen[:, None].float()))


class One(own_tasks.Copy):
    observation_space = spaces.Box(0, 2, (), np.float32)

    def observe(self):
        return np.float32(super().observe().argmax())


@torch.no_grad()
def test_an_observation_may_be_one_number(tmp_path):
    model = nn.Linear(1, 3)
    torch.save({"out.weight": model.weight, "out.bias": model.bias}, tmp_path / "model.pt")
    policy = load_weights(tmp_path / "model.pt", find_env(One), network=NetworkConfig(family="linear")).policy
    seen = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(policy(seen)[0], model(seen[:, None]))


def test_squashed_actions_of_another_range_are_refused(tmp_path):
    state = made("SAC", tmp_path)[0].state_dict() | {"action_scale": torch.tensor([1.0])}
    torch.save(state, tmp_path / "model.cleanrl_model")
    with pytest.raises(
        InputError, match=r"its action_scale is \[1\.0\], that of Pendulum-v1 \[2\.0\]: its actions have another range"
    ):
        load(tmp_path / "model.cleanrl_model", "pendulum")


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_what_is_no_state_dict_here_is_refused_in_one_line(tmp_path, capsys):
    model, _ = made("PPO", tmp_path)
    state = model.state_dict()
    bad = {
        "is none of CleanRL's files": {"weird.weight": torch.zeros(2, 2)},
        "extra.weight, for which there is no place": state | {"extra.weight": torch.zeros(2, 2)},
        "is not finite": state | {"actor.0.bias": torch.full((64,), torch.nan)},
        "is not a plain float32 tensor": state | {"actor.0.bias": torch.zeros(64, dtype=torch.int64)},
        "not a plain float32 tensor, but torch.float64": {name: each.double() for name, each in state.items()},
        "holds several state dicts, actor, critic: save the actor's alone": {"actor": state, "critic": state},
        "not a plain": state | {"actor.0.bias": torch.zeros(64, device="meta")},
        "claims a shape": {"actor.0.weight": torch.zeros(1).expand(10**9, 10)},
        "its 3 outputs are not the 2": {
            name: each[:3] if "actor.4" in name else each for name, each in PPO(actions=3).state_dict().items()
        },
        "is not a state dict": [1, 2],
    }
    for words, content in bad.items():
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=words):
            load(tmp_path / "bad.pt", "cartpole")
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"actor.0.weight": Evil()}))
    with pytest.raises(InputError, match="holds something else than tensors"):
        load(tmp_path / "bad.pt", "cartpole")
    whole = (tmp_path / "model.cleanrl_model").read_bytes()
    for size in range(0, len(whole), len(whole) // 40):
        (tmp_path / "bad.pt").write_bytes(whole[:size])
        with pytest.raises(InputError):
            load(tmp_path / "bad.pt", "cartpole")
    made("PPO continuous", tmp_path)
    with pytest.raises(InputError, match="settle it with --statistics none"):
        load(tmp_path / "model.cleanrl_model", "pendulum")
    assert capsys.readouterr().out == ""
