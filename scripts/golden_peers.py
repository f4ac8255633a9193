#!/usr/bin/env python3
"""Write tests/golden/presets.json: what each preset of `gradclip::compat` has to do, beside what its peer does.

    python scripts/golden_peers.py            write tests/golden/presets.json and tests/golden/PRESETS.md
    python scripts/golden_peers.py --check    write nothing; fail if a file would change

Set up once, with Python 3.11, in a virtual environment outside the repository; burn is built with cargo:

    pip install torch==2.11.0 optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 keras==3.15.1 tensorflow-cpu==2.21.0
    pip install --no-deps megatron-core==0.16.1
    pip install hjson ninja packaging psutil py-cpuinfo pydantic einops msgpack setuptools tqdm wheel
    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation deepspeed==0.19.8

Exact arithmetic, the words for differences and the format are those of `golden.py`.

# How the peers are asked

| peer | what runs |
|---|---|
| torch | `clip_grad_norm_`, `clip_grad_value_` of `torch.nn.utils` |
| optax | `clip_by_global_norm`, `clip_by_block_rms`, `clip` |
| tensorflow | `tf.clip_by_global_norm`, `tf.clip_by_norm`, `tf.clip_by_value` |
| keras | `keras.optimizers.SGD(clipnorm=...)._clip_gradients`, and so on: what `apply` calls. Backend: TensorFlow |
| megatron | `get_grad_norm_fp32` and `clip_grad_by_total_norm_fp32`, behind the `clip_grad > 0` of its optimizer |
| deepspeed | `get_global_norm_of_tensors` and `DeepSpeedZeroOptimizer.unscale_and_clip_grads` (stages 1 and 2), behind the \
overflow check of its `step`; `clip_grad_norm_`; `clip_tensors_by_global_norm` |
| burn | `GradientClipping::{Norm, Value}`, by the program in `scripts/golden_burn`, on burn's Flex back end (its NdArray \
back end has neither f16 nor bf16) |

Two peers expect what a CPU does not have. Megatron puts its scalars on `device='cuda'`: that argument is dropped while
it runs; gradients are given as `decoupled_grad`, where it takes bf16 besides f32 and does not ask for a CUDA tensor;
without TransformerEngine and Apex it uses its own `local_multi_tensor_*`. DeepSpeed's `clip_grad_norm_` averages over
a process group: here that of one process, whose all-reduce changes nothing. `unscale_and_clip_grads` is called with an
object that has the three attributes it reads.

# Format

As in `README.md`, but without the keys that do not apply, and with these more:

| key | meaning |
|---|---|
| `preset` | the function in `gradclip::compat`, as `keras::clipnorm` |
| `arguments` | what it is called with: one threshold, or two bounds |
| `nonfinite` | the policy it stands for: `skip` or `propagate`; null for values |
| `loss_scale` | S, where `loss_scale` is called on the preset |
| `scope` | `global`, or `tensor` where each tensor is clipped by itself; null for values |
| `exact_norms` | with scope `tensor`: the true norm of each; `exact_norm` is null then |

`max_norm`, `eps`, `lo`, `hi` are what the preset has to come to: where a peer takes 0 for "off", `max_norm` is
infinite. `exact_grads` where a norm is not finite is what `nonfinite` makes of the gradients, and so is what
`peer_differs` compares.
"""

import math
import os
import re
import struct
import subprocess
import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.update(
    KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", TF_NUM_INTRAOP_THREADS="1"
)
warnings.simplefilter("ignore")

import golden
from golden import exact_clip_norm, exact_clip_value, exact_norm, float64, grad, raw

import deepspeed.runtime.utils as deepspeed_utils
import keras
import megatron.core.optimizer.clip_grads as megatron_clip
import numpy as np
import optax
import tensorflow as tf
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

BURN = Path(__file__).resolve().parent / "golden_burn"
BURN_VERSION = re.search('burn-optim = { version = "=([^"]+)"', (BURN / "Cargo.toml").read_text())[1]

# ---------------------------------------------------------------------------------------------------------------
# The peers. Each takes the gradients and the arguments of its preset, and returns (norm or None, gradients)
# ---------------------------------------------------------------------------------------------------------------


def to_tensorflow(g):
    return tf.constant(golden.as_integers(g).view(golden.NUMPY_DTYPES[g.fmt.name]))


