"""Checkpoint directories as people have them: every way in which the files of a GPT-2's tokenizer and network come.

Each layout writes a directory with small random weights. What it is called says what is particular about it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file, save_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerFast
from vocabularies import CHINESE, ENGLISH, JAPANESE, MARKS, WORDS

Layout = Callable[[Path], None]
LAYOUTS: dict[str, Layout] = {}
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "[PAD]",
    "<custom>",
    "<s>",
    "</s>",
    "<pad>",
    "<mask>",
    "<|endoftext|>",
    "<unk>",
]
SENTENCES = [
    "The sea is calm tonight, and the moon lies fair upon the straits.",
    "hello world, it's 2026 and we've 1,234.56 reasons; don't they'll say?",
    "今天天气很好，你好。大海", "東京です さくら", "Größe naïve café ﬁne Ⅷ ½ İstanbul", "👩🏽‍🚀 🙂 e\u0301",
    "def f(x):\n    return x  # comment\n\n\n", "привет мир как дела", "안녕하세요 세계",
]  # fmt: skip


def layout(function: Layout) -> Layout:
    LAYOUTS[function.__name__.replace("_", " ")] = function
    return function


def byte_vocabulary(size: int = 420, *, alphabet: bool = True, special: tuple[str, ...] = ("<|endoftext|>",)) -> Any:
    """A byte-level BPE trained on a few sentences; special tokens first, as the library's trainer puts them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=letters)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def write_vocab(directory: Path, *, last: bool = True, **options: Any) -> None:
    """vocab.json and merges.txt, with `<|endoftext|>` in the last place or in none."""
    trained = json.loads(byte_vocabulary(special=(), **options).to_str())["model"]
    vocab = dict(trained["vocab"])
    if last:
        vocab["<|endoftext|>"] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    merges = [" ".join(pair) for pair in trained["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def write_config(directory: Path, name: str = "tokenizer_config.json", **values: Any) -> None:
    (directory / name).write_text(json.dumps(values))


def write_network(directory: Path, vocab_size: int, *, save: bool = True, **config: Any) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 256, "vocab_size": vocab_size}
    network = GPT2LMHeadModel(GPT2Config(**{**shape, "bos_token_id": None, "eos_token_id": None, **config})).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (2.0 if "wpe" in name else 0.3) + (1.0 if ".ln_" in name else 0.0))
    if save:
        network.save_pretrained(directory)
    return network


def plain(directory: Path, **config: Any) -> None:
    """GPT-2's own: vocab.json and merges.txt, and nothing said."""
    write_vocab(directory)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())), **config)


def saved(directory: Path, tokenizer: Any, more: int = 0, **config: Any) -> None:
    tokenizer.save_pretrained(directory)
    write_network(directory, len(tokenizer) + more, **config)


def gpt2(directory: Path, **options: Any) -> Any:
    """A GPT2Tokenizer over a vocabulary that is made in a place of its own."""
    source = directory / "source"
    source.mkdir()
    write_vocab(source)
    return GPT2Tokenizer.from_pretrained(source, **options)


