"""Makes the files beside it with AdapterHub's own library, which needs an older transformers.

    pip install adapters==1.3.0 safetensors    # somewhere else than the project's environment
    python adapterhub.py

For each model: the folder that ``save_adapter`` writes, and ``expected.safetensors`` with the keys
and values that the library's own modules feed each location, [L, H, P, D].
"""

import shutil
from pathlib import Path

import adapters
import torch
from adapters import PrefixTuningConfig
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SITES = {"self_prefix": "decoder", "cross_prefix": "cross", "encoder_prefix": "encoder"}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def llama():
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=16, **sizes)
    )


def bart():
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(BartConfig(vocab_size=16, d_model=32, **sizes, **heads))


def make(name, model, *, eject=False, gating=False):
    torch.manual_seed(0)
    adapters.init(model)
    config = PrefixTuningConfig(prefix_length=5, bottleneck_size=6, use_gating=gating)
    model.add_adapter("task", config=config)
    if eject:
        model.eject_prefix_tuning("task")
    model.eval()
    folder = Path(__file__).parent / f"adapterhub-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_adapter(str(folder), "task", with_head=False)
    with torch.no_grad():
        past = model.base_model.prefix_tuning.prefix_tunings["task"](1)
    expected = {
        f"{SITES[location]}.{part}": torch.stack([layer[i, 0] for layer in layers]).contiguous()
        for location, layers in past.items()
        for i, part in enumerate(("key", "value"))
    }
    save_file(expected, folder / "expected.safetensors")


make("gpt2", gpt2())
make("gpt2-ejected", gpt2(), eject=True)
make("gpt2-gated", gpt2(), gating=True)
make("llama", llama())
make("bart", bart())