def from_tensorflow(g, tensor):
    assert tensor.dtype == golden.NUMPY_DTYPES[g.fmt.name], f"the type became {tensor.dtype.name}"
    return golden.as_table(g, np.asarray(tensor).view(f"u{g.fmt.width // 8}"))


def all_from_tensorflow(grads, tensors):
    return [from_tensorflow(g, t) for g, t in zip(grads, tensors, strict=True)]


def tensorflow_global_norm(grads, max_norm):
    clipped, norm = tf.clip_by_global_norm([to_tensorflow(g) for g in grads], max_norm)
    return float(norm), all_from_tensorflow(grads, clipped)


def tensorflow_norm(grads, max_norm):
    return None, all_from_tensorflow(grads, [tf.clip_by_norm(to_tensorflow(g), max_norm) for g in grads])


def tensorflow_value(grads, lo, hi):
    return None, all_from_tensorflow(grads, [tf.clip_by_value(to_tensorflow(g), lo, hi) for g in grads])


def keras_optimizer(option):
    def clip(grads, threshold):
        optimizer = keras.optimizers.SGD(**{option: threshold})
        return None, all_from_tensorflow(grads, optimizer._clip_gradients([to_tensorflow(g) for g in grads]))

    return clip


def on_the_cpu(function):
    """A torch constructor that ignores device='cuda'."""
    return lambda *args, device=None, **kwargs: function(*args, **kwargs)


def megatron(grads, clip_grad):
    parameters = []
    for g in grads:
        parameter = torch.zeros(g.numel, dtype=golden.TORCH_DTYPES[g.fmt.name], requires_grad=True)
        parameter.decoupled_grad = golden.to_torch(g)
        parameters.append(parameter)
    on_cpu = [mock.patch.object(torch, name, on_the_cpu(getattr(torch, name))) for name in ("zeros", "tensor")]
    reduce = mock.patch.object(torch.distributed, "all_reduce", lambda *args, **kwargs: None)  # a group of one
    norm = None
    with on_cpu[0], on_cpu[1], reduce:
        if clip_grad > 0.0:  # MegatronOptimizer.step
            norm = megatron_clip.get_grad_norm_fp32([p.decoupled_grad for p in parameters])
            megatron_clip.clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, use_decoupled_grad=True)
    return norm, [golden.from_torch(g, p.decoupled_grad) for g, p in zip(grads, parameters)]


def deepspeed_zero(grads, clip_grad, loss_scale=1.0):
    tensors = [golden.to_torch(g) for g in grads]
    norm = deepspeed_utils.get_global_norm_of_tensors(tensors)
    overflow = any(not torch.isfinite(t).all() for t in tensors)
    if not overflow:  # step() returns before it clips
        optimizer = SimpleNamespace(clip_grad=clip_grad, loss_scale=loss_scale, device="cpu")
        DeepSpeedZeroOptimizer.unscale_and_clip_grads(optimizer, tensors, norm)
    # The norm is that of the scaled gradients, or the sentinel; the scales of the cases are powers of two.
    norm = norm.item()
    return norm / loss_scale if norm >= 0 else norm, [golden.from_torch(g, t) for g, t in zip(grads, tensors)]


def deepspeed_clip_grad_norm(grads, max_norm):
    parameters = golden.torch_parameters(grads)
    one = SimpleNamespace(get_world_size=lambda group: 1, all_reduce=lambda tensor, group: None)
    groups = SimpleNamespace(_get_data_parallel_group=lambda: None)
    with mock.patch.object(deepspeed_utils, "dist", one), mock.patch.object(deepspeed_utils, "groups", groups):
        norm = deepspeed_utils.clip_grad_norm_(parameters, max_norm)
    return norm.item(), [golden.from_torch(g, p.grad) for g, p in zip(grads, parameters)]


def deepspeed_bf16(grads, max_norm):
    tensors = [golden.to_torch(g) for g in grads]
    norm = deepspeed_utils.clip_tensors_by_global_norm(tensors, max_norm)
    return norm.item(), [golden.from_torch(g, t) for g, t in zip(grads, tensors)]


class Burn:
    """The program of scripts/golden_burn, a line for each tensor."""

    process = None

    def ask(self, line):
        if self.process is None:
            command = ["cargo", "run", "--quiet", "--locked", "--manifest-path", str(BURN / "Cargo.toml")]
            environment = {"CARGO_TARGET_DIR": str(BURN.parent.parent / "target" / "golden_burn")} | os.environ
            environment["BURN_DEVICE"] = "flex"
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"burn did not answer to {line}")
        return answer.replace("-", "")

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()