def fast(tokenizer: Any, **named: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


# === Byte-level BPE ===


@layout
def vocabulary_and_merges_alone(directory: Path) -> None:
    plain(directory)


@layout
def vocabulary_and_merges_with_more_embeddings(directory: Path) -> None:
    write_vocab(directory)
    write_network(directory, 448)


@layout
def saved_by_transformers(directory: Path) -> None:
    saved(directory, gpt2(directory))


@layout
def a_fine_tune_with_added_tokens(directory: Path) -> None:
    tokenizer = gpt2(directory)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<custom>"])
    saved(directory, tokenizer)


@layout
def a_fine_tune_of_transformers_4_without_tokenizer_json(directory: Path) -> None:
    """As the slow tokenizer of transformers 4 saved it: added_tokens.json and special_tokens_map.json."""
    write_vocab(directory)
    size = len(json.loads((directory / "vocab.json").read_text()))
    added = {"[PAD]": size, "<|im_start|>": size + 1, "<|im_end|>": size + 2, "<custom>": size + 3}
    write_config(directory, "added_tokens.json", **added)
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    more = {"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    write_config(directory, "special_tokens_map.json", **named, **more)
    write_config(directory, tokenizer_class="GPT2Tokenizer", **named)
    write_network(directory, size + 4)


@layout
def added_tokens_decoder_without_tokenizer_json(directory: Path) -> None:
    tokenizer = gpt2(directory)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<custom>", "hello", "天"])
    saved(directory, tokenizer)
    write_vocab(directory)
    (directory / "tokenizer.json").unlink()
    decoder = {
        str(id_): {"content": token.content, "special": token.special, "normalized": token.normalized}
        for id_, token in tokenizer.added_tokens_decoder.items()
    }
    write_config(directory, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=decoder, pad_token="[PAD]")


@layout
def special_tokens_within_the_vocabulary(directory: Path) -> None:
    """As rugpt3: `<s>`, `</s>`, `<pad>`, `<mask>` and `<unk>` are in vocab.json."""
    write_vocab(directory, last=False)
    vocab = json.loads((directory / "vocab.json").read_text())
    for token in ("<s>", "</s>", "<pad>", "<unk>", "<mask>"):
        vocab[token] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab))
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    write_config(directory, "special_tokens_map.json", **named)
    write_network(directory, len(vocab), eos_token_id=len(vocab) - 4)


@layout
def special_tokens_at_the_front(directory: Path) -> None:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = fast(byte_vocabulary(special=names), eos_token="<|endoftext|>")
    saved(directory, tokenizer, eos_token_id=0)


@layout
def an_end_of_text_beyond_the_embeddings(directory: Path) -> None:
    """As german-gpt2: the vocabulary lacks `<|endoftext|>`, so the tokenizer adds it where the model has nothing."""
    write_vocab(directory, last=False)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())), eos_token_id=5)


@layout
def ids_that_are_not_in_the_order_of_the_merges(directory: Path) -> None:
    write_vocab(directory)
    vocab = json.loads((directory / "vocab.json").read_text())
    words = [token for token in vocab if len(token) > 1 and token != "<|endoftext|>"]
    for token, id_ in zip(words, reversed([vocab[token] for token in words]), strict=True):
        vocab[token] = id_
    (directory / "vocab.json").write_text(json.dumps(vocab))
    write_network(directory, len(vocab))


@layout
def a_token_that_no_merge_makes(directory: Path) -> None:
    write_vocab(directory)
    vocab = json.loads((directory / "vocab.json").read_text())
    vocab |= {"hello": len(vocab), "Ġworld": len(vocab) + 1}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    write_network(directory, len(vocab))


