"""Packages like those that models come in, with tiny weights, in a folder that stands for
site-packages; importing any of them raises."""

from __future__ import annotations

from pathlib import Path

import torch

from adarankgrad.fetch.fetch import SOURCES

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RESIDUES = list("ACDEFGHIKLMNPQRSTVWY")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def write_package(site: Path, name: str, version: str | None = None) -> Path:
    """Write a package's metadata and code, and return where its weights belong."""
    source = SOURCES[name]
    version = version or source.version
    info = site / f"{source.package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {version}\n"
    )
    if source.license_file is not None:
        (info / source.license_file).write_text("You may.")
    weights = site / source.weights
    weights.parent.mkdir(parents=True)
    top = site / Path(source.weights).parts[0]
    (top / "__init__.py").write_text("raise RuntimeError('code of the package was run')")
    return weights


def write_smollm2(site: Path) -> Path:
    """A LLaMA of one block; its first matrix of attention in Q4_1, embeddings in Q8_0."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize

    path = write_package(site, "smollm2")
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    words = ["<unk>", "<start>", "<end>", "a", "b", "ab"]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    kinds = {
        "token_embd.weight": GGMLQuantizationType.Q8_0,
        "blk.0.attn_output.weight": GGMLQuantizationType.Q4_1,
    }
    for name, shape in _LLAMA_SHAPES.items():
        values = torch.randn(shape).numpy()
        if name in kinds:
            writer.add_tensor(name, quantize(values, kinds[name]), raw_dtype=kinds[name])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_LLAMA_SHAPES = {
    "token_embd.weight": (6, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}


def write_minilm(site: Path) -> Path:
    """A folder of transformers, as it stands in the package."""
    from transformers import BertModel, BertTokenizer

    path = write_package(site, "minilm")
    words = [*SPECIAL, "good", "day", "##s"]
    BertModel(_bert_config(len(words))).save_pretrained(path.parent)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(
        path.parent
    )
    return path


def write_antiberty(site: Path) -> Path:
    """A checkpoint with the heads, the pooler and the buffer that AntiBERTy's has."""
    from transformers import BertForMaskedLM, BertModel

    path = write_package(site, "antiberty")
    words = [*SPECIAL, *RESIDUES]
    config = _bert_config(len(words))
    model = BertForMaskedLM(config)
    model.bert = BertModel(config)
    others = {"species": 6, "chain": 2, "graft": 2}
    state = {
        **model.state_dict(),
        "bert.embeddings.position_ids": torch.arange(config.max_position_embeddings)[None],
        **{f"cls.{name}.weight": torch.randn(size, 16) for name, size in others.items()},
        **{f"cls.{name}.bias": torch.randn(size) for name, size in others.items()},
    }
    torch.save(state, path)
    config.save_pretrained(path.parent)
    (path.parents[1] / "vocab.txt").write_text("\n".join(words))
    return path


def _bert_config(vocab_size):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