BURN_PROGRAM = Burn()


def burn(how):
    def clip(grads, threshold):
        bits = struct.pack(">f", threshold).hex()
        out = []
        for g in grads:
            values = golden.as_integers(g)
            answer = BURN_PROGRAM.ask(f"{how} {bits} {g.fmt.name} {values.tobytes().hex() or '-'}")
            out.append(golden.as_table(g, np.frombuffer(bytes.fromhex(answer), values.dtype)))
        return None, out

    return clip


# ---------------------------------------------------------------------------------------------------------------
# The presets
# ---------------------------------------------------------------------------------------------------------------


class Preset:
    def __init__(self, name, source, ask, eps=0.0, nonfinite="propagate", scope="global", zero_is_off=False,
                 dtypes=("f32", "f16", "bf16"), f32_threshold=False, norm_type="2"):
        self.name, self.source, self.ask, self.eps, self.nonfinite = name, source, ask, eps, nonfinite
        self.scope, self.zero_is_off, self.dtypes, self.f32_threshold = scope, zero_is_off, dtypes, f32_threshold
        self.norm_type = norm_type

    @property
    def peer(self):
        return self.name.split("::")[0]

    def argument(self, value):
        return float(np.float32(value)) if self.f32_threshold else float(value)

    def max_norm(self, argument):
        return math.inf if self.zero_is_off and argument == 0 else argument


def optax_block_rms(grads, threshold):
    updates, _ = optax.clip_by_block_rms(threshold).update([golden.to_jax(g) for g in grads], None)
    return None, [golden.from_jax(g, u) for g, u in zip(grads, updates)]


def of_golden(function):
    return lambda grads, max_norm: function(grads, max_norm, "2")


def symmetric(function):
    return lambda grads, v: function(grads, -v, v)


FOUR = ("f32", "f16", "bf16", "f64")
ZERO = "stage_1_and_2.py, unscale_and_clip_grads"
NORMS = [
    Preset("torch::clip_grad_norm", "clip_grad.py", of_golden(golden.torch_clip_norm), 1e-6, dtypes=FOUR),
    Preset("optax::clip_by_global_norm", "_clipping.py", of_golden(golden.optax_clip_norm), dtypes=FOUR),
    Preset("optax::clip_by_block_rms", "_clipping.py", optax_block_rms, scope="tensor", dtypes=FOUR, norm_type="rms"),
    Preset("tensorflow::clip_by_global_norm", "clip_ops.py", tensorflow_global_norm),
    Preset("tensorflow::clip_by_norm", "clip_ops.py", tensorflow_norm, scope="tensor"),
    Preset("keras::global_clipnorm", "base_optimizer.py", keras_optimizer("global_clipnorm"), zero_is_off=True),
    Preset("keras::clipnorm", "base_optimizer.py", keras_optimizer("clipnorm"), scope="tensor", zero_is_off=True),
    Preset("megatron::clip_grad", "clip_grads.py", megatron, 1e-6, "skip", zero_is_off=True, dtypes=("f32", "bf16")),
    Preset("deepspeed::gradient_clipping", ZERO, deepspeed_zero, 1e-6, "skip", zero_is_off=True),
    Preset("burn::norm", "base.rs", burn("norm"), scope="tensor", dtypes=FOUR, f32_threshold=True),
]
# Other functions of DeepSpeed, for which the same preset stands.
OTHERS = [
    Preset("deepspeed::gradient_clipping", f"utils.py, {name}", function, 1e-6, "skip", zero_is_off=True)
    for name, function in (
        ("clip_grad_norm_", deepspeed_clip_grad_norm), ("clip_tensors_by_global_norm", deepspeed_bf16)
    )
]
VALUES = [
    Preset("torch::clip_grad_value", "clip_grad.py", symmetric(golden.torch_clip_value), dtypes=FOUR),
    Preset("optax::clip", "_clipping.py", symmetric(golden.optax_clip_value), dtypes=FOUR),
    Preset("tensorflow::clip_by_value", "clip_ops.py", tensorflow_value),
    Preset("keras::clipvalue", "base_optimizer.py", keras_optimizer("clipvalue"), zero_is_off=True),
    Preset("burn::value", "base.rs", burn("value"), dtypes=FOUR, f32_threshold=True),
]


