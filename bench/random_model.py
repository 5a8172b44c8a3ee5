"""Builds a model of any known shape with random weights, so that benchmarks need no download and no checkpoint.

Random weights cost the time and memory of trained ones; what they write is noise. Weights are drawn on the device one
by one, and in 4 bits quantised at once, so that nothing but the finished model and one unquantised Linear is there.
"""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bench.memory import read_config
from core.model import DTYPES, ModelArgs, device, keep_cpu_weights_as_loaded

STD = 0.02  # of all matrices, as Qwen's configs have it for fresh weights


def shape_config(name: str, layers: int = 0) -> PretrainedConfig:
    """The config of a known architecture or a folder, cut to `layers` layers if > 0; DataError if there is none."""
    config = read_config(name)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):  # Llama has none
            config.layer_types = config.layer_types[:layers]
    return config


def random_base(config: PretrainedConfig, args: ModelArgs) -> PreTrainedModel:
    """What model.load_base would give for a checkpoint of this config, with weights from seed 0.

    args: dtype, load_in_4bit and attn_implementation are used.
    """
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)
    # the only buffers of these architectures: frequencies, which a meta device does not compute
    lm.base_model.rotary_emb = type(lm.base_model.rotary_emb)(config).to(device())
    done: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # a tied weight is drawn once
    head = lm.get_output_embeddings()
    for path, module in list(lm.named_modules()):
        four_bit = args.load_in_4bit and isinstance(module, torch.nn.Linear) and module is not head
        if four_bit:
            module = empty_4bit(module, dtype)
            lm.set_submodule(path, module)
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in done:
                done[p] = torch.nn.Parameter(random_values(name, p.shape, dtype), requires_grad=False)
            setattr(module, name, quantised(done.pop(p), module) if four_bit and name == "weight" else done[p])
    if args.load_in_4bit:
        lm.is_loaded_in_4bit = True  # peft asks for it
        keep_cpu_weights_as_loaded(lm)
    return lm.eval()


def random_values(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Matrices normal, biases 0, the scales of norms 1."""
    if len(shape) > 1:
        return torch.randn(shape, dtype=dtype, device=device()) * STD
    return torch.full(shape, float(name != "bias"), dtype=dtype, device=device())


def empty_4bit(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Linear:
    """The bitsandbytes layer that model.load_base puts in place of a Linear, without weights."""
    from bitsandbytes.nn import Linear4bit

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    return Linear4bit(*sizes, dtype, compress_statistics=True, quant_type="nf4", device="meta")


def quantised(weight: torch.nn.Parameter, module: torch.nn.Module) -> torch.nn.Parameter:
    """The weight in NF4 with double quantisation; a move to its own device is what makes bitsandbytes quantise."""
    from bitsandbytes.nn import Params4bit

    options = dict(requires_grad=False, compress_statistics=True, quant_type="nf4", module=module)
    return Params4bit(weight.data, **options).to(weight.device)
