"""ONNX in a browser's runtime: onnxruntime-web under Node computes what PyTorch does."""

import base64
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from small_runs import sharpened

from potstill.export import onnx as exporter
from potstill.export.actor import Actor, layers, verify
from potstill.networks import NetworkConfig, Policy

SCRIPT = """
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const kinds = {uint8: Uint8Array, bool: Uint8Array, float32: Float32Array, float64: Float64Array};
async function answer({model, observations, dtype, shape}) {
    const session = await ort.InferenceSession.create(Buffer.from(model, "base64"));
    const bytes = Buffer.from(observations, "base64");
    const numbers = new kinds[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    const found = await session.run({observation: new ort.Tensor(dtype, numbers, shape)});
    return session.outputNames.map(name => Array.from(found[name].data, Number));
}
(async () => {
    const cases = JSON.parse(require("fs").readFileSync(0));
    const told = [];
    for (const each of cases) told.push(await answer(each));
    console.log(JSON.stringify(told));
})();
"""
TASKS = {
    "numbers": ((4,), np.float32, {"width": "1/4"}),
    "far numbers": ((3,), np.float64, {"width": "1/8"}),
    "leaky": ((4,), np.float32, {"width": "1/4", "options": ("activation=leaky_relu",)}),
    "grid": ((10, 10, 4), np.bool_, {"width": "1/8"}),
    "frames": ((4, 84, 84), np.uint8, {"width": "1/32"}),
    "framewise": ((4, 84, 84), np.uint8, {"width": "1/16", "family": "framewise"}),
    "depthwise": ((4, 84, 84), np.uint8, {"width": "1/16", "family": "depthwise"}),
    "continuous": ((3,), np.float32, {"width": "1/8"}),
}


def made(name):
    shape, dtype, network = TASKS[name]
    continuous = name == "continuous"
    policy = Policy(NetworkConfig(**network), shape, 2 if continuous else 3, continuous, dtype=np.dtype(dtype).name)
    sharpened(policy, times=100)
    policy.normalise_by(torch.full_like(policy.mean, 0.25), torch.full_like(policy.mean, 2.0))
    shown = np.random.default_rng(0).normal(0, 2, (8, *shape))
    shown = (shown * 60).clip(0, 255) if dtype == np.uint8 else shown > 0 if dtype == np.bool_ else shown
    bounds = np.array([[-2.0, 0.0], [2.0, 0.5]], np.float32) if continuous else None
    return Actor(policy, layers(policy), shown.astype(dtype), [] if continuous else [0, 1, 2], bounds)


@pytest.fixture(scope="module")
def web():
    """Of every task: what is to be computed, and what one process of Node did."""
    node = shutil.which("node")
    there = node and subprocess.run(
        [node, "-e", "require.resolve('onnxruntime-web')"], capture_output=True, check=False
    )
    if not there or there.returncode:
        pytest.skip("needs node, and NODE_PATH=DIR/node_modules after npm install --prefix DIR onnxruntime-web")
    actors = {name: made(name) for name in TASKS}
    cases = [
        {
            "model": base64.b64encode(exporter.build(actor).SerializeToString()).decode(),
            "observations": base64.b64encode(actor.observations.tobytes()).decode(),
            "dtype": actor.observations.dtype.name,
            "shape": actor.observations.shape,
        }
        for actor in actors.values()
    ]
    done = subprocess.run([node, "-e", SCRIPT], input=json.dumps(cases).encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(actors, zip(actors.values(), json.loads(done.stdout), strict=True), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_it_computes_what_pytorch_does(web, name):
    actor, (outputs, actions) = web[name]
    outputs = np.array(outputs, np.float32).reshape(len(actor.observations), -1)
    if actor.bounds is None:
        verify(actor, outputs, np.array(actions), "onnxruntime-web")
        return
    centre, half = actor.units
    verify(actor, (outputs - centre) / half, np.array(actions).reshape(outputs.shape), "onnxruntime-web")