def policy(preset, grads, norm_bits, max_norm):
    """What the preset makes of gradients whose norm is not finite."""
    if preset.nonfinite == "skip" or max_norm == math.inf:
        return [list(g.bits) for g in grads]
    return golden.propagated(grads, float64(norm_bits))


def clipped(preset, grads, max_norm):
    """(bits of the norm, gradients) of a list with one norm."""
    bits = exact_norm(grads, preset.norm_type)
    if not math.isfinite(float64(bits)) and max_norm >= 0:
        return bits, policy(preset, grads, bits, max_norm)
    return bits, exact_clip_norm(grads, bits, max_norm, preset.eps)


def ask(preset, grads, arguments):
    try:
        return *preset.ask(grads, *arguments), None
    except Exception as error:  # whatever it raises is its answer
        return None, None, f"raises {type(error).__name__}: {(str(error).splitlines() or ['(no words)'])[0]}"


def scaled_case(preset, label, grads, loss_scale, threshold):
    """Unscaled and clipped, as `preset(threshold).loss_scale(loss_scale)`."""
    max_norm, bits = preset.max_norm(threshold), exact_norm(grads, "2")
    norm, out = golden.exact_unscale_and_clip_norm(grads, bits, max_norm, preset.eps, loss_scale)
    out = policy(preset, grads, norm, max_norm) if out is None else out
    case = golden.case(
        f"{label}_scale_{loss_scale:g}_max_{threshold:g}/{preset.name}", f"loss scale; {preset.peer} {preset.source}",
        preset.peer, "clip_grad_norm", grads, ask(preset, grads, [threshold, loss_scale]), (float64(norm), out), True,
        max_norm=max_norm, norm_type="2", eps=preset.eps,
    )
    return case | {"preset": preset.name, "arguments": [golden.hex64(threshold)], "nonfinite": preset.nonfinite,
                   "scope": "global", "loss_scale": golden.hex64(loss_scale)}


def norm_case(preset, label, what, grads, threshold):
    argument = preset.argument(threshold)
    max_norm = preset.max_norm(argument)
    lists = [[g] for g in grads] if preset.scope == "tensor" else [grads]
    answers = [clipped(preset, one, max_norm) for one in lists]
    legal = max_norm >= 0
    out = [bits for _, of_list in answers for bits in of_list] if legal else None
    is_global = preset.scope == "global"
    truth = float64(answers[0][0]) if is_global else None, out
    case = golden.case(
        f"{label}/{preset.name}", f"{what}; {preset.peer} {preset.source}", preset.peer, "clip_grad_norm", grads,
        ask(preset, grads, [argument]), truth, legal, max_norm=max_norm, norm_type=preset.norm_type, eps=preset.eps,
    )
    norms = None if is_global else [golden.hex64(float64(bits)) for bits, _ in answers]
    return case | {"preset": preset.name, "arguments": [golden.hex64(argument)], "nonfinite": preset.nonfinite,
                   "scope": preset.scope, "exact_norms": norms}


def value_case(preset, label, what, grads, *values):
    arguments = [preset.argument(v) for v in values]
    if len(arguments) == 1:
        v = math.inf if preset.zero_is_off and arguments[0] == 0 else arguments[0]
        lo, hi = -v, v
    else:
        lo, hi = arguments
    case = golden.case(
        f"{label}/{preset.name}", f"{what}; {preset.peer} {preset.source}", preset.peer, "clip_grad_value", grads,
        ask(preset, grads, arguments), (None, exact_clip_value(grads, lo, hi)), lo <= hi, lo=lo, hi=hi,
    )
    return case | {"preset": preset.name, "arguments": [golden.hex64(v) for v in arguments], "nonfinite": None,
                   "scope": None, "exact_norms": None}


# ---------------------------------------------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------------------------------------------


