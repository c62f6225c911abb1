# SPDX-License-Identifier: MIT
"""``shuffled-tensor``: inspect, verify and convert checkpoints, see a layout, and find out what runs here."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

from shuffled_tensor import __version__
from shuffled_tensor.backends.base import BACKENDS, unavailable
from shuffled_tensor.backends.doctor import doctor
from shuffled_tensor.device import arch
from shuffled_tensor.drawing import png
from shuffled_tensor.layouts import LAYOUTS, ROW_MAJOR
from shuffled_tensor.moe.activations import ACTIVATIONS
from shuffled_tensor.picture import picture
from shuffled_tensor.rank_picture import rank_picture
from shuffled_tensor.tensor.geometry import RowOrder, ShardDim

_LAYOUTS = [name for name, layout in LAYOUTS.items() if layout is not ROW_MAJOR]


_NOTHING_TO_COMPARE = 3
_NOBODY_READS = 141  # 128 + SIGPIPE, as of programs that this signal ends
_EXTRAS = {"safetensors": "checkpoint", "tqdm": "checkpoint", "vl_convert": "png"}
_STATUSES = (
    "exit status: 0 where all is well; 1 where something is wrong, with a line that says what; 2 for a command line "
    "that is none; 3 for verify where nothing has a checksum to be compared with; 130 after Ctrl-C; "
    "141 where nobody reads standard output any more, as after | head"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    try:
        try:
            options = _parser().parse_args(arguments)
            with _told():
                return int(options.run(options))
        finally:
            _flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(f"error: {error.name} is missing: pip install 'shuffled_tensor[{_EXTRAS[error.name]}]'", file=sys.stderr)
    except BrokenPipeError:
        return _NOBODY_READS
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


@contextmanager
def _told() -> Iterator[None]:
    """What the package notes, on standard error."""
    log, handler = logging.getLogger("shuffled_tensor"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _flush() -> None:
    """Write what was printed, and not when the process ends, where nobody could say what went wrong."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again
        raise


