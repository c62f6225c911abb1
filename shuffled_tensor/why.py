# SPDX-License-Identifier: MIT
"""Which backend and kernels each layer of a checkpoint would go to, on this machine or on another one: ``python -m
shuffled_tensor why``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shuffled_tensor.backends.aiter import versions
from shuffled_tensor.checkpoint.inspection import in_words
from shuffled_tensor.checkpoint.load import Experts, load_experts
from shuffled_tensor.checkpoint.source import CheckpointError
from shuffled_tensor.device import arch as arch_of
from shuffled_tensor.device import meta_as, override_arch
from shuffled_tensor.moe.activations import ACTIVATIONS, ActivationName
from shuffled_tensor.moe.models import Layer, explain_layer, layer_in, tokens_of
from shuffled_tensor.moe.op import MANY, Kernels
from shuffled_tensor.tensor.weight import ShuffledMXFP4Tensor
from shuffled_tensor.testing import fake_aiter

__all__ = ["ARCHITECTURES", "Answer", "Why", "why"]

ARCHITECTURES = {
    "cpu": "no GPU",
    "gfx950": "MI350X, MI355X",
    "gfx942": "MI300X, MI325X",
    "gfx90a": "MI210, MI250",
    "sm_70": "V100",
    "sm_75": "T4",
    "sm_80": "A100",
    "sm_86": "A10, A40",
    "sm_89": "L4, L40S",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_103": "B300",
    "sm_120": "RTX PRO 6000 Blackwell",
}
"""Machines that can be asked about from another one, by the architecture of their GPUs."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""Of a layer, in its name; the first one counts."""

_TOPK = 8
"""Experts of a token, where nobody says how many."""


@dataclass(frozen=True)
class Answer:
    """Where layers go that have the same sizes and the same answer."""

    layers: str
    """Their names, as one: ``"model.layers.0-35.mlp.experts"``."""
    count: int
    experts: int
    intermediate: int
    hidden: int
    bias: bool
    nbytes: int
    """Of one layer's weights in memory, with padding."""
    backend: str | None
    """None where the checkpoint holds the layer in another dtype, so that it is no layer of ours."""
    layout: str | None
    """In which the backend reads them; None where it reads any."""
    routes: tuple[Kernels, ...]
    passed_over: tuple[tuple[str, str], ...]
    """Preferred backends, and why they do not take these layers."""


@dataclass(frozen=True)
class Why:
    """What :func:`why` found."""

    path: str
    arch: str
    machine: str
    """In words."""
    aiter: str | None
    """Which one the answer holds for, in words; None where it has no part in it."""
    derived: bool
    """Whether aiter's choice was derived from what is known of its version, without its tuned tables."""
    activation: ActivationName
    parameters: dict[str, float]
    """All of the activation's."""
    topk: int
    sources: dict[str, str]
    """Who says so, of activation and topk."""
    tokens: tuple[int, ...]
    """The numbers of tokens that were asked about; empty for all."""
    answers: tuple[Answer, ...]

    def __str__(self) -> str:
        limits = (f"{name}={value:g}" for name, value in self.parameters.items() if value < math.inf)
        said = {"machine": self.machine}
        if self.aiter is not None:
            said["aiter"] = self.aiter
        said["activation"] = f"{', '.join((self.activation, *limits))}: {self.sources['activation']}"
        said["topk"] = f"{self.topk}: {self.sources['topk']}"
        count = sum(answer.count for answer in self.answers)
        total = in_words(sum(answer.count * answer.nbytes for answer in self.answers))
        lines = [
            *(f"{name:14}{text}" for name, text in said.items()),
            "",
            *_table(self.answers, self.tokens),
            f"layers: {count}, memory with padding: {total}",
        ]
        reasons: dict[tuple[str, str], list[str]] = {}
        for answer in self.answers:
            for passed_over in answer.passed_over:
                reasons.setdefault(passed_over, []).append(answer.layers)
        for (name, reason), where in reasons.items():
            some = "" if len(where) == len(self.answers) else f" for {', '.join(where)}"
            lines.append(f"passed over   {name}{some}: {reason}")
        return "\n".join(lines)

    def json(self) -> str:
        """The same for other programs. The last range of tokens has no ``last``."""
        layers = [
            vars(answer)
            | {
                "routes": [
                    {
                        "first": route.tokens[0],
                        "last": None if route.tokens[-1] >= MANY else route.tokens[-1],
                        "tokens": [count for count in self.tokens if count in route.tokens],
                        "kernels": route.name,
                        "activations": route.activations,
                    }
                    for route in _asked(answer.routes, self.tokens)
                ],
                "passed_over": dict(answer.passed_over),
            }
            for answer in self.answers
        ]
        parameters = {name: None if value == math.inf else value for name, value in self.parameters.items()}
        return json.dumps(vars(self) | {"parameters": parameters, "answers": layers}, indent=1)


