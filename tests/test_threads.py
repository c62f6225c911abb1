# SPDX-License-Identifier: MIT
"""Threads, processes and interrupts: results are right, or an error; and nothing waits for ever.

``make stress`` gives every test of threads 30 seconds and every interrupted operation 1,000 interrupts.
"""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffled_tensor import ShuffledMXFP4Tensor, fused_moe, layouts, refit
from shuffled_tensor.layouts import Order
from shuffled_tensor.moe import op

from .support.bytes import marked_parts, weight_of
from .support.judges import assert_holds, dense
from .support.layer import make_layer

SECONDS = float(os.environ.get("STRESS_SECONDS", "1"))
INTERRUPTS = int(os.environ.get("STRESS_INTERRUPTS", "40"))
SMALL = (3, 96, 160)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for ever ends the run, and says where it waits."""
    faulthandler.dump_traceback_later(120 + 4 * SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def beside(*work: Callable[[], object]) -> Iterator[None]:
    """Other threads do this, over and over, meanwhile; their errors are raised."""
    done, errors = threading.Event(), []

    def run(one: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    for error in errors:
        raise error


def for_a_while() -> Iterator[None]:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        yield


def relayout(*weights: ShuffledMXFP4Tensor) -> None:
    for weight in weights:
        weight.shuffle_("mxfp4_moe")
        weight.shuffle_("mxfp4_separated")
        weight.unshuffle_()


def test_a_layer_while_its_weights_change_their_layout() -> None:
    layer = make_layer("cpu")
    expected = fused_moe(**layer)
    with beside(lambda: relayout(layer["w13"], layer["w2"])):
        wrong = sum(not torch.equal(fused_moe(**layer), expected) for _ in for_a_while())
    assert wrong == 0


def test_a_compiled_layer_while_its_weights_change_their_layout() -> None:
    layer = make_layer("cpu")
    call = torch.compile(fused_moe, backend="aot_eager", fullgraph=True)
    expected = fused_moe(**layer)
    for layout in ("mxfp4_moe", "mxfp4_separated", "none"):
        layer["w13"].shuffle_(layout)
        assert torch.equal(call(**layer), expected)
    wrong = 0
    with beside(lambda: relayout(layer["w13"])):
        for _ in for_a_while():
            try:
                wrong += not torch.equal(call(**layer), expected)
            except AssertionError as error:  # torch compiles again, and finds that what it looked at has changed
                wrong += "Guard failed on the same frame" not in str(error)
    assert wrong == 0


def test_a_layer_while_a_weight_gets_new_values() -> None:
    layer = make_layer("cpu")
    old, new = layer["w13"].clone(), layer["w13"].clone()
    new.copy_(torch.full(new.shape, 0.5))
    expected = [fused_moe(**(layer | {"w13": value})) for value in (old, new)]
    layer["w13"].shuffle_("mxfp4_moe")

    def write() -> None:
        for value in (new, old):
            layer["w13"].copy_(value)

    with beside(write, lambda: relayout(layer["w2"])):
        wrong = sum(
            not any(torch.equal(out, value) for value in expected)
            for out in (fused_moe(**layer) for _ in for_a_while())
        )
    assert wrong == 0


def test_reading_values_while_they_change() -> None:
    parts = [marked_parts(2, 512, 512, salt=salt) for salt in (0, 1)]
    weight, others = weight_of(parts[0], "mxfp4_moe"), [weight_of(part) for part in parts]
    values = [dense(*part) for part in parts]

    def write() -> None:
        for other in others:
            weight.copy_(other)

    with beside(write, lambda: relayout(weight)):
        for _ in for_a_while():
            found = weight.dequantize(torch.float64)
            assert any(torch.equal(found, value) for value in values)


PAIRS: dict[str, Callable[[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor], object]] = {
    "copy_": lambda a, b: a.copy_(b),
    "index_copy_": lambda a, b: a.index_copy_(0, torch.tensor([2, 0, 1]), b),
    "setitem": lambda a, b: a.__setitem__(torch.tensor([True, False, True]), b[:2]),
    "a view": lambda a, b: a.qdata_view.copy_(b.qdata_view),
    "cat": lambda a, b: torch.cat([a, b]),
    "equal": lambda a, b: torch.equal(a, b),
    "foreach": lambda a, b: torch._foreach_copy_([a], [b]),
}


@pytest.mark.parametrize("operation", PAIRS.values(), ids=PAIRS)
def test_two_threads_that_use_two_weights_crosswise(
    operation: Callable[[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor], object],
) -> None:
    a, b = weight_of(marked_parts(*SMALL), "mxfp4_moe"), weight_of(marked_parts(*SMALL, salt=1))
    with beside(lambda: operation(b, a), lambda: relayout(a)):
        for _ in for_a_while():
            operation(a, b)


def test_weights_are_joined_after_another_thread_has_written_one() -> None:
    parts = marked_parts(*SMALL)
    a, b = weight_of(parts), weight_of(parts)
    inside = threading.Event()

    def write() -> None:
        with b.writing():
            inside.set()
            time.sleep(0.5)
            b.zero_()

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    joined = torch.cat([a, b]).dequantize(torch.float64)
    thread.join()
    assert torch.equal(joined, torch.cat([dense(*parts), torch.zeros(SMALL)]))


def test_a_refit_waits_for_a_layer_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("cpu")
    expected = fused_moe(**layer)
    inside, written, select = threading.Event(), threading.Event(), op._select

    def slow(call: Any, names: Any) -> op.Choice:
        choice = select(call, names)

        def run(call: Any) -> Tensor:
            inside.set()
            written.wait(0.5)
            return choice.run(call)

        return choice._replace(run=run)

    def write() -> None:
        with refit(layer["w13"]):  # whose bytes are row-major already
            layer["w13"].qdata.zero_()
        written.set()

    monkeypatch.setattr(op, "_select", slow)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fused_moe, **layer)
        inside.wait()
        write()
        assert torch.equal(running.result(), expected)


# --- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("held", [True, False], ids=["lock held", "being written"])
def test_fork_while_another_thread_holds_a_weight(held: bool) -> None:
    parts = marked_parts(*SMALL)
    weight = weight_of(parts, "mxfp4_moe")
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with weight._storage.held() if held else weight.writing():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            torch.set_num_threads(1)  # OpenMP's own threads are not in a child, and torch would wait for them
            weight.unshuffle_()
            assert_holds(weight, parts, "none")
            weight.copy_(weight_of(marked_parts(*SMALL, salt=1)))
            assert_holds(weight, marked_parts(*SMALL, salt=1), "none")
            os._exit(0)
        finally:
            os._exit(1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_holds(weight, parts, "mxfp4_moe")


# --- interrupts


class Interrupted(BaseException):
    pass


def refitted(weight: ShuffledMXFP4Tensor, other: ShuffledMXFP4Tensor) -> None:
    with refit(nn.ParameterList([weight])):
        weight.qdata.copy_(other.qdata)
        weight.scale.copy_(other.scale)


OPERATIONS: dict[str, Callable[[ShuffledMXFP4Tensor, ShuffledMXFP4Tensor], object]] = {
    "shuffle_": lambda weight, other: relayout(weight),
    "copy_": lambda weight, other: weight.copy_(other),
    "index_copy_": lambda weight, other: weight.index_copy_(0, torch.tensor([0, 1, 2]), other),
    "a view": lambda weight, other: weight.qdata_view.copy_(other.qdata_view),
    "permute": lambda weight, other: weight.permute_experts_([1, 2, 0]),
    "refit": refitted,
    "refit_from_hp_": lambda weight, other: weight.refit_from_hp_(other.dequantize()),
    "clone": lambda weight, other: weight.clone().dequantize(),
    "zero_": lambda weight, other: weight.zero_(),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs signal.setitimer")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # where a weakref callback is interrupted
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interrupted_at_any_moment(operation: str) -> None:
    """A weight that was interrupted holds what it held, or what it was to hold, or refuses; a lock is never left."""
    run = OPERATIONS[operation]
    old, new = marked_parts(*SMALL), marked_parts(*SMALL, salt=1)
    weight, other = weight_of(old, "mxfp4_moe"), weight_of(new)

    def interrupt(*args: object) -> None:
        raise Interrupted

    run(weight, other)
    allowed = [dense(*old), weight.dequantize(torch.float64)]
    if operation == "permute":  # each one goes on from the one before
        allowed += [allowed[0][[2, 0, 1]]]
    start = time.perf_counter()
    run(weight, other)
    span = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, interrupt)
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    counted = 0
    try:
        for turn in range(INTERRUPTS):
            # torch's own guards, where they are interrupted at their borders, bring back a state of theirs later
            with torch._C._ForceDispatchKeyGuard(*keys):  # type: ignore[attr-defined]
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(1e-6, span * 1.2 * (turn % 50 + 1) / 50))
                    run(weight, other)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupted:
                    counted += 1
            torch.set_grad_enabled(True)
            signal.setitimer(signal.ITIMER_REAL, 0)
            look = ThreadPoolExecutor(1).submit(looked_at, weight, allowed)
            assert look.result(timeout=30) in ("right", "refused")  # or a lock was left behind
            weight.copy_(weight_of(old))
            weight.shuffle_("mxfp4_moe")
            assert_holds(weight, old, "mxfp4_moe")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert counted > INTERRUPTS // 10


def looked_at(weight: ShuffledMXFP4Tensor, allowed: list[Tensor]) -> str:
    try:
        found = weight.dequantize(torch.float64)
    except RuntimeError as error:
        return "refused" if "cannot be used" in str(error) else str(error)
    return "right" if any(torch.equal(found, value) for value in allowed) else "wrong"


# --- failures before a byte moves


@pytest.mark.parametrize("first", ["none", "mxfp4_moe"])
def test_no_memory_for_scratch(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = marked_parts(*SMALL)
    weight = weight_of(parts, first)

    def none_left(self: Order, data: Tensor) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Order, "scratch", none_left)
        with pytest.raises(MemoryError):
            weight.shuffle_("mxfp4_separated")
        if first != "none":
            with pytest.raises(MemoryError):
                refit(nn.ParameterList([weight])).__enter__()
    assert_holds(weight, parts, first)


def test_one_scratch_serves_codes_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bound that is documented, or of one expert's codes; also where several experts go through it in turn."""
    parts = marked_parts(*SMALL)
    weight, taken, shuffle = weight_of(parts), [], Order.shuffle
    monkeypatch.setitem(layouts._IN_PLACE_SCRATCH, "cpu", 1)  # one expert

    def watched(self: Order, data: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        taken.append(scratch)
        return shuffle(self, data, out, scratch)

    monkeypatch.setattr(Order, "shuffle", watched)
    weight.shuffle_("mxfp4_moe")
    codes, scales = taken
    assert codes is scales
    assert codes.nbytes == weight.qdata[0].nbytes
    assert_holds(weight, parts, "mxfp4_moe")


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.qdata_view.copy_(torch.empty(weight.qdata_view.shape, dtype=torch.uint8, device="meta")),
        lambda weight: weight.copy_(torch.empty(weight.shape, device="meta")),
        lambda weight: weight.index_copy_(0, torch.tensor([0]), torch.ones(1, 3, 3)),
        lambda weight: weight.index_copy_(0, torch.tensor([0]), torch.ones(1, *weight.shape[1:], dtype=torch.int32)),
        lambda weight: weight[:, :32].copy_(torch.ones(3, 1, 1)),
    ],
)
def test_a_source_that_cannot_be_written(write: Callable[[ShuffledMXFP4Tensor], object]) -> None:
    parts = marked_parts(*SMALL)
    weight = weight_of(parts, "mxfp4_moe")
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        write(weight)
    assert_holds(weight, parts, "mxfp4_moe")


