"""`jaxllm plan compile`: reading a compiled program, slices by name, what fits, and the goals on TPUs compiled here."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import runs
import toy

from jaxllm import cli
from jaxllm.errors import UserError
from jaxllm.mesh import MeshConfig
from jaxllm.partition import make_mesh
from jaxllm.plan import changes, collectives, cycles, front, hlo, picture, report_text
from jaxllm.plan import compile as plan_compile
from jaxllm.plan import step as plan_step
from jaxllm.plan.compile_config import CompileVerb
from jaxllm.plan.topology import find, known, link_seconds

PROGRAM = '''
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%in_the_dear_branch (p: bf16[8,64]) -> bf16[8,64] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %dear = bf16[8,64]{1,0} fusion(%p), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"100"}}
}

%in_the_cheap_branch (p.1: bf16[8,64]) -> bf16[8,64] {
  ROOT %p.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
}

%gathering (q: bf16[1,64]) -> bf16[8,64] {
  %q = bf16[1,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,64]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="1"}
}

%body (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %begun = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%gathering, backend_config={"window_config":{"estimated_cycles":"10"}}
  %ended = bf16[8,64]{1,0} fusion(%begun), kind=kCustom, calls=%gathering, metadata={op_name="jit(step)/transpose(jvp())/while/body/dot"}, backend_config={"window_config":{"estimated_cycles":"5"}}
  %kernel = (bf16[8,64]{1,0}, f32[8]{0}) custom-call(%ended), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="jit(step)/jvp()/while/body/attention"}
  %y = bf16[8,64]{1,0} get-tuple-element(%kernel), index=0
  %which = s32[] constant(0)
  %z = bf16[8,64]{1,0} conditional(%which, %y, %y), branch_computations={%in_the_cheap_branch, %in_the_dear_branch}
  %all-reduce.2 = (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[16]{0}) all-reduce(%z, %z), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %w = bf16[8,64]{1,0} get-tuple-element(%all-reduce.2), index=0
  ROOT %next = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%i, %w)
}

%condition (t.1: (s32[], bf16[8,64])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %rounds = s32[]{:T(128)} constant(6), metadata={op_name="jit(step)/while"}
  %j = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %rounds), direction=LT
}

ENTRY %main (x.1: bf16[8,64]) -> bf16[8,64] {
  %x.1 = bf16[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,64]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[8,64]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  %out = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
  %token = token[] after-all()
  %out.1 = (bf16[8,64]{1,0}, u32[], token[]) send(%out, %token), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %moved = bf16[8,64]{1,0} collective-permute(%out), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
'''
SIZES = {"data": 2, "fsdp": 4, "tensor": 1}
CONFIG = str(runs.ROOT / "configs/pretrain/1b-v5e-16.yaml")


def test_cycles_are_counted_as_often_as_their_loop_goes_round():
    found = cycles.count(hlo.parse(PROGRAM))
    assert found.total == 6 * (10 + 5 + 100)  # of the two branches the dear one
    assert found.by_part == {"backward": 6 * 5, "optimizer and the rest": 6 * 110}
    assert (found.kernels, found.unread_loops) == (6, 0)


def test_collectives_by_axis_with_bytes_and_runs():
    every = collectives.read(hlo.parse(PROGRAM), SIZES, {"data": 2})
    over = next(c for c in every if c.times == 1 and c.kind == "all-reduce")
    assert (over.axis, over.group, over.sent) == ("data", (0, 4), 1024)  # through the host, to the other slice
    found = {c.kind: c for c in every if c is not over}
    assert len(every) == 4
    gather, reduce, permute = found["all-gather"], found["all-reduce"], found["collective-permute"]
    assert (gather.axis, gather.times, gather.payload, gather.sent) == ("fsdp", 6, 1024, 768)  # once, though in two fusions
    assert (reduce.axis, reduce.times, reduce.payload, reduce.sent) == ("data", 6, 1024 + 64, 1088)
    assert (permute.axis, permute.times, permute.sent) == ("fsdp", 1, 1024)
    assert collectives.per_layer(list(found.values()), 6) == {"fsdp all-gather": 1, "data all-reduce": 1}


def test_slices_are_joined_by_the_axes_that_go_over_them():
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    for dcn, members, axis in (({"data": 2}, (0, 8), "data"), ({"fsdp": 2}, (0, 4), "fsdp"),
                               ({"data": 2, "fsdp": 2}, (0, 4, 8, 12), "data x fsdp"), ({}, (0,), "none")):
        assert collectives.across(sizes, dcn) == members
        assert collectives.axis_of(members, sizes) == axis


SCATTER = """
%all-reduce-scatter.1 (input: bf16[32,64]) -> bf16[8,64] {
  %input = bf16[32,64]{1,0} parameter(0)
  %all-reduce.1 = bf16[32,64]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[8,64]{1,0} dynamic-slice(%all-reduce.1, %i, %j), dynamic_slice_sizes={8,64}
}

