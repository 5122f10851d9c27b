"""The arms are the rows of `tuned_comparison`, train what their names say, begin as the base and are compiled whole."""

import functools

import pandas as pd
import pytest
import torch

import deltaw as dw
from deltaw.experiments import step_cost, tuned_comparison, tuned_further
from deltaw.experiments.engine import step
from deltaw.experiments.engine.step import BASE, SHAPES, base
from deltaw.experiments.step_cost import ARM_OF, PEFT, PISSA, QUICK, XS, Settings, arms, by_method, cost, kept_from_shapes
from deltaw.experiments.tuned_comparison import FULL, HEAD, LORA

SMALL = [SHAPES["small bert"], SHAPES["small llama"]]
LLAMA, MINILM = SHAPES["Llama-2-7B, 4 × 2048"], SHAPES["MiniLM, 2048 × 64"]


@pytest.fixture(scope="module")
def record(quick):
    return quick("step_cost")


def ranked(settings):
    return [name for name in arms(settings) if tuned_comparison.rank_of(name)]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# What is run


def test_the_full_record_has_every_shape():
    full = Settings()
    found = [(cell["shape"], cell["compiled"]) for cell in step_cost.cells(full)]
    eager = ["MiniLM, 32 × 64", "MiniLM, 2048 × 64", "Llama-2-7B, 4 × 2048"]
    assert found == [(shape, False) for shape in eager] + [(shape, True) for shape in eager[1:]]
    assert step_cost.TIMED and full.rounds >= 5 and step_cost.data(full) == {}
    assert (full.xs, full.vera) == (tuned_comparison.Settings().xs, tuned_comparison.Settings().vera)
    assert set(arms(full)) - set(arms(full, compiled=True)) == {*PEFT, *ranked(full)}


def test_a_shape_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"shapes must be of .*'small llama'.*, not \['GPT-4'\]"):
        Settings(compiled_shapes=("GPT-4",))


def test_every_row_of_the_comparison_has_an_arm():
    rows = [row.name for group in tuned_comparison.groups(tuned_comparison.Settings()).values() for row in group]
    main = tuned_comparison.main_rows(pd.DataFrame({"row": rows}))
    by_rank = {row.rsplit(" ", 1)[0] for row in rows if tuned_comparison.rank_of(row)}
    assert set(ARM_OF) == {*main, *by_rank}
    assert set(ARM_OF.values()) == set(arms(Settings())) - {BASE, *PEFT, *ranked(Settings())}
    further = [row.name for group in tuned_further.groups(tuned_further.Settings()).values() for row in group]
    wanted = {row.replace("rsLoRA", LORA) for row in [*rows, *further] if tuned_comparison.rank_of(row)}
    assert wanted - set(ranked(Settings())) <= {"LoRA 2", "LoRA 8"}  # beside rank 1, and LoRA itself


def test_ranks_are_what_their_names_say():
    found = arms(Settings(ranks=(3,), dora_ranks=(5,)))
    for name, rank in (("LoRA 3", 3), ("DoRA 5", 5)):
        for shape in SMALL:
            model = found[name](base(shape, "cpu"), shape)
            assert {layer.adapter.factors()[0].shape[0] for layer in dw.adapted_layers(model).values()} == {rank}


@pytest.mark.parametrize("row", [row for row in ARM_OF if row not in (HEAD, FULL)])
def test_an_arm_trains_the_tensors_of_its_row(row):
    """Those of the comparison's own spec, at the same ranks, starts aside."""
    shape = SMALL[0]
    settings = tuned_comparison.Settings(rank=shape.rank, xs=QUICK.xs, vera=QUICK.vera, everywhere=4, ranks=(4,))
    rows = {each.name: each for group in tuned_comparison.groups(settings).values() for each in group}
    expected = dw.attach(base(shape, "cpu"), rows.get(row, rows.get(f"{row} 4")).spec(0), targets=shape.targets)
    found = arms(QUICK)[ARM_OF[row]](base(shape, "cpu"), shape)
    for own, theirs in zip(dw.adapted_layers(found).values(), dw.adapted_layers(expected).values(), strict=True):
        shapes = [{name: p.shape for name, p in layer.adapter.named_parameters()} for layer in (own, theirs)]
        assert shapes[0] == shapes[1] and type(own.adapter) is type(theirs.adapter)
        products = [[factor.shape for factor in layer.adapter.factors()] for layer in (own, theirs)]
        assert products[0] == products[1]  # of rank 2r, where a start is subtracted


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.family)
def test_all_arms_begin_as_the_base_and_pass_a_gradient_to_the_input_but_one(shape):
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.length, shape.width, requires_grad=True)
    outputs = {name: build(base(shape, "cpu"), shape)(inputs_embeds=x).last_hidden_state
               for name, build in arms(QUICK).items()}
    for name, y in outputs.items():
        assert torch.allclose(y, outputs[BASE], atol=1e-5), name
        assert y.requires_grad == (name != HEAD)
        if name != HEAD:
            (grad,) = torch.autograd.grad(y.square().mean(), x)
            assert grad.abs().sum() > 0


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.family)
def test_full_trains_the_weights_that_the_others_adapt_in_fp32(shape):
    before = base(shape, "cpu").to(torch.bfloat16)
    weights = {name: weight.clone() for name, weight in before.state_dict().items()}
    layers = dw.adapted_layers(dw.attach(base(shape, "cpu"), dw.LoRA(2), targets=shape.targets))
    model = arms(QUICK)[FULL](before, shape)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(own) == {f"{name}.weight" for name in layers}
    assert all(p.dtype == torch.float32 and torch.equal(p, weights[name].float()) for name, p in own.items())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)


