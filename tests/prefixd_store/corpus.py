"""Damaged and mismatched checkpoints by name, and what their refusal must say."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prefixd_store import Geometry, SiteGeometry
from tests.prefixd_store.checkpoints import save_peft
from tests.prefixd_store.damage import (
    Build,
    Runs,
    adapter_said,
    both_formats,
    cut,
    dtype_in_ini,
    huge_product,
    listed,
    lists,
    made,
    nan_in_ours,
    ours,
    put,
    removed,
    said,
    shared,
    spoilt,
    tensors,
    then,
    ungrouped,
    without,
)
from tests.prefixd_store.foreign import (
    BART,
    GPT2,
    LLAMA,
    cartridge,
    faster_transformer,
    paper_bart,
    paper_gpt2,
)

WIDE = Geometry(2, 4, 16)
DEEP = Geometry(5, 2, 8)
PEFT_LLAMA = Geometry(3, 2, 16)


class Case(NamedTuple):
    build: Build
    model: Geometry
    reason: str


BIN = "model.prefix_prompt.sum.weights"

peft = made(save_peft)
gpt2, words, bart, ft = (
    made(paper_gpt2),
    made(paper_gpt2, kind="words"),
    made(paper_bart),
    made(faster_transformer),
)

CORPUS = {
    # ours
    "ours: not ours at all": Case(ours(format="acme"), GPT2, "no known checkpoint"),
    "ours: a version to come": Case(ours(format_version="2"), GPT2, "format_version is '2'"),
    "ours: cut in half": Case(then(ours(), cut), GPT2, "truncated"),
    "ours: NaN": Case(then(ours(), nan_in_ours), GPT2, "decoder.key.* is NaN"),
    "ours: another head size": Case(
        ours(), WIDE, r"\[L=2, H_kv=4, P=5, D=8\] .* \[L=2, H_kv=4, P, D=16\]"
    ),
    "ours: an encoder's, for a decoder": Case(
        ours(("decoder", "encoder")), GPT2, "tensors for decoder, encoder; a decoder-only"
    ),
    "ours: a cross prefix of another size": Case(
        ours(("cross",)), BART, r"cross tensors are \[L=2.* takes \[L=3"
    ),
    "ours: another model's": Case(
        ours(base_fingerprint="bb"), GPT2, "fingerprint is bb, this model's is aa"
    ),
    "ours: a wrong offset": Case(ours(query_offset="3"), GPT2, "query_offset is 3"),
    # PEFT
    "peft: cut in half": Case(then(peft, cut), PEFT_LLAMA, "truncated"),
    "peft: a LoRA": Case(
        then(peft, said("adapter_config.json", peft_type="LORA")), PEFT_LLAMA, "LORA cannot"
    ),
    "peft: another head size": Case(peft, LLAMA, r"\[P, 192\] .*3\*2\*2\*8\] = \[P, 96\]"),
    "peft: another length": Case(
        then(peft, said("adapter_config.json", num_virtual_tokens=9)),
        PEFT_LLAMA,
        r"num_virtual_tokens 9 but prompt_embeddings is \[7, 192\]",
    ),
    "peft: weights of the model too": Case(
        then(peft, put("lm_head.weight", torch.zeros(2, 2))), PEFT_LLAMA, "lm_head.weight"
    ),
    "peft: infinite": Case(
        then(peft, spoilt("prompt_embeddings", float("inf"))), PEFT_LLAMA, "is infinite"
    ),
    "peft: a decoder-only model's, for an encoder-decoder": Case(
        peft,
        Geometry(3, 2, 16, encoder=SiteGeometry(3, 2, 16)),
        "a decoder-only model .* this is an encoder-decoder model",
    ),
    "peft: without its config": Case(
        then(peft, removed("adapter_config.json")), PEFT_LLAMA, "no known checkpoint"
    ),
    "peft: a config that is not JSON": Case(
        then(peft, lambda f: (f / "adapter_config.json").write_text("{")), PEFT_LLAMA, "valid JSON"
    ),
    # HazyResearch
    "cartridge: cut in half": Case(then(lists(), cut), LLAMA, "cannot be loaded as weights"),
    "cartridge: runs code": Case(
        then(lists(), put("extra", Runs())), LLAMA, "cannot be loaded as weights"
    ),
    "cartridge: a file that runs code": Case(
        lambda f: torch.save(Runs(), f / "c.pt"), LLAMA, "cannot be loaded as weights"
    ),
    "cartridge: no values": Case(
        then(lists(), without("trainable_values")), LLAMA, "3 trainable_keys and 0 trainable_values"
    ),
    "cartridge: only frozen": Case(
        then(lists(), without("trainable_values"), without("trainable_keys")),
        LLAMA,
        "has fixed tensors; expected trainable",
    ),
    "cartridge: both names of the frozen ones": Case(
        then(lists(), put("frozen_keys", [torch.zeros(1, 2, 1, 8)])),
        LLAMA,
        "has fixed and frozen and trainable",
    ),
    "cartridge: more layers": Case(
        lists(), DEEP, "has 3 trainable_keys .* model has 5 layers|3 fixed"
    ),
    "cartridge: another head size": Case(
        lists(), Geometry(3, 2, 16), r"\[1, 2, 1, 8\], expected \[1, 2, n, 16\]"
    ),
    "cartridge: a layer is longer": Case(
        then(lists(), listed("trainable_keys", lambda t: t.append(torch.cat([t.pop()] * 2, 2)))),
        LLAMA,
        r"trainable_keys.2 has shape \[1, 2, 8, 8\], expected \[1, 2, 4, 8\]",
    ),
    "cartridge: NaN": Case(
        then(
            lists(), listed("trainable_values", lambda t: t[0].view(-1).__setitem__(0, torch.nan))
        ),
        LLAMA,
        "is NaN",
    ),
    "cartridge: two dtypes": Case(
        then(lists(), listed("trainable_keys", lambda t: t.append(t.pop().half()))),
        LLAMA,
        r"differ in dtype \(float16, float32\)",
    ),
    "cartridge: for an encoder-decoder": Case(
        lists(geometry=BART), BART, "a cartridge is for a decoder-only model"
    ),
    "cartridge: optimizer state inside": Case(
        then(lists(), put("step", torch.tensor(7))), LLAMA, "also has 'step'"
    ),
    "cartridge: two of them": Case(
        then(lists(), lambda f: cartridge(f / "cache-step9.pt")), LLAMA, "push one of them"
    ),
    # the paper's GPT-2
    "gpt2: infix": Case(then(gpt2, said(use_infix=True)), GPT2, "use_infix: .* each request's"),
    "gpt2: infix by its tensors": Case(
        then(gpt2, put("wte2.weight", torch.zeros(5, 32))), GPT2, "use_infix"
    ),
    "gpt2: without its config": Case(
        then(gpt2, removed("config.json")), GPT2, "config.json is mis"
    ),
    "gpt2: another model": Case(gpt2, WIDE, r"\[5, 128\] .*2\*2\*4\*16\] = \[P, 256\]"),
    "gpt2: direct, another model": Case(
        words, WIDE, r"\[4, 1, 4, 5, 8\], expected \[4, 1, 4, P, 16\]"
    ),
    "gpt2: flat, not a whole token": Case(
        then(made(paper_gpt2, kind="flat"), put("control_trans", torch.zeros(639))),
        GPT2,
        r"639 values, .* 5\*2\*2\*4\*8 = 640",
    ),
    "gpt2: half an MLP": Case(
        then(gpt2, without("control_trans.2.bias")), GPT2, "control_trans.2.bias is missing"
    ),
    "gpt2: layers that do not join": Case(
        then(gpt2, put("control_trans.2.weight", torch.zeros(128, 7))),
        GPT2,
        r"control_trans.2.weight has shape \[128, 7\], expected \[out, 6\]",
    ),
    "gpt2: an infinity that tanh would hide": Case(
        then(gpt2, spoilt("wte.weight", float("inf"))), GPT2, r"wte.weight\[0, 0\] is infinite"
    ),
    "gpt2: another length": Case(then(gpt2, said(preseqlen=9)), GPT2, "preseqlen 9 .* have 5"),
    "gpt2: the embedding-only ablation": Case(
        then(
            gpt2,
            put("control_trans.2.weight", torch.zeros(32, 6)),
            put("control_trans.2.bias", torch.zeros(32)),
        ),
        GPT2,
        "embedding-only ablation",
    ),
    "gpt2: the fine-tuned model too": Case(
        then(gpt2, put("transformer.wpe.weight", torch.zeros(2, 2))), GPT2, "transformer.wpe.weight"
    ),
    "gpt2: for an encoder-decoder": Case(gpt2, BART, "GPT-2, a decoder-only model"),
    "gpt2: a product of gigabytes": Case(
        huge_product, GPT2, r"\[40000, 40000\] in float32 takes 6400000000 bytes"
    ),
    "gpt2: integers": Case(
        then(gpt2, put("wte.weight", torch.zeros(5, 32, dtype=torch.int64))), GPT2, "is I64"
    ),
    # the paper's BART
    "bart: for a decoder-only model": Case(bart, GPT2, "BART, an encoder-decoder model"),
    "bart: another model": Case(
        bart, Geometry(4, 4, 8, encoder=SiteGeometry(4, 4, 8)), r"\[5, 192\] .*4\*2\*4\*8\]"
    ),
    "bart: an encoder with more layers": Case(
        bart, Geometry(3, 4, 8, encoder=SiteGeometry(6, 4, 8)), r"\[L=3, .* encoder \[L=6"
    ),
    "bart: an encoder of other heads": Case(
        bart, Geometry(3, 4, 8, encoder=SiteGeometry(2, 2, 16)), r"H=4, D=8.*H=2, D=16"
    ),
    "bart: another length": Case(
        then(bart, put("wte2.weight", torch.zeros(6, 32))),
        BART,
        "preseqlen 5 but wte2 and control_trans2 have 6",
    ),
    "bart: infix": Case(then(bart, said(format_mode="infix")), BART, "use_infix"),
    "bart: cross without its table": Case(
        then(bart, without("wte2.weight")), BART, "wte2.weight is missing"
    ),
    # AdapterHub
    "adapterhub: gates": Case(shared("gpt2-gated"), GPT2, "gates .use_gating.*input"),
    "adapterhub: heads of a group differ": Case(
        ungrouped, LLAMA, r"\[L=3, H=4, P=5, D=8\].*differ.*\[L=3, H_kv=2, P, D=8\]"
    ),
    "adapterhub: another model": Case(
        shared("gpt2"), Geometry(3, 4, 8), r"\[5, 128\] .*3\*2\*4\*8\] = \[P, 192\]"
    ),
    "adapterhub: an encoder-decoder's": Case(
        shared("bart"), Geometry(3, 4, 8), "prefixes for cross, decoder, encoder; .*decoder-only"
    ),
    "adapterhub: for an encoder-decoder": Case(shared("gpt2"), BART, "no encoder_prefix tensor"),
    "adapterhub: several methods": Case(
        then(shared("gpt2"), adapter_said(architecture="union")), GPT2, "architecture is union"
    ),
    "adapterhub: layers left out": Case(
        then(shared("gpt2"), adapter_said(leave_out=[1])), GPT2, r"leave_out is \[1\]"
    ),
    "adapterhub: another length": Case(
        then(shared("gpt2"), adapter_said(prefix_length=6)), GPT2, "prefix_length 6 .* have 5"
    ),
    "adapterhub: ejected, another length": Case(
        then(shared("gpt2-ejected"), adapter_said(prefix_length=7)), GPT2, "7 does not divide"
    ),
    "adapterhub: an unknown activation": Case(
        then(shared("gpt2"), adapter_said(non_linearity="swish")), GPT2, "swish is not known.*eject"
    ),
    "adapterhub: a LoRA beside it": Case(
        then(shared("gpt2"), put("transformer.h.0.loras.task.lora_A", torch.zeros(2, 2))),
        GPT2,
        "loras.task.lora_A",
    ),
    "adapterhub: without its config": Case(
        then(shared("gpt2"), removed("adapter_config.json")), GPT2, "adapter_config.json .* missing"
    ),
    "adapterhub: half an MLP": Case(
        then(
            shared("gpt2"), tensors(lambda s: [s.pop(n) for n in list(s) if n.endswith("2.bias")])
        ),
        GPT2,
        "2.bias is missing",
    ),
    # FasterTransformer
    "fastertransformer: a rank is missing": Case(
        then(ft, removed(f"{BIN}.0.bin")), GPT2, "ranks 1 of task 'sum'; expected all of 0 to 1"
    ),
    "fastertransformer: a rank is short": Case(
        then(ft, lambda f: (f / f"{BIN}.1.bin").write_bytes(b"\0" * 64)), GPT2, "16 and 320 values"
    ),
    "fastertransformer: half a number": Case(
        then(ft, lambda f: (f / f"{BIN}.1.bin").write_bytes(b"\0" * 63)), GPT2, "63 bytes"
    ),
    "fastertransformer: another model": Case(
        ft, Geometry(3, 4, 8), r"\[L, 2, H, P, D\] = \[3, 2, 4, P, 8\]"
    ),
    "fastertransformer: another dtype than it says": Case(
        then(ft, lambda f: dtype_in_ini(f, "fp16")), GPT2, "prompt_length 5 .* have 10|NaN|infinite"
    ),
    "fastertransformer: an unknown dtype": Case(
        then(ft, lambda f: dtype_in_ini(f, "int8")), GPT2, "weight_data_type int8"
    ),
    "fastertransformer: two tasks": Case(
        then(ft, made(faster_transformer, task="qa")), GPT2, r"2 tasks \(qa, sum\): push one"
    ),
    "fastertransformer: for an encoder-decoder": Case(ft, BART, "decoder-only models"),
    "fastertransformer: NaN": Case(
        then(ft, lambda f: (f / f"{BIN}.0.bin").write_bytes(b"\xff" * 1280)), GPT2, "is NaN"
    ),
    # no checkpoint, or more than one
    "nothing": Case(lambda f: None, GPT2, "holds no prefix"),
    "tensors of nobody's": Case(
        lambda f: torch.save({"x": torch.zeros(2)}, f / "x.pt"), GPT2, "no known checkpoint"
    ),
    "two formats at once": Case(
        both_formats, GPT2, "more than one checkpoint: .*prefixd.* and .*PEFT"
    ),
    "a pickle that says it is safetensors": Case(
        lambda f: torch.save({"x": torch.zeros(2)}, f / "x.safetensors"), GPT2, "not a safetensors"
    ),
}