def norm_lists(preset):
    """(label, what, gradients, threshold). The norm of the first lists is 13, those of their tensors are 5 and 12."""
    for dtype in preset.dtypes:
        thirteen = [grad(dtype, [3, 4]), grad(dtype, [12])]
        at = (5, 12) if preset.scope == "tensor" else (13,)
        for threshold in (1, 6, *at, 20, 0, math.inf):
            yield f"thirteen_{dtype}_max_{threshold}", "thresholds", thirteen, threshold
        yield f"zero_{dtype}_max_1", "zero norm", [grad(dtype, [0.0, -0.0]), grad(dtype, [0.0])], 1
        yield f"zero_{dtype}_max_0", "zero norm", [grad(dtype, [0.0, -0.0]), grad(dtype, [0.0])], 0
        for name, value in (("nan", math.nan), ("inf", math.inf), ("minus_inf", -math.inf)):
            yield f"{name}_{dtype}", "not finite", [grad(dtype, [1, value, -2]), grad(dtype, [2, -0.5])], 1
        yield f"empty_{dtype}", "empty tensors", [raw(dtype, []), grad(dtype, [3, -4]), raw(dtype, [])], 1
        rng = golden.random.Random(f"presets {dtype}")
        normal = [golden.normal_grad(rng, dtype, 33), golden.normal_table(rng, dtype, 4097)]
        yield f"normal_{dtype}_clipped", "random", normal, 0.25
        yield f"normal_{dtype}_not_clipped", "random", normal, 1000
    f32 = [grad("f32", [3, 4]), grad("f32", [12])]
    yield "nan_max_inf", "not finite, an infinite threshold", [grad("f32", [1, math.nan]), grad("f32", [2])], math.inf
    yield "inf_max_0", "not finite, threshold 0", [grad("f32", [1, math.inf]), grad("f32", [2])], 0
    yield "inf_and_nan", "not finite", [grad("f32", [1, math.inf]), grad("f32", [2, math.nan]), grad("f32", [2])], 1
    yield "empty_list", "no tensors", [], 1
    yield "empty_only", "empty tensors", [raw("f32", []), raw("f32", [])], 1
    yield "f32_1e20", "squares overflow", [grad("f32", [1e20, 1]), grad("f32", [-1e20])], 1
    yield "f32_1e-30", "squares underflow", [grad("f32", [1e-30, -1e-30])], 1e-31
    yield "f32_41", "a threshold with 41 * (1 / 41) != 1", [grad("f32", [3, 4])], 41
    if "f16" in preset.dtypes:
        yield "f16_300", "squares overflow", [grad("f16", [300])], 1
        yield "f16_200_max_1000", "not clipped, but 200 * 1000 is beyond f16", [grad("f16", [200])], 1000
    if "bf16" in preset.dtypes:
        yield "bf16_1e20", "squares overflow", [grad("bf16", [1e20, -1e20])], 1
    for threshold in (-1, math.nan):
        yield f"threshold_{threshold}", "not a threshold", f32, threshold


def value_lists(preset):
    for dtype in preset.dtypes:
        special = [golden.special_values(dtype)]
        for value in (1, 0.1, 0, math.inf):
            yield f"special_{dtype}_{value}", "special values", special, value
        rng = golden.random.Random(f"preset values {dtype}")
        normal = [golden.normal_grad(rng, dtype, 33), golden.normal_table(rng, dtype, 4097)]
        yield f"normal_{dtype}", "random", normal, 0.7
    yield "empty", "empty tensors", [raw("f32", []), grad("f32", [3, -4, 0.5]), raw("f32", [])], 1
    yield "empty_list", "no tensors", [], 1
    for value in (-1, math.nan):
        yield f"value_{value}", "not a threshold", [grad("f32", [-3, 0.5, 4, -0.25])], value


def deepspeed_scaled_cases(preset):
    for dtype in preset.dtypes:
        thirteen = [grad(dtype, [3, 4]), grad(dtype, [12])]
        rng = golden.random.Random(f"preset scales {dtype}")
        normal = [golden.normal_grad(rng, dtype, 33), golden.normal_table(rng, dtype, 4097)]
        for loss_scale, thresholds in ((1024.0, (13 / 2048, 13 / 1024, 1.0, 0.0)), (0.5, (1.0, 26.0, 27.0, 0.0))):
            for threshold in thresholds:
                yield scaled_case(preset, f"thirteen_{dtype}", thirteen, loss_scale, threshold)
        yield scaled_case(preset, f"normal_{dtype}", normal, 1024.0, 0.01)
        yield scaled_case(preset, f"zero_{dtype}", [grad(dtype, [0.0, -0.0])], 1024.0, 1.0)
        for name, value in (("nan", math.nan), ("inf", math.inf)):
            yield scaled_case(preset, f"{name}_{dtype}", [grad(dtype, [1, value]), grad(dtype, [2])], 1024.0, 1.0)


