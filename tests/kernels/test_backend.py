"""Choosing the implementation, what a repeated call costs, and importing without a GPU or Triton."""

import collections
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pm_kernels
from pm_kernels import (
    SparseRows,
    backend,
    fused_merge_attention,
    fused_merge_attention_qkv,
    reference,
    runtime,
    token_mix,
    token_mix_layer_norm,
    transition,
)
from pm_kernels.attention import Attention
from pm_kernels.launches import Launch, Plan, Prepared
from pm_kernels.mixing import Mix


def test_reference_and_auto_run_on_the_cpu():
    x, matrix = torch.randn(2, 5, 6), torch.randn(4, 5)
    expected = reference.token_mix(x, matrix)
    with backend("reference"):
        assert torch.equal(token_mix(x, matrix), expected)
    assert torch.equal(token_mix(x, matrix), expected)


def test_triton_without_a_kernel_is_a_clear_error():
    with backend("triton"), pytest.raises(RuntimeError, match=r"kernel of token_mix: there is none for torch.float64"):
        token_mix(torch.randn(2, 5, 6).double(), torch.randn(4, 5).double())


def test_the_setting_outlasts_the_call_and_ends_with_the_block():
    x, matrix = torch.randn(2, 5, 6).double(), torch.randn(4, 5).double()
    backend("triton")
    try:
        with backend("reference"):
            token_mix(x, matrix)
        with pytest.raises(RuntimeError):
            token_mix(x, matrix)
    finally:
        backend("auto")
    token_mix(x, matrix)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        backend("cuda")


def test_imports_and_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, pm_kernels, pm_models\n"
        "assert pm_kernels.token_mix(torch.ones(1, 2, 3), torch.ones(1, 2)).sum() == 6"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def calls():
    """One call of every op, by name."""
    qkv, x = torch.randn(2, 9, 3, 2, 4), torch.randn(2, 9, 8)
    matrix, sparse = torch.randn(5, 9), SparseRows.from_dense(torch.eye(12)[:, 2:])
    norm, gate = (torch.ones(8), torch.zeros(8), 1e-6), torch.ones(5)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return {
        "attention": lambda: fused_merge_attention(q, k, v, matrix, gate=gate, key_bias=gate),
        "packed attention": lambda: fused_merge_attention_qkv(qkv, matrix, gate=gate, key_bias=gate),
        "mix": lambda: token_mix(x, matrix),
        "mix and norm": lambda: token_mix_layer_norm(x, matrix, *norm, 3),
        "transition": lambda: transition(x, x[:, :1], sparse, 7, update=x, norm=norm),
    }


@pytest.mark.parametrize("name", calls())
def test_a_repeated_call_passes_few_functions(name):
    """From the public name to PyTorch's operators, on a CPU."""
    folder, call, passed = str(Path(pm_kernels.__file__).parent), calls()[name], collections.Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            passed[frame.f_code.co_name] += 1

    call()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert 2 <= passed.total() <= 7, passed


class Kernel:
    """As much of a Triton kernel as a repeated launch takes, and what it was given."""

    def __init__(self, *names):
        self.params, self.given = [SimpleNamespace(name=name) for name in names], []

    def __getitem__(self, grid):
        return lambda *arguments: self.given.append((grid, arguments))


def test_a_plan_is_repeated_on_other_tensors():
    """Two launches with memory between them: views of what is given, of results and of the scratch, by their places."""
    first, second = Kernel("p_x", "p_part", "p_half", "n"), Kernel("p_half", "p_y", "p_none")

    def planned(x, q):
        y, scratch = torch.empty(3, 4).mT, torch.empty(2, 5)
        launches = [
            Launch(first, 7, {"p_x": q, "p_part": x[:, 1], "p_half": scratch[1], "n": 4}, 4, 1),
            Launch(second, 8, {"p_half": scratch[1:], "p_y": y, "p_none": None}, 4, 1),
        ]
        return Plan(launches, (None, y), (scratch,))

    def inputs():
        return torch.empty(11, 3)[1:], torch.empty(2, 3)

    prepared = Prepared.of(planned(*(given := inputs())), (first, second), given)
    x, q = given = inputs()
    none, y = prepared.run(given)
    assert none is None
    assert (y.shape, y.stride()) == ((4, 3), (1, 4))
    (one, (given_q, part, half, n)), (two, (again, given_y, nothing)) = first.given[-1], second.given[-1]
    assert (one, two, n, nothing) == ((7, 1, 1), (8, 1, 1), 4, None)
    assert [id(given_q), id(given_y)] == [id(q), id(y)]
    assert (part.data_ptr(), part.shape, part.stride()) == (x[:, 1].data_ptr(), (10,), (3,))
    assert half.data_ptr() == again.data_ptr() == half.untyped_storage().data_ptr() + 5 * 4
    assert half.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (x, q, y)}