def _parser() -> argparse.ArgumentParser:
    script = Path(sys.argv[0]).stem == "shuffled-tensor"
    parser = argparse.ArgumentParser(
        prog="shuffled-tensor" if script else "python -m shuffled_tensor",
        description="MXFP4 expert weights: checkpoints and layouts",
        epilog=_STATUSES,
    )
    parser.add_argument("--version", action="version", version=f"shuffled_tensor {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="a table of the MXFP4 weights in a checkpoint, and their problems")
    inspect.add_argument("path", help="a safetensors file, or a directory of them")
    inspect.add_argument("--read", action="store_true", help="read the weights too, and compare them with checksums")
    inspect.add_argument("--ranks", type=_positive, help="say what each of so many ranks would hold")
    _add_json(inspect)
    _add_names(inspect)
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify", help="compare every weight with its checksum; exit 1 where one is damaged, 3 where none has one"
    )
    verify.add_argument("path", help="a safetensors file, or a directory of them")
    _add_json(verify)
    _add_names(verify)
    verify.set_defaults(run=_verify)

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint again, its experts with checksums, and in a kernel's layout if wanted",
        description="A directory becomes a directory, with the files beside its shards. In the canonical layout "
        "experts keep their names and bytes, and checksums are in shuffled_tensor.json. A run that was stopped is "
        "gone on with by the same command.",
    )
    convert.add_argument("source", help="a safetensors file, or a directory of them")
    convert.add_argument("destination", help="the directory to write, or the file where the source is one")
    convert.add_argument("--layout", choices=["canonical", *_LAYOUTS], default="canonical", help="of the bytes written")
    convert.add_argument("--single-file", action="store_true", help="write a directory as one file")
    _add_names(convert)
    convert.set_defaults(run=_convert)

    show = commands.add_parser(
        "show",
        help="a picture of where the codes, or the scales, of a small weight land, or of what each rank holds",
        description="Draws a small weight in a layout, row-major and as it lies in memory; or, with --ranks, a weight "
        "and what each rank holds of it. Writes a file, over one that is there, and prints its name.",
    )
    what = show.add_mutually_exclusive_group(required=True)
    what.add_argument("layout", nargs="?", choices=list(LAYOUTS), metavar="LAYOUT", help=", ".join(LAYOUTS))
    what.add_argument("--ranks", type=_positive, help="what each of so many ranks holds, in any layout")
    show.add_argument("--dim", choices=get_args(ShardDim), help="what ranks share (default intermediate)")
    show.add_argument("--experts", type=_positive, help="that ranks share (default 8)")
    show.add_argument("--rows", type=int, help="N, gate rows and up rows together (default 64; with --ranks 512)")
    show.add_argument("--k", type=int, default=256, help="K, logical columns (default 256)")
    show.add_argument("--scale", action="store_true", help="its scales, not its codes")
    show.add_argument(
        "--logical", type=int, nargs=2, metavar=("N", "K"), help="sizes without padding, which is hatched then"
    )
    show.add_argument("--down", action="store_true", help="a down weight (w2), not a gate-up one (w13)")
    show.add_argument(
        "--output",
        type=Path,
        help="the file to write, .svg or .png; - is standard output (default: LAYOUT.svg, with what else is chosen)",
    )
    show.set_defaults(run=_show, refuse=show.error)

    why = commands.add_parser("why", help="which backend and kernels each layer of a checkpoint would go to, and why")
    why.add_argument("path", help="a safetensors file, or a directory of them; the config.json beside it is read")
    why.add_argument("--arch", help="of another machine's GPU, as gfx950 or sm_90 (default: this machine)")
    why.add_argument(
        "--aiter", help="a version of aiter, as v0.1.20, installed here or not (default: the installed one)"
    )
    why.add_argument("--tokens", type=_positive, nargs="+", default=[], help="answer for these numbers (default: all)")
    why.add_argument("--activation", choices=list(ACTIVATIONS), help="instead of what config.json says")
    why.add_argument("--topk", type=_positive, help="experts of a token, instead of what config.json says")
    why.add_argument("--json", action="store_true", help="a JSON object, for other programs")
    why.set_defaults(run=_why)

    tune = commands.add_parser(
        "tune",
        help="measure how the triton backend best launches a layer on this GPU, and keep it for later processes",
        description="Measures plans for a layer on this GPU, and keeps those that are faster than the built-in ones in "
        "a file that later processes read, in $SHUFFLED_TENSOR_CACHE, $XDG_CACHE_HOME/shuffled_tensor or "
        "~/.cache/shuffled_tensor.",
    )
    for name, help in (
        ("experts", "at hand: of one rank, where ranks share them"),
        ("hidden", "logical, without padding"),
        ("intermediate", "logical, of one rank where ranks share it"),
        ("topk", "experts of a token"),
    ):
        tune.add_argument(f"--{name}", type=_positive, required=True, help=help)
    tune.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        default=[2**power for power in range(14)],
        help="numbers of tokens to measure with, each for all numbers down to half of it (default 1, 2, 4, ... 8192)",
    )
    tune.set_defaults(run=_tune)

    commands.add_parser("doctor", help="which backends this machine has, and what to install or change").set_defaults(
        run=_doctor
    )
    return parser


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="JSON, an object a weight, for other programs")