def why(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    aiter: str | None = None,
    tokens: Sequence[int] = (),
    activation: ActivationName | None = None,
    topk: int | None = None,
) -> Why:
    """Which backend and kernels each layer of a checkpoint would go to; reads headers only, and runs nothing.

    Args:
        path: a safetensors file, or a directory of them. The config.json beside it says the activation, its parameters
            and topk.
        arch: of a machine's GPU, one of :data:`ARCHITECTURES`; None for this machine, as ``explain`` sees it.
        aiter: a release of it, or a pull request or commit. If another one is installed here, or none, what it would
            choose is derived from what is known of its version. None for the one that is installed here.
        tokens: the numbers of them to answer for; all, if there are none.
        activation, topk: instead of what config.json says.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: the files, or the config.json beside them, cannot be made sense of.
        ValueError: an architecture or a version of aiter that is not known.
    """
    if arch is not None and arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHITECTURES)}")
    if not all(0 < count <= MANY for count in tokens):
        raise ValueError(f"numbers of tokens must be from 1 to {MANY}, found {', '.join(map(str, tokens))}")
    version = None
    if aiter is not None and aiter.removeprefix("v") != versions.release():  # else the installed one answers
        version = versions.version_named(aiter)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, found {activation!r}")
    if topk is not None and topk < 1:
        raise ValueError(f"topk must be 1 or more, found {topk}")
    layers = _load(path)
    biases = any(layer.w13_bias is not None or layer.w2_bias is not None for layer in layers.values())
    layer, sources = _call(Path(path), biases, activation, topk)
    with _machine(arch) as machine, nullcontext() if version is None else fake_aiter(version.name, tuned=False):
        name = arch_of("meta")
        grouped: dict[Answer, list[int]] = {}
        for each, experts in layers.items():
            number = _NUMBER.search(each)
            found = _answer(_NUMBER.sub("*", each, count=1) or "w13_weight, w2_weight", experts, layer)
            grouped.setdefault(found, []).append(int(number[0]) if number else 0)
        about = _about(aiter, version) if name == versions.ARCH else None
    answers = [
        replace(found, layers=found.layers.replace("*", _ranges(numbers)), count=len(numbers))
        for found, numbers in grouped.items()
    ]
    return Why(
        str(path),
        name,
        machine,
        about,
        version is not None and about is not None,  # else no aiter has a part in it
        layer.activation,
        {name: value for name, value in ACTIVATIONS[layer.activation].named(layer.parameters).items() if value},
        layer.topk or _TOPK,
        sources,
        tuple(sorted(set(tokens))),
        tuple(answers),
    )


def _load(path: str | os.PathLike[str]) -> dict[str, Experts]:
    """All layers, on the meta device, in the order of their numbers."""
    try:
        layers = load_experts(path, device="meta")
    except CheckpointError as error:
        try:  # in case that the order of rows is all that is not known: sizes do not depend on it
            layers = load_experts(path, device="meta", row_order="contiguous")
        except ValueError:
            raise error from None
    return dict(sorted(layers.items(), key=lambda item: [int(each) for each in re.findall(r"\d+", item[0])]))


