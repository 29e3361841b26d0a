"""A GGUF file of a tiny Llama, written with the gguf package; the tokenizer's too."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

from tests.tiny import CHATML, EOS_ID

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(base: Path, path: Path) -> Path:
    """Write the base's weights in fp32. GGUF keeps Llama's query and key rows interleaved."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Some Title Of The File")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, base)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        module = name.removeprefix("model.").removesuffix(".weight")
        if module.startswith("layers."):
            _, layer, inner = module.split(".", 2)
            short = _BLOCK[inner]
            array = tensor.numpy()
            if short in heads:
                array = _interleave(array, heads[short])
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(array))
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[module]
            writer.add_tensor(f"{short}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    out, into = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, into).swapaxes(1, 2).reshape(out, into)


def _add_tokenizer(writer: gguf.GGUFWriter, base: Path) -> None:
    vocab = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
    tokens[255] = "ab"  # the format wants a merge, and no UTF-8 text holds this byte
    tokens += ["<|im_start|>", "<|im_end|>"]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(EOS_ID)
    writer.add_pad_token_id(EOS_ID)
    writer.add_bos_token_id(EOS_ID - 1)
    writer.add_chat_template(CHATML)