def _add_names(command: argparse.ArgumentParser) -> None:
    """What a checkpoint's names may leave open."""
    command.add_argument("--format", default="auto", help="of the checkpoint, where its names do not tell")
    command.add_argument(
        "--row-order", choices=get_args(RowOrder), help="of gate and up rows in one tensor, where its names do not tell"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, found {text!r}")
    return int(text)


# The commands on checkpoints import what the extra `checkpoint` installs.


def _inspect(options: argparse.Namespace) -> bool:
    from shuffled_tensor.checkpoint.inspection import inspect, shares, shares_in_words, table

    findings = inspect(options.path, read=options.read, format=options.format, row_order=options.row_order)
    ranks = shares(findings, options.ranks) if options.ranks else {}
    if options.json:
        print(json.dumps({"weights": [asdict(finding) for finding in findings], "ranks": ranks}, indent=1))
    else:
        print(table(findings))
        if ranks:
            print(shares_in_words(ranks, options.ranks))
    return any(finding.problems for finding in findings)


def _verify(options: argparse.Namespace) -> int:
    from shuffled_tensor.checkpoint.inspection import inspect

    findings = inspect(options.path, read=True, format=options.format, row_order=options.row_order)
    recorded = sum(finding.recorded for finding in findings)
    damaged = sum(bool(finding.problems) for finding in findings)
    if options.json:
        print(json.dumps({"weights": [asdict(finding) for finding in findings]}, indent=1))
    else:
        for finding in findings:
            for problem in finding.problems:
                print(f"{finding.name}: {problem}")
        print(f"{len(findings)} weights read, {recorded} compared with a checksum, {damaged} with problems")
        if not damaged and not recorded:
            print("no file has a checksum to compare with; convert writes one for every weight")
    return 1 if damaged else 0 if recorded else _NOTHING_TO_COMPARE


def _convert(options: argparse.Namespace) -> bool:
    from shuffled_tensor.checkpoint.conversion import convert

    try:
        convert(
            options.source,
            options.destination,
            layout=options.layout,
            format=options.format,
            row_order=options.row_order,
            single_file=options.single_file,
        )
    except KeyboardInterrupt:
        if Path(f"{options.destination}.partial").exists():
            print(f"the same command goes on from what is in {options.destination}.partial", file=sys.stderr)
        raise
    return False


def _show(options: argparse.Namespace) -> bool:
    for name in ("scale", "logical") if options.ranks else ("dim", "experts"):
        if getattr(options, name):
            options.refuse(f"--{name} says nothing {'with' if options.ranks else 'without'} --ranks")
    if options.ranks:
        dim: ShardDim = options.dim or "intermediate"
        name = f"ranks_{dim}"
        svg = rank_picture(
            options.ranks,
            512 if options.rows is None else options.rows,
            options.k,
            gate_up=not options.down,
            dim=dim,
            experts=options.experts or 8,
        )
    else:
        name = options.layout
        svg = picture(
            options.layout,
            64 if options.rows is None else options.rows,
            options.k,
            gate_up=not options.down,
            part="scale" if options.scale else "qdata",
            logical=options.logical and tuple(options.logical),
        )
    named = f"{name}{'_down' if options.down else ''}{'_scale' if options.scale else ''}.svg"
    output = options.output or Path(named)
    kind = output.suffix.lower()
    if output == Path("-"):
        print(svg, end="")
        return False
    if kind not in (".svg", ".png", ""):
        raise ValueError(f"a picture is written as .svg or .png, found {output}")
    output.write_bytes(png(svg) if kind == ".png" else svg.encode())
    print(output)
    return False


def _why(options: argparse.Namespace) -> bool:
    from shuffled_tensor.why import why

    asked = {name: getattr(options, name) for name in ("arch", "aiter", "tokens", "activation", "topk")}
    found = why(options.path, **asked)
    print(found.json() if options.json else found)
    return False


def _tune(options: argparse.Namespace) -> bool:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reason = unavailable(BACKENDS["triton"], device)
    if reason is not None:
        raise ValueError(
            f"tune measures the triton backend, which does not run on {arch(device)}: {reason}. It needs an NVIDIA GPU "
            "of compute capability 8.0 or later, or an AMD GPU, that PyTorch sees, and an installed triton"
        )
    from shuffled_tensor.backends.triton import measure, tune  # not before there is a Triton to import

    sizes = options.experts, options.hidden, options.intermediate, options.topk
    print("A plan: rows, small; then rows, columns, warps, stages, parts, run of the first GEMM and of the second\n")
    print(f"{'tokens':>6}  {'plan of the table':44}{'us':>9}  {'best plan':44}{'faster':>8}")
    for found in measure.measure(*sizes, options.tokens, device):
        plans = [
            " ".join(",".join(map(str, part)) for part in (plan[:2], plan.first, plan.second))
            for plan in (found.table, found.best)
        ]
        ratio = found.table_microseconds / found.best_microseconds
        best = "the same" if found.best == found.table else plans[1]
        print(f"{found.tokens:6}  {plans[0]:44}{found.table_microseconds:9.1f}  {best:44}{ratio:7.2f}x", flush=True)
    print(f"\nwritten: {tune.path(device)}")
    return False


def _doctor(options: argparse.Namespace) -> bool:
    print(doctor())
    return False
