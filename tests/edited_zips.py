"""Stable-Baselines3 zips with other content than they were saved with, and as policies of ours."""

import io
import json
import os
import zipfile

import torch

from potstill.load.sb3 import load_sb3
from potstill.load.weights import save_import


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def imported(file, env, out, **options):
    """The policy of a zip, saved as one of ours in a new directory `out`."""
    loaded = load_sb3(file, env, **options)
    save_import(loaded, out)
    return loaded


def rewrite(source, target, change, compression=zipfile.ZIP_STORED):
    """A copy of a zip whose members, a dictionary of name to bytes, `change` has changed."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = change(members) or members
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def with_data(**changes):
    def change(members):
        data = json.loads(members["data"])
        members["data"] = json.dumps({k: v for k, v in (data | changes).items() if v is not None}).encode()

    return change


def with_state(edit):
    def change(members):
        state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
        state = edit(state)
        file = io.BytesIO()
        torch.save(state, file)
        members["policy.pth"] = file.getvalue()

    return change
