from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ffsplit
from ffsplit.errors import ResumeError
from ffsplit.ffn.projections import Dense, DenseSpec, LowRank, Packed
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ops.rounding import round_to_nearest
from ffsplit.pipeline import fit as fit_module
from ffsplit.pipeline import job as job_module
from ffsplit.pipeline.journal import Journal, fingerprint, sum_state
from tests.tiny import tiny
from tests.unit.family_batches import family_batches, token_ids

IDENTITY = {"recipe": {"seed": 0}, "model": "abc", "data": "def"}


def random_sum() -> SumFFN:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    codes, grid = round_to_nearest(random(4, 8), 3, 8)
    packed = Packed.from_codes(codes, grid, bits=3, group=8)
    heavy = Branch(nn.GELU(), Dense(random(6, 4)), Dense(random(4, 6)), up_bias=random(6))
    rest = Branch(nn.GELU(), LowRank(random(8, 2), random(2, 4)), packed)
    return SumFFN(4, [heavy, rest], LowRank(random(4, 1), random(1, 4)), random(4))


def test_a_sum_comes_back_as_it_was(tmp_path: Path) -> None:
    journal, module = Journal(tmp_path, IDENTITY), random_sum().requires_grad_(False)
    notes = {"ffn": "a", "output_error": 0.25, "tokens": 7}
    assert (journal.has(3), journal.finished) == (False, 0)
    journal.store(3, module, notes)
    again = Journal(tmp_path, IDENTITY)
    assert (again.has(3), again.has(2), again.finished) == (True, False, 1)
    loaded, found = again.load(3, nn.GELU(), torch.float32)
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), module(x))
    assert (loaded.spec, found) == (module.spec, notes)
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [False] * len(list(module.parameters()))
    again.remove()
    assert not tmp_path.exists()


def test_the_activation_is_not_stored() -> None:
    act = nn.PReLU(init=0.3)
    module = SumFFN(2, [Branch(act, Dense(torch.eye(2)), Dense(torch.eye(2)))])
    assert set(sum_state(module)) == {"branches.0.up.weight", "branches.0.down.weight"}
    assert DenseSpec(shape=(2, 2)) in module.spec.projections


def test_files_that_were_not_finished_do_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, IDENTITY)
    (tmp_path / ".ffn-0000.safetensors.partial").write_bytes(b"half of it")
    (tmp_path / ".journal.json.partial").write_bytes(b"{")
    assert (journal.has(0), journal.finished) == (False, 0)
    journal.store(0, random_sum(), {})
    assert Journal(tmp_path, IDENTITY).has(0)