def preset_cases():
    for preset in NORMS:
        for label, what, grads, threshold in norm_lists(preset):
            yield norm_case(preset, label, what, grads, threshold)
        if preset.ask is deepspeed_zero:
            yield from deepspeed_scaled_cases(preset)
    for preset in OTHERS:
        function = preset.source.split(", ")[1]
        for label, what, grads, threshold in norm_lists(preset):
            # Their callers ask whether clipping is on, and only these cases are theirs.
            if threshold > 0 and label.endswith(("_max_1", "_max_13", "_max_20", "nan_f32", "inf_f32", "f32_clipped")):
                yield norm_case(preset, f"{label}/{function}", what, grads, threshold)
    for preset in VALUES:
        for label, what, grads, value in value_lists(preset):
            bounds = (-value, value) if preset.name.startswith("tensorflow") else (value,)
            yield value_case(preset, label, what, grads, *bounds)
        if preset.name.startswith("tensorflow"):
            for dtype in preset.dtypes:
                yield value_case(preset, f"bounds_{dtype}", "bounds", [golden.special_values(dtype)], -0.25, 1)
            yield value_case(preset, "bounds_crossed", "not bounds", [grad("f32", [-3, 0.5, 4])], 1.5, -1)


# ---------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------


def versions():
    return golden.versions() | {
        "script": "scripts/golden_peers.py",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "megatron-core": version("megatron-core"),
        "deepspeed": version("deepspeed"),
        "burn": BURN_VERSION,
    }


def without_nulls(case):
    return {key: value for key, value in case.items() if value is not None}


def preset_table(cases):
    rows = []
    for name in dict.fromkeys(c["preset"] for c in cases):
        mine = [c for c in cases if c["preset"] == name]
        differs = sum(c["peer_differs"] is not None for c in mine)
        scope, nonfinite = mine[0]["scope"] or "", mine[0]["nonfinite"] or ""
        rows.append([f"`{name}`", mine[0]["op"], scope, nonfinite, len(mine), differs])
    return golden.markdown_table(["preset", "op", "scope", "NaN and Inf", "cases", "peer differs"], rows)


def difference_table(cases):
    rows = {}
    for c in cases:
        if c["peer_differs"]:
            what = c["peer_differs"].split(": ", 1)[1]
            rows.setdefault((c["preset"], what), []).append(c["name"].replace(f"/{c['preset']}", ""))
    cells = [[f"`{preset}`", what, ", ".join(f"`{n}`" for n in names)] for (preset, what), names in rows.items()]
    return golden.markdown_table(["preset", "what the peer does", "cases"], cells)


def page(cases):
    asked, form = (part.split("\n", 1)[1].strip() for part in __doc__.split("\n# ")[1:])
    setup = "\n".join(line for line in __doc__.splitlines() if line.startswith("    ") and "pip install" in line)
    made_with = ", ".join(f"{k} {v}" for k, v in versions().items() if k != "script")
    parts = [
        "# Golden files of the presets",
        "What each preset of `gradclip::compat` has to do, beside what its peer does. Written by\n"
        "`scripts/golden_peers.py`, this page included: change the script, not the files.",
        f"Made with {made_with}. To regenerate:",
        f"{setup}\n    python scripts/golden_peers.py       # --check: write nothing, fail if a file would change",
        preset_table(cases),
        "## How the peers are asked",
        asked,
        "## Format",
        form,
        "## Where a peer differs from its preset",
        f"Clipping by norm: by more than {golden.TOLERANCE_ULPS} units in the last place of the peer's arithmetic (the "
        "narrowest dtype of the list). Clipping by value: at all.",
        difference_table(cases),
    ]
    return "\n\n".join(parts) + "\n"


def generate():
    torch.set_num_threads(1)
    golden.self_check()
    cases = list(preset_cases())
    BURN_PROGRAM.close()
    names = Counter(c["name"] for c in cases)
    assert max(names.values()) == 1, f"not unique: {[n for n, k in names.items() if k > 1]}"
    return {"presets.json": golden.file_text([without_nulls(c) for c in cases], versions()), "PRESETS.md": page(cases)}


if __name__ == "__main__":
    sys.exit(golden.run(__doc__, generate))
