"""The kernels of benches/variants/variants.json: PTX of the crate or of benches/variants, one entry of it, and what is
replaced in its text. Twin: benches/variants/kernels.rs."""

import json
import re

from cuda_packages import PREBUILT, ROOT

FOLDER = ROOT / "benches" / "variants"


def described():
    return json.loads((FOLDER / "variants.json").read_text())


def only(text, entry):
    """What stands before the first entry, and this one."""
    before, *entries = text.split(".visible .entry ")
    mine = [part for part in entries if part.startswith(f"{entry}(")]
    assert len(mine) == 1, f"{len(mine)} entries are called {entry}"
    return before + ".visible .entry " + mine[0]


def ptx_of(kernel):
    """The text of one of the kernels."""
    folder = FOLDER if (FOLDER / f"{kernel['ptx']}.ptx").exists() else PREBUILT
    text = only((folder / f"{kernel['ptx']}.ptx").read_text(), kernel["entry"])
    for old, new in kernel.get("replace", []):
        assert old in text, f"{kernel['name']}: there is no {old!r}"
        text = text.replace(old, new)
    return text


def target_of(text):
    """The oldest compute capability that takes it, as 10 * major + minor."""
    return int(re.search(r"^\.target sm_(\d+)", text, re.MULTILINE)[1])