def _call(
    path: Path, biases: bool, activation: ActivationName | None, topk: int | None
) -> tuple[Layer, dict[str, str]]:
    """How the checkpoint's layers are called, and who says so of activation and topk."""
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{beside} is no JSON: {error}") from error
        try:
            if not isinstance(config, dict):
                raise ValueError("no JSON object")
            layer = layer_in(config, activation)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{beside}: {error}; --activation says what the layers have") from error
        said = f"config.json of {layer.model_type}"
        sources = {"activation": said, "topk": said if layer.topk else "assumed, since config.json does not say"}
    else:
        layer = layer_in({}, activation or ("swiglu" if biases else "silu"))
        assumed = "assumed, since no config.json is beside the checkpoint"
        sources = {
            "activation": f"{assumed}, and layers have biases as gpt-oss's" if biases else assumed,
            "topk": assumed,
        }
    if activation is not None:
        sources["activation"] = "--activation"
    if topk is not None:
        layer, sources["topk"] = layer._replace(topk=topk), "--topk"
    return layer, sources


@contextmanager
def _machine(arch: str | None) -> Iterator[str]:
    """Inside, the meta device stands for a GPU of this machine or of another one, which is said in words."""
    if arch is not None:
        gpu = arch.startswith(("gfx", "sm_"))
        with override_arch(arch, "meta"):
            yield f"{arch} ({ARCHITECTURES[arch]}){', with PyTorch and Triton for it' if gpu else ''}"
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    with meta_as(device):
        yield f"this one: {f'{device}, {torch.cuda.get_device_name(device)}, ' if cuda else ''}{arch_of(device)}"


def _about(asked: str | None, version: versions.Version | None) -> str:
    """Which aiter the answer is of."""
    if version is not None:
        return (
            f"{asked}, which is not installed here: derived from what is known of its API ({version.name}), with "
            "flydsl and without aiter's tuned tables"
        )
    if versions.unusable(torch.device("meta")) is None:
        return versions.installed()
    return "none that can be used here; --aiter VERSION derives the answer for one that is not installed"


def _answer(name: str, experts: Experts, layer: Layer) -> Answer:
    w13, w2 = experts.w13, experts.w2
    bias = experts.w13_bias is not None or experts.w2_bias is not None
    nbytes = sum(
        each.qdata.nbytes + each.scale.nbytes if isinstance(each, ShuffledMXFP4Tensor) else each.nbytes
        for each in (w13, w2)
    )
    found = Answer(name, 1, w13.shape[0], w2.shape[2], w13.shape[2], bias, nbytes, None, None, (), ())
    if not (isinstance(w13, ShuffledMXFP4Tensor) and isinstance(w2, ShuffledMXFP4Tensor)):
        plain = next(each for each in (w13, w2) if not isinstance(each, ShuffledMXFP4Tensor))
        said = f"none of ours: {str(plain.dtype).removeprefix('torch.')} in the checkpoint"
        return replace(found, routes=(Kernels(range(1, MANY + 1), said, ""),))
    topk = min(layer.topk or _TOPK, found.experts)  # a shared expert is one
    report = explain_layer(w13, w2, experts.w13_bias, experts.w2_bias, topk, layer.activation, layer.parameters)
    return replace(
        found,
        backend=report.backend,
        layout=report.layout,
        routes=report.routes,
        passed_over=tuple(report.passed_over.items()),
    )


def _ranges(numbers: list[int]) -> str:
    """Numbers in their order, as ``"0-3,7"``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _asked(routes: tuple[Kernels, ...], tokens: tuple[int, ...]) -> list[Kernels]:
    """The routes of the numbers of tokens that were asked about."""
    return [route for route in routes if not tokens or any(count in route.tokens for count in tokens)]


def _table(answers: tuple[Answer, ...], tokens: tuple[int, ...]) -> list[str]:
    """A line for each range of tokens; what is the same as in the line above is left out."""
    rows = [("layers", "E x I x K", "a layer", "backend", "layout", "tokens", "kernels", "activations")]
    for answer in answers:
        sizes = f"{answer.experts} x {answer.intermediate} x {answer.hidden}{', biases' if answer.bias else ''}"
        layout = "" if answer.backend is None else answer.layout or "any"
        cells = (answer.layers, sizes, in_words(answer.nbytes), answer.backend or "none", layout)
        for route in _asked(answer.routes, tokens):
            counts = ", ".join(str(count) for count in tokens if count in route.tokens) or tokens_of(route)
            rows.append((*cells, counts, route.name, route.activations))
            cells = ("",) * 5
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