def test_a_weight_is_not_written_in_fake_mode() -> None:
    parts = marked_parts(*SMALL)
    weight = weight_of(parts, "mxfp4_moe")
    from torch._subclasses.fake_tensor import FakeTensorMode

    other = weight_of(marked_parts(*SMALL, salt=1), "mxfp4_moe")
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensorMode"):
        weight.copy_(other)
    assert_holds(weight, parts, "mxfp4_moe")


# --- a refit that takes up another


@pytest.mark.parametrize("layout", ["none", "mxfp4_moe"])
@pytest.mark.parametrize("left_out", ["codes of an expert", "scales", "a row of codes", "the last scale", "nothing"])
def test_a_refit_after_one_that_failed_must_write_everything(left_out: str, layout: str) -> None:
    new = marked_parts(*SMALL, salt=1)
    weight = weight_of(marked_parts(*SMALL), layout)

    def first() -> None:
        with refit(nn.ParameterList([weight])):
            weight.qdata[0].fill_(3)
            raise KeyError

    with pytest.raises(KeyError):
        first()
    halves = weight.qdata.unflatten(1, (2, -1)), weight.scale.unflatten(1, (2, -1))

    def write() -> None:
        rows = SMALL[1] // 2
        for half, part in zip(halves, new, strict=True):
            half[:, :, :rows, : part.shape[-1]].copy_(part.unflatten(1, (2, -1)))

    def second() -> None:
        with refit(nn.ParameterList([weight])):
            before = [half.clone() for half in halves]
            write()
            chosen = {
                "codes of an expert": (0, (1,)),
                "scales": (1, ()),
                "a row of codes": (0, (2, 1, 47)),
                "the last scale": (1, (2, 1, 47, 4)),
            }.get(left_out)
            if chosen is not None:
                halves[chosen[0]][chosen[1]] = before[chosen[0]][chosen[1]]

    if left_out == "nothing":
        second()
    else:
        part, of = (
            ("qdata", "are missing;") if "codes" in left_out else ("scale", "are missing (or it holds NaN scales")
        )
        with pytest.raises(RuntimeError, match=rf"has not written all of it: {part} of expert \d {re.escape(of)}"):
            second()
        with pytest.raises(RuntimeError, match="cannot be used"):
            weight.dequantize()
        left_out = "nothing"
        second()
    assert_holds(weight, new, layout)


def test_pads_that_were_lost_with_the_memory() -> None:
    """As after an engine has slept, and loads halves through views."""
    for layout in ("none", "mxfp4_moe", "mxfp4_separated"):
        new = marked_parts(*SMALL, salt=1)
        weight = weight_of(marked_parts(*SMALL), layout)
        weight.qdata.fill_(0xFF)
        weight.scale.fill_(0xFF)
        for view, part in ((weight.qdata_view, new[0]), (weight.scale_view, new[1])):
            for half in (slice(0, 48), slice(48, 96)):
                view[:, half].copy_(part[:, half])
        assert_holds(weight, new, layout)