def test_a_journal_of_other_inputs_is_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, IDENTITY)
    Journal(tmp_path, dict(reversed(IDENTITY.items())))
    with pytest.raises(ResumeError, match="belongs to a run with other data; remove it"):
        Journal(tmp_path, {**IDENTITY, "data": "xyz"})
    with pytest.raises(ResumeError, match="other model, recipe"):
        Journal(tmp_path, {**IDENTITY, "model": "x", "recipe": {"seed": 1}})
    with pytest.raises(ResumeError, match="other new"):
        Journal(tmp_path, {**IDENTITY, "new": 1})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_identity(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.json").write_bytes(content)
    with pytest.raises(ResumeError, match=r"journal\.json is damaged|other"):
        Journal(tmp_path, IDENTITY)


def test_a_damaged_layer(tmp_path: Path) -> None:
    journal = Journal(tmp_path, IDENTITY)
    journal.store(0, random_sum(), {})
    file = tmp_path / "ffn-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ResumeError, match=r"ffn-0000\.safetensors is damaged"):
        journal.load(0, nn.GELU(), torch.float32)


def test_a_fingerprint_sees_every_part() -> None:
    assert fingerprint(IDENTITY) == fingerprint(dict(reversed(IDENTITY.items())))
    assert fingerprint(IDENTITY) != fingerprint({**IDENTITY, "model": "x"})


class InterruptedError_(RuntimeError):
    """Stands for whatever kills a run."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, layers: int) -> list[str]:
    """Make the fit of a later layer fail; the names of the layers that are fitted."""
    fit, names = fit_module._fit, []

    def failing(job: Any, site: Any, *arguments: Any) -> Any:
        if len(names) == layers:
            raise InterruptedError_
        names.append(site.name)
        return fit(job, site, *arguments)

    monkeypatch.setattr(fit_module, "_fit", failing)
    return names


RECIPES: dict[str, dict[str, Any]] = {
    "prune": {"method": {"method": "prune", "keep": 0.6}},
    "packed": {"method": {"method": "ffsplit", "bits": 5.0, "group": 16}},
    "linear-drift": {"method": {"method": "ffsplit", "keep": 0.6}, "drift": 1.0},
    "dense-prefix": {"method": {"method": "svd", "keep": 0.6}, "propagate": False},
    "full": {"method": {"method": "ffsplit", "keep": 1.0}},
    "one-left": {"method": {"method": "prune", "keep": 0.6}, "overrides": [{"ffns": "0", "method": None}]},
}


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        ("llama", "prune", torch.float32),
        ("llama", "packed", torch.bfloat16),
        ("llama", "linear-drift", torch.float32),
        ("llama", "dense-prefix", torch.float32),
        ("llama", "one-left", torch.float32),
        ("phi3", "full", torch.float32),
        ("apertus", "prune", torch.float32),
        ("t5", "packed", torch.float32),
        ("albert", "prune", torch.float32),
        ("opt", "linear-drift", torch.float16),
    ],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_bits(
    family: str, name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    batches = family_batches(family if family != "apertus" else "llama")

    def run(**options: Any) -> ffsplit.CompressionResult:
        model = tiny(family).to(dtype)
        return ffsplit.compress(model, recipe=recipe, calibration=batches, device="cpu", **options)

    whole = run()
    journal = tmp_path / "journal"
    with monkeypatch.context() as patched:
        layers = 0 if family == "albert" or name == "one-left" else 1
        fitted = interrupt_after(patched, layers)
        with pytest.raises(InterruptedError_):
            run(journal=journal)
        assert len(fitted) == layers == len(list(journal.glob("ffn-*.safetensors")))
    with monkeypatch.context() as patched:
        fitted_later = interrupt_after(patched, 99)
        resumed = run(journal=journal)
        assert not set(fitted) & set(fitted_later)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)
    assert [p.requires_grad for p in resumed.model.parameters()] == [p.requires_grad for p in whole.model.parameters()]
    for report in (whole.report, resumed.report):
        for layer in report["layers"]:
            layer.pop("seconds")
    assert resumed.report["layers"] == whole.report["layers"]
    with torch.no_grad():
        outputs = [result.model(**batches[0])[0] for result in (whole, resumed)]
    assert torch.equal(*outputs)
    finished = run(journal=journal)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in finished.model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"keep": 0.5}, "plan, recipe"),
        ({"seed": 1}, "recipe"),
        ({"calibration": token_ids(3, 16, seed=9)}, "data"),
        ({"model": "llama-biased"}, "model, plan"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_a_run_does_not_go_on_from_other_inputs(changed: dict[str, Any], what: str, tmp_path: Path) -> None:
    def run(model: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        options = {"recipe": "prune", "keep": 0.6, "calibration": token_ids(3, 16), "device": "cpu"} | options
        ffsplit.compress(tiny(model).to(dtype), journal=tmp_path, **options)

    run()
    with pytest.raises(ResumeError, match=f"other .*{what}"):
        run(**changed)


def test_a_run_does_not_go_on_from_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        ffsplit.compress(
            tiny("llama"), recipe="prune", keep=0.6, calibration=token_ids(3, 16), device="cpu", journal=tmp_path
        )

    run()
    monkeypatch.setattr(job_module, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(ResumeError, match="belongs to a run with other versions"):
        run()