ENTRY %main (x: bf16[32,64]) -> bf16[8,64] {
  %x = bf16[32,64]{1,0} parameter(0)
  %fused = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %plain = bf16[8,64]{1,0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}
"""


def test_a_fused_reduce_scatter_is_counted_as_one():
    fused, plain = collectives.read(hlo.parse(SCATTER), SIZES)
    assert (fused.kind, fused.axis, fused.payload, fused.sent) == ("reduce-scatter", "fsdp", 4096, 3072)
    assert (plain.kind, plain.axis, plain.payload, plain.sent) == ("reduce-scatter", "fsdp", 4096, 3072)


@pytest.mark.parametrize(("text", "members"), [
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)), ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)), ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)), ("replica_groups={}", tuple(range(8))),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 2)),
])
def test_every_way_to_write_a_group_is_read(text, members):
    assert collectives.groups(text, 8) == members


def test_a_program_compiled_here_is_read_as_the_emulated_devices_run_it():
    """fsdp=8: every parameter of a layer is gathered, forward and backward, and its gradient summed over `fsdp` alone."""
    prog = toy.program(toy.MODEL, devices=8, fsdp=8)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in toy.batch().items()}
    with jax.set_mesh(prog.mesh):
        text = prog.train_step.lower(prog.abstract, batch).compile().as_text()
    found = collectives.read(hlo.parse(text), dict(prog.mesh.shape))
    assert {c.axis for c in found} == {"fsdp"}
    weights = {leaf.size for leaf in jax.tree.leaves(prog.abstract.params["trunk"]["blocks_L"])}
    gathered = sum(c.payload / 4 * c.times for c in found if c.kind == "all-gather")
    assert gathered >= sum(w for w in weights if w > 1000)


def test_a_slices_name_tells_its_chips_and_shape():
    for name, chips, jax_name, accelerator in (("v5e-256", 256, "v5e:16x16", "v5litepod-256"), ("v5p-128", 64, "v5p:4x4x4", "v5p-128"),
                                               ("v4-8", 4, "v4:2x2x1", "v4-8"), ("v6e-16", 16, "v6e:4x4", "v6e-16")):
        found = find(name)
        assert (found.devices, found.jax_name, found.accelerator_type) == (chips, jax_name, accelerator)
    assert find("v5e-16", slices=2).devices == 32
    assert {n.partition("-")[0] for n in known()} == {"v4", "v5e", "v5p", "v6e"}


def test_the_clock_gives_the_published_peak():
    """The clocks come from units x rows x columns x 2 x clock = the chip's bf16 peak."""
    for name, units, side in (("v4-8", 8, 128), ("v5e-4", 4, 128), ("v5p-8", 8, 128), ("v6e-4", 4, 256)):
        topology = find(name)
        assert units * side**2 * 2 * topology.clock_hz == pytest.approx(topology.chip.bf16_flops, rel=0.01)


def test_link_seconds_by_hand():
    whole = [((x, y), 0) for x in range(16) for y in range(16)]
    v5e = find("v5e-256")
    assert link_seconds(v5e, "all-gather", 200e9, whole) == (pytest.approx(1.0), "4 links")  # two rings, both ways, 50 GB/s
    assert link_seconds(v5e, "all-gather", 200e9, whole[:16])[0] == pytest.approx(2.0)  # one ring
    assert link_seconds(v5e, "all-gather", 200e9, whole[:8])[0] == pytest.approx(4.0)  # a line
    assert link_seconds(find("v5e-256", 2), "all-reduce", 25e9, [((0, 0), 0), ((0, 0), 1)])[0] == pytest.approx(8.0)


@pytest.mark.parametrize(("words", "said"), [
    ([], "topology is missing"), (["--topology=v5e-17"], "known: v4-{8,16"), (["--topology=v5litepod-16"], "did you mean 'v5e-16'"),
    (["--topology=v5e-64"], "needs 16 devices, found 64 in v5e-64"),
    (["--topology=v5e-16", "--mesh.dcn.data=2", "--mesh.fsdp=8"], "needs 16 devices, found 32 in 2 slices of v5e-16"),
    (["--topology=v5e-16", "--mesh.dcn.data=0"], "should be a positive number of slices"),
    (["--topology=v5e-16", "--picture=front.svg"], "is of a search: give --search too"),
    (["--topology=v5e-16", "--search", "--picture=front.txt"], "should end in .svg"),
    (["--topology=v5e-16", "--model.vocab_size=null"], "give --model.vocab_size=N"),
])
def test_mistakes_are_one_line_before_any_compile(words, said, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a child was started"))
    assert cli.main(["plan", "compile", CONFIG, *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_without_libtpu_the_install_line_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert cli.main(["plan", "compile", CONFIG, "--topology=v5e-16"]) == 2
    assert f"-m pip install --no-deps --target {tmp_path}/libtpu 'libtpu==" in capsys.readouterr().err


def test_a_folder_named_libtpu_is_no_compiler(monkeypatch, tmp_path):
    (tmp_path / "libtpu").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "nowhere"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(UserError, match="the TPU compiler is missing"):
        plan_compile.libtpu()


@pytest.mark.parametrize(("mesh", "change", "said"), [
    ({"context": 4}, {"data": {"seq_len": 1020}}, "data.seq_len=1020 is not divisible by 8, twice mesh.context=4; nearest: 1024"),
    ({"fsdp": 4}, {"train": {"sync": "diloco", "groups": 4}}, "train.groups=4: should be the degree of mesh.data"),
    ({"fsdp": 4}, {"train": {"batch_size": 6}}, "mesh.fsdp=4 x mesh.expert=1 does not divide; nearest batch_size: 8"),
    ({"expert": 4}, {}, "mesh.expert=4 is an axis that a dense model can't use"),
])
def test_what_training_would_refuse_is_refused_before_compiling(mesh, change, said, monkeypatch):
    emulated = make_mesh(MeshConfig(data=1, **mesh), jax.devices()[:4])
    monkeypatch.setattr(plan_step, "mesh_of", lambda cfg, topology: emulated)
    with pytest.raises(UserError, match=re.escape(said)):
        plan_step.measure(changes.with_changes(settings(), **change))


def settings(**train) -> CompileVerb:
    from jaxllm import config

    cfg = config.load(CompileVerb, CONFIG, ["topology=v5e-16"])
    return changes.with_changes(cfg, train={"remat": "none"} | train)


def compiled(cfg: CompileVerb) -> dict:
    """Stands in for a compilation: only full remat and two micro-batches fit; the latter is faster."""
    gb = 30 - 20 * (cfg.train.remat == "full") - 15 * (cfg.train.micro_batches > 1)
    return {"fits": gb < 17, "memory": {"peak": gb * 1e9}, "step_s": [0, 2.0 if cfg.train.remat == "full" else 1.0]}


def test_the_single_change_that_makes_it_fit_is_found_by_trying():
    rows = changes.single_changes(settings(), find("v5e-16"), {"mesh": {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}}, compiled, lambda line: None)
    assert [r["change"] for r in rows if r["fits"]] == ["--train.micro_batches=2", "--train.remat=full"]  # the faster first
    assert {"--train.loss_chunk=128", "--train.remat=qkv"} <= {r["change"] for r in rows if not r["fits"]}


def test_the_front_holds_what_nothing_beats():
    def row(peak, step, fits=True):
        return {"peak_gb": peak, "step_s": step, "fits": fits}

    marked = front.mark_best([row(4, 2.0), row(8, 1.0), row(8, 1.5), row(2, 0.5, fits=False), row(9, 1.0)])
    assert [(r["peak_gb"], r["step_s"]) for r in marked if r["best"]] == [(8, 1.0), (4, 2.0)]


def searching(tries: int = 100, **more) -> CompileVerb:
    return dataclasses.replace(settings(), search=True, tries=tries, **more)


def stand_in(cfg: CompileVerb) -> dict:
    """Stands in for a compilation: recomputing, micro-batches, tensor and the host's memory take time for memory."""
    kept = {"full": 2, "qkv": 8, "none": 30}[cfg.train.remat] / cfg.train.micro_batches
    gb = (4 if cfg.train.offload == "none" else 1) * (cfg.mesh.data or 1) + kept
    step = 1 + 0.3 * (cfg.train.remat == "full") + 0.1 * cfg.train.micro_batches + 0.2 * cfg.mesh.tensor + (cfg.train.offload != "none")
    return {"fits": gb < 17, "memory": {"peak": gb * 1e9}, "step_s": [0, step]}


def test_a_search_tries_only_what_divides():
    cfg = searching()
    tried = front.ways(cfg, find("v5e-16"))
    assert len(tried) == len(set(tried)) > 10
    for way in tried:
        assert way.data * way.fsdp * way.tensor == 16
        assert cfg.train.batch_size // way.micro_batches % (way.data * way.fsdp) == 0
    inside = front.ways(changes.with_changes(cfg, mesh={"stage": 2}, train={"micro_batches": 4}), find("v5e-16"))
    assert inside and all(w.data * w.fsdp * w.tensor == 8 for w in inside)  # the stages stay as they are set


def test_a_search_passes_over_what_surely_needs_more():
    seen = []

    def compile_one(cfg):
        seen.append(cfg)
        return stand_in(cfg)

    rows = front.search(searching(), find("v5e-16"), compile_one, lambda line: None)
    assert len(rows) == len(seen)
    refused = {(r["mesh"], r["remat"], r["micro_batches"]) for r in rows if not r["fits"]}
    assert ("fsdp=16", "none", 1) in refused
    tried = {(r["mesh"], r["remat"], r["micro_batches"], r["offload"]) for r in rows}
    assert ("fsdp=16", "none", 2, "none") in tried  # may fit, and is not passed over
    assert ("data=4 fsdp=4", "full", 1, "none") in tried and ("data=4 fsdp=4", "none", 1, "none") not in tried
    best = [r for r in rows if r["best"]]
    assert min(rows, key=lambda r: r["peak_gb"])["offload"] == "both" and {"both", "none"} == {r["offload"] for r in best}
    # what was passed over could not have been on the front: trying all of it gives the same one
    every = [front.named(w) for w in front.ways(searching(), find("v5e-16"))]
    assert len(every) > len(rows)


def test_a_search_that_was_killed_goes_on_from_its_results(tmp_path):
    cfg, topology = searching(tries=6, results=str(tmp_path / "found.jsonl")), find("v5e-16")
    whole = front.search(dataclasses.replace(cfg, results=None), topology, stand_in, lambda line: None)
    begun = []

    def killed(one):
        begun.append(one)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return stand_in(one)

    with pytest.raises(KeyboardInterrupt):
        front.search(cfg, topology, killed, lambda line: None)
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('{"of": "cut by the ki')
    again, said = [], []
    rows = front.search(cfg, topology, lambda one: again.append(one) or stand_in(one), said.append)
    assert rows == whole
    assert len(again) == 4  # two of six were known
    assert said[0].startswith("3 of 6: ") and "left: " in said[1]
    other = changes.with_changes(cfg, model={"n_layers": 8})
    front.search(other, topology, lambda one: again.append(one) or stand_in(one), said.append)
    assert len(again) == 10  # another model's results are not taken


def test_a_file_that_no_search_wrote_is_said(tmp_path):
    (tmp_path / "other.jsonl").write_text("hello\n{}\n")
    with pytest.raises(UserError, match="line 1: is no line of a search"):
        front.search(searching(results=str(tmp_path / "other.jsonl")), find("v5e-16"), stand_in, lambda line: None)


def test_the_front_as_text_and_as_a_picture(tmp_path):
    topology = find("v5e-16")
    rows = front.search(searching(), topology, stand_in, lambda line: None)
    text = report_text.pareto(rows, topology)
    assert text.count("\n  * ") == sum(r["best"] for r in rows) >= 2
    for name in ("front.svg", "front.png"):
        picture.check_picture(str(tmp_path / name))
        picture.draw(rows, topology, str(tmp_path / name))
    svg = (tmp_path / "front.svg").read_text()
    assert "both on the host" in svg and "peak memory of one device, GB" in svg
    for path, said in ((f"{tmp_path}/front.txt", "should end in .svg"), (f"{tmp_path}/no/front.svg", "its folder is not there")):
        with pytest.raises(UserError, match=said):
            picture.check_picture(path)


def test_offload_is_among_the_changes_that_may_make_it_fit():
    def one(cfg):
        gb = 30 - 14 * (cfg.train.offload != "none")
        return {"fits": gb < 17, "memory": {"peak": gb * 1e9}, "step_s": [0, 2.0]}

    cfg = changes.with_changes(settings(), train={"remat": "qkv"})
    rows = changes.single_changes(cfg, find("v5e-16"), {"mesh": {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}}, one, lambda line: None)
    assert [r["change"] for r in rows if r["fits"]] == ["--train.offload=optimizer"]  # the milder; `both` is not tried then
    assert changes.offloads(changes.with_changes(cfg, train={"remat": "none"}), {"stage": 1}) == ["optimizer"]  # nothing is named
    assert changes.offloads(cfg, {"stage": 2}) == ["optimizer"]


def test_what_does_not_divide_is_not_tried():
    cfg = settings()
    whole = {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}
    assert changes.divides(cfg, whole)
    # as many rows as the model is wide, so that one size must not stand for the other
    wide = changes.with_changes(cfg, model={"d_model": 48, "n_heads": 4, "d_ff": 64}, train={"batch_size": 48})
    assert changes.divides(wide, {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}) and not changes.divides(wide, {"data": 2, "fsdp": 16, "expert": 1, "tensor": 1})
    assert not changes.divides(wide, {"data": 16, "fsdp": 1, "expert": 1, "tensor": 3})


def test_a_refused_program_tells_what_it_needs():
    from jaxllm.plan.step import too_large

    told = too_large("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.25G of 15.75G hbm. Exceeded by 18.5G.\n"
                     '  1. Size: 2.00G\n     Operator: op_name="jit(step)/dot"\n')["refused"]
    assert (told["needs"], told["has"]) == (34.25 * 2**30, 15.75 * 2**30)
    early = too_large("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (49.53G) exceeds "
                      "available HBM (15.75G).")["refused"]
    assert early == {"needs": 49.53 * 2**30, "has": 15.75 * 2**30, "largest": []}
    assert told["largest"] == [{"bytes": 2 * 2**30, "from": "jit(step)/dot"}]


BESIDE = pathlib.Path(sys.prefix) / "libtpu"  # where launch/local.sh puts it


def compile_for_tpu(tmp_path, *words: str) -> dict:
    if not BESIDE.is_dir() and importlib.util.find_spec("libtpu") is None and "LIBTPU" not in os.environ:
        pytest.skip("no libtpu; launch/local.sh test installs it, or: pip install 'jax[tpu]'")
    where = os.pathsep.join([str(runs.ROOT), os.environ.get("LIBTPU", str(BESIDE))])
    done = subprocess.run([sys.executable, "-m", "jaxllm", "plan", "compile", *words, f"--json={tmp_path}/found.json"],
                          capture_output=True, text=True, check=False, cwd=runs.ROOT, timeout=1500,
                          env=os.environ | {"PYTHONPATH": where, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found.get("copies")
    return found


@pytest.mark.slow
def test_the_demo_compiles_for_one_tpu_host(tmp_path):
    found = compile_for_tpu(tmp_path, "configs/pretrain/demo.yaml", "--topology=v5e-4", "--mesh.fsdp=4", "--mesh.data=1",
                            "--model.vocab_size=4096")
    assert found["kernels"] >= 3  # forward, and the two kernels of the backward
    assert found["memory"]["peak"] < 1e9


@pytest.mark.slow
def test_a_billion_parameters_on_sixteen_chips_reach_their_goals(tmp_path):
    found = compile_for_tpu(tmp_path, "configs/pretrain/1b-v5e-16.yaml", "--topology=v5e-16")
    assert found["memory"]["peak"] <= 3.38e9
    assert found["compute_s"] <= 0.60
    assert found["memory"]["arguments"] == pytest.approx(12 * found["parameters"] / 16, rel=0.05)  # split in sixteen


@pytest.mark.slow
def test_moments_and_activations_of_a_tpu_are_in_the_hosts_memory(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "model: {d_model: 512, n_layers: 8, n_heads: 4, d_ff: 2048, vocab_size: 4096, max_seq_len: 1024}\nmesh: {data: 1, fsdp: 4}\n"
        "data: {seq_len: 1024}\ntrain: {steps: 100, batch_size: 16, remat: full, loss_chunk: 256}\n")
    found = compile_for_tpu(tmp_path, str(tmp_path / "small.yaml"), "--topology=v5e-4", "--train.offload=both")
    memory, held = found["memory"], found["held"]
    assert memory["host_arguments"] == pytest.approx(held["optimizer"], rel=1e-3)  # all moments
    assert memory["arguments"] == pytest.approx(held["parameters"], rel=0.01)  # nothing but them
    assert memory["host_temporaries"] == 8 * 4 * 1024 * 512 * 2  # of each layer its input, in bfloat16
    assert memory["peak"] < 0.25e9  # 0.293 GB without


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [["gpipe"], ["1f1b"], ["interleaved", "--train.virtual_stages=2"], ["zero_bubble"]], ids=lambda s: s[0])
def test_every_pipeline_schedule_compiles_for_tpu_with_the_splash_kernel(schedule, tmp_path):
    (tmp_path / "toy.yaml").write_text(
        "model: {d_model: 256, n_layers: 4, n_heads: 4, n_kv_heads: 2, vocab_size: 512, max_seq_len: 256}\n"
        "data: {seq_len: 256}\ntrain: {steps: 10, batch_size: 16, micro_batches: 4}\nmesh: {stage: 2, fsdp: 2, data: 1}\n")
    name, *more = schedule
    found = compile_for_tpu(tmp_path, str(tmp_path / "toy.yaml"), "--topology=v5e-4", f"--train.pipeline={name}", *more)
    assert found["kernels"] >= 4  # the forward's kernel, and the backward's, which begins with the forward's again
    assert found["memory"]["peak"] < 0.1e9


@pytest.mark.slow
def test_a_pipeline_on_tpu_holds_less_with_1f1b_by_what_the_tables_say(tmp_path):
    from jaxllm.parallel.schedule import make
    from jaxllm.parallel.table import lower

    (tmp_path / "small.yaml").write_text(
        "model: {d_model: 1024, n_layers: 8, n_heads: 8, d_ff: 2816, vocab_size: 32000, max_seq_len: 2048}\ndata: {seq_len: 2048}\n"
        "train: {steps: 10, batch_size: 64, micro_batches: 16, remat: full, loss_chunk: 256}\nmesh: {stage: 4, data: 1, fsdp: 4}\n")
    alive = [compile_for_tpu(tmp_path, str(tmp_path / "small.yaml"), "--topology=v5e-16", f"--train.pipeline={name}")["memory"]["alive"]
             for name in ("gpipe", "1f1b")]
    tables = [lower(make(name, 4, 16)) for name in ("gpipe", "1f1b")]
    predicted = (tables[0].x_slots + tables[0].g_slots - tables[1].x_slots - tables[1].g_slots) * 2048 * 1024 * 2
    assert alive[0] - alive[1] == pytest.approx(predicted, rel=0.1)


@pytest.mark.slow
def test_a_sequence_in_parts_compiles_for_tpu_with_the_splash_kernel(tmp_path):
    found = compile_for_tpu(tmp_path, "configs/pretrain/demo.yaml", "--topology=v5e-4", "--mesh.data=2", "--mesh.context=2",
                            "--model.vocab_size=4096", "--data.seq_len=1024", "--model.max_seq_len=1024")
    assert found["kernels"] >= 16  # two chunks on either of two devices: forward, again in the backward, and its two kernels
