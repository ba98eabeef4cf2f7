"""Tiny models with random weights, and tokenizers trained here: what tests use in place of a hub.

`family(name)` gives a model of each supported family; `save_bart` and `save_t5` write whole model
directories, with tokenizer and generation settings, as a user would have them.
"""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 99
FAMILIES = (
    "bart",
    "pegasus",
    "pegasus_x",
    "mbart",
    "marian",
    "m2m_100",
    "t5",
    "mt5",
    "flan_t5",
    "longt5",
    "longt5_global",
    "bigbird_pegasus",
    "bigbird_pegasus_sparse",
    "led",
    "prophetnet",
    "fsmt",
    "bert2bert",
    "bert2bert_projected",
    "roberta2gpt2",
)
WITHOUT_INTERFACE = ("led", "prophetnet", "fsmt")

CORPUS = (
    "Jazz musicians met in the old harbour and played music until the morning came.",
    "The opera house opened its season with a long evening of classical music and dance.",
    "Farmers in the valley fear a dry summer, for the river carries little water this year.",
    "A new climate policy asks the city to plant trees along every street and square.",
    "The football club won the final match after extra time and a penalty shoot-out.",
    "Researchers measured the temperature of the sea and found warmer water than ever before.",
    "The government signed a treaty on trade, taxes and the price of grain.",
    "Doctors warn of a winter with many infections and ask the elderly to be vaccinated.",
)


def _bart_like(config: type, **more: object) -> hf.PretrainedConfig:
    return config(
        vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=160,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        init_std=0.4, **more,
    )  # fmt: skip


def _t5_like(config: type, **more: object) -> hf.PretrainedConfig:
    # heads x d_kv is not d_model, as in T5's small and 3b sizes; encoder and decoder differ in depth
    return config(
        vocab_size=VOCAB, d_model=16, d_kv=6, num_heads=4, num_layers=3, num_decoder_layers=2, d_ff=24,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, initializer_factor=1.0, **more,
    )  # fmt: skip


def _bert(width: int = 16, **more: object) -> hf.BertConfig:
    return hf.BertConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=160, initializer_range=0.4, pad_token_id=1, **more,
    )  # fmt: skip


