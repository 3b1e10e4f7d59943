"""AntiBERTy (arXiv 2112.07782), a BERT trained on 558M antibody sequences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.fetch.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarankgrad.fetch.source import Converted

_OTHER_HEADS = ("cls.species.", "cls.chain.", "cls.graft.")
_POSITIONS = "bert.embeddings.position_ids"  # 0, 1, 2, ...: transformers makes them anew


def convert(checkpoint: Path) -> Converted:
    """Read the masked language model, with its pooler, and the vocabulary beside its folder."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig.from_pretrained(checkpoint.parent, local_files_only=True)
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = BertForMaskedLM(config)
    # With the pooler, which a classifier starts from and BertForMaskedLM leaves out.
    model.bert = BertModel(config)
    model.load_state_dict(
        {
            name: tensor
            for name, tensor in stored.items()
            if name != _POSITIONS and not name.startswith(_OTHER_HEADS)
        }
    )
    words = (checkpoint.parents[1] / "vocab.txt").read_text(encoding="utf-8").split()
    return model, residue_tokenizer(words, config.max_position_embeddings)


def residue_tokenizer(words: list[str], max_length: int) -> PreTrainedTokenizerBase:
    """Build a tokenizer of one token a residue, for sequences with or without spaces.

    AntiBERTy itself puts a space between residues and uses BERT's tokenizer; the tokens are the
    same.

    Args:
        words: Tokens by their index: BERT's special tokens and one-letter residues.
        max_length: The longest input, in tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.decoder = decoders.Fuse()
    fast_tokenizer: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = fast_tokenizer(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return wrapped


SOURCE = ModelSource(
    name="antiberty",
    title="AntiBERTy",
    summary="A masked language model of antibodies: a BERT of 26M weights, 512 positions, one "
    "token a residue.",
    package="antiberty",
    version="0.1.3",
    weights="antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
    others=(
        "antiberty/trained_models/AntiBERTy_md_smooth/config.json",
        "antiberty/trained_models/vocab.txt",
    ),
    license="MIT",
    license_says="the package's LICENSE.MD, Copyright (c) 2023 Jeffrey Ruffolo",
    license_file="LICENSE.MD",
    conversion=(
        "Encoder, pooler and masked language model as they are. The heads for species, chain and "
        "grafting are left out, since no class of transformers has them. The tokenizer takes "
        "sequences as they are written, EVQLVESGG or E V Q L V E S G G; anything but the 20 "
        "residues is [UNK], and a residue to be filled in is [MASK]."
    ),
    convert=convert,
)