def test_the_counts_that_the_hypotheses_name():
    def count(arm, shape):
        return sum(p.numel() for p in trained(arms(Settings())[arm](base(shape, "meta"), shape)))

    assert count(FULL, LLAMA) == 3 * 4096**2 + 2 * 4096 * 11008
    assert 12 * count(FULL, LLAMA) / 2**30 == pytest.approx(1.57, abs=0.005)
    assert round(count(LORA, LLAMA) / count("VeRA", LLAMA)) == 61
    assert round(count(LORA, MINILM) / count("VeRA", MINILM)) == 11
    tokens = LLAMA.batch * LLAMA.length
    assert 2 * tokens * (4096 + 4096 + 11008) / 2**30 == pytest.approx(0.29, abs=0.005)  # q, k and v share theirs
    assert 2 * tokens * (4 * 4096 + 11008) / 2**30 == pytest.approx(0.42, abs=0.005)


def test_what_is_new_here_is_compiled_whole(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    new = {name: arms(QUICK, compiled=True)[name] for name in (BASE, HEAD, FULL, XS)}
    before = step._graphs()
    rows = step.costs(new, SMALL[1], compiled=True, rounds=1, steps=1, device="cpu")
    assert step._graphs() - before == len(new) and all(row["graphs"] == 0 for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# The quick record


def test_the_quick_run_has_every_arm(record):
    for _, rows in record.groupby("shape"):
        assert set(rows["arm"]) == set(arms(QUICK)) and rows.groupby("arm").size().eq(QUICK.rounds).all()
    assert (record["ms"] > 0).all() and (record["graphs"] == 0).all()


def test_peft_trains_as_many_numbers(record):
    counts = record.groupby(["shape", "arm"])["parameters"].first().unstack()
    for name in ("LoRA", "DoRA", "VeRA"):
        assert (counts[f"PEFT {name}"] == counts[name]).all()
    assert (counts[[BASE, HEAD]] == 0).all(axis=None) and (counts[PISSA] == counts[LORA]).all()
    for fewer, more in ((XS, "VeRA"), ("VeRA", LORA), (LORA, FULL)):
        assert (counts[fewer] < counts[more]).all()


def test_the_optimizer_holds_two_moments_of_what_is_trained(record):
    moments = 8 * record["parameters"]
    steps = record["optimizer_bytes"] - moments  # a number a tensor
    assert steps[record["parameters"] == 0].eq(0).all() and steps[record["parameters"] > 0].between(4, 4 * 30).all()


def test_the_analysis_takes_the_quick_record(record):
    found = cost(record)
    assert len(found) == 2 * len(arms(QUICK))
    assert found.query(f"arm == '{BASE}'")[["ratio", "least", "largest"]].to_numpy().tolist() == [[1, 1, 1]] * 2
    methods = by_method(record)
    assert methods["row"].tolist() == 2 * [*ARM_OF, "LoRA 2", "rsLoRA 2"] and methods["ratio"].notna().all()


def test_a_method_has_the_cost_of_its_arm():
    ms = {BASE: 10.0} | {arm: 11.0 + i for i, arm in enumerate(dict.fromkeys(ARM_OF.values()))} | {"PEFT LoRA": 99.0}
    table = pd.DataFrame([
        {"shape": shape, "compiled": False, "arm": arm, "round": i, "ms": value, "graphs": 0, "parameters": int(value),
         "optimizer_bytes": 8 * int(value), "kept_gib": value / 100, "peak_gib": value / 10}
        for shape in ("a", "b") for arm, value in ms.items() for i in range(2)])
    found = by_method(table)
    assert found["shape"].tolist() == ["a"] * len(ARM_OF) + ["b"] * len(ARM_OF)
    assert found["arm"].tolist() == found["row"].map(ARM_OF).tolist()
    own = found["arm"].map(ms)  # of the row's arm
    for column, share in (("ratio", 10), ("parameters", 1), ("kept_gib", 100)):
        assert found[column].tolist() == pytest.approx((own / share).tolist())


def test_two_arms_are_compared_in_the_same_round_where_both_are():
    ms = {"a": {BASE: [1.0, 2.0, 4.0], LORA: [2.0, 6.0, 4.0]}, "b": {BASE: [1.0, 1.0, 1.0]}}
    table = pd.DataFrame([
        {"shape": shape, "compiled": False, "arm": arm, "round": i, "ms": value, "graphs": 0}
        for shape, arms_ in ms.items() for arm, values in arms_.items() for i, value in enumerate(values)])
    (row,) = step_cost.between(table, LORA, BASE).to_dict("records")
    assert row == {"shape": "a", "compiled": False, "ratio": 2, "least": 1, "largest": 3, "added_ms": 1}
    assert step_cost.between(table, LORA, "nobody").empty


@pytest.mark.parametrize("shape", [*SMALL, LLAMA, MINILM], ids=lambda shape: f"{shape.family} {shape.width}")
def test_sizes_are_those_of_the_layers(shape):
    layers = dw.adapted_layers(dw.attach(base(shape, "meta"), dw.LoRA(2), targets=shape.targets)).values()
    found = step_cost.sizes(shape)
    assert (found.layers, found.tokens) == (len(layers), shape.batch * shape.length)
    assert found.ins == sum(layer.in_features for layer in layers)
    assert found.outs == sum(layer.out_features for layer in layers)
    assert found.weights == sum(layer.weight.numel() for layer in layers)
    assert found.widest == max(max(layer.weight.shape) for layer in layers)


def test_what_is_kept_grows_by_inputs_outputs_and_products():
    gib = 2**30
    many, s = LLAMA._replace(length=2 * LLAMA.length), step_cost.sizes(LLAMA)

    def for_tokens(arm):
        return round((kept_from_shapes(arm, many) - kept_from_shapes(arm, LLAMA)) * gib / (2 * s.tokens))

    assert for_tokens(FULL) == s.inputs == 4096 + 4096 + 11008
    assert for_tokens(LORA) == s.inputs + 32 * s.layers and for_tokens("LoRA 4") == s.inputs + 4 * s.layers
    assert (for_tokens(XS), for_tokens("VeRA")) == (16 * s.layers, 256 * s.layers)
    for outer, inner in (("DoRA", LORA), ("DoRA(MoSLoRA)", LORA), ("DVoRA", "VeRA"), ("DoRA 16", "LoRA 16")):
        assert for_tokens(outer) - for_tokens(inner) == s.outs
    with pytest.raises(ValueError, match="PEFT LoRA"):
        kept_from_shapes("PEFT LoRA", LLAMA)


def test_the_count_stands_beside_what_is_kept_beyond_the_base():
    table = pd.DataFrame([
        {"shape": "Llama-2-7B, 4 × 2048", "compiled": compiled, "arm": arm, "round": 0, "ms": 1.0, "graphs": 0,
         "parameters": 1, "optimizer_bytes": 8, "kept_gib": value, "peak_gib": value}
        for compiled in (False, True) for arm, value in {BASE: 1.0, HEAD: 0.0, LORA: 1.5, "PEFT LoRA": 2.0}.items()])
    (row,) = step_cost.kept(table).to_dict("records")
    assert (row["arm"], row["measured"]) == (LORA, 0.5) and row["counted"] == kept_from_shapes(LORA, LLAMA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_full_is_charged_with_twelve_bytes_a_number_and_head_only_keeps_nothing():
    shape = LLAMA._replace(width=1024, inner=2048, heads=8, length=64)
    names = (BASE, HEAD, LORA, FULL)
    built = {name: arms(Settings())[name] for name in names}
    rows = {row["arm"]: row for row in step.costs(built, shape, False, 1, 1, "cuda")}
    kept = {name: row["kept_gib"] * 2**30 for name, row in rows.items()}
    numbers = rows[FULL]["parameters"] - rows[LORA]["parameters"]
    assert kept[FULL] - kept[LORA] == pytest.approx(12 * numbers, rel=0.1)
    assert kept[HEAD] < 0.1 * kept[BASE] and rows[FULL]["peak_gib"] * 2**30 > 13.9 * rows[FULL]["parameters"]