@pytest.mark.parametrize(
    "given",
    [lambda x: (x, x), lambda x: (x[:3], x[3:]), lambda x: (x, torch.empty(1))],
    ids=["one tensor twice", "parts of one", "a copy"],
)
def test_a_plan_that_may_mean_another_tensor_is_not_repeated(given):
    kernel, tensors = Kernel("p_x"), given(torch.randn(6, 2))
    argument = tensors[0].clone() if tensors[1].numel() == 1 else tensors[0].view(-1)
    plan = Plan([Launch(kernel, 1, {"p_x": argument}, 4, 1)], ())
    assert Prepared.of(plan, [kernel], tensors) is None


@pytest.mark.parametrize("name", calls())
def test_a_kind_of_call_is_checked_once(name, monkeypatch):
    checked = []
    for arguments in (Attention, Mix):
        own = arguments.check
        monkeypatch.setattr(arguments, "check", lambda *given, own=own: checked.append(given[1]) or own(*given))
    runtime.KNOWN.clear()
    call = calls()[name]
    call()
    call()
    calls()[name]()  # the same shapes in other tensors
    assert len(checked) == 1
    with torch.autocast("cpu", torch.bfloat16):
        call()
    assert len(checked) == 2


def test_what_differs_in_one_respect_is_another_kind():
    """After a call that is right, every argument that no longer fits is still found."""
    x, matrix, norm = torch.randn(2, 9, 8), torch.randn(5, 9), (torch.ones(8), torch.zeros(8), 1e-6)
    q = torch.randn(2, 3, 9, 4)
    for _ in range(2):
        transition(x, None, matrix, 3, update=x, norm=norm)
        fused_merge_attention(q, q, q, matrix, gate=torch.ones(5))
        with pytest.raises(ValueError, match="rows must be between 0 and 5"):
            transition(x, None, matrix, 6, update=x, norm=norm)
        with pytest.raises(ValueError, match="update must have the shape of x"):
            transition(x, None, matrix, 3, update=x[:1], norm=norm)
        with pytest.raises(TypeError, match="matrix must have the dtype of x"):
            transition(x, None, matrix.double(), 3, update=x, norm=norm)
        with pytest.raises(ValueError, match="weight must have shape"):
            transition(x, None, matrix, 3, update=x, norm=(norm[0][:7], *norm[1:]))
        with pytest.raises(ValueError, match="v must have a contiguous last dimension"):
            fused_merge_attention(q, q, q.mT.contiguous().mT, matrix, gate=torch.ones(5))
        with pytest.raises(TypeError, match="k must be a torch.Tensor, got NoneType"):
            fused_merge_attention(q, None, q, matrix, gate=torch.ones(5))
        with pytest.raises(TypeError, match="gate must be a torch.Tensor, got list"):
            fused_merge_attention(q, q, q, matrix, gate=[1.0] * 5)
        with pytest.raises(ValueError, match="gate must broadcast"):
            fused_merge_attention(q, q, q, gate=torch.ones(5))


def test_a_known_call_is_run_by_the_backend_that_is_set():
    """What was learned of a kind of call under one backend does not hold under another."""
    x, matrix = torch.randn(2, 5, 6).double(), torch.randn(4, 5).double()
    for _ in range(2):
        expected = token_mix(x, matrix)
        with backend("triton"), pytest.raises(RuntimeError, match="there is none for torch.float64"):
            token_mix(x, matrix)
        with backend("reference"):
            assert torch.equal(token_mix(x, matrix), expected)


def test_a_tensor_subclass_is_asked_every_time():
    """A mode or a kind of tensor of its own may give other results for the same shapes: nothing is known of it."""

    class Other(torch.Tensor):
        pass

    before = len(runtime.KNOWN)
    x = torch.randn(3, 7, 11).as_subclass(Other)
    torch.testing.assert_close(token_mix(x, torch.eye(7)).as_subclass(torch.Tensor), x.as_subclass(torch.Tensor))
    assert len(runtime.KNOWN) == before
    vmapped = torch.func.vmap(lambda x: token_mix(x, torch.eye(7)))(torch.ones(2, 3, 7, 11))
    assert torch.equal(vmapped, torch.ones(2, 3, 7, 11))


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of every size that is compared
def test_a_traced_call_is_no_constant():
    """torch.jit.trace sees the operators, whatever is known of the call."""
    matrix = torch.randn(4, 5)
    token_mix(torch.randn(2, 5, 6), matrix)
    traced = torch.jit.trace(lambda x: token_mix(x, matrix), (torch.randn(2, 5, 6),))
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(traced(x), token_mix(x, matrix))