@layout
def merges_that_reach_a_token_by_another_way(directory: Path) -> None:
    """`abc` is made of `ab` and `c`, but its bytes alone become `a` and `bc`, whose merge comes first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id_ for id_, token in enumerate([*alphabet, "bc", "ab", "abc", "<|endoftext|>"])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\nb c\na b\nab c\n")
    write_network(directory, len(vocab))


@layout
def bytes_that_the_vocabulary_lacks(directory: Path) -> None:
    write_vocab(directory, alphabet=False, size=200)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())))


@layout
def a_bos_token_that_is_added(directory: Path) -> None:
    write_vocab(directory)
    write_config(directory, tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())))


@layout
def bos_and_eos_tokens_that_are_added(directory: Path) -> None:
    write_vocab(directory)
    write_config(directory, tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_eos_token=True)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())))


@layout
def a_prefix_space(directory: Path) -> None:
    write_vocab(directory)
    write_config(directory, tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())))


@layout
def special_tokens_that_are_split(directory: Path) -> None:
    write_vocab(directory)
    write_config(directory, tokenizer_class="GPT2Tokenizer", split_special_tokens=True)
    write_network(directory, len(json.loads((directory / "vocab.json").read_text())))


@layout
def an_end_of_its_own(directory: Path) -> None:
    tokenizer = gpt2(directory)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    saved(directory, tokenizer)


def _with_added(name: str, *tokens: Any) -> None:
    def write(directory: Path) -> None:
        tokenizer = gpt2(directory)
        tokenizer.add_tokens(list(tokens))
        saved(directory, tokenizer)

    LAYOUTS[name] = write


_with_added("an added token that strips on its left", AddedToken("<mask>", lstrip=True, special=True))
_with_added("an added token that strips on its right", AddedToken("<mask>", rstrip=True, special=True))
_with_added("an added token that is a whole word", AddedToken("he", single_word=True))
_with_added("added tokens of which one begins another", "hello", "hello world", "he")
_with_added("added tokens that overlap", "sea is", "is calm")
_with_added("added tokens with spaces and Chinese", " the", "今天", "天气", "é", "  ")
_with_added("an added token that is a byte's letter", "é", "Ġ")
_with_added(
    "added tokens that are special and that are not", AddedToken("<s>", special=True), "</s>", AddedToken("<unk>")
)
_with_added("a hundred added tokens", *[f"<extra_{i}>" for i in range(100)])


def _of_json(name: str, **options: Any) -> None:
    """A tokenizer.json that transformers is to take as it is."""
    parts = {key: options.pop(key) for key in ("normalizer", "pre_tokenizer", "post_processor") if key in options}

    def write(directory: Path) -> None:
        tokenizer = byte_vocabulary()
        for key, part in parts.items():
            setattr(tokenizer, key, part)
        saved(directory, fast(tokenizer, **{"eos_token": "<|endoftext|>", **options}))

    LAYOUTS[name] = write


_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
_of_json("tokenizer json taken as it is")
_of_json("NFKC", normalizer=normalizers.NFKC())
_of_json("lower case", normalizer=normalizers.Lowercase())
_of_json("NFD without accents", normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]))
_of_json("white space before bytes", pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), _bytes]))
_of_json("digits one by one", pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes]))
_of_json("punctuation apart", pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), _bytes]))
_of_json(
    "bytes without GPT-2's pattern", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
)
_of_json("bytes with a prefix space", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
_of_json(
    "a template that puts a bos before the text",
    post_processor=processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
)
_of_json("more special tokens", additional_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="[PAD]")
_of_json("no end at all", eos_token=None)


@layout
def GPT2_class_over_a_json_with_a_normalizer(directory: Path) -> None:
    """transformers 5 puts GPT2Tokenizer together from the vocabulary, and leaves the normalizer out."""
    tokenizer = byte_vocabulary()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(directory / "tokenizer.json"))
    write_config(directory, tokenizer_class="GPT2TokenizerFast")
    write_network(directory, tokenizer.get_vocab_size())


@layout
def old_merges_in_one_string(directory: Path) -> None:
    whole = json.loads(byte_vocabulary().to_str())
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    write_network(directory, len(whole["model"]["vocab"]))


# === Other vocabularies ===


@layout
def BPE_with_metaspace(directory: Path) -> None:
    """As KoGPT2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>", "<pad>", "<mask>"])
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    saved(directory, fast(tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"))


@layout
def BPE_with_byte_fallback(directory: Path) -> None:
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocab = {token: id_ for id_, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, "▁", "h", "e", "▁h", "▁he"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "h"), ("▁h", "e")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    saved(directory, fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


@layout
def BPE_with_an_end_of_word(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    saved(directory, fast(tokenizer, eos_token="</s>", unk_token="<unk>"))


@layout
def words(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
    saved(directory, fast(tokenizer, eos_token="</s>", unk_token="<unk>"))


def _bert_vocabulary(directory: Path) -> int:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ENGLISH, *CHINESE, *MARKS]
    pieces = list(dict.fromkeys([*pieces, *"abcdefghijklmnopqrstuvwxyz0123456789", *[f"##{c}" for c in "abcxyz"]]))
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    return len(pieces)


def _of_bert(name: str, **options: Any) -> None:
    def write(directory: Path) -> None:
        size = _bert_vocabulary(directory)
        write_config(directory, tokenizer_class="BertTokenizer", **options)
        write_network(directory, size)

    LAYOUTS[name] = write


_of_bert("WordPiece")
_of_bert("WordPiece of two cases", do_lower_case=False)
_of_bert("WordPiece without Chinese characters apart", tokenize_chinese_chars=False, strip_accents=False)
_of_bert("WordPiece cleaned up", clean_up_tokenization_spaces=True)
_of_bert("WordPiece with an end of its own", eos_token="[EOS]", additional_special_tokens=["<custom>"])


@layout
def WordPiece_saved_by_transformers(directory: Path) -> None:
    source = directory / "source"
    source.mkdir()
    _bert_vocabulary(source)
    tokenizer = BertTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<custom>"])
    saved(directory, tokenizer)


def _spiece(directory: Path, **options: Any) -> int:
    chance = Random(1)
    lines = [" ".join(chance.choices([*WORDS, *JAPANESE], k=8)) for _ in range(500)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=120, hard_vocab_limit=False, minloglevel=2,
        **options,
    )  # fmt: skip
    (directory / "spiece.model").write_bytes(trained.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).get_piece_size())


def _of_t5(name: str, *, pieces: dict[str, Any] | None = None, **options: Any) -> None:
    def write(directory: Path) -> None:
        size = _spiece(directory, **(pieces or {}))
        write_config(directory, tokenizer_class="T5Tokenizer", **options)
        write_network(directory, size + options.get("extra_ids", 100))

    LAYOUTS[name] = write


_of_t5("unigram", extra_ids=0)  # as rinna's
_of_t5(
    "unigram with named tokens", extra_ids=0, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", cls_token="[CLS]"
)
_of_t5("unigram with sentinels")
_of_t5("unigram with symbols of the user", pieces={"user_defined_symbols": ["<custom>", "hello"]}, extra_ids=0)


@layout
def unigram_in_json(directory: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    saved(directory, fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


# === Networks ===


def _network(name: str, change: Callable[[Path, dict[str, Any]], None] | None = None, **config: Any) -> None:
    """change: is given the directory and the tensors by name, which it may write otherwise."""

    def write(directory: Path) -> None:
        plain(directory, **config)
        if change is not None:
            change(directory, load_file(directory / "model.safetensors"))

    LAYOUTS[name] = write


def _renamed(rename: Callable[[str], str]) -> Callable[[Path, dict[str, Any]], None]:
    def change(directory: Path, tensors: dict[str, Any]) -> None:
        save_file({rename(name): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")

    return change


def _own_head(directory: Path, tensors: dict[str, Any]) -> None:
    head = torch.randn(tensors["transformer.wte.weight"].shape)
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})


def _head_alone(directory: Path, tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _saved_as_model(directory: Path, tensors: dict[str, Any]) -> None:
    save_model(
        GPT2LMHeadModel.from_pretrained(directory), str(directory / "model.safetensors"), metadata={"format": "pt"}
    )


def _silent(directory: Path, tensors: dict[str, Any]) -> None:
    """A config.json that says nothing about whether the head is tied."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    write_config(directory, "config.json", **config)
    _own_head(directory, tensors)


def _buffers(directory: Path, tensors: dict[str, Any]) -> None:
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**tensors, **mask}, directory / "model.safetensors", metadata={"format": "pt"})


def _half(directory: Path, tensors: dict[str, Any]) -> None:
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, directory / "model.safetensors", metadata={"format": "pt"})


_network("a head of its own", tie_word_embeddings=False)
_network("a head that differs though it is tied", _own_head)
_network("a head that differs and nothing is said", _silent)
_network("tied weights under the head's name", _head_alone)
_network("tied weights as safetensors saves a model", _saved_as_model)
_network("no prefix", _renamed(lambda name: name.removeprefix("transformer.")))
_network("buffers of old versions", _buffers)
_network("attention scaled by layer", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)
_network("relu and a narrow mlp", activation_function="relu", n_inner=48)
_network(
    "half precision",
    lambda d, t: save_file({n: w.half() for n, w in t.items()}, d / "model.safetensors", {"format": "pt"}),
)
_network("several ends", eos_token_id=[0, 1])


@layout
def shards(directory: Path) -> None:
    write_vocab(directory)
    network = write_network(directory, len(json.loads((directory / "vocab.json").read_text())), save=False)
    network.save_pretrained(directory, max_shard_size="60KB")