def _encoder_decoder(encoder: PreTrainedModel, decoder: PreTrainedModel) -> PreTrainedModel:
    model = hf.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.update({"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2})
    model.generation_config.update(pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    return model


def _decoder_bert(**more: object) -> hf.BertLMHeadModel:
    return hf.BertLMHeadModel(_bert(is_decoder=True, add_cross_attention=True, **more))


def _build(name: str) -> PreTrainedModel:
    match name:
        case "bart":
            return hf.BartForConditionalGeneration(_bart_like(hf.BartConfig))
        case "pegasus":
            return hf.PegasusForConditionalGeneration(_bart_like(hf.PegasusConfig, scale_embedding=True))
        case "pegasus_x":
            return hf.PegasusXForConditionalGeneration(
                _bart_like(hf.PegasusXConfig, block_size=8, num_global_tokens=4, scale_embedding=True)
            )
        case "mbart":
            return hf.MBartForConditionalGeneration(_bart_like(hf.MBartConfig))
        case "marian":
            return hf.MarianMTModel(_bart_like(hf.MarianConfig, decoder_vocab_size=VOCAB))
        case "m2m_100":
            return hf.M2M100ForConditionalGeneration(_bart_like(hf.M2M100Config))
        case "t5":
            return hf.T5ForConditionalGeneration(_t5_like(hf.T5Config))
        case "mt5":
            return hf.MT5ForConditionalGeneration(_t5_like(hf.MT5Config))
        case "flan_t5":
            gated = _t5_like(hf.T5Config, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            return hf.T5ForConditionalGeneration(gated)
        case "longt5":
            return hf.LongT5ForConditionalGeneration(_t5_like(hf.LongT5Config, local_radius=5))
        case "longt5_global":
            config = _t5_like(
                hf.LongT5Config,
                local_radius=5,
                global_block_size=4,
                encoder_attention_type="transient-global",
            )
            return hf.LongT5ForConditionalGeneration(config)
        case "bigbird_pegasus":
            config = _bart_like(hf.BigBirdPegasusConfig, attention_type="original_full", block_size=4)
            return hf.BigBirdPegasusForConditionalGeneration(config)
        case "bigbird_pegasus_sparse":
            config = _bart_like(
                hf.BigBirdPegasusConfig, attention_type="block_sparse", block_size=2, num_random_blocks=1
            )
            return hf.BigBirdPegasusForConditionalGeneration(config)
        case "led":
            config = _bart_like(hf.LEDConfig, attention_window=4, max_encoder_position_embeddings=160)
            return hf.LEDForConditionalGeneration(config)
        case "prophetnet":  # with a cache its positions are right only if the pad is id 0
            config = hf.ProphetNetConfig(
                vocab_size=VOCAB, hidden_size=16, encoder_ffn_dim=24, decoder_ffn_dim=24,
                num_encoder_layers=2,
                num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
                max_position_embeddings=160, pad_token_id=0, bos_token_id=1, eos_token_id=2, init_std=0.4,
                decoder_start_token_id=2,
            )  # fmt: skip
            return hf.ProphetNetForConditionalGeneration(config)
        case "fsmt":
            config = hf.FSMTConfig(
                langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, d_model=16, encoder_layers=2,
                decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
                decoder_ffn_dim=24, max_position_embeddings=160, pad_token_id=1, bos_token_id=0,
                eos_token_id=2, decoder_start_token_id=2, init_std=0.4, forced_eos_token_id=None,
            )  # fmt: skip
            return hf.FSMTForConditionalGeneration(config)
        case "bert2bert":
            return _encoder_decoder(hf.BertModel(_bert(), add_pooling_layer=False), _decoder_bert())
        case "bert2bert_projected":
            encoder = hf.BertModel(_bert(24), add_pooling_layer=False)
            return _encoder_decoder(encoder, _decoder_bert())
        case "roberta2gpt2":
            roberta = hf.RobertaConfig(**{**_bert().to_dict(), "model_type": "roberta"})
            gpt2 = hf.GPT2Config(
                vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=160, add_cross_attention=True,
                is_decoder=True, initializer_range=0.4, bos_token_id=0, eos_token_id=2,
            )  # fmt: skip
            encoder = hf.RobertaModel(roberta, add_pooling_layer=False)
            return _encoder_decoder(encoder, hf.GPT2LMHeadModel(gpt2))
    raise KeyError(name)


def family(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, in eval mode, whose outputs differ from position to position."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build(name).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zero at initialisation, which would hide a forgotten bias
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A BART-like byte-level BPE tokenizer, in which " music" and "music" are different tokens."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([*CORPUS, "music", "Music"], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=160,
    )  # fmt: skip


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """A T5-like Unigram tokenizer with SentencePiece's word mark."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=160
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT-like WordPiece tokenizer."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=specials, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=160,
    )  # fmt: skip


def bart_with_tokenizer() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny BART as wide as its byte-level vocabulary."""
    tokenizer = byte_level_tokenizer()
    config = _bart_like(hf.BartConfig)
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.BartForConditionalGeneration(config).eval(), tokenizer


def t5_with_tokenizer() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny T5 as wide as its Unigram vocabulary."""
    tokenizer = unigram_tokenizer()
    config = _t5_like(hf.T5Config)
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.T5ForConditionalGeneration(config).eval(), tokenizer


def save_bart(folder: Path) -> Path:
    """Write a tiny BART's whole model directory."""
    model, tokenizer = bart_with_tokenizer()
    return _save(folder, model, tokenizer)


def save_t5(folder: Path) -> Path:
    """Write a tiny T5's whole model directory."""
    model, tokenizer = t5_with_tokenizer()
    return _save(folder, model, tokenizer)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.generation_config.update(num_beams=2, max_new_tokens=12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
